"The explorer: its arithmetic against the pyramid's own, strangers' labels, and the room in a real browser."
import os, signal, socket, subprocess, sys, time
from dataclasses import fields, replace
from pathlib import Path
import numpy as np, polars as pl, pytest
from conftest import still, trouble
from opensora_nb.cluster.files import UserError
from opensora_nb.data.explorer import BINS, TECHNICAL, ExploreConfig, Explorer, ExplorerRoom, explore, judgeable, open_explorer, page_code, read_thresholds
from opensora_nb.data.filters import FilterConfig, technical_faults
from opensora_nb.data.manifest import manifest_frame, read_clips, read_manifest, read_release_table, write_manifest
from opensora_nb.data.pyramid import LEVELS, RULES, Level, assign_levels, check_levels, read_levels, write_levels
from opensora_nb.data.room import browser, can_look, label, media_tag, served, write_page
from opensora_nb.data.video import VideoInfo, write_video

HOSTILE = '<img src=x onerror="window.pwned=1">'
needs_browser = pytest.mark.skipif(not can_look(), reason="no Chromium, playwright or Voila")

def made(n: int, seed: int = 0, nulls: bool = True) -> pl.DataFrame:
    "A manifest of scores without files: all kinds of values, and of no value."
    rng = np.random.default_rng(seed)
    def some(values, share=0.1): return [None if nulls and rng.random() < share else v for v in values.tolist()]
    def odd(values): return [float("nan") if nulls and rng.random() < 0.03 else float("inf") if nulls and rng.random() < 0.01 else v for v in some(values)]
    image = rng.random(n) < 0.1
    height, width = rng.choice([32, 256, 512, 720], n), rng.choice([48, 256, 640, 1280], n)
    frame = dict(clip_id=[f"c{k}" for k in range(n)], path=[f"clips/{k}.mp4" if rng.random() < 0.8 else None for k in range(n)], source=["a.mp4"] * n, start_s=[0.0] * n, num_frames=np.where(image, 1, 50).tolist(),
                 duration_s=[None if i else d for i, d in zip(image, rng.uniform(2, 8, n))], fps=[None if i else f for i, f in zip(image, rng.choice([16.0, 24.0, 30.0], n))], height=height.tolist(), width=width.tolist(), aspect_ratio=(height / width).tolist(),
                 bpp=rng.uniform(0.02, 0.4, n).tolist(), profile=[None if i else p for i, p in zip(image, rng.choice(["High", "Main"], n))], score_vmafmotion=odd(rng.gamma(1.5, 3, n)), score_blur=odd(rng.lognormal(5, 1, n)), blurry=some(rng.random(n) < 0.1),
                 score_ocr=odd(np.maximum(0, rng.normal(-0.01, 0.02, n))), score_jitter=odd(rng.gamma(2, 8, n)), score_shake=odd(rng.lognormal(0, 1.2, n)), score_aesthetic=odd(rng.normal(5, 0.8, n)), status=["kept"] * n)
    return manifest_frame(pl.DataFrame(frame, strict=False))

LOOSE = FilterConfig(min_aspect=0.01, max_aspect=100, min_duration_s=0, min_bpp=0, min_fps=0)     # a ground that lets all pass

def test_counts_are_the_pyramids_whatever_is_moved():
    manifest, rng = made(1500), np.random.default_rng(1)
    explorer = Explorer(manifest, filters=LOOSE)
    for step in range(60):
        group, field = int(rng.integers(1, 3)), list(RULES)[rng.integers(len(RULES))]
        if field == "allow_blurry": value = bool(rng.random() < 0.5)
        else: value = None if rng.random() < 0.15 else float(np.round(explorer.scales[RULES[field][0]].value(rng.random() * (0.4 if field.startswith("min") else 1)), 3))
        explorer.change(group, field, value)
        assert getattr(explorer.levels[group - 1], field) == value, "the moved one wins"
        check_levels(explorer.levels)
        level = assign_levels(manifest, explorer.levels)["level"].fill_null(0).to_numpy()
        for g, layer in enumerate(explorer.layers()[1:], 1):
            assert np.array_equal(explorer.kept(g), level >= g) and layer.clips == (level >= g).sum()
    assert explorer.layers()[1].unwritten == (manifest["path"].is_null().to_numpy() & (level >= 1)).sum() > 0
    explorer.reset()
    assert explorer.levels == LEVELS and np.array_equal(explorer.kept(2), assign_levels(manifest)["level"].fill_null(0).to_numpy() >= 2)

def test_rejected_alone_means_that_the_clip_comes_back_without_the_threshold():
    explorer = Explorer(made(1200, seed=2), filters=LOOSE)
    before, lost = explorer.layers()[1].clips, explorer.rejects(1)
    assert sum(alone > 0 for _, alone in lost.values()) >= 4
    for field, (all_of_them, alone) in lost.items():
        explorer.reset(); explorer.change(1, field, True if field == "allow_blurry" else None)
        assert explorer.layers()[1].clips == before + alone and alone <= all_of_them

def test_technical_thresholds_say_what_the_filters_say():
    manifest, cfg = made(600, seed=3, nulls=False).filter(pl.col("num_frames") > 1), FilterConfig(min_side=200, max_pixels=400_000, min_duration_s=3.0, min_bpp=0.1, min_fps=20, min_aspect=0.4, max_aspect=1.5, banned_profiles=("Main",))
    explorer = Explorer(manifest, filters=cfg)
    for k, row in enumerate(manifest.iter_rows(named=True)):
        info = VideoInfo(**{f.name: row.get(f.name) for f in fields(VideoInfo)} | dict(pixel_aspect=1.0))
        words = {TECHNICAL[f][1] for f in explorer.faults_of(0, k)}
        assert words == set(technical_faults(info, cfg)) and explorer.kept(0)[k] == (not words)

def test_histograms_count_every_clip_once():
    explorer = Explorer(made(800, seed=4))
    for group in (0, 1, 2):
        for column in dict.fromkeys(c for c, _ in explorer.rules(group).values() if c not in ("blurry", "profile")):
            counts, unknown = explorer.histogram(group, column)
            assert counts.shape == (3, BINS) and counts.sum() + unknown == 800 and counts[0].sum() <= explorer.layers()[group].clips

@pytest.mark.parametrize("field, limit", [("min_motion", 2.0), ("max_shake", 3.0), ("max_text", 0.0), ("min_aesthetic", 5.0), ("min_motion", None), ("allow_blurry", False)])
def test_examples_are_the_nearest_on_both_sides(field, limit):
    explorer = Explorer(made(700, seed=5), filters=LOOSE)
    explorer.change(1, field, limit)
    good, bad = explorer.examples(1, field, 5)
    assert good and len(set(good)) == len(good) and all(explorer.kept(1)[k] for k in good) and all(field in explorer.faults_of(1, k) for k in bad)
    assert bool(bad) == (limit is not None) and all(explorer.rows["path"][k] is not None for k in (*good, *bad)), "those that can play come first"
    assert all(explorer.faults_of(1, k) == [field] for k in bad), "and those that nothing else rejects"
    if limit is not None and field != "allow_blurry":
        values = explorer.columns[RULES[field][0]]
        rest = np.flatnonzero(explorer.kept(1) & explorer.rows["path"].is_not_null().to_numpy() & np.isfinite(values))
        assert max(abs(values[good] - limit)) <= sorted(abs(values[rest] - limit))[4] + 1e-9

def test_files_that_no_one_looked_at_are_counted_apart():
    rows = [dict(clip_id="a", source="a", path="a.mp4", height=64, width=64, fps=24.0, num_frames=9, duration_s=3.0, score_vmafmotion=3.0, status="kept"),
            dict(clip_id="b", source="b", height=64, width=64, fps=12.0, num_frames=9, duration_s=3.0, status="rejected", reason="fps"),
            dict(clip_id="c", source="c", score_vmafmotion=2.0, status="rejected", reason="duplicate", duplicate_of="a"), dict(clip_id="d", source="d", status="failed", reason="broken")]
    explorer = Explorer(manifest_frame(rows))
    assert judgeable(manifest_frame(rows))["clip_id"].to_list() == ["a", "b"] and explorer.layers()[0].clips == 1 and explorer.reread() == 0
    explorer.change(0, "min_fps", 10.0)
    assert explorer.reread() == 1 and explorer.layers()[0].clips == 1

# ---- files

@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    "A curated folder of tiny clips with motion scores 0.25, 0.75, ...; strangers' labels; sources for two clips that were rejected."
    home = tmp_path_factory.mktemp("room") / "curated"
    rng, rows = np.random.default_rng(0), []
    for k in range(14):
        name = f"{HOSTILE}.mp4" if k == 3 else f"clip{k:02d}.mp4"
        frames = np.full((20, 48, 64, 3), (60 + 12 * k, 200 - 12 * k, 90), np.uint8)
        for t in range(20): frames[t, 16:32, 2 * t : 2 * t + 16] = 255 - 10 * k
        rejected = k < 2
        write_video(home.parent / "footage" / name if rejected else home / "clips" / name, frames, 10)
        rows.append(dict(clip_id=f"c{k}{HOSTILE if k == 3 else ''}", path=None if rejected else f"clips/{name}", source=name, start_s=0.0, end_s=2.0, duration_s=2.0, fps=24.0, num_frames=20, height=48, width=64, aspect_ratio=0.75, bpp=0.2, codec="h264",
                         profile=HOSTILE if k == 3 else "High", score_vmafmotion=0.25 + 0.5 * k, score_blur=100.0 + k, blurry=False, score_ocr=0.0, score_jitter=2.0, score_shake=1.0, score_aesthetic=5.0,
                         text=f"{HOSTILE}\u202e\n" + "long " * 20_000 if k % 2 else f"caption {HOSTILE}", **(dict(status="rejected", reason="still") if rejected else dict(status="kept", level=1))))
    write_manifest(rows, home / "manifest.parquet")
    write_levels((Level("256px", min_motion=1.0, max_text=0.01), Level(f"best{HOSTILE}", min_motion=2.0, max_text=0.01)), home.parent / "levels.csv")
    return home

def room_of(collection, out) -> ExplorerRoom: return explore(collection, collection.parent / "footage", collection.parent / "levels.csv", out=out)

def test_export_is_read_again_by_all_that_read_such_files(collection, tmp_path):
    explorer = room_of(collection, tmp_path).explorer
    explorer.change(1, "min_motion", 0.1); explorer.change(0, "min_fps", 17.0)
    files, count = explorer.export(1, tmp_path / "deep" / "explored")
    assert count == 12 and sorted(f.name for f in (tmp_path / "deep" / "explored").iterdir()) == ["256px.csv", "256px.json", "256px.parquet", "levels.csv"], "two pass that have no file; nothing else is left"
    clips = read_clips(files[0])
    assert clips.height == 12 and all(Path(p).samefile(collection / "clips" / Path(p).name) for p in clips["path"]) and read_manifest(files[0])["level"].max() == 2
    assert read_clips(files[1])["path"].to_list() == clips["path"].to_list() and read_release_table(files[1]).height == 12
    assert read_levels(files[2]) == explorer.levels and read_thresholds(files[3]) == (explorer.levels, explorer.filters)
    assert explore(collection, levels=files[3]).explorer.filters.min_fps == 17.0
    for path in files[:2]:                                                          # tables beside the folder of clips: a larger root
        table = open_explorer(path, root=Path(os.path.commonpath([tmp_path, collection])))[0]
        assert table.layers()[0].clips == 12 and not table.outside and all(table.clip_file(k)[0].parent == collection / "clips" for k in range(12))
        with pytest.raises(UserError, match="12 lead out"): open_explorer(path)
    with pytest.raises(UserError, match="does not lie in"): open_explorer(collection, root=tmp_path)

def test_export_that_fails_leaves_what_was_there(collection, tmp_path):
    explorer = room_of(collection, tmp_path).explorer
    explorer.export(1, tmp_path / "out"); before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    explorer.change(1, "min_motion", 4.0)
    code = f"""
import resource, sys
from opensora_nb.data.explorer import explore
from opensora_nb.cluster.files import UserError
e = explore({str(collection)!r}, levels={str(collection.parent / 'levels.csv')!r}).explorer
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try: e.export(1, {str(tmp_path / 'out')!r})
except UserError as error: print('SAID', error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1")).stdout
    assert said.startswith("SAID") and "cannot be written" in said and said.count("\n") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"): explorer.export(1, tmp_path / "file")
    (tmp_path / "other" / "256px.json").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder"): explorer.export(1, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["256px.json"]
    with pytest.raises(UserError, match="choose a level"): explorer.export(0, tmp_path / "out")

def test_paths_that_lead_out_are_neither_played_nor_exported(collection, tmp_path):
    home = tmp_path / "curated"; home.mkdir(); (tmp_path / "secret.mp4").write_bytes(b"secret"); (home / "in.mp4").symlink_to(tmp_path / "secret.mp4")
    row = dict(source="../secret.mp4", height=64, width=64, num_frames=9, score_vmafmotion=3.0, score_blur=50.0, start_s=0.0, end_s=1.0, duration_s=3.0)
    paths = ["../secret.mp4", str(tmp_path / "secret.mp4"), "a/../../secret.mp4", "in.mp4", None, "absent.mp4"]
    write_manifest([row | dict(clip_id=str(k), path=p, **(dict(status="kept") if p else dict(status="rejected", reason="still"))) for k, p in enumerate(paths)], home / "manifest.parquet")
    explorer = Explorer(read_manifest(home), (Level("all"),), folder=home, sources=home)
    assert explorer.outside == 3 and explorer.rows["clip_id"].to_list() == ["3", "4", "5"]
    for row in range(3):
        with pytest.raises(UserError, match="not in the"): explorer.clip_file(row)
    assert "3 rows lead out" in explore(home).ui.children[0].value
    assert not {"0", "1", "2"} & set(read_manifest(explorer.export(1, home / "out")[0][0])["clip_id"])

def test_what_cannot_be_explored_is_one_line(tmp_path, collection):
    (tmp_path / "words.parquet").write_text("words"); write_manifest([dict(clip_id="a", source="a", status="failed", reason="broken")], tmp_path / "failed.parquet"); (tmp_path / "bad.json").write_text('{"levels": [{"name": 3, "x": 1}]}')
    for work in (lambda: explore(tmp_path / "gone"), lambda: explore(tmp_path / "words.parquet"), lambda: explore(tmp_path / "failed.parquet"), lambda: explore(tmp_path / "bad.json"), lambda: explore(tmp_path),
                 lambda: explore(collection, sources=tmp_path / "gone"), lambda: explore(collection, levels=tmp_path / "bad.json"), lambda: explore(collection, levels=tmp_path / "words.parquet")):
        with pytest.raises(UserError) as error: work()
        assert "\n" not in str(error.value) and len(str(error.value)) < 500

def test_without_ipywidgets_the_arithmetic_works_and_the_room_names_the_extra(collection):
    code = f"""
import sys; sys.modules['ipywidgets'] = None
from opensora_nb.data.explorer import explore, Explorer
from opensora_nb.data.manifest import read_manifest
print(Explorer(read_manifest({str(collection)!r})).layers()[0].clips)
try: explore({str(collection)!r})
except Exception as error: print(type(error).__name__, error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert said[0] == "14" and said[1].startswith("UserError") and "opensora_nb[notebooks]" in said[1]

# ---- the room, without a browser

def test_labels_of_strangers_are_text(collection, tmp_path):
    room = room_of(collection, tmp_path)
    for place in (20, 60, 120): room.controls[1, "min_motion"].slider.value = place; assert room.settle()
    room.chooser.value = 0; assert room.settle()
    def html_of(widget): return [widget.value] if type(widget).__name__ == "HTML" else [page for child in getattr(widget, "children", ()) for page in html_of(child)]
    pages = html_of(room.ui)
    assert any("&lt;img src=x" in page for page in pages) and not any("<img src=x" in page or "\u202e" in page for page in pages)
    assert max(map(len, (page.partition("base64,")[0] for page in pages))) < 20_000, "a caption of 100 kB stays out"
    assert label(HOSTILE).startswith("&lt;img") and HOSTILE not in media_tag("video/mp4", b"", HOSTILE)

def test_a_fast_drag_is_worked_on_once(collection, tmp_path):
    room, seen = room_of(collection, tmp_path), []
    assert room.settle()
    room.pyramid.observe(lambda change: seen.append(change.new), "value")
    slider = room.controls[1, "min_motion"].slider
    start = time.perf_counter()
    for place in [*range(0, 180), 77]: slider.value = place
    assert room.settle() and len(seen) <= 10, f"{len(seen)} updates for 181 values"
    wanted = room.controls[1, "min_motion"].scale.value(77 / 200)
    assert room.explorer.levels[0].min_motion == wanted and room.controls[1, "min_motion"].number.value == float(f"{wanted:.4g}")
    assert f'data-count="{room.explorer.layers()[1].clips}"' in room.pyramid.value

@pytest.mark.slow
def test_every_threshold_has_controls_that_move_it(collection, tmp_path):
    room = room_of(collection, tmp_path)
    for (group, field), control in room.controls.items():
        room.back.click(); assert room.settle()
        before = getattr(room.explorer.groups[group], field)
        if field == "banned_profiles": control.marks[0].value = not control.marks[0].value
        elif field == "allow_blurry": control.switch.value = not control.switch.value
        else:
            if group and not control.switch.value: control.switch.value = True; assert room.settle()
            control.slider.value = 100 if control.slider.value < 80 else 60
        assert room.settle() and getattr(room.explorer.groups[group], field) != before and "os-bad" not in room.status.value, (group, field, room.status.value)
        check_levels(room.explorer.levels)
    assert set(room.controls) == {(0, f) for f in TECHNICAL} | {(g, f) for g in (1, 2) for f in RULES}
    room.back.click(); assert room.settle(); assert room.explorer.levels == read_levels(collection.parent / "levels.csv")
    room.controls[1, "min_motion"].number.value = -1.0; assert room.settle()
    assert "os-bad" in room.status.value and room.controls[1, "min_motion"].number.value == 1.0, "what is not allowed is said and taken back"

def test_a_clip_that_is_gone_or_broken_says_so_in_its_place(collection, tmp_path):
    write_manifest(read_manifest(collection), tmp_path / "manifest.parquet"); (tmp_path / "clips").mkdir()
    for k in range(4, 14): (tmp_path / "clips" / f"clip{k:02d}.mp4").write_bytes((collection / "clips" / f"clip{k:02d}.mp4").read_bytes())
    (tmp_path / "clips" / "clip02.mp4").write_text("words")
    room = explore(tmp_path, levels=collection.parent / "levels.csv"); assert room.settle()
    room.controls[1, "min_motion"].number.value = 1.1; assert room.settle()
    shown = [screen.value for screen, _ in room.screens.values()]
    assert any("not a video" in s for s in shown) and any("not in the manifest" in s for s in shown) and any("no clip was written" in s for s in shown) and any("<video" in s for s in shown)

# ---- the room in a browser

COUNT = "document.querySelector('[data-layer=\"1\"] b').dataset.count"
ROWS = "[...document.querySelectorAll('.os-screen')].map(e => e.dataset.row)"

@pytest.mark.slow
@needs_browser
def test_a_taken_port_is_one_line_and_an_interrupt_ends_the_pages(collection):
    typed = [sys.executable, "-m", "opensora_nb.commands.cli", "serve", "explorer", str(collection), "--no-browser", "--port"]
    with socket.create_server(("127.0.0.1", 0)) as taken: port = taken.getsockname()[1]; refused = subprocess.run([*typed, str(port)], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "already in use" in refused.stderr and "--port" in refused.stderr
    with subprocess.Popen([*typed, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as pages:
        assert f"open http://127.0.0.1:{port}/?token=" in next(iter(pages.stdout)), "it says so when it is ready"
        socket.create_connection(("127.0.0.1", port)).close()
        pages.send_signal(signal.SIGINT)                                                         # to the command alone: no terminal that tells the whole group
        assert pages.wait(60) == 0
    with pytest.raises(OSError): socket.create_connection(("127.0.0.1", port))

@pytest.mark.slow
@needs_browser
def test_the_served_page_answers_to_keys_and_hands(collection, tmp_path):
    code = "import sys; from pathlib import Path; from opensora_nb.data.explorer import *; path = Path(sys.argv[1]); serve_explorer(ExploreConfig(path, path.parent / 'footage', path.parent / 'levels.csv', out=sys.argv[2], port=int(sys.argv[3]), token='', browser=False))"
    with served(lambda port: [sys.executable, "-c", code, str(collection), str(tmp_path / "out"), str(port)], tmp_path / "voila.log", "/voila/static/voila.js") as address, browser(1280, 1000) as (page, complaints):
        page.goto(address, wait_until="commit", timeout=120_000)
        page.wait_for_function("[...document.querySelectorAll('.os-screen video')].filter(v => v.readyState >= 2 && !v.paused).length == 5", timeout=120_000)
        box, count, rows = page.locator(".os-cards").nth(1).bounding_box(), page.evaluate(COUNT), page.evaluate(ROWS)
        assert count == "12" and page.evaluate("[...document.querySelectorAll('video')].every(v => v.muted && v.loop)")
        at = page.evaluate("document.querySelector('video').currentTime")
        page.wait_for_function(f"document.querySelector('video').currentTime != {at}")          # it plays
        page.locator(".os-slider-1-min_motion .noUi-handle").focus()                            # by keyboard
        for _ in range(12): page.keyboard.press("ArrowRight")
        page.wait_for_function(f"{COUNT} != '12' && JSON.stringify({ROWS}) != '{str(rows).replace(' ', '').replace(chr(39), chr(34))}'", timeout=120_000)
        by_keys = int(still(page, COUNT))
        assert by_keys < 12
        handle = page.locator(".os-slider-1-min_motion .noUi-handle").bounding_box(); track = page.locator(".os-slider-1-min_motion .noUi-base").bounding_box()
        page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2); page.mouse.down()     # by a drag
        for k in range(21): page.mouse.move(track["x"] + track["width"] * (0.2 + 0.01 * k), track["y"] + 3)
        page.mouse.up()
        page.wait_for_function(f"Number({COUNT}) < {by_keys}", timeout=120_000)
        typed = float(still(page, "document.querySelector('.os-number-1-min_motion input').value"))
        assert typed > 3 and int(still(page, COUNT)) == sum(0.25 + 0.5 * k >= typed for k in range(14)), "the page and the numbers agree"
        assert page.locator(".os-cards").nth(1).bounding_box() == box, "nothing jumped while clips came and went"
        page.get_by_role("button", name="Export this level").press("Enter")
        page.wait_for_function("document.querySelector('.os-status').innerText.includes('clips written')", timeout=120_000)
        levels, _ = read_thresholds(tmp_path / "out" / "256px.json")
        assert levels[0].min_motion == pytest.approx(typed, rel=1e-3) and read_clips(tmp_path / "out" / "256px.parquet").height == int(page.evaluate(COUNT))
        page.get_by_role("button", name="Reset").click(); page.wait_for_function(f"{COUNT} == '12'")
        page.locator(".os-number-1-min_motion input").fill("1.6"); page.keyboard.press("Enter"); page.wait_for_function(f"{COUNT} == '11'")      # the clip with the hostile name is just kept
        page.wait_for_function("document.querySelector('.os-room').innerText.includes('<img src=x')")
        page.get_by_role("button", name="files").click(); page.wait_for_timeout(800)
        assert page.evaluate("window.pwned === undefined && !document.querySelector('.os-room img[src=x]')"), "labels are text"
        assert page.evaluate("[...document.querySelectorAll('.os-room input, .os-room button, .os-room .widget-slider')].every(e => e.title || e.closest('[title]') || e.innerText)"), "each control says what it is"
        page.set_viewport_size(dict(width=390, height=844))
        page.wait_for_function("Math.max(...[...document.querySelectorAll('.os-room *')].map(e => e.getBoundingClientRect().right)) <= 391")      # nothing sticks out on a phone
        assert not complaints
    assert not (said := trouble((tmp_path / "voila.log").read_text())), said

@pytest.mark.slow
@needs_browser
def test_the_room_works_in_jupyterlab(collection, tmp_path, monkeypatch):
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR"): monkeypatch.setenv(name, str(tmp_path / "jupyter" / name))
    (tmp_path / "work").mkdir()
    write_page(tmp_path / "work" / "room.ipynb", page_code(ExploreConfig(collection, collection.parent / "footage", collection.parent / "levels.csv", out=tmp_path / "out")))
    command = lambda port: [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root", "--IdentityProvider.token=probe", f"--ServerApp.root_dir={tmp_path / 'work'}", "--LabApp.news_url=None"]
    with served(command, tmp_path / "lab.log", "/api") as address, browser(1280, 1000) as (page, complaints):
        page.goto(f"{address}/lab/tree/room.ipynb?token=probe&reset", timeout=120_000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
        page.wait_for_timeout(1500); page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click(); page.keyboard.press("Control+Enter")
        page.wait_for_function("[...document.querySelectorAll('.os-screen video')].filter(v => v.readyState >= 2).length == 5", timeout=120_000)
        page.locator(".os-slider-1-min_motion .noUi-handle").focus()
        for _ in range(12): page.keyboard.press("ArrowRight")
        page.wait_for_function(f"Number({COUNT}) < 12", timeout=120_000)
        assert page.evaluate("window.pwned === undefined")
        assert not complaints, complaints
        assert not (said := trouble((tmp_path / "lab.log").read_text())), said          # before the page is closed: JupyterLab complains of messages that were on their way to it
