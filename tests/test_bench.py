"`osnb bench curation`: it runs to the end, its scores are equal, and what is missing is a row. No figure about speed is tested."
import json, os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import numpy as np
import pytest
from opensora_nb.data.bench import ALLOWED, Program, bench_equality, differences, find_programs, loop_video, one_pass, our_scores, report, scoring_figure, sweep, with_borders
from opensora_nb.data.footage import sample_clips
from opensora_nb.data.video import iter_frames, probe, read_luma
ROOT = Path(__file__).parents[1]
OSNB = [sys.executable, "-m", "opensora_nb.commands.cli"]
HAVE_FFMPEG = any(p.path for p in find_programs())

def bench(*words, **kwargs): return subprocess.run([*OSNB, "bench", *map(str, words)], capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)

@pytest.mark.slow
@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_pristine"])
def test_a_looped_film_shows_the_same_pictures_again_and_its_clock_goes_on(tmp_path, name):
    clip = sample_clips()[name]
    film, once = loop_video(clip, tmp_path / "film.mp4", 1.5 * probe(clip).duration_s), read_luma(clip)
    again, times = read_luma(film), np.array([t for t, _ in iter_frames(film)])
    assert len(again) == 2 * len(once) and (again[: len(once)] == once).all() and (again[len(once) :] == once).all()
    assert np.allclose(np.diff(times), 1 / probe(clip).fps, atol=2e-3)                # milliseconds of the container's clock

@pytest.mark.skipif(not HAVE_FFMPEG, reason="no FFmpeg program")
def test_a_wrong_score_is_noticed(tmp_path):
    program = next(p for p in find_programs() if p.path)
    ours = our_scores(with_borders(sample_clips()["carphone_pristine"], tmp_path / "a.mp4", rows=24, seconds=1))
    assert all(value <= ALLOWED[score][0] for score, value in differences(ours, program.path).items())
    shifted = type(ours)(ours.path, ours.changes + 0.01, ours.scores, ours.motion + 0.01, ours.content, ours.takes)
    found = differences(shifted, program.path)
    assert found["scene score"] > ALLOWED["scene score"][0] and found["motion"] > ALLOWED["motion"][0] and found["borders"] <= 2

@pytest.mark.slow
def test_the_clock_leaves_the_start_of_workers_out_and_results_keep_their_order():
    clips = [(str(sample_clips()[name]),) for name in ("bikes", "carphone_pristine", "bikes")]
    swept = sweep(one_pass, clips, clips[1], workers=2)
    assert swept.results == [one_pass(*c) for c in clips] and swept.seconds > 0 and swept.cpu_seconds > 0

def test_a_broken_file_is_an_error_and_no_figure(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 500)
    with pytest.raises(Exception, match="broken.mp4"): sweep(one_pass, [(str(tmp_path / "broken.mp4"),)], (str(sample_clips()["carphone_pristine"]),), workers=1)

@pytest.mark.slow
@pytest.mark.soak
def test_the_quick_suite_runs_from_the_command_line_and_all_scores_are_equal(tmp_path):
    r = bench("curation", "--quick", "--workers", 1, "--out", tmp_path / "new" / "figures.json")
    assert r.returncode == 0, r.stderr
    result = json.loads((tmp_path / "new" / "figures.json").read_text())
    check_schema(result)
    assert report(result) in r.stdout and str(tmp_path) not in json.dumps({k: v for k, v in result.items() if k != "command"})
    assert all(row["equal"] for row in result["equality"])
    if HAVE_FFMPEG: assert {row["score"] for row in result["equality"]} >= {"scene score", "motion", "borders", "blur"}

@pytest.mark.soak
@pytest.mark.slow
def test_what_is_missing_becomes_a_row_that_says_so(tmp_path):
    code = "import sys; sys.modules['scenedetect'] = sys.modules['ray'] = None; from opensora_nb.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    r = subprocess.run([sys.executable, "-c", code, "bench", "curation", "--quick", "--workers", "1", "--out", tmp_path / "a.json"], capture_output=True, text=True,
                       env={**os.environ, "PATH": str(tmp_path), "IMAGEIO_FFMPEG_EXE": str(tmp_path / "no-such-program")})
    assert r.returncode == 0, r.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["ray"] == {"missing": "not installed"} and result["equality"] == []
    assert all(a == {"missing": "not installed"} for a in result["scoring"]["against"].values())
    assert [t["what"] for t in result["scoring"]["tools"] if "missing" not in t] == ["blur"] and result["scoring"]["ours"]["best_s"] > 0
    assert r.stdout.count("not installed") >= 10

def check_schema(result):
    assert {"suite", "date", "command", "machine", "programs", "settings", "material", "scoring", "ray", "equality", "memory"} == result.keys() and result["suite"] == "curation"
    assert result["machine"]["cpu"] and result["machine"]["cores"] >= 1 and {"av", "cv2", "numpy", "scenedetect", "ray"} == result["machine"]["versions"].keys()
    scoring, repetitions = result["scoring"], result["settings"]["repetitions"]
    assert len(scoring["others_share"]) == repetitions <= len(scoring["ours"]["seconds"]["many"]) and len(scoring["tools"]) == 8
    for tool in scoring["tools"]: assert "missing" in tool or tool["best_way"] in tool["seconds"] and all(t > 0 for times in tool["seconds"].values() for t in times)
    for a in scoring["against"].values():
        if "missing" not in a: assert a["ratio"] == pytest.approx(a["seconds"] / scoring["ours"]["best_s"])
    for row in result["equality"]: assert row["equal"] == (row["largest_difference"] <= row["allowed"])
    for w in result["memory"]["worker"]: assert w["difference_mb"] == pytest.approx(w["long"]["peak_mb"] - w["short"]["peak_mb"]) and w["long"]["frames"] > w["short"]["frames"]
    many = result["memory"]["main"]["many"]
    assert 0.49 * many["files"] <= many["kept"] <= many["files"] / 2                  # half are broken; of the pictures some few may be alike by chance
    if find_spec("ray") and "missing" not in result["ray"]: assert len(result["ray"]["seconds"]["ray"]) == len(result["ray"]["seconds"]["processes"]) and repetitions >= 1

def test_the_record_that_the_page_shows_is_whole_and_says_where_it_was_made():
    result = json.loads((ROOT / "assets/bench/curation.json").read_text())
    check_schema(result)
    assert result["command"].startswith("osnb bench curation") and "--quick" not in result["command"] and result["settings"]["repetitions"] >= 3
    assert all(row["equal"] for row in result["equality"]) and report(result)

@pytest.mark.parametrize("words, why", [(("curation", "--out", "."), "is a folder"), (("curation", "--repetitions", "0"), "must be positive"), (("curation", "--workers", "0"), "must be positive")])
def test_what_the_user_can_mend_is_said_in_one_line_before_anything_is_measured(words, why):
    r = bench(*words)
    assert r.returncode == 2 and why in r.stderr and r.stderr.count("\n") == 1
