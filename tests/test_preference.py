"Preference: order and sides, answers that survive, what win rates prove, and the room in a real browser."
import base64, json, os, random, signal, subprocess, sys, time
from itertools import permutations
from pathlib import Path
import numpy as np, pytest
from conftest import still, trouble
from opensora_nb.cluster.files import UserError
from opensora_nb.data.room import browser, can_look, served
from opensora_nb.data.video import decode, write_video
from opensora_nb.evaluation.preference import ANSWERS, QUESTIONS, AnswerFile, Answers, Entry, Study, krippendorff, left_share, open_study, order, preference_figure, read_answers, read_set, report, results, simulated_rater, win_rate
from opensora_nb.evaluation.preference_room import PreferenceConfig, PreferenceRoom, nameless, serve_preference

HOSTILE = '<img src=x onerror="window.pwned=1">'
needs_browser = pytest.mark.skipif(not can_look(), reason="no Chromium, playwright or Voila")

def clip(path: Path, k: int, size=(48, 64), shift: int = 0) -> Path:
    frames = np.full((12, *size, 3), (60 + 12 * k, 200 - 12 * k, 90 + shift), np.uint8)
    for t in range(12): frames[t, 16:32, 2 * t : 2 * t + 16] = 255 - 10 * k
    return write_video(path, frames, 12)

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Two sets of ten prompts, one of them hostile, one very long."
    home = tmp_path_factory.mktemp("preference")
    prompts = [f"a thing, number {k}" for k in range(8)] + [f"{HOSTILE} is shown as it stands", "long words " * 200]
    for name in ("alphamodel", "betamodel"):
        for k, prompt in enumerate(prompts):
            clip(home / name / f"{k:04d}-{len(name)}.mp4", k, shift=60 * (name == "betamodel"))
            (home / name / f"{k:04d}-{len(name)}.json").write_text(json.dumps(dict(prompt="refined", asked=prompt)))
    return home

@pytest.fixture()
def study(home): return open_study(dict(alphamodel=home / "alphamodel", betamodel=home / "betamodel"))

class Listed(Study):
    "Pairs without files."
    def _look(self, path, seen): return str(path), (48, 64)

def listed(names: str, prompts: int, **how) -> Study: return Listed({n: [Entry(Path(n) / f"{k}.mp4", f"prompt {k}") for k in range(prompts)] for n in names}, **how)

class InMemory:
    "Takes answers as a file does."
    def __init__(self): self.answers = Answers()
    def add(self, rater, shown, question, answer, seconds=0.0): self.answers.given[rater, shown.pair.key, question] = answer, shown.left

# ---- pairs

def test_clips_belong_together_by_what_they_were_asked_for(study, home):
    assert len(study.pairs) == 10 and {p.prompt for p in study.pairs.values()} >= {"a thing, number 0", f"{HOSTILE} is shown as it stands"}, "names of files differ, and the refined prompt is not what was asked"
    assert all(name not in p.key and p.key not in str(p.clips) for p in study.pairs.values() for name in study.names)

def test_missing_and_broken_clips_are_skipped_counted_and_named(tmp_path):
    for name in "ab":
        for k in range(5): clip(tmp_path / name / f"{k}.mp4", k)
    whole = (tmp_path / "a" / "1.mp4").read_bytes(); (tmp_path / "a" / "1.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "2.mp4").write_text("words"); (tmp_path / "b" / "3.mp4").unlink(); (tmp_path / "a" / "4.mp4").write_bytes(b"")
    left = open_study(dict(a=tmp_path / "a", b=tmp_path / "b"))
    assert [p.prompt for p in left.pairs.values()] == ["0"] and len(left.skipped) == 4
    for part in ("a/1.mp4", "b/2.mp4", "b has no clip of '3'", "a/4.mp4"): assert sum(part in why for why in left.skipped.values()) == 1
    assert all("\n" not in why and why in report(left, Answers()) for why in left.skipped.values())
    (tmp_path / "b" / "0.mp4").write_text("words")
    with pytest.raises(UserError, match="no pair can be shown"): open_study(dict(a=tmp_path / "a", b=tmp_path / "b"))

def test_what_cannot_be_compared_is_one_line(tmp_path, home):
    clip(tmp_path / "other" / "x.mp4", 0); (tmp_path / "empty").mkdir(); (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\0"); (tmp_path / "bad.json").write_text("[1, 2]"); (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    for sets in (dict(a=home / "alphamodel"), dict(a=home / "alphamodel", b=tmp_path / "other"), dict(a=home / "alphamodel", b=tmp_path / "empty"), dict(a=tmp_path / "bad.csv", b=tmp_path / "other"),
                 dict(a=tmp_path / "bad.json", b=tmp_path / "other"), dict(a=tmp_path / "no.csv", b=tmp_path / "other"), dict(a=tmp_path / "gone", b=tmp_path / "other"), dict(a=home / "alphamodel" / "0000-10.mp4", b=tmp_path / "other")):
        with pytest.raises(UserError) as said: open_study(sets)
        assert "\n" not in str(said.value) and len(str(said.value)) < 500
    with pytest.raises(UserError, match="share no prompt"): open_study(dict(a=home / "alphamodel", b=tmp_path / "other"))

def test_tables_and_folders_say_the_same(home, tmp_path):
    prompts = {str(e.path): e.prompt for e in read_set(home / "alphamodel")}
    (tmp_path / "t.json").write_text(json.dumps(prompts)); (tmp_path / "l.json").write_text(json.dumps([dict(path=p, prompt=t) for p, t in prompts.items()]))
    assert read_set(tmp_path / "t.json") == read_set(tmp_path / "l.json") == read_set(home / "alphamodel")

@pytest.mark.parametrize("prompts, names", [(10, "ab"), (7, "abc"), (1, "ab")])
def test_orders_are_shuffled_balanced_and_repeatable(prompts, names):
    study = listed(names, prompts, every=True)
    lefts = np.zeros(2)
    for rater in (f"r{k}" for k in range(60)):
        seen = order(study, rater)
        assert seen == order(study, rater) and {s.pair.key for s in seen} == set(study.pairs)
        for two in study.comparisons:
            at_left = [s.left for s in seen if s.pair.sets == two]
            assert abs(at_left.count(two[0]) - at_left.count(two[1])) == prompts % 2
        for s in seen: assert s.left == s.pair.sets[0] if not s.swapped else s.left == s.pair.sets[1]; assert s.clips[0].parent.name == s.left
        lefts += [sum(s.swapped for s in seen), len(seen)]
    assert abs(lefts[0] / lefts[1] - 0.5) < 0.2, "whom the odd pair favours is dealt, too"
    if prompts > 5: assert len({tuple(s.pair.key for s in order(study, f"r{k}")) for k in range(20)}) == 20

# ---- the answer file

def test_a_cut_anywhere_loses_one_answer_at_most_and_none_that_follows(study, tmp_path):
    file, seen = AnswerFile(tmp_path / "a.jsonl", study), order(study, "ann")
    for k in range(3): file.add("ann\u2028\n", seen[k], "visual", ANSWERS[k])
    data = file.path.read_bytes(); ends = [k + 1 for k, c in enumerate(data) if c == 10]
    assert len(ends) == 3, "a line each, whatever the name"
    for cut in range(0, len(data) + 1, 7):
        file.path.write_bytes(data[:cut])
        whole = sum(e <= cut or e == cut + 1 for e in ends)                    # a line that lacks its end only is complete
        assert len(read_answers(study, file.path).given) == whole
        file.add("bob", seen[5], "motion", "tie")
        now = read_answers(study, file.path)
        assert len(now.given) == whole + 1 and now.given["bob", seen[5].pair.key, "motion"] == ("tie", seen[5].left) and now.torn == (cut not in ends and cut + 1 not in ends and cut > 0)

def test_rubbish_lines_are_counted_and_the_rest_is_read(study, tmp_path):
    file, seen = AnswerFile(tmp_path / "a.jsonl", study), order(study, "ann")
    file.add("ann", seen[0], "visual", "left")
    good = json.loads(file.path.read_text())
    rubbish = [b"\xff\xfe", b"[1]", b"3", b"null", b"{}", b"[" * 5000, *(json.dumps(good | change).encode() for change in (dict(answer="both"), dict(question=["visual"]), dict(question=None)))]
    with open(file.path, "ab") as raw: raw.write(b"\n".join(rubbish) + b"\n\n" + json.dumps(good | dict(pair="0" * 16)).encode() + b"\n" + json.dumps(good | dict(left="gamma")).encode() + b"\n")
    said = read_answers(study, file.path)
    assert len(said.given) == 1 and said.torn == len(rubbish) and said.stale == 2
    with pytest.raises(UserError, match="is a folder"): AnswerFile(tmp_path, study)

def test_answers_to_another_study_or_other_clips_are_refused(study, home, tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl", study)
    file.add("ann", order(study, "ann")[0], "visual", "left")
    other = open_study(dict(alphamodel=home / "alphamodel", gamma=home / "betamodel"))
    with pytest.raises(UserError, match="another study .of alphamodel, betamodel") as said: read_answers(other, file.path)
    assert "\n" not in str(said.value)
    anew = open_study(dict(alphamodel=home / "alphamodel", betamodel=home / "alphamodel"))
    with pytest.raises(UserError, match="none of the 1 answers"): read_answers(anew, file.path)

WRITER = """
import sys
from opensora_nb.evaluation.preference import *
study = open_study(dict(alphamodel=sys.argv[1] + '/alphamodel', betamodel=sys.argv[1] + '/betamodel'))
file, seen = AnswerFile(sys.argv[2], study), order(study, sys.argv[3])
print('go', flush=True)
for k in range(int(sys.argv[4])): file.add(sys.argv[3], seen[k % 10], ('visual', 'prompt', 'motion')[k // 10 % 3], 'left'); print(k, flush=True)
"""

@pytest.mark.slow
def test_raters_at_once_and_a_kill(study, home, tmp_path):
    path = tmp_path / "a.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(home), str(path), name, count], stdout=subprocess.PIPE, text=True) for name, count in (("ann", "30"), ("bob", "30"), ("cem", "100000"))]
    lines = [writers[2].stdout.readline() for _ in range(40)]
    writers[2].send_signal(signal.SIGKILL); told = lines + writers[2].stdout.read().split()
    assert [w.communicate()[0].count("\n") for w in writers[:2]] == [31, 31]; writers[2].wait()
    said = read_answers(study, path)
    assert said.torn <= 1 and all(sum(rater == name for rater, _, _ in said.given) == 30 for name in ("ann", "bob", "cem"))
    assert sum('"cem"' in line for line in path.read_text().splitlines()) >= len(told) - 1, "what was said to be kept is kept"

def test_a_full_disk_is_said_and_leaves_whole_lines(home, study, tmp_path):
    code = f"""
import resource, signal
from opensora_nb.evaluation.preference import *
from opensora_nb.evaluation.preference_room import PreferenceRoom
from opensora_nb.cluster.files import UserError
study = open_study(dict(alphamodel={str(home / 'alphamodel')!r}, betamodel={str(home / 'betamodel')!r}))
file = AnswerFile({str(tmp_path / 'a.jsonl')!r}, study); seen = order(study, 'ann')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for k in range(3): file.add('ann', seen[k], 'visual', 'left')
resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 50, resource.RLIM_INFINITY))
try: file.add('ann', seen[3], 'visual', 'left')
except UserError as error: print('SAID', error)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, resource.RLIM_INFINITY))
room = PreferenceRoom(study, file, 'ann'); assert room.settle()
resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 50, resource.RLIM_INFINITY))
before = room.asked, len(room.given), room._step
room.answer('prompt', 'tie'); print('ROOM', before[:2] == (room.asked, len(room.given)), room._step > before[2], 'Not kept' in room.status.value)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, resource.RLIM_INFINITY))
room.answer('prompt', 'tie'); print('THEN', room.asked)
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = made.stdout.splitlines()
    assert said and said[0].startswith("SAID") and "could not be written" in said[0] and said[1] == "ROOM True True True" and said[2] == "THEN 2", made
    known = read_answers(study, tmp_path / "a.jsonl")
    assert len(known.given) == 4 and known.torn == 0

# ---- what answers prove

def test_intervals_cover_the_known_preference_in_about_95_of_100_studies():
    study, held, bias, n = listed("ab", 24), 0, 0, 150
    for seed in range(n):
        file = InMemory()
        for rater in ("ann", "bob"): simulated_rater(study, file, rater, {("visual", "b"): 0.7}, ties=0.2, seed=seed)
        visual = results(study, file.answers)[0]
        held += visual.low <= 0.8 * 0.7 + 0.1 <= visual.high
        _, low, high = left_share(study, file.answers); bias += low <= 0.5 <= high
    assert 0.9 * n <= held and 0.9 * n <= bias, (held, bias)
    assert held < n or bias < n, "intervals that always hold are too wide to be of use"

def test_a_win_rate_does_not_care_who_is_named_first():
    rng = np.random.default_rng(0)
    for _ in range(50):
        groups = [rng.choice([0, 0.5, 1], rng.integers(1, 6)).tolist() for _ in range(rng.integers(1, 12))]
        p, low, high = win_rate(groups); q, below, above = win_rate([[1 - s for s in g] for g in groups])
        assert 0 <= low <= p <= high <= 1 and np.allclose([q, below, above], [1 - p, 1 - high, 1 - low])
        assert win_rate(groups, 0.8)[1] >= low

def test_alpha_is_the_ratio_of_disagreements_pair_by_pair():
    rng = np.random.default_rng(1)
    for metric, apart in (("nominal", lambda a, b: float(a != b)), ("interval", lambda a, b: (a - b) ** 2)):
        for _ in range(10):
            units = [rng.choice([0, 0.5, 1], rng.integers(0, 5)).tolist() for _ in range(8)]
            used = [u for u in units if len(u) > 1]; flat = [v for u in used for v in u]
            within = sum(apart(a, b) / (len(u) - 1) for u in used for a, b in permutations(u, 2)) / len(flat)
            blind = np.mean([apart(a, b) for a, b in permutations(flat, 2)])
            assert krippendorff(units, metric) == pytest.approx(1 - within / blind)

def test_the_figure_has_a_bar_for_each_comparison_and_question():
    import matplotlib; matplotlib.use("Agg")
    study, file = listed("abc", 6), InMemory()
    simulated_rater(study, file, "ann", {})
    fig = preference_figure(results(study, file.answers))
    assert len(fig.axes) == 3 and all(sum(p.get_width() for p in ax.patches) == pytest.approx(200) for ax in fig.axes) and [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["against b", "against c"]
    with pytest.raises(UserError, match="no answers"): preference_figure([])
    assert "0 answers of 0 raters" in report(study, Answers())

# ---- the room, without a browser

def html_of(widget): return [widget.value] if type(widget).__name__ == "HTML" else [page for child in getattr(widget, "children", ()) for page in html_of(child)]

def test_prompts_and_names_are_text_and_nothing_names_a_set(study, home, tmp_path):
    room = PreferenceRoom(study, AnswerFile(tmp_path / "a.jsonl", study), f"  {HOSTILE}\n{'x' * 100}", page=True); seen = ""
    while room.at < 10:
        assert room.settle(); seen += "\n".join(html_of(room.ui))
        for q in QUESTIONS: room.answer(q, "tie")
    seen += "\n".join(html_of(room.ui))
    assert "&lt;img src=x" in seen and "<img" not in seen and "Thank you" in seen
    for part in seen.split('"'):
        if part.startswith("data:video/mp4;base64,"): seen += base64.b64decode(part[22:]).decode("latin1")
    assert not any(word in seen for word in ("alphamodel", "betamodel", str(home), "x264"))
    assert len(room.rater) <= 60 and len(read_answers(study, room.answers.path).given) == 30

def test_slips_do_nothing(study, tmp_path):
    room = PreferenceRoom(study, AnswerFile(tmp_path / "a.jsonl", study))
    room.answer("visual", "left"); room.back.click(); room.who.value = " \n"; room.begin.click()
    assert room.rater is None and not room.answers.path.exists() and "name" in room.status.value
    room.who.value = "ann"; room.begin.click(); assert room.settle()
    room.back.click(); room.answer("prompt", "left"); room.answer("motion", "left")
    assert (room.at, room.asked) == (0, 0) and not room.given
    for q in QUESTIONS: room.answer(q, "left")
    room.buttons["motion"]["left"].click()                                    # the second click of a double one, on the next pair
    assert (room.at, room.asked) == (1, 0) and len(room.given) == 3

def test_a_clip_that_is_lost_in_between_is_left_out_and_noted(home, tmp_path):
    import shutil
    shutil.copytree(home / "alphamodel", tmp_path / "a"); shutil.copytree(home / "betamodel", tmp_path / "b")
    study = open_study(dict(alphamodel=tmp_path / "a", betamodel=tmp_path / "b")); file = AnswerFile(tmp_path / "a.jsonl", study); seen = order(study, "ann")
    seen[0].clips[0].unlink(); seen[4].clips[1].write_text("words")
    room = PreferenceRoom(study, file, "ann"); assert room.settle()
    assert room.shown[0] == seen[1] and "1 pair could not be shown" in room.status.value
    while room.at < len(room.shown):
        for q in QUESTIONS: room.answer(q, "right")
        assert room.settle()
    known = read_answers(study, file.path)
    assert len(known.given) == 24 and set(known.skipped) == {seen[0].pair.key, seen[4].pair.key} and seen[4].clips[1].name in report(study, known)
    assert not any(str(tmp_path) in page for page in html_of(room.ui))

@pytest.mark.parametrize("codec, pixels", [("mpeg4", "yuv420p"), ("libx264", "yuv444p")])
def test_what_browsers_do_not_play_becomes_h264_that_looks_the_same(codec, pixels, tmp_path):
    import av
    frames = np.random.default_rng(0).integers(90, 160, (6, 12, 16, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    with av.open(str(tmp_path / "x.mp4"), "w") as out:
        stream = out.add_stream(codec, rate=12); stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 128, 96, pixels, 4_000_000
        for frame in frames: out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    (tmp_path / "y.mp4").write_bytes(nameless(tmp_path / "x.mp4"))
    with av.open(str(tmp_path / "y.mp4")) as made: assert made.streams.video[0].codec_context.name == "h264" and made.streams.video[0].codec_context.pix_fmt == "yuv420p"
    a, b = decode(tmp_path / "x.mp4"), decode(tmp_path / "y.mp4")
    assert a.shape == b.shape and np.abs(a.astype(int) - b).mean() < 4

def test_wrong_answer_files_are_refused_before_anything_is_served(home, study, tmp_path):
    sets = (f"alphamodel={home / 'alphamodel'}", f"gamma={home / 'betamodel'}")
    AnswerFile(tmp_path / "a.jsonl", study).add("ann", order(study, "ann")[0], "visual", "left")
    with pytest.raises(UserError, match="another study"): serve_preference(PreferenceConfig(sets, tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="is a folder"): serve_preference(PreferenceConfig(sets, tmp_path))

# ---- the room in a browser

SEEN = "() => { const v = [...document.querySelectorAll('.os-screen video')]; return v.length == 2 && v.every(x => x.readyState >= 2 && !x.error) && !document.querySelector('.os-wait') }"
STATE = "() => { const s = document.querySelector('[data-step]').dataset; return [Number(s.pair), Number(s.asked)] }"

def press(page, key):
    "A key, and what it does."
    page.wait_for_function(SEEN, timeout=120_000)
    step = page.locator("[data-step]").get_attribute("data-step")
    page.keyboard.press(key); page.wait_for_function(f"document.querySelector('[data-step]').dataset.step != '{step}'", timeout=120_000)

@pytest.mark.slow
@needs_browser
def test_ten_pairs_are_rated_by_keys_with_a_reload_on_the_way(home, study, tmp_path):
    answers, wanted, rng, frames, refused = tmp_path / "answers.jsonl", {}, random.Random(0), [], []
    code = "import sys; from pathlib import Path; from opensora_nb.evaluation.preference_room import *; serve_preference(PreferenceConfig((f'alphamodel={sys.argv[1]}/alphamodel', f'betamodel={sys.argv[1]}/betamodel'), Path(sys.argv[2]), port=int(sys.argv[3]), token='', browser=False))"
    keys = {"left": ("1", "ArrowLeft"), "tie": ("2", "ArrowDown"), "right": ("3", "ArrowRight")}
    seen = order(study, "ann b")
    def rate_pair(page, k, by=0):
        for q in QUESTIONS:
            press(page, keys[said := rng.choice(ANSWERS)][by]); wanted[seen[k].pair.key, q] = said
    with served(lambda port: [sys.executable, "-c", code, str(home), str(answers), str(port)], tmp_path / "voila.log", "/voila/static/voila.js") as address, browser(1280, 900) as (page, complaints):
        page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
        page.on("websocket", lambda socket: socket.on("framereceived", lambda data: frames.append(data if isinstance(data, bytes) else data.encode())))
        page.goto(address, wait_until="commit", timeout=120_000)
        page.locator(".os-who input").fill("ann  b", timeout=120_000); page.keyboard.press("Enter")      # a door that Enter opens
        page.wait_for_function(SEEN, timeout=120_000)
        page.wait_for_url("**/?rater=ann%20b", wait_until="commit", timeout=120_000); assert page.evaluate(STATE) == [0, 0]
        boxes = page.evaluate("[...document.querySelectorAll('.os-ask, .os-screen')].map(e => JSON.stringify(e.getBoundingClientRect()))")
        a = page.evaluate("[...document.querySelectorAll('video')].map(v => v.currentTime)"); page.wait_for_function(f"(v => v.length == 2 && v[0].currentTime != {a[0]} && !v[0].ended && !v[1].ended && Math.abs(v[0].currentTime - v[1].currentTime) < 0.2)([...document.querySelectorAll('video')])")
        assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.muted && !v.loop)"), "both play, in step"
        for k in range(4): rate_pair(page, k, k % 2)
        page.wait_for_function(SEEN)
        assert page.evaluate("[...document.querySelectorAll('.os-ask, .os-screen')].map(e => JSON.stringify(e.getBoundingClientRect()))") == boxes, "nothing moved while pairs came and went"
        press(page, "1"); wanted[seen[4].pair.key, "visual"] = "left"
        page.reload(wait_until="commit"); page.wait_for_function(SEEN, timeout=120_000)                   # in the middle of a pair
        assert page.evaluate(STATE) == [4, 1]
        press(page, "Backspace"); press(page, "3"); wanted[seen[4].pair.key, "visual"] = "right"          # a correction
        for q in ("prompt", "motion"): press(page, "2"); wanted[seen[4].pair.key, q] = "tie"
        page.wait_for_function(SEEN)
        for _ in range(9): page.keyboard.press("1")                                                       # a hand that rests on the keys: some count, in their turn
        k, asked = still(page, STATE)
        for j in range(5 * 3, 3 * k + asked): wanted[seen[j // 3].pair.key, list(QUESTIONS)[j % 3]] = "left"
        known = {(key, q): said for (_, key, q), (said, _) in read_answers(study, answers).given.items()}
        assert known == wanted and (k, asked) > (5, 0), "what the page shows is what is kept"
        other = page.context.browser.new_page(); other.set_default_timeout(120_000); other.goto(f"{address}/?rater=bob", wait_until="commit"); other.wait_for_function(SEEN, timeout=120_000)      # somebody else, at the same time
        press(other, "3"); assert other.evaluate(STATE) == [0, 1] and page.evaluate(STATE) == [k, asked]
        while k < 10:
            q = list(QUESTIONS)[asked]
            if (k, q) == (8, "visual"): page.locator(".os-now button").nth(1).click(); said = "tie"; page.wait_for_function(f"({STATE})()[1] == 1")      # and by hand
            else: press(page, keys[said := rng.choice(ANSWERS)][0])
            wanted[seen[k].pair.key, q] = said
            k, asked = page.evaluate(STATE)
        page.wait_for_function("document.querySelector('.os-end').innerText.includes('Thank you, ann b')")
        assert any(b"&lt;img src=x" in frame for frame in frames) and page.evaluate("window.pwned === undefined && !document.querySelector('img[src=x]')"), "words are text"
        assert other.evaluate("[...document.querySelectorAll('.os-room button, .os-room input')].filter(e => e.offsetParent).every(e => e.title && e.innerText)"), "each control says what it is"
        other.set_viewport_size(dict(width=390, height=800))
        other.wait_for_function("Math.max(...[...document.querySelectorAll('.os-room *')].map(e => e.getBoundingClientRect().right)) <= 391")      # nothing sticks out on a phone
        said = "\n".join([page.content(), other.content(), *(f.decode("latin1") for f in frames)])
        assert len(frames) > 50 and not any(word in said for word in ("alphamodel", "betamodel", str(home))), "neither page nor messages name a set"
        assert not complaints, (complaints, refused)
    known = {(key, q): (said, left) for (who, key, q), (said, left) in read_answers(study, answers).given.items() if who == "ann b"}
    assert known == {(s.pair.key, q): (wanted[s.pair.key, q], s.left) for s in seen for q in QUESTIONS} and len(known) == 30
    log = (tmp_path / "voila.log").read_text()
    assert not trouble(log) and "alphamodel : betamodel" in log, trouble(log) or log
