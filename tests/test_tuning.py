"The tuning room: hands that slip, files of strangers, processes that die, and the page in a real browser."
import io, json, math, os, signal, subprocess, sys, threading, time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from conftest import trouble
from opensora_nb.cluster.files import UserError
from opensora_nb.data.room import browser, can_look, served, write_page
from opensora_nb.data.world import caption, render, world_truth
from opensora_nb.inference.gallery import Gallery, Wish, distance
from opensora_nb.inference.sweeps import KNOBS, Axis, Cell, chart, flicker, grid, measure
from opensora_nb.inference.tuning_room import TuningRoom, guest_of, map_of, neighbours, open_workshop

HOSTILE = '<img src=x onerror="window.pwned=1">'
SMALL = Wish(steps=4, num_frames=8, text=3.0, image=2.0)
needs_browser = pytest.mark.skipif(not can_look(), reason="no Chromium, playwright or Voila")

def until(what, seconds=120):
    end = time.monotonic() + seconds
    while not (found := what()): assert time.monotonic() < end, "waited too long"; time.sleep(0.02)
    return found

def left(folder: Path, a: Wish = SMALL, b: Wish = replace(SMALL, motion_score=7.0)) -> Path:
    "A folder as a room with these settings leaves it."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "room.json").write_text(json.dumps(dict(A=asdict(a), B=asdict(b), now="A")))
    return folder

# ---- arithmetic

def test_neighbours_are_a_notch_or_two_away_and_on_the_sliders():
    for wish in (SMALL, replace(SMALL, motion_score=0.0, text=0.0, image=0.0), replace(SMALL, motion_score=8.0, text=15.0)):
        made = neighbours(wish)
        assert len(set(made)) == len(made) >= 5 and all(1 <= distance(wish, n) <= 2 for n in made) and distance(wish, made[0]) == 1
        assert all(KNOBS[k].low <= getattr(n, k) <= KNOBS[k].high for n in made for k in ("motion_score", "text", "image")) and all(Wish.of(asdict(n)) == n for n in made)

def test_a_guest_is_known_by_address_then_by_cookie_and_else_is_new():
    assert guest_of(dict(QUERY_STRING="token=x&guest=ann", HTTP_COOKIE="a=b; os_guest=bob; c=d")) == "ann"
    assert guest_of(dict(QUERY_STRING="guest=../etc", HTTP_COOKIE="a=b; os_guest=bob")) == "bob" and guest_of(dict(HTTP_COOKIE="xos_guest=bob")) != "bob"
    assert guest_of({}) != guest_of({})

def test_the_map_has_a_place_for_each_step_and_frame_that_can_be_picked():
    for picture, rows in ((None, 1), ("a.png", 5)):
        drawn = map_of(replace(SMALL, picture=picture), 12, 5, 11, 4)
        assert drawn.count("data-xray") == 12 * (rows + 1) and ("image x 2.00" in drawn) == (picture is not None)

def test_flicker_rises_with_its_strength_and_not_with_light_or_grain():
    rng, film = np.random.default_rng(0), render(replace(world_truth(3, 5), camera="static"), 64, 24)
    swing = (-1.0) ** np.arange(24)[:, None, None, None]
    found = [flicker(np.clip(film + k * swing, 0, 255).astype(np.uint8)) for k in (0, 2, 4, 8)]
    assert all(b > a + 1 for a, b in zip(found, found[1:])), found
    ramp = np.clip(film + np.linspace(0, 40, 24)[:, None, None, None], 0, 255).astype(np.uint8)
    grain = np.clip(film + rng.normal(0, 5, film.shape), 0, 255).astype(np.uint8)
    assert flicker(ramp) < found[0] + 0.5 and flicker(grain) < found[0] + 0.5
    assert all(v is None or math.isfinite(v) for v in measure(film[:2], film[0]).values())

# ---- the room, without a browser

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("tuning")
    with open_workshop(home): yield home

@pytest.fixture()
def room(home, request):
    guest = f"guest-{abs(hash(request.node.name)) % 10**8}"
    left(home / "guests" / guest)
    room = TuningRoom(home, guest)
    room.live.value = False
    assert room.settle()
    yield room
    room.close()

def upload(room, name, data):
    room.upload.value = (dict(name=name, type="", size=len(data), content=memoryview(data), last_modified=datetime.now(timezone.utc)),)
    assert room._uploads.settle(60)
    return room.status.value

def as_bytes(image, kind, **how):
    file = io.BytesIO(); image.save(file, kind, **how)
    return file.getvalue()

@pytest.mark.slow
def test_uploads_that_are_no_picture_are_a_line_and_change_nothing(room):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    before = room.side.wish
    for name, data, why in (("words.png", b"no picture", "not used"), (f"{HOSTILE}.png", b"<svg onload='x'>", "not used"), ("empty.jpg", b"", "not used"), ("cut.png", as_bytes(noise, "PNG")[:400], "not used"),
                            ("huge.png", as_bytes(Image.new("1", (10_000, 10_000)), "PNG"), "10000 x 10000"), ("moves.webp", as_bytes(noise, "WEBP", save_all=True, append_images=[noise.rotate(90)]), "animation"),
                            ("strip.png", as_bytes(Image.new("RGB", (900, 20)), "PNG"), "900 x 20"), ("words.mp4", b"no film", "not used"),
                            ("moves.gif", as_bytes(noise, "GIF", save_all=True, append_images=[noise.rotate(90)]), "not a still picture")):
        said = upload(room, name, data)
        assert "os-bad" in said and why in said and "<img" not in said and said.count("\n") == 0 and "/tmp" not in said, (name, said)
        assert room.side.wish == before
    for name, data in (("cmyk.jpg", as_bytes(noise.convert("CMYK"), "JPEG")), ("grey.png", as_bytes(noise.convert("L"), "PNG")), ("large.jpg", as_bytes(noise.resize((4000, 3000)), "JPEG"))):
        said = upload(room, name, data)
        assert "os-bad" not in said and room.side.wish.picture != before.picture, (name, said)
        assert max(Image.open(room.gallery.picture(room.side.wish.picture)).size) <= 1440
        before = room.side.wish
    room.refused.value = "big.tif|9000000|1"; assert "9.0 MB" in room.status.value and room.side.wish == before

@pytest.mark.slow
def test_a_drag_leaves_one_job_and_one_clip_and_words_stay_words(room):
    room.live.value = True
    jobs = []
    room.goes.observe(lambda change: jobs.append(len(room._jobs)), "value")
    room.controls["prompt"].value = f"a red circle {HOSTILE}"
    for k in range(81): room.controls["motion_score"].value = round(0.1 * k / 0.5) * 0.5
    room.controls["motion_score"].value = 3.0
    assert room.settle(120) and max(jobs) <= 1, jobs
    assert 1 <= len(room.gallery.list()) <= 2 and room.side.kept.wish.motion_score == 3.0 and not room.side.notches
    def html_of(widget): return [widget.value] if type(widget).__name__ == "HTML" else [page for child in getattr(widget, "children", ()) for page in html_of(child)]
    until(lambda: "1 clip" in room.pages.value or "2 clips" in room.pages.value)
    assert all("<img src=x" not in page for page in html_of(room.ui)) and any("&lt;img src=x" in page for page in html_of(room.ui))

@pytest.mark.slow
def test_settling_waits_for_the_screen_of_a_clip_that_began_and_ended_meanwhile(tmp_path):
    room = TuningRoom(left(tmp_path)); assert room._looks.settle(); ask, look = room._asks.work, room._looks.work
    room._asks.work, room._looks.work = lambda value: (time.sleep(4), ask(value)), lambda value: (time.sleep(6), look(value))       # the clip, of four steps, takes less
    room.live.value = False; room._ask("A"); room._asks.put()
    assert room.settle(120) and room.side.kept is not None and room.side.notches == 0
    room.close()

@pytest.mark.slow
def test_a_slider_shows_what_is_there_at_once_and_idle_rooms_make_neighbours(room):
    room.live.value = True
    room._ask("A"); assert room.settle(120)
    near = until(lambda: [k for k in room.home.near.list() if distance(k.wish, room.side.wish) <= 2], 120)
    room.controls["motion_score"].value = near[-1].wish.motion_score
    until(lambda: room.sides["A"].kept and room.sides["A"].kept.wish.motion_score == near[-1].wish.motion_score and not room.sides["A"].notches)
    assert not room._jobs and 'data-state="exact"' in room.screens["A"].value, "a clip that is there is not made"
    def rest(): made = len(room.home.near.list()); time.sleep(4); return len(room.home.near.list()) == made
    room.tabs.value = "xray"; until(lambda: rest() and rest(), 120); made = len(room.home.near.list())      # looks into steps have the model to themselves
    room.tabs.value = "history"; until(lambda: len(room.home.near.list()) > made, 120)
    room.live.value = False; room.controls["text"].value = 5.0
    until(lambda: 'data-state="nearest"' in room.screens["A"].value); assert "text guidance" in room.screens["A"].value

@pytest.mark.slow
def test_two_visitors_get_their_own_clips_and_wait_for_nobody(home):
    rooms = [TuningRoom(left(home / "guests" / name).parent.parent, name) for name in ("ann", "bob")]
    for k, room in enumerate(rooms): room.live.value = False; assert room.settle(); room._set(seed=k, steps=30)
    for room in rooms: room._ask("A")
    until(lambda: all(any(job[2] for job in room._jobs.values()) for room in rooms), 120)
    for k, room in enumerate(rooms): assert room.settle(120) and [c.wish.seed for c in room.gallery.list()] == [k]
    rooms[0]._set(steps=60); rooms[0]._ask("A"); until(lambda: any(job[2] for job in rooms[0]._jobs.values()))
    rooms[1]._cancel(); assert rooms[0]._jobs, "a neighbour's cancel is a neighbour's"
    rooms[0].close()                                                          # a tab that is closed in the middle: the clip is finished and kept
    until(lambda: len(Gallery(home).guest("ann").list()) == 2, 120); rooms[1].close()

@pytest.mark.slow
def test_sweeps_fill_their_grid_stop_and_leave_the_room_usable(room):
    first, second = room.axes
    first[3].value = 2; second[0].value, second[1].value, second[2].value = "steps", 3.0, 4.0
    room.run.click(); until(lambda: room._sweep and not room._sweeping, 120)
    assert [(c.wish.motion_score, c.wish.steps) for c in room._sweep] == [(1, 3), (1, 4), (7, 3), (7, 4)] and all(c.kept and c.measures["motion"] is not None for c in room._sweep), room.status.value
    assert room.plot.value.count("<circle") == 8 and all("<video" in box.children[0].value for box in room.cells.children) and "4 of 4" in room.swept.value
    room.cells.children[2].children[1].click(); assert room.side.wish == room._sweep[2].wish, "a click reloads the settings"
    first[1].value, first[2].value = 5.0, 1.0; room.run.click(); assert "no range" in room.status.value
    second[0].value = ""; first[0].value, first[1].value, first[2].value, first[3].value = "steps", 40.0, 60.0, 3
    room.run.click(); room.run.click(); assert "under way" in room.status.value
    time.sleep(0.5); room._set(seed=5, steps=3); room._ask("A"); until(lambda: room.gallery.find(room.side.wish), 120)
    assert room._sweeping, "the room's own clip goes first"
    room.halt.click(); until(lambda: not room._sweeping, 120); assert "stopped" in room.swept.value

@pytest.mark.slow
def test_a_workshop_that_is_killed_in_the_middle_is_replaced_and_nothing_is_lost(tmp_path):
    room = TuningRoom(left(tmp_path)); room.live.value = False; assert room.settle(120), room.status.value
    room._ask("A"); assert room.settle(120) and len(room.gallery.list()) == 1
    pid = json.loads((tmp_path / "workshop/door.json").read_text())["pid"]
    room._set(steps=60); room._ask("A"); until(lambda: any(job[2] for job in room._jobs.values()))
    os.kill(pid, signal.SIGKILL)
    until(lambda: "ended in the middle" in room.status.value); assert not room._jobs
    room._set(steps=3); room._ask("A")
    until(lambda: len(room.gallery.list()) == 2, 120); assert room.settle() and room.side.kept.wish.steps == 3
    os.kill(json.loads((tmp_path / "workshop/door.json").read_text())["pid"], signal.SIGTERM)
    room.close()

def test_weights_that_cannot_be_loaded_are_a_line(tmp_path):
    with pytest.raises(UserError, match="no weights at .*none.safetensors"):
        with open_workshop(tmp_path, dict(mmdit=str(tmp_path / "none.safetensors"))): pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"): TuningRoom(tmp_path / "file")

def test_broken_settings_of_yesterday_are_the_defaults_of_today(tmp_path):
    for text in ("{", "[]", '{"A": {"steps": "many"}}', '{"A": null}'):
        (tmp_path / "room.json").write_text(text)
        with open_full(tmp_path) as room: assert room.sides["A"].wish == Wish()

class open_full:
    "A room that finds a workshop's lock taken, so that it waits for one and starts none."
    def __init__(self, folder): self.folder = folder
    def __enter__(self):
        import fcntl
        (self.folder / "workshop").mkdir(exist_ok=True); self.held = open(self.folder / "workshop/held", "w"); fcntl.flock(self.held, fcntl.LOCK_EX)
        self.room = TuningRoom(self.folder)
        return self.room
    def __exit__(self, *_): self.room.close(); self.held.close()

@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path):
    code = f"""
import json, resource, signal
from dataclasses import asdict
from opensora_nb.inference.gallery import Gallery, Wish, clip_maker
from opensora_nb.inference.pipelines import AnyToVideo
from opensora_nb.inference.workshop import Desk, Turns
heard, gallery = [], Gallery({str(tmp_path)!r})
desk = Desk(clip_maker(AnyToVideo.from_pretrained(), gallery), Turns(), heard.append)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
wish = Wish(steps=3, num_frames=8)
desk.ask(dict(wish=asdict(wish))); assert desk.idle.wait(120); print(heard[-1]["event"], heard[-1]["why"])
resource.setrlimit(resource.RLIMIT_FSIZE, (10**8, resource.RLIM_INFINITY))
print(len(gallery.list()), [p.name for p in (gallery.folder / "clips").iterdir()])
desk.ask(dict(wish=asdict(wish))); assert desk.idle.wait(120); print(heard[-1]["event"], len(gallery.list()))
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = made.stdout.splitlines()
    assert said and said[0].startswith("failed the clip is made, but could not be kept: File too large; make room") and said[1] == "0 []" and said[2] == "done 1", made

# ---- the page

STATE = "n => document.querySelector(`[data-side=${n}]`)?.dataset.state"
PLAYS = "n => { const v = document.querySelector(`[data-side=${n}] video`); return v && v.readyState >= 2 && !v.paused }"

def drag(page, knob: str, to: float, moves: int = 40) -> None:
    "The handle of a slider, to a share of its track and about it on the way."
    handle, track = (page.locator(f".os-knob-{knob} .noUi-{part}").bounding_box() for part in ("handle", "base"))
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2); page.mouse.down()
    for k in range(moves): page.mouse.move(track["x"] + track["width"] * (0.5 + 0.45 * math.sin(k / 3)), track["y"] + 2)
    page.mouse.move(track["x"] + track["width"] * to, track["y"] + 2); page.mouse.up()

def shown(page, name: str, state: str = "exact", seconds: int = 90) -> None:
    page.wait_for_function(f"({STATE})('{name}') == '{state}'" + (f" && ({PLAYS})('{name}')" if state == "exact" else ""), timeout=1000 * seconds)

def after(page, act, more: int = 1) -> None:
    "What `act` asks for, on the screen: this many clips more, and no work. The state alone says nothing before the page has heard of the act."
    clips = int(page.locator("[data-clips]").get_attribute("data-clips")); act()
    page.wait_for_function(f"Number(document.querySelector('[data-clips]').dataset.clips) >= {clips + more} && document.querySelector('[data-jobs]').dataset.jobs == '0'", timeout=120_000); shown(page, "A")

SERVE = """
import sys; from pathlib import Path; from opensora_nb.commands.serve import *
serve_rooms(Rooms(folder=Path(sys.argv[1]), sets=tuple(sys.argv[3:]), answers=Path(sys.argv[1]) / 'answers.jsonl', port=int(sys.argv[2]), token='let-me-in', browser=False))
"""

@pytest.mark.slow
@needs_browser
def test_the_served_rooms_in_a_browser(tmp_path):
    home, clips, refused, elsewhere = tmp_path / "home", tmp_path / "clips", [], []
    left(home / "guests" / "ann", replace(SMALL, steps=8), replace(SMALL, motion_score=7.0))
    for name in ("ours", "other"): Gallery(clips / name).keep(render(world_truth(1, 2), 64, 8), SMALL, dict(prompt="x"), 0.1)
    with served(lambda port: [sys.executable, "-c", SERVE, str(home), str(port), *(f"{n}={clips / n / 'clips'}" for n in ("ours", "other"))], tmp_path / "voila.log", "/voila/static/voila.js", 180) as address, browser(1280, 900) as (page, complaints):
        page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
        page.goto(f"{address}/voila/render/Tuning%20room.ipynb"); assert "/login" in page.url, "not without the token"
        page.on("request", lambda asked: elsewhere.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None)
        page.goto(f"{address}/?token=let-me-in"); assert page.evaluate("[...document.querySelectorAll('a b')].map(e => e.innerText)") == ["Tuning room", "Preference test"], "no footage, no explorer"
        page.get_by_role("link", name="Preference test").click(); page.wait_for_selector(".os-who input", timeout=120_000)
        page.goto(f"{address}/voila/render/Tuning%20room.ipynb?guest=ann", wait_until="commit", timeout=120_000)
        shown(page, "A", "none"); boxes = page.evaluate("[...document.querySelectorAll('.os-side, .os-make, .os-tabs, .os-knobs')].map(e => JSON.stringify(e.getBoundingClientRect()))")
        page.evaluate("window.states = []; new MutationObserver(() => window.states.push(document.querySelector('[data-side=A]')?.dataset.state)).observe(document.querySelector('.os-stage'), {subtree: true, childList: true})")
        page.get_by_role("button", name="Generate").press("Enter")                               # by keyboard
        shown(page, "A"); assert "preview" in page.evaluate("window.states")
        page.get_by_role("button", name="Tune B").click(); page.get_by_role("button", name="Generate").click(); shown(page, "B")
        page.wait_for_timeout(700)
        page.wait_for_function("(v => { const d = Math.abs(v[0].currentTime - v[1].currentTime); return v.length == 2 && (d < 0.1 || Math.abs(v[0].duration - d) < 0.1) })([...document.querySelectorAll('.os-side video')])")      # two clips, in step
        assert page.evaluate("[...document.querySelectorAll('.os-side, .os-make, .os-tabs, .os-knobs')].map(e => JSON.stringify(e.getBoundingClientRect()))") == boxes, "nothing moved while clips came"
        page.evaluate("window.most = 0; new MutationObserver(() => window.most = Math.max(window.most, Number(document.querySelector('[data-jobs]')?.dataset.jobs ?? 0))).observe(document.querySelector('.os-stage'), {subtree: true, childList: true, attributes: true})")
        page.get_by_role("button", name="Tune A").click(); after(page, lambda: drag(page, "motion_score", 0.75)); assert page.evaluate("window.most") <= 1, "a fast drag leaves at most one job"
        drag(page, "steps", 1.0, 3); page.wait_for_function("document.querySelector('[data-jobs]').dataset.jobs == '1'", timeout=120_000)       # sixty steps, and not all of them
        page.wait_for_function("Number(document.querySelector('.os-goes [role=progressbar]')?.ariaValueNow) >= 1", timeout=120_000)
        page.get_by_role("button", name="Cancel").click(); page.wait_for_function("document.querySelector('[data-jobs]').dataset.jobs == '0'", timeout=120_000)
        kept = Gallery(home / "guests" / "ann").list(); made = len(kept); page.wait_for_function(f"document.querySelector('[data-clips]').dataset.clips == '{made}'", timeout=120_000)
        assert made >= 3 and all(k.wish.steps < KNOBS["steps"].high for k in kept), "A, B, A dragged, perhaps some on the way; not what was cancelled"
        page.locator(".os-use:visible").last.click(); page.wait_for_function("document.querySelector('.os-side-A .os-words').innerText.includes('8 steps')", timeout=120_000); shown(page, "A")      # the first clip's settings again
        after(page, lambda: (page.locator("textarea").fill(HOSTILE), page.keyboard.press("Tab")))
        page.get_by_role("button", name="X-ray", exact=True).click(); page.locator("rect[data-xray='3,0']").last.click()
        page.wait_for_function("document.querySelector('.os-panes[data-look^=\"3,\"]')", timeout=120_000); assert page.locator(".os-panes img").count() == 5      # from words alone: no pass with the image
        page.get_by_role("button", name="Command", exact=True).click(); assert "osnb generate --prompt" in page.locator(".os-command").inner_text() and HOSTILE in page.locator(".os-command").inner_text()
        other = page.context.browser.new_context(viewport=dict(width=390, height=844)).new_page(); other.set_default_timeout(120_000); other.goto(f"{address}/voila/render/Tuning%20room.ipynb?token=let-me-in", wait_until="commit", timeout=120_000)
        shown(other, "A", "none"); assert other.locator("[data-clips]").get_attribute("data-clips") == "0", "somebody else's room is empty"
        assert other.evaluate("Math.max(...[...document.querySelectorAll('.os-room *')].filter(e => !e.closest('.os-unseen')).map(e => e.getBoundingClientRect().right))") <= 391, "nothing sticks out on a phone"
        assert other.evaluate("[...document.querySelectorAll('.os-room input:not([type=file]), .os-room textarea, .os-room select, .os-room button, .os-room .widget-slider')].filter(e => e.offsetParent && !e.closest('.os-unseen')).every(e => e.title || e.closest('[title]') || e.innerText)"), "each control says what it is"
        page.reload(wait_until="commit"); shown(page, "A"); assert HOSTILE in page.locator("textarea").input_value() and int(page.locator("[data-clips]").get_attribute("data-clips")) >= made + 1, "another kernel, the same room"
        assert page.evaluate("window.pwned === undefined && !document.querySelector('.os-room img[src=x]')"), "words are text"
        assert not complaints and not elsewhere, "\n".join(complaints + refused + elsewhere)
    log = (tmp_path / "voila.log").read_text() + (home / "workshop/log.txt").read_text()
    assert not trouble(log) and log.count("let-me-in") == 1, trouble(log) or log

@pytest.mark.soak
@needs_browser
def test_the_room_in_jupyterlab_outlives_its_kernel(home, tmp_path, monkeypatch):
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR"): monkeypatch.setenv(name, str(tmp_path / "jupyter" / name))
    (tmp_path / "work").mkdir(); left(home / "guests" / "lab")
    write_page(tmp_path / "work" / "room.ipynb", f"from opensora_nb.inference.tuning_room import TuningRoom\nTuningRoom({str(home)!r}, 'lab')")
    command = lambda port: [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root", "--IdentityProvider.token=probe", f"--ServerApp.root_dir={tmp_path / 'work'}", "--LabApp.news_url=None"]
    def run(page):
        page.wait_for_timeout(1500); page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click(); page.keyboard.press("Control+Enter")
    with served(command, tmp_path / "lab.log", "/api") as address, browser(1280, 1000) as (page, complaints):
        page.goto(f"{address}/lab/tree/room.ipynb?token=probe&reset", timeout=120_000); page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
        run(page); shown(page, "A", "none")
        page.locator(".os-knob-motion_score .noUi-handle").focus()
        for _ in range(3): page.keyboard.press("ArrowRight")
        shown(page, "A"); clip = page.locator("[data-side=A] video").get_attribute("data-clip")
        page.keyboard.press("Escape"); page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click(); page.keyboard.press("Escape"); page.keyboard.press("0"); page.keyboard.press("0")
        page.get_by_role("button", name="Restart", exact=True).or_(page.get_by_role("button", name="Confirm Kernel Restart")).first.click(timeout=120_000)
        page.wait_for_timeout(1000); run(page)
        page.wait_for_function(f"document.querySelector('[data-side=A] video')?.dataset.clip == '{clip}' && document.querySelector('.os-knob-motion_score .widget-readout').innerText == '5.5'", timeout=90_000)
        assert not complaints, complaints
        assert not (said := trouble((tmp_path / "lab.log").read_text())), said          # before the page is closed: JupyterLab complains of messages that were on their way to it
