"Curation: right verdicts, complete books, and nothing lost, half-written or done twice, whatever happens meanwhile."
import os, shutil, signal, sqlite3, subprocess, sys, time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
import av, numpy as np, polars as pl, pytest
from PIL import Image
from opensora_nb.cluster.files import UserError
from opensora_nb.commands.cli import main
from opensora_nb.data.cache import curated_cache
from opensora_nb.data.curate import WRITE, curate, funnel, summary
from opensora_nb.data.duplicates import DuplicateConfig
from opensora_nb.data.filters import FilterConfig
from opensora_nb.data.footage import caption_from_truth, make_footage, sample_clips
from opensora_nb.data.images import probe_image
from opensora_nb.data.manifest import COLUMNS, REASONS, RELEASE_COLUMNS, read_clips, read_manifest, read_release_table
from opensora_nb.data.ocr import OCRConfig
from opensora_nb.data.pyramid import LEVELS, Level, write_levels
from opensora_nb.data.shots import ShotConfig
from opensora_nb.data.stages import CurateConfig, find_sources, source_id, take_id
from opensora_nb.data.video import decode, probe
from opensora_nb.data.world import FPS

pytestmark = pytest.mark.slow        # real processes and files: minutes
FEW = ("film-000.mp4", "film-001.mp4", "letterbox.mp4", "frozen.mp4", "nothing.mp4", "copy.mp4", "photo-000.jpg", "photo-copy.jpg", "photo-001.jpg")

@pytest.fixture(scope="session")
def footage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return folder, make_footage(folder, shots=6, seed=2, progress=False)

@pytest.fixture(scope="session")
def done(footage, tmp_path_factory):
    "The whole footage, by one worker and undisturbed."
    cfg = CurateConfig(footage[0], tmp_path_factory.mktemp("curated"), progress=False)
    return cfg, curate(cfg)

def fill(folder: Path, footage, names=FEW) -> Path:
    folder.mkdir(parents=True)
    for name in names: shutil.copy2(footage[0] / name, folder / name)
    return folder

BLIND = OCRConfig(enabled=False)       # half of the work is to look for text, which changes nothing here

@pytest.fixture(scope="session")
def few(footage, tmp_path_factory):
    "A handful of files of each kind, and what an undisturbed run makes of them. Not to be changed."
    cfg = CurateConfig(fill(tmp_path_factory.mktemp("few") / "raw", footage), tmp_path_factory.mktemp("few-curated"), ocr=BLIND, progress=False)
    return cfg, curate(cfg)

def files(folder: Path, *parts: str) -> dict[str, bytes]:
    "All results of a curated folder; the journal is none."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("journal.sqlite")}

def same(out: Path, cfg: CurateConfig) -> None:
    "Two curated folders hold the same, byte for byte, and nothing that a run only needs while it writes."
    ours, theirs = files(out), files(cfg.out)
    assert read_manifest(out).equals(read_manifest(cfg.out))
    assert set(ours) == set(theirs) and [name for name in ours if ours[name] != theirs[name]] == []
    assert not list(out.rglob(".*"))

def books(out: Path, copies: Path) -> dict[tuple[str, str], int]:
    "(stage, item) -> place in the journal; one that is written again gets another place. Works on a copy, so that a run may go on meanwhile, or be dead."
    shutil.rmtree(copies, ignore_errors=True); copies.mkdir()
    for name in ("journal.sqlite", "journal.sqlite-wal"):
        if (out / name).exists(): shutil.copy(out / name, copies / name)
    if not (copies / "journal.sqlite").exists(): return {}
    db = sqlite3.connect(copies / "journal.sqlite")
    try: return {(stage.decode(), item.decode("utf-8", "surrogatepass")): row for stage, item, row in db.execute("SELECT stage, item, rowid FROM records")}
    except sqlite3.Error: return {}                                                # copied while it was made
    finally: db.close()

def redone(before: dict, after: dict) -> set[tuple[str, str]]:
    "What is done again between two states of the journal; names of tables are no work."
    return {what for what in after if before.get(what) != after[what] and what[0] != "level"}

def options(cfg: CurateConfig) -> list[str]: return ["--no-progress"] if cfg.ocr.enabled else ["--no-progress", "--ocr.no-enabled"]
def typed(cfg: CurateConfig, *args) -> list[str]: return [sys.executable, "-m", "opensora_nb.commands.cli", "curate", *map(str, (cfg.src, "--out", cfg.out, *options(cfg), *args))]
def start(cfg: CurateConfig, *args) -> subprocess.Popen: return subprocess.Popen(typed(cfg, *args), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)

LONG = 300                             # seconds until a test gives up; nothing takes as long, on whatever machine

def until(condition, run: subprocess.Popen | None = None, seconds: float = LONG, step: float = 0.02):
    "Waits for a condition (or the end of `run`) and returns what it said. Not too often: asking takes time from what is waited for."
    end = time.time() + seconds
    while not (said := condition()) and time.time() < end and (run is None or run.poll() is None): time.sleep(step)
    return said

def family(group: int) -> list[int]:
    "Processes of a process group that are alive, by /proc."
    def one(p: Path) -> bool:
        try: state, _, pgrp = (p / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError: return False
        return int(pgrp) == group and state not in "ZX"
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and one(p)]

def reading(group: int, path: Path) -> int | None:
    "The process of a group that has a file open."
    for pid in family(group):
        try:
            if any(os.readlink(fd) == str(path) for fd in Path(f"/proc/{pid}/fd").iterdir()): return pid
        except OSError: continue

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at processes through /proc")

def open_levels(path: Path, *levels: Level) -> Path: write_levels(levels or (Level("all"),), path); return path

# ---- what comes out

def test_every_verdict_is_the_known_truth(footage, done):
    for r in footage[1]:
        rows = done[1].filter(pl.col("source") == r["file"])
        assert set(rows["reason"]) == {r["reason"]}, (r["file"], rows["reason"].to_list())
        assert set(rows["status"]) == {"kept" if r["reason"] is None else "failed" if r["reason"] in ("empty", "foreign", "truncated", "broken", "streamless", "playlist") else "rejected"}

def test_clean_films_come_back_as_their_shots(footage, done):
    for r in (r for r in footage[1] if r["defect"] in (None, "trailer") and r["kind"] == "video"):
        rows = done[1].filter(pl.col("source") == r["file"])
        assert [(round(a * FPS), round(b * FPS)) for a, b in rows.select("start_s", "end_s").rows()] == [(round(s["start_s"] * FPS), round(s["end_s"] * FPS)) for s in r["shots"]]

def test_the_manifest_tells_what_the_clips_are(done):
    cfg, manifest = done
    kept = manifest.filter(pl.col("status") == "kept")
    assert manifest.columns == list(COLUMNS) and read_manifest(cfg.out).equals(manifest) and manifest["clip_id"].is_unique().all()
    assert {p.name for p in (cfg.out / "clips").iterdir()} == {Path(p).name for p in kept["path"]} and manifest.filter(pl.col("status") != "kept")["path"].null_count() == manifest.height - kept.height
    for row in kept.filter(pl.col("num_frames") > 1).iter_rows(named=True):
        clip = probe(cfg.out / row["path"])
        assert (clip.height, clip.width, clip.num_frames, clip.fps, clip.duration_s) == tuple(row[k] for k in ("height", "width", "num_frames", "fps", "duration_s")) and clip.codec == "h264"
        assert 2 <= row["duration_s"] <= 8.05 and row["fps"] <= 30 and row["aspect_ratio"] == clip.height / clip.width and abs(row["end_s"] - row["start_s"] - row["duration_s"]) < 1.5 / row["fps"]
        assert 0.5 <= row["score_vmafmotion"] <= 20 and row["score_blur"] > 0 and row["blurry"] is False and 0 <= row["score_ocr"] <= 0.01 and 0 < row["score_jitter"] <= 60 and 0 <= row["score_shake"] <= 15 and row["level"] == 1
    stills = kept.filter(pl.col("num_frames") == 1)
    assert stills.height == 4
    for row in stills.iter_rows(named=True):
        picture = probe_image(cfg.out / row["path"])
        assert (picture.height, picture.width) == (row["height"], row["width"]) and picture.codec in ("jpeg", "mjpeg") and row["path"].endswith(".jpg")
        assert row["score_blur"] > 0 and row["blurry"] is False and row["score_ocr"] == 0 and all(row[k] is None for k in ("start_s", "end_s", "duration_s", "fps", "score_vmafmotion", "score_shake"))
    assert manifest["score_aesthetic"].null_count() == manifest.height, "not measured is null"
    assert not any(str(cfg.src) in str(v) for row in manifest.rows() for v in row), "no path of this machine"

def test_borders_go_phones_are_turned_and_long_shots_are_divided(footage, done):
    for r in (r for r in footage[1] if "box" in r or "upright" in r):
        row = done[1].filter(pl.col("source") == r["file"]).row(0, named=True)
        assert (row["height"], row["width"]) == tuple(r.get("upright") or r["box"][2:]), r["file"]
    assert done[1].filter(pl.col("source") == "long.mp4")["duration_s"].round(2).to_list() == [8.0, 2.5]
    assert done[1].filter(pl.col("source") == "60fps.mp4")["fps"].to_list() == [30.0]

def test_copies_name_the_better_clip_that_stays(footage, done):
    manifest = done[1]
    kept = dict(manifest.filter(pl.col("status") == "kept").select("clip_id", "source").rows())
    for r in (r for r in footage[1] if "duplicate_of" in r):
        rows = manifest.filter(pl.col("source") == r["file"])
        assert rows.height and {kept.get(c) for c in rows["duplicate_of"]} == {r["duplicate_of"]}, "the larger and better one stays"
    assert manifest.filter(pl.col("reason") != "duplicate")["duplicate_of"].null_count() == manifest.filter(pl.col("reason") != "duplicate").height

def test_the_funnel_counts_each_row_once(done):
    steps = funnel(done[1])
    assert sum(sum(lost.values()) for *_, lost in steps) + steps[-1][1] == done[1].height
    assert steps[0][1] == len(list(find_sources(done[0].src))) and steps[-1][1] == (done[1]["status"] == "kept").sum()
    assert "2 duplicate" in summary(done[1]) and "min_aesthetic" in summary(done[1]).splitlines()[-1]

def test_kept_pocket_clips_get_their_captions(footage, done):
    assert caption_from_truth(done[1], footage[0]).filter(pl.col("status") == "kept")["text"].null_count() == 0

# ---- frames

BITS = 8
def coded(shots: list[int], seed: int, height: int = 128, width: int = 192) -> tuple[np.ndarray, list[int]]:
    "A film that says in a row of black and white blocks (a Gray code) which frame it is; each shot has a texture of its own that moves on."
    rng, frames, first = np.random.default_rng(seed), [], [0]
    for length in shots:
        ground = rng.integers(60, 200, (height // 16, width // 8, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        for k in range(length): frames.append(np.roll(ground, k, 1)[:, :width].copy())
        first.append(len(frames))
    for k, frame in enumerate(frames):
        for bit in range(BITS): frame[48:80, 16 + 20 * bit : 36 + 20 * bit] = 255 * ((k ^ k >> 1) >> bit & 1)
    return np.stack(frames), first

def numbers(clip: np.ndarray) -> list[int]:
    "Which frame of the film each picture is."
    def one(frame: np.ndarray) -> int:
        number, gray = 0, [int(frame[56:72, 20 + 20 * bit : 32 + 20 * bit].mean() > 127) for bit in range(BITS)]
        for bit in reversed(gray): number = number << 1 | (bit ^ number & 1)
        return number
    return [one(frame) for frame in clip]

def film(path: Path, frames: np.ndarray, rate, stamps: list[int] | None = None, tick: Fraction | None = None, rotation: int = 0, keys: int = 250) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.options = *frames.shape[1:3], "yuv420p", {"crf": "14", "g": str(keys), "preset": "veryfast"}
        if tick: stream.codec_context.time_base = tick
        if rotation: stream.set_display_rotation(rotation)
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if stamps: frame.pts, frame.time_base = stamps[k], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

def test_clips_hold_the_frames_of_their_shot_and_no_other(tmp_path):
    "Constant rates, rates above the limit, irregular times, borders, turned pictures; shots begin at odd frames and away from key frames."
    rng, cases, raw = np.random.default_rng(3), {}, tmp_path / "raw"; raw.mkdir()
    for k, (name, rate, shots) in enumerate([("24.mp4", 24, [61, 75]), ("23976.mkv", Fraction(24000, 1001), [71, 60]), ("2997.mp4", Fraction(30000, 1001), [77, 81]), ("5994.mp4", Fraction(60000, 1001), [125, 131]), ("25.mpg.ts", 25, [63, 57]),
                                                ("60.mp4", 60, [127, 129])]):
        frames, first = coded(shots, k)
        film(raw / name, frames, rate)
        cases[name] = [i / rate for i in range(len(frames))], first
    frames, first = coded([83, 71], 20)
    for name, tick in (("uneven.mkv", Fraction(1, 1000)), ("uneven.mp4", Fraction(1, 90000))):
        stamps = np.concatenate([[0], np.cumsum(rng.choice([20, 33, 33, 40, 50, 80], len(frames) - 1))])            # milliseconds: a phone in the dark
        film(raw / name, frames, 1 / tick, [round(int(s) / 1000 / tick) for s in stamps], tick)
        cases[name] = (stamps / 1000).tolist(), first
    frames, first = coded([65, 59], 30); boxed = np.zeros((len(frames), 192, 192, 3), np.uint8); boxed[:, 32:160] = frames
    film(raw / "boxed.mp4", boxed, 24); cases["boxed.mp4"] = [i / 24 for i in range(len(frames))], first
    frames, first = coded([65, 59], 31); film(raw / "turned.mp4", np.rot90(frames, -1, (1, 2)), 24, rotation=90); cases["turned.mp4"] = [i / 24 for i in range(len(frames))], first
    cfg = CurateConfig(raw, tmp_path / "out", levels=open_levels(tmp_path / "levels.csv"), duplicates=DuplicateConfig(enabled=False), filters=FilterConfig(banned_profiles=()), ocr=BLIND, workers=2, progress=False)
    manifest = curate(cfg)
    wrong = []
    for name, (times, first) in cases.items():
        rows = manifest.filter(pl.col("source") == name).sort("start_s")
        if rows["status"].to_list() != ["kept"] * 2 or [int(c[-6:]) for c in rows["clip_id"]] != first[:2]: wrong.append((name, rows.select("clip_id", "status", "reason", "start_s", "end_s").rows())); continue
        for row, a, b in zip(rows.iter_rows(named=True), first, first[1:]):
            clip = decode(cfg.out / row["path"])
            said = numbers(clip)
            if (row["height"], row["width"]) != (128, 192): wrong.append((name, "size", row["height"], row["width"]))
            if not all(a <= n < b for n in said): wrong.append((name, "a frame of another shot", a, b, said))
            late = [abs(times[n] - times[a] - j / row["fps"]) * row["fps"] for j, n in enumerate(said)]                       # in frames of the clip
            if max(late) > (1.01 if "uneven" not in name else 3.1) or said[0] > a + ("uneven" in name): wrong.append((name, "frames at other times", max(late), said))
            if "uneven" not in name and said != list(range(a, b, 2 if row["fps"] < 30.1 and name in ("60.mp4", "5994.mp4") else 1)): wrong.append((name, "frames left out or repeated", said))
            if "uneven" in name and (times[b - 1] - times[said[-1]]) > 0.1: wrong.append((name, "the end is missing", b, said))
    assert not wrong, "\n".join(map(str, wrong))

def test_clips_show_the_pictures_of_their_seconds(footage, done):
    cfg, manifest = done
    for row in manifest.filter(pl.col("status") == "kept", pl.col("source").str.starts_with("film")).head(3).iter_rows(named=True):
        assert np.abs(decode(cfg.out / row["path"]).astype(int) - decode(footage[0] / row["source"], row["start_s"], row["end_s"])).mean((1, 2, 3)).max() < 8

# ---- workers and engines

def test_a_second_run_does_nothing_and_says_the_same(few, tmp_path):
    cfg, manifest = few
    before, journal = {p: p.stat().st_mtime_ns for p in (cfg.out / "clips").iterdir()}, books(cfg.out, tmp_path / "books")
    assert curate(cfg).equals(manifest) and before == {p: p.stat().st_mtime_ns for p in (cfg.out / "clips").iterdir()}
    assert books(cfg.out, tmp_path / "books") == journal and len(journal) > 15

# ---- kills, interrupts, lost workers

@needs_proc
@pytest.mark.parametrize("which, kills", [pytest.param("few", [0, 4, 12, 18], id="few"), pytest.param("done", [0, 4, 21, 38, 45, 55, 61, 68, 73], id="whole-footage", marks=pytest.mark.soak)])
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(which, kills, request, tmp_path):
    "Each kill comes after so many answers are on record; half of the time the main process alone is killed, and its workers must go with it."
    whole, known, stages = request.getfixturevalue(which)[0], {}, set()
    cfg = replace(whole, out=tmp_path / "out"); out = cfg.out
    for k, count in enumerate(kills):
        run = start(cfg, "--workers", 2)
        if count: until(lambda: len(books(out, tmp_path / "books")) >= count, run)
        else: until(lambda: len(family(run.pid)) > 1, run)
        assert run.poll() is None, f"it ended before kill {k}: {run.communicate()[1]}"
        (os.killpg if k % 2 else os.kill)(run.pid, signal.SIGKILL)
        run.communicate(timeout=LONG)
        assert until(lambda: not family(run.pid)), "workers outlive the run"
        now = books(out, tmp_path / "books")
        assert {what: now.get(what) for what in known} == known, "something was forgotten or done twice"
        known = now; stages.add(max((("probe", "survey", "write").index(s) for s, _ in now), default=-1))
        assert not (out / "manifest.parquet").exists() or k == len(kills) - 1
        for clip in (out / "clips").glob("[!.]*"): probe_image(clip) if clip.suffix == ".jpg" else probe(clip)
    assert stages >= {0, 1, 2}, "a kill in each stage"
    written = {p: p.stat().st_mtime_ns for p in (out / "clips").glob("[!.]*") if ("write", p.stem) in known}
    run = start(cfg, "--workers", 2)
    assert run.communicate(timeout=LONG) and run.returncode == 0 and until(lambda: not family(run.pid))
    now = books(out, tmp_path / "books")
    assert {what: now.get(what) for what in known} == known and {p: p.stat().st_mtime_ns for p in written} == written and written
    same(out, whole)

@needs_proc
def test_a_kill_while_tables_are_written_leaves_no_litter(few, tmp_path):
    "What a killed run was writing is removed by the next, wherever it lies."
    cfg = replace(few[0], out=tmp_path / "out")
    shutil.copytree(few[0].out, cfg.out)
    for at in (".manifest-abc123.parquet", ".manifest-abc/00000001.arrow", "levels/.256px-abc.csv", "clips/.film-abc.mp4"): (cfg.out / at).parent.mkdir(exist_ok=True); (cfg.out / at).write_bytes(b"half")
    curate(cfg)
    same(cfg.out, few[0])

@needs_proc
def test_a_clip_that_was_put_in_place_just_before_a_kill_goes_if_it_is_not_wanted(few, tmp_path):
    cfg = replace(few[0], out=tmp_path / "out")
    shutil.copytree(few[0].out, cfg.out)
    for at in (take_id("gone.mp4", 0) + ".mp4", take_id("frozen.mp4", 0) + ".mp4", take_id("gone.jpg", 0) + ".jpg"): (cfg.out / "clips" / at).write_bytes(b"a clip of a source that was removed since")
    curate(cfg)
    same(cfg.out, few[0])

@needs_proc
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_says_so_in_a_line_and_goes_on(few, tmp_path, workers):
    cfg = replace(few[0], out=tmp_path / "out"); out = cfg.out
    run = start(cfg, "--workers", workers)
    until(lambda: len(books(out, tmp_path / "books")) >= len(FEW) + 2, run)
    (os.killpg if workers == 2 else os.kill)(run.pid, signal.SIGINT)              # a terminal sends it to all of them
    text, err = run.communicate(timeout=LONG)
    assert run.returncode == 130 and len(err.strip().splitlines()) == 1 and "run the same command again" in err and not text, err
    assert until(lambda: not family(run.pid)) and not (out / "manifest.parquet").exists() and not list(out.rglob(".*")), "nothing half-written"
    known = books(out, tmp_path / "books")
    assert len(known) >= len(FEW) + 2
    run = start(cfg, "--workers", workers)
    assert run.communicate(timeout=LONG) and run.returncode == 0 and not redone(books(out, tmp_path / "books"), known)
    same(out, few[0])

@needs_proc
def test_a_worker_that_dies_or_hangs_costs_its_file_and_more_time_brings_it_back(footage, tmp_path):
    raw = fill(tmp_path / "raw", footage, ("film-000.mp4", "pillarbox.mp4", "letterbox.mp4", "photo-000.jpg"))
    fresh = CurateConfig(raw, tmp_path / "fresh", ocr=BLIND, progress=False)
    began = time.monotonic(); curate(fresh)
    cfg = replace(fresh, out=tmp_path / "out", time_limit_s=2 + time.monotonic() - began); out = cfg.out       # all files together take less: one that hangs waits no longer, one that does not has time, whatever the machine
    run = start(cfg, "--workers", 2, "--time-limit-s", cfg.time_limit_s)
    for name, sign in (("letterbox.mp4", signal.SIGSTOP), ("pillarbox.mp4", signal.SIGKILL)):
        until(lambda: sum(stage == "probe" for stage, _ in books(out, tmp_path / "books")) == 4, run)
        worker = until(lambda: reading(run.pid, raw / name), run, step=0.002)
        assert worker and worker != run.pid, f"nobody reads {name}"
        os.kill(worker, sign)
    _, err = run.communicate(timeout=LONG)
    assert run.returncode == 0 and until(lambda: not family(run.pid)), err
    manifest, whole = read_manifest(out), read_manifest(fresh.out)
    lost = pl.col("source").is_in(["letterbox.mp4", "pillarbox.mp4"])
    assert sorted(manifest.filter(lost).select("source", "status", "reason").rows()) == [("letterbox.mp4", "failed", "timeout"), ("pillarbox.mp4", "failed", "crashed")]
    assert manifest.filter(~lost).equals(whole.filter(~lost)) and manifest.filter(lost)["height"].to_list() == [192, 192], "what the header said is known"
    before = books(out, tmp_path / "books")
    assert curate(cfg).equals(manifest) and books(out, tmp_path / "books") == before, "the same limits, the same answer"
    curate(replace(cfg, time_limit_s=240.0))
    assert {item for stage, item in redone(before, books(out, tmp_path / "books")) if stage == "survey"} == {"letterbox.mp4", "pillarbox.mp4"}
    same(out, fresh)

@needs_proc
def test_a_clip_that_cannot_be_written_gives_its_place_to_its_copy(footage, tmp_path):
    raw = fill(tmp_path / "raw", footage, ("film-000.mp4", "copy.mp4"))
    cfg = CurateConfig(raw, tmp_path / "out", ocr=BLIND, progress=False); out = cfg.out
    run = start(cfg)
    until(lambda: sum(stage == "survey" for stage, _ in books(out, tmp_path / "books")) == 2, run)
    worker = until(lambda: reading(run.pid, raw / "film-000.mp4"), run, step=0.002)
    assert worker and worker != run.pid
    os.kill(worker, signal.SIGKILL)
    _, err = run.communicate(timeout=LONG)
    assert run.returncode == 0, err
    manifest = read_manifest(out)
    assert sorted(manifest.select("source", "status", "reason", "duplicate_of").rows()) == [("copy.mp4", "kept", None, None), ("film-000.mp4", "failed", "crashed", None)]
    assert {p.name for p in (out / "clips").iterdir()} == {Path(p).name for p in manifest["path"].drop_nulls()}
    again = curate(replace(cfg, time_limit_s=240))
    assert sorted(again.select("source", "status", "reason").rows()) == [("copy.mp4", "rejected", "duplicate"), ("film-000.mp4", "kept", None)] and len(list((out / "clips").iterdir())) == 1

def test_no_time_at_all_makes_rows_and_time_makes_clips(few, footage, tmp_path):
    "A worker that answers before anybody looks at the clock is not too late: so a file may also get the word that it gets with time."
    raw = fill(tmp_path / "raw", footage, ("film-000.mp4", "film-001.mp4", "nothing.mp4", "photo-000.jpg"))
    cfg = replace(few[0], src=raw, out=tmp_path / "out", time_limit_s=1e-6)
    hasty, patient = curate(cfg), few[1].filter(pl.col("source").is_in(os.listdir(raw)))
    true = dict(patient.select("source", "reason").rows())
    assert set(hasty["source"]) == set(true) and all(reason in ("timeout", true[source]) for source, reason in hasty.select("source", "reason").rows()) and "timeout" in hasty["reason"]
    assert curate(replace(cfg, time_limit_s=240.0)).equals(patient)

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux only")
def test_a_picture_that_needs_more_memory_is_kept_with_more(footage, tmp_path):
    raw = fill(tmp_path / "raw", footage, ("photo-001.jpg",))
    with Image.open(raw / "photo-001.jpg") as picture: picture.resize((8000, 8000), Image.Resampling.BICUBIC).rotate(180).save(raw / "poster.png", compress_level=1)
    cfg = CurateConfig(raw, tmp_path / "out", memory_limit_mb=700, levels=open_levels(tmp_path / "levels.csv"), duplicates=DuplicateConfig(enabled=False), ocr=BLIND, progress=False)
    tight = curate(cfg)
    assert {r["source"]: (r["status"], r["reason"]) for r in tight.iter_rows(named=True)} == {"poster.png": ("failed", "crashed"), "photo-001.jpg": ("kept", None)}
    wide = curate(replace(cfg, memory_limit_mb=6000))
    assert set(wide["status"]) == {"kept"} and wide.filter(pl.col("source") == "poster.png").select("height", "width").row(0) == (1080, 1080)

# ---- what is done again

def test_only_what_depends_on_a_change_is_done_again(footage, few, tmp_path, monkeypatch):
    "One change after the other; each leaves alone what it does not concern."
    raw, cfg, book = tmp_path / "raw", replace(few[0], src=tmp_path / "raw", out=tmp_path / "out"), tmp_path / "books"
    shutil.copytree(few[0].src, raw); shutil.copytree(few[0].out, cfg.out); state = books(cfg.out, book)
    def change(**more) -> tuple[set, set]:
        "Runs with one more change: (stage, item) done again, and clips whose files are not the same file any more."
        nonlocal state, cfg
        clips, cfg = {p.name: p.stat().st_mtime_ns for p in (cfg.out / "clips").iterdir()}, replace(cfg, **more)
        before, manifest = state, curate(cfg)
        state = books(cfg.out, book)
        assert {p.name for p in (cfg.out / "clips").iterdir()} == {Path(p).name for p in manifest["path"].drop_nulls()}
        return redone(before, state), {p.name for p in (cfg.out / "clips").iterdir() if clips.get(p.name) != p.stat().st_mtime_ns}
    assert change() == (set(), set()), "the same files in another folder: nothing"
    clip = take_id("film-000.mp4", 0)
    (cfg.out / "clips" / f"{clip}.mp4").unlink()
    assert change() == ({("write", clip)}, {f"{clip}.mp4"}), "a clip that somebody removed"
    (raw / "nothing.mp4").write_bytes((footage[0] / "pillarbox.mp4").read_bytes())
    new = take_id("nothing.mp4", 0)
    assert change() == ({("probe", "nothing.mp4"), ("survey", "nothing.mp4"), ("write", new)}, {f"{new}.mp4"}), "a file that changed"
    again, clips = change(filters=FilterConfig(min_duration_s=2.1))
    assert {stage for stage, _ in again} == {"probe"} and not clips, "a threshold on headers"
    again, clips = change(shots=ShotConfig(border_level=27.0))
    assert {stage for stage, _ in again} == {"survey"} and not clips, "a threshold of the survey that changes no clip"
    again, clips = change(levels=open_levels(tmp_path / "lax.csv", Level("loose"), Level("strict", min_motion=0.5)))
    still = take_id("frozen.mp4", 0)
    assert again == {("write", still)} and clips == {f"{still}.mp4"}, "another table of levels"
    assert {p.name for p in (cfg.out / "levels").iterdir()} == {f"{name}.{kind}" for name in ("loose", "strict") for kind in ("csv", "parquet")}, "tables of levels that are no more are gone"
    (raw / "letterbox.mp4").unlink(); (raw / "film-001.mp4").rename(raw / "other.mp4")
    again, clips = change()
    assert {item for stage, item in again if stage != "write"} == {"other.mp4"} and clips == {f"{item}.mp4" for stage, item in again if stage == "write"}
    assert {source_id("letterbox.mp4"), source_id("film-001.mp4")}.isdisjoint(p.name.rpartition("_")[0] for p in (cfg.out / "clips").iterdir()), "clips of sources that are gone are gone"
    curate(fresh := replace(cfg, out=tmp_path / "fresh"))
    same(cfg.out, fresh)
    again, clips = change(shots=ShotConfig(border_level=27.0, crf=30))
    assert {stage for stage, _ in again} == {"write"} and clips == {p.name for p in (cfg.out / "clips").iterdir()}, "another quality: all clips and nothing else"
    monkeypatch.setattr("opensora_nb.data.curate.WRITE", replace(WRITE, version=2))
    again, clips = change()
    assert {stage for stage, _ in again} == {"write"} and clips == {p.name for p in (cfg.out / "clips").iterdir()}, "a release that writes clips otherwise"

def test_patterns_decide_by_source_and_a_second_thought_is_cheap(few, tmp_path):
    cfg = replace(few[0], out=tmp_path / "out")
    some = curate(replace(cfg, filters=FilterConfig(allow=("film*", "photo*"), deny=("*-001.*",))))
    said = {r["source"]: r["reason"] for r in some.iter_rows(named=True)}
    assert {n for n, reason in said.items() if reason == "source"} == set(FEW) - {"film-000.mp4", "photo-000.jpg", "photo-copy.jpg"}
    assert set(some.filter(pl.col("reason") == "source")["status"]) == {"rejected"} and some.filter(pl.col("status") == "kept")["source"].to_list() == ["film-000.mp4", "photo-000.jpg"]
    surveyed = {k: v for k, v in books(cfg.out, tmp_path / "books").items() if k[0] == "survey"}
    curate(cfg)
    assert {k: v for k, v in books(cfg.out, tmp_path / "books").items() if k in surveyed} == surveyed and len(surveyed) == 3
    same(cfg.out, few[0])

def test_same_names_in_two_folders_do_not_meet(footage, tmp_path):
    for folder in ("a", "b"): fill(tmp_path / "raw" / folder, footage, ("film-000.mp4",)); (tmp_path / "raw" / folder / "film-000.mp4").rename(tmp_path / "raw" / folder / "x.mp4")
    cfg = CurateConfig(tmp_path / "raw", tmp_path / "raw" / "out", duplicates=DuplicateConfig(enabled=False), ocr=BLIND, progress=False)          # the output may lie inside
    manifest = curate(cfg)
    assert manifest["source"].to_list() == ["a/x.mp4", "b/x.mp4"] and set(manifest["status"]) == {"kept"} and manifest["clip_id"].is_unique().all()
    assert curate(cfg).equals(manifest), "clips are not taken for sources"

# ---- tables to train on

def test_levels_come_as_tables_that_training_reads(few, tmp_path):
    table = open_levels(tmp_path / "levels.csv", replace(LEVELS[0], min_aesthetic=None), replace(LEVELS[1], min_side=140, min_aesthetic=None, max_motion=7.0))
    cfg = replace(few[0], out=tmp_path / "out", levels=table)
    shutil.copytree(few[0].out, cfg.out)                                          # scored already
    manifest = curate(cfg)
    sizes = []
    for number, name in enumerate(("256px", "768px"), 1):
        there = manifest.filter(pl.col("level") >= number)["clip_id"].to_list()
        full, flat = cfg.out / "levels" / f"{name}.parquet", cfg.out / "levels" / f"{name}.csv"
        assert read_manifest(full)["clip_id"].to_list() == there and all((full.parent / p).is_file() for p in read_manifest(full)["path"])
        assert pl.read_csv(flat).columns[: len(RELEASE_COLUMNS)] == list(RELEASE_COLUMNS) and read_release_table(flat).height == len(there)
        for path in (full, flat):
            clips = read_clips(path)
            assert clips.height == len(there) and all(Path(p).is_file() and Path(p).is_absolute() for p in clips["path"])
        assert read_clips(flat).select("num_frames", "height", "width").rows() == read_clips(full).select("num_frames", "height", "width").rows()
        sizes.append(len(there))
    assert sizes[0] > sizes[1] > 0 and 1 in read_clips(flat)["num_frames"]
    with pytest.raises(UserError, match="no clip to train on") as error: read_clips(few[0].out / "levels" / "768px.csv")
    assert "\n" not in str(error.value)

def test_a_table_of_the_release_trains_here_unchanged(few, tmp_path):
    rows = few[1].filter(pl.col("status") == "kept", pl.col("num_frames") > 1)
    with open(tmp_path / "theirs.csv", "w") as f:
        print("path,text,num_frames,height,width,aspect_ratio,resolution,fps", file=f)
        for r in rows.iter_rows(named=True): print(f'{few[0].out / r["path"]},"a ball, red",{r["num_frames"]},{r["height"]},{r["width"]},{r["aspect_ratio"]},{r["height"] * r["width"]},{r["fps"]}', file=f)
    clips = read_clips(tmp_path / "theirs.csv")
    assert clips["path"].to_list() == [str(few[0].out / p) for p in rows["path"]] and set(clips["text"]) == {"a ball, red"}
    cache = curated_cache(tmp_path / "theirs.csv", size=32, num_frames=16, progress=False)
    assert len(cache.captions) >= rows.height and {tuple(c) for c in cache.captions} == {("a ball, red",)}

# ---- hostile folders

NAMES = [b"two words.mp4", b"quo'te\".mp4", b"line\nbreak.mp4", b"-i.mp4", b"--out=x.mp4", b"\xff\xfe.mp4", "\N{CLAPPER BOARD}.mp4".encode(), b"%05d.mp4", b"http:x.mp4", b"a,b;c|d.mp4", b"x" * 240 + b".mp4",
         b"tab\t.jpg", b"-.jpg", b"\xe9t\xe9.jpg", b"$(touch hacked).jpg", b"con\r.jpg"]

def test_hostile_names_are_names_like_others(footage, tmp_path, monkeypatch):
    raw = tmp_path / "raw"; raw.mkdir(); monkeypatch.chdir(tmp_path)
    for name in NAMES: shutil.copy(footage[0] / ("film-000.mp4" if name.endswith(b"mp4") else "photo-000.jpg"), os.fsencode(raw) + b"/" + name)
    (raw / "- a 'folder'\n").mkdir(); shutil.copy(footage[0] / "photo-000.jpg", raw / "- a 'folder'\n" / "x.jpg")
    cfg = CurateConfig(raw, tmp_path / "out", duplicates=DuplicateConfig(enabled=False), ocr=BLIND, workers=2, progress=False)
    manifest = curate(cfg)
    assert manifest.height == len(NAMES) + 1 and set(manifest["status"]) == {"kept"} and manifest["clip_id"].is_unique().all()
    assert all(p.isascii() and " " not in p and (cfg.out / p).is_file() for p in manifest["path"]) and len(read_clips(cfg.out / "levels" / "256px.csv")) == manifest.height
    assert {p.name for p in tmp_path.iterdir()} == {"raw", "out"} and curate(cfg).equals(manifest)

def test_nothing_outside_the_folder_is_read_and_nothing_waits(footage, tmp_path):
    raw, secret = fill(tmp_path / "raw", footage, ("film-000.mp4",)), fill(tmp_path / "secret", footage, ("film-001.mp4", "photo-000.jpg"))
    (raw / "file.mp4").symlink_to(secret / "film-001.mp4"); (raw / "picture.jpg").symlink_to("../secret/photo-000.jpg"); (raw / "folder").symlink_to(secret)
    (raw / "inside.mp4").symlink_to("film-000.mp4"); (raw / "loop.mp4").symlink_to("loop.mp4"); (raw / "ping.jpg").symlink_to("pong.jpg"); (raw / "pong.jpg").symlink_to("ping.jpg")
    (raw / "round").symlink_to("."); (raw / "nowhere.mp4").symlink_to("lost.mp4"); (raw / "roundabout").symlink_to("roundabout"); (raw / "device.mp4").symlink_to("/dev/zero")
    os.mkfifo(raw / "pipe.mp4"); os.mkfifo(raw / "pipe.jpg"); (raw / "a folder.mp4").mkdir()
    (raw / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{secret / 'film-001.mp4'}'\n"); (raw / "hls.mp4").write_text(f"#EXTM3U\n#EXTINF:10,\n{secret / 'film-001.mp4'}\n#EXT-X-ENDLIST\n")
    (raw / ".hidden.mp4").write_bytes(b"not looked at")
    manifest = curate(CurateConfig(raw, tmp_path / "out", ocr=BLIND, progress=False))
    said = {r["source"]: r["reason"] for r in manifest.iter_rows(named=True)}
    same_film = {said.pop("film-000.mp4"), said.pop("inside.mp4")}
    assert same_film == {None, "duplicate"}
    assert said == {"file.mp4": "outside", "picture.jpg": "outside", "folder": "outside", "device.mp4": "outside", "loop.mp4": "unreadable", "ping.jpg": "unreadable", "pong.jpg": "unreadable", "nowhere.mp4": "unreadable",
                    "pipe.mp4": "unreadable", "pipe.jpg": "unreadable", "list.mp4": "playlist", "hls.mp4": "playlist"}

def test_a_file_that_breaks_halfway_leaves_a_row_and_no_clip(footage, tmp_path):
    raw = fill(tmp_path / "raw", footage, ("film-000.mp4",))
    data = bytearray((footage[0] / next(r for r in footage[1] if r["defect"] is None and len(r["shots"]) > 1)["file"]).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (raw / "film.mp4").write_bytes(data)
    manifest = curate(CurateConfig(raw, tmp_path / "out", ocr=BLIND, progress=False))
    assert manifest.filter(pl.col("source") == "film.mp4").select("status", "reason").rows() == [("failed", "broken")]
    assert [p.name for p in (tmp_path / "out" / "clips").iterdir()] == [take_id("film-000.mp4", 0) + ".mp4"]

@pytest.mark.parametrize("name", ["film-000.mp4", "photo-000.jpg"])
def test_one_file_alone_is_enough(footage, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path); shutil.copy(footage[0] / name, name)
    assert main(["curate", name, "--out", "out", "--no-progress"]) == 0
    assert read_manifest("out").select("source", "status").rows() == [(name, "kept")] and "manifest.parquet" in capsys.readouterr().out

def test_one_bad_file_alone_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); Path("notes.mp4").write_text("milk\n")
    assert main(["curate", "notes.mp4", "--out", "out", "--no-progress"]) == 0
    assert read_manifest("out").select("source", "status", "reason").rows() == [("notes.mp4", "failed", "foreign")] and "1 foreign" in capsys.readouterr().out

@pytest.mark.parametrize("args, words", [(["nowhere", "--out", "out"], "no such folder"), (["empty", "--out", "out"], "no videos"), (["empty", "--out", "empty"], "at once"), (["notes.txt", "--out", "out"], "neither"),
                                         (["raw", "--out", "out", "--levels", "none.csv"], "no such"), (["raw", "--out", "out", "--levels", "notes.txt"], "notes.txt"), (["raw", "--out", "out", "--levels", "looser.csv"], "looser"),
                                         (["raw", "--out", "notes.txt"], "notes.txt")])
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path); Path("empty").mkdir(); Path("raw").mkdir(); Path("raw/x.mp4").write_bytes(b""); Path("notes.txt").write_text("milk\n")
    Path("looser.csv").write_text("name,min_motion\na,2\nb,1\n")
    assert main(["curate", *args, "--no-progress"]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and "\n" not in err and not (tmp_path / "out").exists(), err

def test_clips_are_never_their_own_source(few, tmp_path, capsys):
    "The clips of a curated folder given as source, with the same folder as output: they would be removed as clips that nobody wants."
    out = tmp_path / "out"; shutil.copytree(few[0].out, out)
    for src in (out / "clips", out / "levels", next((out / "clips").iterdir())):
        assert main(["curate", str(src), "--out", str(out), "--no-progress"]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    same(out, few[0])

@needs_proc
def test_two_workers_write_the_same_bytes_and_a_second_run_in_the_folder_is_refused_meanwhile(few, tmp_path, capsys):
    cfg = replace(few[0], out=tmp_path / "out")
    run = start(cfg, "--workers", 2)
    assert until(lambda: books(cfg.out, tmp_path / "books"), run)
    assert main(typed(cfg)[3:]) == 2
    err = capsys.readouterr().err.strip()
    assert "in use" in err and "\n" not in err
    run.communicate(timeout=LONG)
    assert run.returncode == 0
    same(cfg.out, few[0])

@pytest.fixture
def small_disk(tmp_path):
    "A file system of 400 kB, where the machine allows to make one, and how to enlarge it."
    disk = tmp_path / "disk"; disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)], capture_output=True).returncode: pytest.skip("no file system can be mounted here")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    subprocess.run(["umount", "-l", str(disk)], check=True)

def test_a_full_disk_stops_the_run_and_blames_no_file(few, small_disk, tmp_path, capsys):
    disk, enlarge = small_disk
    args = typed(replace(few[0], out=disk / "out"))[3:]
    (disk / "ballast").write_bytes(bytes(180_000))
    assert main(args) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and str(disk) in err, err
    known = books(disk / "out", tmp_path / "books")
    enlarge()
    assert main(args) == 0 and not redone(books(disk / "out", tmp_path / "books"), known) and known
    same(disk / "out", few[0])

def test_a_file_in_the_place_of_clips_blames_no_source(few, tmp_path, capsys):
    out = tmp_path / "out"; out.mkdir(); (out / "clips").write_text("not a folder\n")
    args = typed(replace(few[0], out=out))[3:]
    assert main(args) == 2
    err = capsys.readouterr().err.strip()
    assert "clips" in err and "\n" not in err and (out / "clips").read_text() == "not a folder\n", err
    (out / "clips").unlink()
    assert main(args) == 0
    same(out, few[0])

# ---- size

PEAK = """
import resource, sys
from pathlib import Path
from opensora_nb.data.curate import curate_to_disk
from opensora_nb.data.stages import CurateConfig
curate_to_disk(CurateConfig(Path(sys.argv[1]), Path(sys.argv[2]), progress=False))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""

def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    peaks = []
    for count in (300, 3000):
        raw = tmp_path / f"raw-{count}"
        for k in range(count):
            folder = raw / f"{k // 500:02d}"
            if k % 500 == 0: folder.mkdir(parents=True)
            (folder / f"a rather long name of a film that nobody will ever look at, number {k:06d}.mp4").write_bytes(b"")
        said = subprocess.run([sys.executable, "-c", PEAK, raw, tmp_path / f"out-{count}"], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert read_manifest(tmp_path / f"out-{count}").height == count
        peaks.append(int(said.stdout) / 1e6)
    assert peaks[1] - peaks[0] < 60, f"{peaks[0]:.0f} MB, then {peaks[1]:.0f} MB"

# ---- footage

@pytest.mark.parametrize("defects", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_footage_follows_from_its_seed(tmp_path, defects):
    a, b = (make_footage(tmp_path / name, shots=2, seed=4, size=64, defects=defects, progress=False) for name in "ab")
    assert a == b and files(tmp_path / "a") == files(tmp_path / "b")
    assert make_footage(tmp_path / "c", shots=2, seed=5, size=64, defects=False, progress=False) != a
    with pytest.raises(UserError, match="other footage"): make_footage(tmp_path / "a", shots=3, seed=4, size=64, progress=False)

def test_without_a_network_the_sample_clips_are_one_clear_line(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"): monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1"); monkeypatch.setenv("PIP_FIND_LINKS", ""); monkeypatch.setenv("PIP_NO_CACHE_DIR", "1"); monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(UserError, match="cannot fetch the sample clips") as error: sample_clips(tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.mp4"))

def test_reasons_are_single_words():
    assert all(r.isalpha() and r.islower() for r in REASONS) and source_id("ä/ö.mp4").isascii()
