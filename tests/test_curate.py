"Curation: right verdicts, complete books, and nothing lost or half-written."
import os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, polars as pl, pytest
from opensora_nb.cluster.files import UserError
from opensora_nb.commands.cli import main
from opensora_nb.data import curate as module
from opensora_nb.data.curate import CurateConfig, curate, find_videos, funnel, source_id
from opensora_nb.data.footage import caption_from_truth, make_footage, sample_clips
from opensora_nb.data.manifest import COLUMNS, REASONS, read_manifest
from opensora_nb.data.scores import MotionRange
from opensora_nb.data.video import decode, probe
from opensora_nb.data.world import FPS

pytestmark = pytest.mark.slow        # real processes and files: half a minute

@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return folder, make_footage(folder, shots=6, seed=2, progress=False)

@pytest.fixture(scope="module")
def done(footage, tmp_path_factory):
    cfg = CurateConfig(footage[0], tmp_path_factory.mktemp("curated"), progress=False)
    return cfg, curate(cfg)

def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
def typed(*args): return [sys.executable, "-m", "opensora_nb.commands.cli", "curate", *map(str, args)]

def test_every_verdict_is_the_known_truth(footage, done):
    for r in footage[1]:
        rows = done[1].filter(pl.col("source") == r["file"])
        assert set(rows["reason"]) == {r["reason"]}, (r["file"], rows["reason"].to_list())
        assert set(rows["status"]) == {"kept" if r["reason"] is None else "failed" if r["reason"] in ("empty", "foreign", "truncated", "broken", "streamless") else "rejected"}

def test_clean_films_come_back_as_their_shots(footage, done):
    for r in (r for r in footage[1] if r["defect"] in (None, "trailer")):
        rows = done[1].filter(pl.col("source") == r["file"])
        assert [(round(a * FPS), round(b * FPS)) for a, b in rows.select("start_s", "end_s").rows()] == [(round(s["start_s"] * FPS), round(s["end_s"] * FPS)) for s in r["shots"]]

def test_the_manifest_tells_what_the_clips_are(done):
    cfg, manifest = done
    kept = manifest.filter(pl.col("status") == "kept")
    assert manifest.columns == list(COLUMNS) and read_manifest(cfg.out).equals(manifest) and manifest["clip_id"].is_unique().all()
    assert {p.name for p in (cfg.out / "clips").iterdir()} == {Path(p).name for p in kept["path"]} and manifest.filter(pl.col("status") != "kept")["path"].null_count() == manifest.height - kept.height
    for row in kept.iter_rows(named=True):
        clip = probe(cfg.out / row["path"])
        assert (clip.height, clip.width, clip.num_frames, clip.fps) == tuple(row[k] for k in ("height", "width", "num_frames", "fps")) and clip.codec == "h264"
        assert 2 <= row["duration_s"] <= 8.05 and 0.5 <= row["score_vmafmotion"] <= 20 and row["aspect_ratio"] == clip.height / clip.width
    later = ("score_aesthetic", "score_blur", "blurry", "score_ocr", "score_jitter", "text", "level")
    assert all(manifest[c].null_count() == manifest.height for c in later), "not measured is null"
    assert not any(str(cfg.src) in str(v) for row in manifest.rows() for v in row), "no path of this machine"

def test_clips_hold_the_pictures_of_their_seconds(footage, done):
    cfg, manifest = done
    for row in manifest.filter(pl.col("status") == "kept", pl.col("source").str.starts_with("film")).head(3).iter_rows(named=True):
        assert np.abs(decode(cfg.out / row["path"]).astype(int) - decode(footage[0] / row["source"], row["start_s"], row["end_s"])).mean((1, 2, 3)).max() < 8

def test_borders_go_and_long_shots_are_divided(footage, done):
    box = next(r["box"] for r in footage[1] if r["defect"] == "letterbox")
    row = done[1].filter(pl.col("source") == "letterbox.mp4").row(0, named=True)
    assert (row["height"], row["width"]) == tuple(box[2:])
    assert done[1].filter(pl.col("source") == "long.mp4")["duration_s"].round(2).to_list() == [8.0, 2.5]

def test_the_funnel_counts_each_row_once(done):
    steps = funnel(done[1])
    assert sum(sum(lost.values()) for *_, lost in steps) + steps[-1][1] == done[1].height
    assert steps[0][1] == len(find_videos(done[0].src))

def test_kept_pocket_clips_get_their_captions(footage, done):
    kept = caption_from_truth(done[1], footage[0]).filter(pl.col("status") == "kept")
    assert kept["text"].null_count() == 0

def test_a_second_run_does_nothing_and_says_the_same(done, monkeypatch):
    cfg, manifest = done
    before = {p: p.stat().st_mtime_ns for p in (cfg.out / "clips").iterdir()}
    monkeypatch.setattr(module, "curate_file", lambda *_: pytest.fail("a finished file was done again"))
    assert curate(cfg).equals(manifest) and before == {p: p.stat().st_mtime_ns for p in (cfg.out / "clips").iterdir()}

def test_two_workers_write_the_same_bytes(done, tmp_path):
    cfg, manifest = done
    assert curate(replace(cfg, out=tmp_path, workers=2)).equals(manifest)
    assert files(tmp_path) == files(cfg.out)

def test_a_changed_file_or_threshold_is_done_again(footage, tmp_path):
    raw = tmp_path / "raw"; raw.mkdir()
    for name in ("film-000.mp4", "frozen.mp4", "nothing.mp4"): (raw / name).write_bytes((footage[0] / name).read_bytes())
    cfg = CurateConfig(raw, tmp_path / "out", progress=False)
    first = curate(cfg)
    (raw / "nothing.mp4").write_bytes((raw / "film-000.mp4").read_bytes())
    second = curate(cfg)
    assert set(second.filter(pl.col("source") == "nothing.mp4")["status"]) == {"kept"} and second.filter(pl.col("source") != "nothing.mp4").equals(first.filter(pl.col("source") != "nothing.mp4"))
    third = curate(replace(cfg, motion=MotionRange(low=0.01, high=0.5)))
    assert third.filter(pl.col("status") == "kept")["source"].to_list() == ["frozen.mp4"]
    assert len(list((tmp_path / "out" / "clips").iterdir())) == 1, "clips that are out of date are gone"
    (raw / "frozen.mp4").unlink()
    assert "frozen.mp4" not in set(curate(cfg)["source"])

def test_same_names_in_two_folders_do_not_meet(footage, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        (tmp_path / "raw" / folder / "x.mp4").write_bytes((footage[0] / "film-000.mp4").read_bytes())
    manifest = curate(CurateConfig(tmp_path / "raw", tmp_path / "raw" / "out", progress=False))          # the output may lie inside
    assert set(manifest["source"]) == {"a/x.mp4", "b/x.mp4"} and manifest["clip_id"].is_unique().all()
    assert curate(CurateConfig(tmp_path / "raw", tmp_path / "raw" / "out", progress=False)).equals(manifest), "clips are not taken for sources"

def test_a_file_that_breaks_halfway_leaves_a_row_and_no_clip(footage, tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    film = next(r for r in footage[1] if len(r["shots"]) > 1)["file"]
    data = bytearray((footage[0] / film).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (tmp_path / "raw" / "film.mp4").write_bytes(data)
    (tmp_path / "raw" / "good.mp4").write_bytes((footage[0] / "film-000.mp4").read_bytes())
    manifest = curate(CurateConfig(tmp_path / "raw", tmp_path / "out", progress=False))
    assert manifest.filter(pl.col("source") == "film.mp4").select("status", "reason").rows() == [("failed", "broken")]
    assert all("good" in p.name for p in (tmp_path / "out" / "clips").iterdir())

def test_an_interrupted_run_goes_on_where_it_stopped(footage, done, tmp_path):
    out = tmp_path / "out"
    run = subprocess.Popen(typed(footage[0], "--out", out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while len(list(out.glob("records/*.json"))) < 6 and time.time() < deadline: time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    records = {p: p.stat().st_mtime_ns for p in out.glob("records/*.json")}
    assert run.returncode == 130 and "Traceback" not in err and "run the same command again" in err and f"{len(records)} of {len(footage[1])} files" in err
    assert 6 <= len(records) < len(footage[1]) and not (out / "manifest.parquet").exists()
    assert not [p for p in out.rglob(".*")], "nothing half-written"
    for p in (out / "clips").glob("*"): probe(p)
    assert subprocess.run(typed(footage[0], "--out", out), capture_output=True).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in records} == records, "what was done was not done again"
    assert files(out) == files(done[0].out), "as if nothing had happened"

def test_an_interrupted_run_of_two_workers_ends_quietly(footage, tmp_path):
    run = subprocess.Popen(typed(footage[0], "--out", tmp_path, "--workers", "2"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 120
    while not list(tmp_path.glob("records/*.json")) and run.poll() is None and time.time() < deadline: time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)                                      # as a terminal does: to all of them
    _, err = run.communicate(timeout=120)
    assert run.returncode in (0, 130) and "Traceback" not in err and not [p for p in tmp_path.rglob(".*")]

@pytest.mark.parametrize("args, words", [(["nowhere", "--out", "out"], "no such folder"), (["empty", "--out", "out"], "no videos"), (["empty", "--out", "empty"], "at once")])
def test_nothing_to_do_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path); (tmp_path / "empty").mkdir()
    assert main(["curate", *args]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and "\n" not in err and not (tmp_path / "out").exists()

def test_one_bad_file_alone_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); Path("notes.mp4").write_text("milk\n")
    assert main(["curate", "notes.mp4", "--out", "out", "--no-progress"]) == 0
    assert read_manifest("out").select("source", "status", "reason").rows() == [("notes.mp4", "failed", "foreign")] and "1 foreign" in capsys.readouterr().out

def test_a_full_disk_stops_the_run_and_blames_no_file(footage, tmp_path, monkeypatch):
    "Writing fails as it does on a full disk; the file in hand is not written down as broken."
    import av, errno
    def full(*_): raise av.error.OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module, "cut_clip", full)
    with pytest.raises(OSError) as error: curate(CurateConfig(footage[0] / "film-000.mp4", tmp_path, progress=False))
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.rglob("*.json")) and not (tmp_path / "manifest.parquet").exists()

def test_footage_follows_from_its_seed(footage, tmp_path):
    a, b = (make_footage(tmp_path / name, shots=2, seed=4, size=64, progress=False) for name in "ab")
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
