"Captions: what is asked, what comes back, and that nothing is asked twice. The servers here are real ones on this machine, faults included."
import contextlib, itertools, json, os, random, shutil, signal, socket, subprocess, sys, threading, time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np, polars as pl, pytest

from opensora_nb.cluster.files import UserError
from opensora_nb.cluster.journal import Journal
from opensora_nb.commands.cli import main
from opensora_nb.data import captions
from opensora_nb.data.captions import (ASPECTS, MARK, CaptionConfig, Captioner, Clip, ClipTask, Fault, FrameConfig, HttpCaptioner, HttpConfig, LocalCaptioner, LocalConfig, Pace,
                                       caption_manifest, clean_caption, load_clip, prompt_for, read_answer, spread, with_suffix)
from opensora_nb.data.images import write_image
from opensora_nb.data.manifest import manifest_frame, read_manifest, read_release_table, write_manifest, write_release_table
from opensora_nb.data.video import write_video
from opensora_nb.mmdit.text import decorate

OSNB = [sys.executable, "-m", "opensora_nb.commands.cli"]
KEY = "sk-Zm9vYmFy-0123456789"


# ---- a collection and a server ----
def collection(folder, clips=5, photos=1):
    "A curated folder of tiny clips; clip k claims a length of k + 1 seconds, so that a prompt tells which one it is about."
    rng, rows = np.random.default_rng(0), []
    for k in range(clips):
        write_video(folder / f"clips/c{k}.mp4", rng.integers(0, 256, (5, 32, 48, 3), np.uint8), crf=40)
        rows.append(dict(clip_id=f"c{k}", path=f"clips/c{k}.mp4", source="film.mp4", duration_s=k + 1.0, fps=24.0, num_frames=5, height=32, width=48, aspect_ratio=2 / 3, score_vmafmotion=k + 0.5, status="kept", level=1))
    for k in range(photos):
        write_image(folder / f"clips/p{k}.jpg", rng.integers(0, 256, (40, 40, 3), np.uint8))
        rows.append(dict(clip_id=f"p{k}", path=f"clips/p{k}.jpg", source=f"p{k}.jpg", num_frames=1, height=40, width=40, status="kept", level=1))
    rows.append(dict(clip_id="dark", source="film.mp4", status="rejected", reason="black"))
    write_manifest(rows, folder / "manifest.parquet")
    return folder

def reply(content, **more): return json.dumps(dict(choices=[dict(message=dict(content=content), **more)], usage=dict(prompt_tokens=10, completion_tokens=5))).encode()

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def do_GET(self): self.server.seen.append(dict(method="GET", headers=dict(self.headers), path=self.path)); self.send_error(404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        content = json.loads(body)["messages"][0]["content"]
        about = "photo" if "photo" in content[0]["text"] else int(float(content[0]["text"].split("clip of ")[1].split()[0])) - 1
        with self.server.lock:
            self.server.asked.append(about)
            number = len(self.server.asked) - 1
        self.server.seen.append(dict(method="POST", at=time.monotonic(), headers=dict(self.headers), path=self.path, body=body, about=about, pictures=len(content) - 1))
        with contextlib.suppress(OSError): self.server.plan(self, number, about)

    def say(self, data, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items(): self.send_header(name, value)
        self.end_headers(); self.wfile.write(data)

    def well(self, about): self.say(reply(f"Clip {about}, described."))

@contextlib.contextmanager
def serving(plan=lambda h, number, about: h.well(about)):
    "(HttpConfig, server): `plan(handler, number of the request, clip)` answers each request."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.plan, server.asked, server.seen, server.lock, server.request_queue_size = True, plan, [], [], threading.Lock(), 64
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    try: yield HttpConfig(f"http://127.0.0.1:{server.server_port}/v1", "tiny", parallel=3, timeout_s=20, backoff_s=0.01), server
    finally: server.shutdown(); server.server_close()

def run(folder, http, **more): return caption_manifest(CaptionConfig(**{**dict(manifest=folder, backend="http", http=http, frames=FrameConfig(count=3), workers=0, progress=False), **more}))
def texts(folder): return {row["clip_id"]: row["text"] for row in read_manifest(folder).iter_rows(named=True)}
def everything(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"): monkeypatch.delenv(name, raising=False); monkeypatch.delenv(name.upper(), raising=False)


# ---- prompt and frames ----
def test_the_prompt_asks_for_the_six_aspects_and_of_a_photo_for_five():
    video, photo = prompt_for({}, (0.0, 1.0)), prompt_for({}, (0.0,))
    assert len(ASPECTS) == 6 and all(ask in video for ask in ASPECTS.values())
    assert ASPECTS["camera"] not in photo and ASPECTS["style"] in photo and ASPECTS["action"] not in photo
    assert "moves" not in prompt_for(dict(score_vmafmotion=None), (0.0, 1.0)) and "very much moves" in prompt_for(dict(score_vmafmotion=9.0), (0.0, 1.0))

def test_frames_are_spread_each_once_and_in_order():
    for frames, count in itertools.product((1, 2, 3, 5, 48, 1000), (1, 2, 7, 64)):
        found = spread(frames, count)
        assert found == sorted(set(found)) and len(found) == min(frames, count) and 0 <= found[0] and found[-1] < frames
        assert max(np.diff([-found[0] - 1, *found, 2 * frames - found[-1] - 1])) <= 2 * -(-frames // count)

def test_what_is_wrong_with_a_file_is_an_answer(tmp_path):
    folder = collection(tmp_path, clips=2)
    row = dict(read_manifest(folder).row(0, named=True), path=str(folder / "clips/c0.mp4"))
    def loaded(**more): return load_clip(ClipTask("c0", row | more, FrameConfig(count=3)))
    good = loaded()
    assert good.frames.shape == (3, 32, 48, 3) and len(good.times) == 3 and good.state[0] == os.path.getsize(row["path"])
    assert load_clip(ClipTask("c0", row, FrameConfig(side=16))).frames.shape == (5, 11, 16, 3)
    assert [loaded(**w).reason for w in (dict(height=64), dict(num_frames=90), dict(path=str(folder)), dict(path=str(folder / "gone.mp4")), dict(path=str(folder / "gone.jpg")))] == ["changed", "changed", *["unreadable"] * 3]
    (folder / "empty.mp4").touch(); (folder / "text.mp4").write_text("no film"); (folder / "half.mp4").write_bytes(Path(row["path"]).read_bytes()[:600]); (folder / "half.jpg").write_bytes((folder / "clips/p0.jpg").read_bytes()[:500])
    assert [loaded(path=str(folder / name)).reason for name in ("empty.mp4", "text.mp4", "half.mp4", "half.jpg")] == ["empty", "foreign", "truncated", "truncated"]
    assert all(loaded(path=str(folder / name)).reason in captions.FAULTS for name in ("empty.mp4", "text.mp4"))


# ---- texts ----
def test_cleaning_keeps_every_script_and_nothing_that_harms():
    for text in ("Ein Käfer läuft.", "Собака бежит.", "雪の中を犬が走る。", "可爱的小狗", "كلب يجري", "می‌رود", "कुत्ता दौड़ता है", "สุนัขวิ่ง", "🧑‍🚀 waves", "e\u0301"): assert clean_caption(text) == text
    rng = random.Random(0)
    pool = [chr(c) for c in (*range(0x30), 0x7F, 0x85, 0xA0, 0x200B, 0x200D, 0x200E, 0x2028, 0x202E, 0x2066, 0xD800, 0xDFFF, 0xFEFF, 0xFFFE, 0x10FFFF)] + list("abz 雪ж.;\"',\n")
    for _ in range(2000):
        text, limit = "".join(rng.choices(pool, k=rng.randrange(80))), rng.randrange(20, 60)
        ours = clean_caption(text, limit)
        assert clean_caption(ours, limit) == ours and len(ours) <= limit and "\n" not in ours and "  " not in ours and ours == ours.strip()
        assert all(c.isprintable() or c in "\u200b\u200d" for c in ours), ascii(ours)
        assert ours.encode() is not None and bool(ours) == any(c.isalnum() for c in ours)
        assert bool(ours) or not any(c.isalnum() for c in text[:15])

def test_a_text_of_100_kb_is_cut_between_words_with_a_mark():
    ours = clean_caption("word and " * 12_000)
    assert len(ours) <= 2000 and ours.endswith(("word" + MARK, "and" + MARK)) and clean_caption("雪" * 100_000, 50) == "雪" * (50 - len(MARK)) + MARK

def test_a_model_cannot_set_the_frame_rate_or_the_motion_that_is_appended():
    for lie in ("A dog, filmed at 60 FPS.", "A dog. 60 FPS, 9 motion score.", "A dog 9 motion score", "A dog. 60  FPS"): assert decorate(clean_caption(lie), 24, 4).endswith("24 FPS, 4 motion score."), lie

@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"7", b'"x"', b"{", b"<html>", b"\xff", b"[" * 200_000, b'{"choices":null}', b'{"choices":{}}', b'{"choices":[]}', b'{"choices":[7]}', b'{"choices":[{"message":null}]}',
                                  b'{"choices":[{"message":{"content":{"text":"x"}}}]}', b'{"choices":[{"message":{"content":true}}]}', b'{"choices":[{"text":"x"}]}', b'{"error":{"message":"busy"}}', b"1" * 5000], ids=lambda d: ascii(d[:30]))
def test_what_is_no_chat_answer_is_said_in_a_few_words(data):
    with pytest.raises(ValueError) as error: read_answer(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 80

def test_answers_of_all_shapes_are_understood():
    assert read_answer(reply(None))[0] == read_answer(reply([]))[0] == "" and read_answer(reply(["x", dict(type="text", text="A"), dict(type="text"), dict(text=7)]))[0] == "A"
    assert read_answer(reply("A dog.")) == ("A dog.", dict(prompt_tokens=10, completion_tokens=5))
    assert read_answer(b'{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":"many","completion_tokens":true}}') == ("x", {})
    assert read_answer(json.dumps(dict(choices=[dict(message=dict(content="", refusal="No."))])).encode())[0] == Fault("refused")
    assert read_answer(reply("A dog runs over the wide", finish_reason="length"))[0].endswith(MARK) and read_answer(reply("狗跑。它非", finish_reason="length"))[0] == "狗跑。"


# ---- a server on a bad day ----
def test_captions_arrive_whatever_the_server_does_first(tmp_path):
    folder, tries = collection(tmp_path), []
    def drip(h):
        data = reply("Too slow."); h.send_response(200); h.send_header("Content-Length", str(len(data))); h.end_headers()
        for k in range(len(data)): h.wfile.write(data[k : k + 1]); h.wfile.flush(); time.sleep(0.2)
    faults = [lambda h: h.say(b'{"error":{"message":"slow down"}}', 429, Retry_After="0.05"), lambda h: h.say(b"<html>", 500), lambda h: h.say(reply("x")[:-20]), lambda h: h.connection.shutdown(socket.SHUT_RDWR), drip,
              lambda h: h.say(b'{"text":"x"}'), lambda h: h.say(b"", 503, Retry_After="soon"), lambda h: h.say(reply("x" * 5_000_000)), lambda h: h.say(reply("x")[:-3], Content_Length="99999"), lambda h: h.say(b"", 502),
              lambda h: h.wfile.write(b"garbage\r\n\r\n"), lambda h: h.say(b"\xff\xfe{}")]
    def plan(h, number, about): faults[number](h) if number < len(faults) else h.well(about)
    before = read_manifest(folder)
    with serving(plan) as (http, server):
        report = run(folder, replace(http, timeout_s=1.5, tries=14, parallel=3))
    assert report.new == 6 and not report.failed and report.failures is None and report.counts["requests"] == len(server.asked) == 6 + len(faults)
    assert texts(folder) == {**{f"c{k}": f"Clip {k}, described." for k in range(5)}, "p0": "Clip photo, described.", "dark": None} and read_manifest(folder).drop("text").equals(before.drop("text"))
    assert report.counts["HTTP 429"] == 1 and report.counts["HTTP 500"] == 1 and report.counts["timeout"] >= 1 and report.counts["not an answer"] >= 4 and report.counts["prompt_tokens"] == 60
    assert {s["pictures"] for s in server.seen if s["about"] == "photo"} == {1} and {s["pictures"] for s in server.seen if s["about"] != "photo"} == {3}

def test_one_clip_that_the_server_does_not_take_fails_alone_and_is_tried_again(tmp_path):
    folder = collection(tmp_path)
    hostile = "bad\x1b[2J \"request\"\n\n;=1+1"
    def plan(h, number, about):
        if about == 1: h.say(json.dumps(dict(error=dict(message=hostile))).encode(), 400)
        elif about == 2: h.say(b"", 500)
        elif about == 3: h.say(reply(" \n\u202e… "))
        else: h.well(about)
    with serving(plan) as (http, server): report = run(folder, replace(http, tries=2))
    assert report.failed == dict(request=1, server=1, wordless=1) and report.new == 3 and server.asked.count(2) == 2 and server.asked.count(1) == 1
    named = {row["clip"]: row for row in pl.read_csv(report.failures).iter_rows(named=True)}
    assert {k: v["reason"] for k, v in named.items()} == dict(c1="request", c2="server", c3="wordless") and "\x1b" not in named["c1"]["detail"] and "2 tries" in named["c2"]["detail"] and "1 request" in str(report)
    with serving() as (http, server): report = run(folder, replace(http, tries=2))
    assert sorted(server.asked) == [1, 2, 3] and report.new == 3 and report.there == 3 and not (folder / "manifest-without-caption.csv").exists()

def test_hostile_texts_stay_texts(tmp_path):
    folder = collection(tmp_path, clips=5, photos=0)
    said = ['"quoted", and; a\r\nnew line\x00', "\ud800 lone \udfff", "<script>alert(1)</script> $x^2$ =cmd|' /C calc'!A0", "word " * 20_000, "雪" * 50 + "\u202e gnp.exe"]
    with serving(lambda h, number, about: h.say(json.dumps(dict(choices=[dict(message=dict(content=said[about]))])).encode())) as (http, _): report = run(folder, http)
    ours = texts(folder)
    assert report.new == 5 and ours["c0"] == '"quoted", and; a new line' and ours["c1"] == "lone" and ours["c2"] == said[2] and ours["c3"].endswith(MARK) and ours["c4"] == "雪" * 50 + " gnp.exe"
    write_release_table(read_manifest(folder), folder / "t.csv")
    assert read_release_table(folder / "t.csv")["text"].to_list() == [ours[f"c{k}"] for k in range(5)]


@pytest.mark.parametrize("answer, said", [(lambda h: h.say(b'{"error":{"message":"wrong key"}}', 401), "refuses the key"), (lambda h: h.say(b"", 403), "refuses the key"), (lambda h: h.say(b"", 404), "no such address or model"),
                                          (lambda h: h.say(b"", 307, Location="http://elsewhere.example/v1"), "elsewhere.example"), (lambda h: h.say(b"", 429, Retry_After="86400"), "86400 s")], ids=["401", "403", "404", "redirect", "a day"])
def test_what_no_other_clip_would_change_ends_the_run_in_one_line(tmp_path, answer, said):
    folder = collection(tmp_path, clips=8)
    before = everything(folder)
    with serving(lambda h, number, about: answer(h) if number > 1 else h.well(about)) as (http, server):
        with pytest.raises(UserError) as error: run(folder, replace(http, parallel=2))
        assert said in str(error.value) and "\n" not in str(error.value) and len(server.asked) <= 6
    assert {k: v for k, v in everything(folder).items() if "sqlite" not in k} == before           # the table is as it was
    with serving() as (http, server): assert run(folder, http).known >= 1 and len(server.asked) <= 8       # what was answered is not asked again

def test_refused_clips_in_a_row_do_not_end_a_run_that_has_captions(tmp_path):
    folder = collection(tmp_path, clips=8)
    with serving(lambda h, number, about: h.well(about) if about == 0 else h.say(b"", 400)) as (http, server):
        assert run(folder, replace(http, parallel=1), give_up=3).failed == dict(request=8)
        assert run(folder, replace(http, parallel=1), give_up=3).failed == dict(request=8) and len(server.asked) == 17      # the second one begins with them
    with serving(lambda h, number, about: h.say(b"", 400)) as (http, server), pytest.raises(UserError, match="HTTP 400"): run(folder, replace(http, model="other"), give_up=3, redo=True)

def test_a_server_that_never_answers_well_is_given_up(tmp_path):
    folder = collection(tmp_path, clips=8)
    with serving(lambda h, number, about: h.say(b"", 500)) as (http, server):
        with pytest.raises(UserError, match="3 clips in a row .*HTTP 500.* run the same command again"): run(folder, replace(http, tries=2, parallel=1), give_up=3)
    assert len(server.asked) <= 8
    with pytest.raises(UserError, match="connection lost"): run(folder, replace(http, tries=1), give_up=2)       # nobody listens there any more


# ---- pace ----
def test_requests_do_not_start_faster_than_allowed(tmp_path):
    folder = collection(tmp_path, clips=7, photos=0)
    with serving() as (http, server):
        began = time.monotonic()
        run(folder, replace(http, per_minute=600, parallel=7))
    assert all(s["at"] >= began + 0.1 * k for k, s in enumerate(sorted(server.seen, key=lambda s: s["at"])))      # 600 a minute: the k-th not before k/10 s

def test_a_pause_holds_for_everybody_and_a_stop_ends_it():
    pace, starts = Pace(), []
    pace.wait(); pace.pause(0.3)
    ends = time.monotonic() + 0.29
    threads = [threading.Thread(target=lambda: (pace.wait(), starts.append(time.monotonic()))) for _ in range(5)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert len(starts) == 5 and min(starts) >= ends
    pace.pause(3600)
    (waiting := threading.Thread(target=lambda: pytest.raises(captions.Stopped, pace.wait))).start()
    pace.stopped.set(); waiting.join(60)
    assert not waiting.is_alive()

def test_retry_after_is_kept_to_as_seconds_and_as_a_date(tmp_path):
    folder, sent = collection(tmp_path, clips=2, photos=0), []
    def plan(h, number, about):
        if number > 1: return h.well(about)
        wait = "0.7" if number == 0 else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2.5))
        sent.append((time.monotonic() + (0.7 if number == 0 else 1.4), len(server.asked)))      # a date has whole seconds only
        h.say(b"", 429, Retry_After=wait)
    with serving(plan) as (http, server): assert run(folder, replace(http, parallel=1)).new == 2
    assert len(sent) == 2 and all(server.seen[k]["at"] >= until for until, k in sent)


def test_a_slow_servers_limit_costs_no_clip(tmp_path):
    "It takes a request each 50 ms and answers 429 to all others: many of them a clip, though each may fail only once."
    folder, free = collection(tmp_path, clips=8), [0.0]
    def plan(h, number, about):
        with h.server.lock: now = time.monotonic(); fits = now >= free[0]; free[0] = now + 0.05 if fits else free[0]
        h.well(about) if fits else h.say(b"", 429, Retry_After="0.06")
    with serving(plan) as (http, server): report = run(folder, replace(http, parallel=6, tries=1))
    assert report.new == 9 and not report.failed and report.counts["requests"] == len(server.asked)

# ---- the key ----
def test_the_key_is_in_the_authorization_header_and_nowhere_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CAPTION_TEST_KEY", KEY)
    folder = collection(tmp_path / "c")
    def plan(h, number, about):      # a server that repeats the key wherever it can
        if about == 1: h.say(json.dumps(dict(error=dict(message=f"bad request of {KEY}"))).encode(), 400)
        elif about == 2: h.say(f"no JSON, {KEY}".encode())
        elif about == 3: h.say(KEY.encode(), 500)
        else: h.say(reply(f"A dog and {KEY}."))
    with serving(plan) as (http, server):
        asked = ["caption", str(folder), "--backend", "http", "--http.base-url", http.base_url, "--http.model", "tiny", "--http.key-env", "CAPTION_TEST_KEY", "--http.tries", "2", "--http.backoff-s", "0.01", "--workers", "0", "--table", str(folder / "t.csv")]
        assert main(asked) == 0
        server.plan = lambda h, number, about: h.say(f'{{"error":{{"message":"{KEY} is not valid"}}}}'.encode(), 401)
        assert main(asked) == 2
    out = capsys.readouterr()
    assert "refuses the key in $CAPTION_TEST_KEY" in out.err and "***" in out.err and KEY not in out.out + out.err
    assert not [name for name, data in everything(folder).items() if KEY.encode() in data] and texts(folder)["c0"] == "A dog and ***."
    assert server.seen and all(s["headers"]["Authorization"] == f"Bearer {KEY}" and KEY not in s["path"] and KEY.encode() not in s["body"] and [k for k, v in s["headers"].items() if KEY in v] == ["Authorization"] for s in server.seen)

def test_without_a_named_variable_no_key_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as (http, server): run(collection(tmp_path, clips=1, photos=0), http)
    assert "Authorization" not in server.seen[0]["headers"] and server.seen[0]["path"] == "/v1/chat/completions"

def test_requests_take_the_proxy_of_the_environment(tmp_path, monkeypatch):
    with serving() as (http, server):
        monkeypatch.setenv("http_proxy", http.base_url.removesuffix("/v1"))
        assert run(collection(tmp_path, clips=1, photos=0), replace(http, base_url="http://captions.example/v1")).new == 1
    assert server.seen[0]["path"] == "http://captions.example/v1/chat/completions" and server.seen[0]["headers"]["Host"] == "captions.example"


# ---- resuming ----
def test_a_copied_folder_costs_nothing_and_a_changed_clip_is_asked_for_anew(tmp_path):
    folder = collection(tmp_path / "a")
    with serving() as (http, server):
        assert run(folder, http).new == 6
        for name in ("b", "c"):
            there = shutil.copytree(folder, tmp_path / name, copy_function=shutil.copy)               # new times
            write_manifest(read_manifest(there).with_columns(text=pl.lit(None, pl.String)), there / "manifest.parquet")      # curated again: no texts
        del server.asked[:]
        report = run(tmp_path / "b", http)
        assert (report.new, report.known, server.asked) == (0, 6, []) and texts(tmp_path / "b") == texts(folder)
        write_video(tmp_path / "c/clips/c2.mp4", np.full((5, 32, 48, 3), 9, np.uint8))
        assert run(tmp_path / "c", http).known == 5 and server.asked == [2]
        del server.asked[:]
        assert run(folder, http, redo=True).known == 6 and not server.asked                                             # the same question again
        assert run(folder, replace(http, model="other"), redo=True).new == 6 and run(folder, http, redo=True, frames=FrameConfig(count=2)).new == 6      # another one

def test_an_interrupted_run_keeps_what_it_was_told(tmp_path):
    folder = collection(tmp_path)
    before = (folder / "manifest.parquet").read_bytes()
    class Tired(Captioner):
        asked, stopped = [], False
        def describe(self, clips):
            self.asked.append(clips[0].row["clip_id"])
            if len(self.asked) == 4: raise KeyboardInterrupt
            return ["Said."]
        def stop(self): Tired.stopped = True
    cfg = CaptionConfig(folder, "http", workers=0, progress=False)
    with pytest.raises(KeyboardInterrupt, match="3 captions are kept"): caption_manifest(cfg, Tired("tired"))
    assert (folder / "manifest.parquet").read_bytes() == before and Tired.stopped
    assert caption_manifest(cfg, Tired("tired")).known == 3 and sorted(Tired.asked) == sorted([f"c{k}" for k in range(5)] + ["p0", "c3"])

def test_two_runs_in_one_folder_do_not_meet(tmp_path):
    folder = collection(tmp_path, clips=1)
    with serving() as (http, _), Journal(folder / "captions.sqlite"), pytest.raises(UserError, match="another run"): run(folder, http)

@pytest.mark.slow
def test_a_killed_run_does_not_ask_again_for_what_is_done(tmp_path):
    "SIGKILL, then Ctrl-C, then to the end; worker processes load the clips."
    folder, slow = collection(tmp_path, clips=12, photos=0), 0.15
    def plan(h, number, about): time.sleep(slow); h.well(about)
    def done():
        copy = tmp_path / "journal.copy"
        for end in ("", "-wal"): shutil.copy(f"{folder}/captions.sqlite{end}", f"{copy}{end}") if os.path.exists(f"{folder}/captions.sqlite{end}") else None
        with Journal(copy) as journal: return {int(item[1:]) for item, *_ in journal.items("caption")}
    with serving(plan) as (http, server):
        typed = [*OSNB, "caption", folder, "--backend", "http", "--http.base-url", http.base_url, "--http.model", "tiny", "--http.parallel", "2", "--no-progress"]
        for hit, more in ((signal.SIGKILL, 3), (signal.SIGINT, 3)):
            begun = len(server.asked)
            process = subprocess.Popen(list(map(str, typed)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while len(server.asked) < begun + more + 1 and process.poll() is None: time.sleep(0.01)
            process.send_signal(hit)
            _, err = process.communicate(timeout=60)
            assert process.returncode == (130 if hit == signal.SIGINT else -9) and "Traceback" not in err and texts(folder)["c0"] is None
            if hit == signal.SIGINT: assert err.count("\n") == 1 and "captions are kept" in err
            kept, so_far = done(), len(server.asked)
            assert len(kept) >= 1
            server.plan = lambda h, number, about, kept=kept, so_far=so_far: (time.sleep(slow), h.well(about) if about not in kept else h.say(b"", 404))       # asking again would end the run
        r = subprocess.run(list(map(str, typed)), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert all(texts(folder)[f"c{k}"] == f"Clip {k}, described." for k in range(12))
    assert max(server.asked.count(k) for k in range(12)) <= 3 and len(server.asked) <= 12 + 2 * 2       # no more than was under way when it was hit


# ---- tables ----
def test_a_training_table_gets_its_texts_and_keeps_all_else(tmp_path):
    folder = collection(tmp_path, clips=3, photos=0)
    rows = ["path,num_frames,height,width,fps,notes,id", 'clips/c0.mp4,5,32,48,24,"a, b",007', "clips/c1.mp4,5,32,48,,,1e5", "clips/c0.mp4,5,32,48,24.0, x ,"]
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    with serving(lambda h, number, about: h.say(reply("Said, \"so\"."))) as (http, server):
        prompt = folder / "prompt.txt"; prompt.write_text("{facts} clip of 1 s")
        report = run(folder / "train.csv", http, prompt=prompt, out=folder / "out" / "new.csv")
        assert report.new == 2 and len(server.asked) == 2 and (folder / "train.csv").read_text().splitlines() == rows          # one question for the clip that is listed twice
        after = pl.read_csv(folder / "out/new.csv", infer_schema=False)
        before = pl.read_csv(folder / "train.csv", infer_schema=False)
        assert after.drop("text").equals(before) and after["text"].to_list() == ['Said, "so".'] * 3
        with pytest.raises(UserError, match="ends in .csv"): run(folder / "train.csv", http, out=folder / "new.parquet")

def test_a_manifest_written_elsewhere_finds_its_clips(tmp_path):
    folder = collection(tmp_path / "curated")
    table = pl.read_parquet(folder / "manifest.parquet").with_columns(mine=pl.lit("stays"))
    table.write_parquet(folder / "manifest.parquet")
    with serving() as (http, _): report = run(folder, http, out=tmp_path / "far/away/manifest.parquet")
    there = pl.read_parquet(report.out)
    assert there["mine"].to_list() == ["stays"] * 7 and all((report.out.parent / p).exists() for p in there["path"].drop_nulls()) and pl.read_parquet(folder / "manifest.parquet").equals(table)

def test_levels_of_a_curated_folder_get_the_texts(tmp_path):
    folder = collection(tmp_path)
    (folder / "levels").mkdir()
    for kind in ("csv", "parquet"): write_release_table(read_manifest(folder), folder / f"levels/256px.{kind}", root="..")
    (folder / "levels/notes.csv").write_text("a,b\n1,2\n")
    with serving() as (http, _): run(folder, http)
    for kind in ("csv", "parquet"): assert read_release_table(folder / f"levels/256px.{kind}")["text"].to_list() == list(texts(folder).values())[:6]
    assert (folder / "levels/notes.csv").read_text() == "a,b\n1,2\n"

GOLDEN = [("a cat.", 24.0, 3.6, "a cat. 24 FPS, 4 motion score."), ("a cat.", 23.976, 2.5, "a cat. 23.976 FPS, 3 motion score."), ("dog.", None, 3.0, "dog. 3 motion score."), ("dog.", 24.0, 12.49, "dog. 24 FPS, 12 motion score."), ("a cat.", 24.0, None, "a cat. 24 FPS.")]

def test_the_suffix_is_the_releases_and_stands_once():
    rows = [dict(clip_id=str(k), path=f"{k}.mp4", status="kept", text=text, fps=fps, score_vmafmotion=motion) for k, (text, fps, motion, _) in enumerate([*GOLDEN, ("fast.", 60.0, 2.0, "fast."), (None, 24.0, 1.0, None), ("photo.", None, None, "photo.")])]
    ours = with_suffix(manifest_frame(rows), decorate)
    assert ours["text"].to_list() == [row[3] for row in GOLDEN] + ["fast.", None, "photo."]
    assert ours["fps"].to_list() == [None] * 5 + [60.0, 24.0, None] and ours["score_vmafmotion"].to_list() == [None] * 5 + [2.0, 1.0, None]
    assert with_suffix(ours, decorate).equals(ours) and [decorate(t, f, m) for t, f, m in ours.head(5).select("text", "fps", "score_vmafmotion").rows()] == ours["text"].to_list()[:5]


# ---- the command ----
def test_the_command_writes_texts_and_a_training_table(tmp_path, capsys):
    folder = collection(tmp_path)
    with serving() as (http, _):
        assert main(["caption", str(folder), "--backend", "http", "--http.base-url", http.base_url, "--http.model", "tiny", "--workers", "0", "--table", str(tmp_path / "t/train.csv"), "--suffix"]) == 0
    said, table = capsys.readouterr(), read_release_table(tmp_path / "t/train.csv")
    assert "6  captions written" in said.out and "captions" in said.err and "6 clips with frame rate" in said.out and table["text"][1] == "Clip 1, described. 24 FPS, 2 motion score." and table["fps"].is_null().all()
    assert all((tmp_path / "t" / p).exists() for p in table["path"])

@pytest.mark.parametrize("words, said", [("nothing --backend http", "no such curated folder"), ("{folder} --backend http", "http.base_url"), ("{folder} --backend http --http.base-url http://u:p@h/v1", "must not hold a name"), ("{folder} --backend http --http.base-url http://h/v1", "needs a model"),
    ("{folder} --backend http --http.base-url http://h/v1 --http.model m --http.key-env NOT_SET_AT_ALL", "NOT_SET_AT_ALL"), ("{folder} --backend http --http.base-url http://h/v1 --http.model m --http.extra [", "is not JSON"),
    ("{folder} --backend http --http.base-url http://h/v1 --http.model m --prompt {folder}/gone.txt", "no such prompt"), ("{folder} --backend http --http.base-url http://h/v1 --http.model m --prompt {folder}/clips/p0.jpg", "not a text file"),
    ("{folder} --backend truth", "needs the folder"), ("{folder} --backend truth --truth {folder}", "no such truth"), ("{folder} --backend local", "needs a model"), ("{folder} --backend local --local.model ./gone", "no such vision-language model"),
    ("{folder} --backend http --table t.txt", "ends in .csv or .parquet"), ("{folder} --backend http --suffix", "--table"), ("{folder}/clips/p0.jpg --backend http", "are listed in"), ("{folder} --backend nobody", "nobody")])
def test_what_cannot_work_is_one_line_and_leaves_no_trace(tmp_path, capsys, words, said):
    folder = collection(tmp_path, clips=1)
    before = everything(folder)
    with contextlib.suppress(SystemExit): assert main(["caption", *(w.format(folder=folder) for w in words.split())]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and (err.count("\n") == 1 or "nobody" in words) and everything(folder) == before

def test_moved_changed_and_broken_clips_are_counted_and_named(tmp_path):
    folder = collection(tmp_path, clips=5)
    (folder / "clips/c1.mp4").unlink(); (folder / "clips/c2.mp4").write_bytes(b""); write_video(folder / "clips/c3.mp4", np.zeros((9, 64, 64, 3), np.uint8))
    with serving() as (http, server): report = run(folder, http)
    assert report.failed == dict(unreadable=1, empty=1, changed=1) and sorted(map(str, server.asked)) == ["0", "4", "photo"] and report.new == 3
    assert pl.read_csv(report.failures)["clip"].to_list() == ["c1", "c2", "c3"] and len(read_manifest(folder)) == 7


# ---- models on this machine ----
WORDS = "<unk> <pad> <eos> <image> <video> <user> <assistant> a red green blue ball box rolls falls stands before clouds grass sand in warm cool light , and the camera pans zooms out .".split()
TEMPLATE = "{% for m in messages %}<user> {% for c in m['content'] %}{{ '<' + c['type'] + '> ' if c['type'] != 'text' else c['text'] }}{% endfor %}{% endfor %} <assistant>"

def tiny(folder, kind):
    "A model of the class, with random weights, saved as published ones are."
    import torch, transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="<unk>")); words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", additional_special_tokens=WORDS[3:7], chat_template=TEMPLATE)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    clip, siglip = dict(small, model_type="clip_vision_model", image_size=28, patch_size=7), dict(small, model_type="siglip_vision_model", image_size=28, patch_size=7, vision_use_head=False)
    text = dict(small, model_type="qwen2", vocab_size=len(WORDS), num_key_value_heads=2, bos_token_id=2, eos_token_id=2, pad_token_id=1)
    grid, crop = [[28, 28], [28, 56], [56, 28]], dict(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
    match kind:
        case "onevision": model, look = t.LlavaOnevisionForConditionalGeneration(t.LlavaOnevisionConfig(vision_config=siglip, text_config=text, image_token_index=3, video_token_index=4, image_grid_pinpoints=grid)), t.LlavaOnevisionImageProcessorPil(size=dict(height=28, width=28), image_grid_pinpoints=grid)
        case "next_video": model, look = t.LlavaNextVideoForConditionalGeneration(t.LlavaNextVideoConfig(vision_config=clip, text_config=text, image_token_index=3, video_token_index=4, image_grid_pinpoints=grid)), t.LlavaNextImageProcessorPil(image_grid_pinpoints=grid, **crop)
        case "llava": model, look = t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=clip, text_config=text, image_token_index=3)), t.CLIPImageProcessorPil(**crop)
    for name, weight in model.named_parameters(): weight.data *= 8 if weight.ndim > 1 and "embed" not in name else 1      # the usual 0.02 is meant for wide models: such a small one would not look at its input
    model.save_pretrained(folder)
    if kind == "llava": t.LlavaProcessor(look, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE).save_pretrained(folder)
    else: tokenizer.save_pretrained(folder); look.save_pretrained(folder)
    return folder

def some_clips():
    rng = np.random.default_rng(1)
    return [Clip({}, rng.integers(0, 256, (n, 32, 48, 3), np.uint8), tuple(range(n))) for n in (3, 1, 3)]

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onevision", "next_video", "llava"])
def test_models_of_these_classes_describe_clips_and_photos_together(tmp_path, kind):
    model = LocalCaptioner(LocalConfig(str(tiny(tmp_path, kind)), device="cpu", max_tokens=12), FrameConfig(count=3))
    clips = some_clips()
    said = model.describe(clips)
    assert all(isinstance(s, str) for s in said) and [model.describe([clip])[0] for clip in clips] == said and model.counts["completion_tokens"] > 0
    def next_word(*clips): return model.model(**model.inputs([c.frames for c in clips], [prompt_for(c.row, c.times) + " a dog" * k for k, c in enumerate(clips)])).logits[:, -1]
    alone, other, both = next_word(clips[0]), next_word(replace(clips[0], frames=255 - clips[0].frames)), next_word(clips[0], clips[2])
    assert (alone - other).abs().max() > 1e-3 * alone.abs().max()                                   # it looks
    assert (alone[0] - both[0]).abs().max() < 1e-4 * alone.abs().max()                              # and not at its neighbour, whose prompt is longer

@pytest.mark.slow
def test_a_local_model_captions_a_folder_and_what_is_none_is_refused(tmp_path, capsys):
    folder, model = collection(tmp_path / "c", clips=3), tiny(tmp_path / "m", "onevision")
    typed = ["caption", str(folder), "--backend", "local", "--local.model", str(model), "--local.device", "cpu", "--local.max-tokens", "8", "--local.batch", "2", "--frames.count", "2", "--workers", "0", "--no-progress"]
    assert main(typed) == 0 and all(texts(folder)[k] for k in ("c0", "c1", "c2", "p0"))
    from safetensors.torch import load_file, save_file
    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "projector" not in k}, model / "model.safetensors", metadata=dict(format="pt"))
    (tmp_path / "theirs").mkdir(); (tmp_path / "theirs/config.json").write_text(json.dumps(dict(model_type="llava_qwen", mm_vision_tower="google/siglip", architectures=["LlavaQwenForCausalLM"])))
    (tmp_path / "empty").mkdir()
    for name, said in (("m", "lacks"), ("theirs", "LLaVA's own code"), ("empty", "no vision-language model")):
        with pytest.raises(UserError, match=said) as error: LocalCaptioner(LocalConfig(str(tmp_path / name), device="cpu"))
        assert "\n" not in str(error.value)
