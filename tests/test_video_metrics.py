"Six metrics of a clip: they see the damage they are for, refuse what is no clip, and VBench is called as it wants to be."
import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from opensora_nb.cluster.files import UserError
from opensora_nb.data.world import render, world_truth
from opensora_nb.evaluation.metrics import (DAMAGE, METRICS, STANDIN_SCALE, STANDINS, VBENCH_FILES, VBENCH_SCALE, VBenchConfig, agreement, checked, damaged, dynamic_degree, frames_between, imaging_quality,
                                            kendall, motion_smoothness, read_vbench, subject_consistency, vbench_clips, vbench_command, vbench_folder, vbench_verifiers)

TRUTH = world_truth(3, 5)
ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope="module")
def clip(): return render(TRUTH, num_frames=16)


@pytest.mark.parametrize("kind", [k for k in DAMAGE if k not in ("dropped frames", "background swap")])
def test_a_metric_falls_with_the_damage_it_is_for(kind):
    scores = [STANDINS[DAMAGE[kind]](damaged(TRUTH, kind, s, num_frames=16)) for s in (0, 0.4, 1)]
    assert scores[0] > scores[1] > scores[2]

def test_scores_are_between_0_and_1_whatever_the_clip(clip):
    rng = np.random.default_rng(0)
    for x in (clip, np.zeros_like(clip), np.full_like(clip, 255), rng.integers(0, 256, (5, 48, 80, 3), dtype=np.uint8), clip[:3, :16, :16]):
        for name, metric in STANDINS.items(): assert 0 <= metric(x) <= 1, name

def test_a_still_clip_is_consistent_smooth_and_without_motion(clip):
    still = np.repeat(clip[3:4], 6, 0)
    assert STANDINS["subject_consistency"](still) > 0.9999 and STANDINS["background_consistency"](still) > 0.9999 and motion_smoothness(still) == 1 and dynamic_degree(still) < 0.01

def test_motion_of_known_speed_is_half_at_vbenchs_threshold():
    rng = np.random.default_rng(1)
    wide = cv2.GaussianBlur(rng.integers(0, 256, (128, 512, 3)).astype(np.float32), (0, 0), 3)
    wide = np.clip((wide - wide.mean()) * 8 + 128, 0, 255).astype(np.uint8)
    slide = lambda pixels: np.stack([wide[:, 40 + round(i * pixels) : 168 + round(i * pixels)] for i in range(13)])
    assert dynamic_degree(slide(1)) == pytest.approx(0.5, abs=0.03)                   # 3 px from one eighth of a second to the next; the threshold is 6 of 256, at 128 px
    assert dynamic_degree(slide(2)) == pytest.approx(2 / 3, abs=0.05)
    assert dynamic_degree(slide(1), fps=8) == pytest.approx(1 / 4, abs=0.03)          # then 1 px
    assert motion_smoothness(slide(2)) > 0.98 and np.abs(frames_between(slide(2))[:, 16:-16, 16:-16] - slide(2)[1:-1:2, 16:-16, 16:-16]).mean() < 2

def test_a_swapped_subject_is_seen_by_the_subjects_metric_and_order_matters(clip):
    swapped = damaged(TRUTH, "identity swap", 1.0, num_frames=16)
    assert subject_consistency(swapped) < subject_consistency(clip)
    assert np.array_equal(swapped[:8], clip[:8]) and not np.array_equal(swapped[8:], clip[8:])

def test_black_and_white_holes_cost_picture_quality(clip):
    burnt = clip.copy(); burnt[:, :32] = 255
    assert imaging_quality(burnt) < imaging_quality(clip)

def test_kendall_counts_pairs():
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6) and kendall([1, 2], [2, 2]) == 0
    with pytest.raises(ValueError, match="same two or more"): kendall([1], [1])

def test_agreement_of_a_perfect_a_reversed_and_a_blind_metric():
    calls = {"down": 0, "up": 0}
    def ranks(name, sign):                                                            # strengths come in order, three of each
        def metric(clip): calls[name] += 1; return sign * float((calls[name] - 1) % 3)
        return metric
    result = agreement(dict(down=ranks("down", -1), up=ranks("up", 1), blind=lambda clip: 1.0), [world_truth(3, i) for i in (0, 1)], (0, 0.5, 1), num_frames=4)
    for name, tau in (("down", 1), ("up", -1), ("blind", 0)):
        for part in ("within", "worst", "across"): assert all(v == pytest.approx(tau) for v in result[part][name].values()), (name, part)
    assert result["clips"] == 2 and all(np.shape(result["scores"]["down"][k]) == (2, 3) for k in DAMAGE)

@pytest.mark.parametrize("bad, words", [(np.zeros((4, 32, 32, 3)), "uint8"), (np.zeros((4, 32, 32), np.uint8), "T, H, W, 3"), (np.zeros((2, 32, 32, 3), np.uint8), "at least 3 frames"), (np.zeros((4, 8, 32, 3), np.uint8), "16 x 16"),
    (np.zeros((4, 32, 32, 4), np.uint8), "T, H, W, 3"), ("clip.mp4", "got str"), (None, "NoneType")])
def test_what_is_no_clip_is_one_line(bad, words):
    for metric in (checked, *STANDINS.values()):
        with pytest.raises(UserError, match=words) as e: metric(bad)
        assert "\n" not in str(e.value)

def test_unknown_damage_is_said(): pytest.raises(ValueError, damaged, TRUTH, "rust", 0.5).match("unknown damage 'rust'")

def test_both_back_ends_have_the_six_and_a_scale_for_each():
    assert set(METRICS) == set(STANDINS) == set(STANDIN_SCALE) == set(VBENCH_SCALE) == set(VBENCH_FILES) == set(DAMAGE.values())


@pytest.fixture
def vbench(tmp_path):
    "An environment whose Python is this one, and a `vbench` package that writes what VBench 0.1.5 writes; weights are empty files."
    for files in VBENCH_FILES.values():
        for f in files: (tmp_path / "weights" / f).parent.mkdir(parents=True, exist_ok=True); (tmp_path / "weights" / f).touch()
    (tmp_path / "site/vbench").mkdir(parents=True); (tmp_path / "site/torchvision").mkdir()
    (tmp_path / "site/torchvision/__init__.py").write_text("import torch\nif not hasattr(torch.ops.torchvision, 'nms'): raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "site/vbench/__init__.py").write_text("""
import json, os, torchvision
class VBench:
    def __init__(self, device, full_info_dir, output_path): self.out = output_path
    def evaluate(self, videos_path, name, dimension_list, local, mode):
        assert local and mode == "custom_input" and os.environ["VBENCH_CACHE_DIR"].endswith("weights")
        files = sorted(os.path.join(videos_path, f) for f in os.listdir(videos_path))
        value = {"imaging_quality": 70.0, "dynamic_degree": True}
        rows = {d: [0, [dict(video_path=f, video_results=value.get(d, os.path.getsize(f) / 1e6)) for f in files]] for d in dimension_list}
        json.dump(rows, open(os.path.join(self.out, name + "_eval_results.json"), "w"))
""")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/site" exec "{sys.executable}" "$@"\n'); python.chmod(0o755)
    return VBenchConfig(python=python, weights=tmp_path / "weights", device="cpu", timeout_s=120)

def test_vbench_measures_a_batch_in_one_process_and_its_numbers_become_0_to_1(vbench, clip):
    scores = vbench_clips([clip, clip[:4]], ("imaging_quality", "dynamic_degree", "motion_smoothness"), vbench)
    assert len(scores) == 2 and scores[0]["imaging_quality"] == 0.7 and scores[1]["dynamic_degree"] == 1.0
    assert scores[0]["motion_smoothness"] > scores[1]["motion_smoothness"]              # by the file's size: clips keep their order

def test_what_vbench_says_when_it_fails_or_hangs_is_one_line(vbench, clip, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'Traceback (most recent call last):' >&2\necho 'OSError: weights are broken' >&2\nexit 1\n"); broken.chmod(0o755)
    with pytest.raises(UserError, match="VBench failed .code 1.: OSError: weights are broken") as e: vbench_verifiers(["imaging_quality"], replace(vbench, python=broken))["imaging_quality"](clip)
    assert "\n" not in str(e.value)
    broken.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(UserError, match="did not end within"): vbench_clips([clip], ["imaging_quality"], replace(vbench, python=broken, timeout_s=0.3))

def test_vbenchs_command_and_what_is_missing(vbench, tmp_path):
    command = vbench_command(tmp_path, tmp_path / "out", ["dynamic_degree"], vbench)
    assert command[0] == str(vbench.python) and json.loads(command[3]) == [str(tmp_path), str(tmp_path / "out"), ["dynamic_degree"], True, "cpu"]
    compile(command[2], "child", "exec")
    for cfg, words in ((replace(vbench, python=tmp_path / "nowhere"), "make vbench"), (replace(vbench, weights=tmp_path / "none"), "lacks 1 weight files, first raft_model")):
        with pytest.raises(UserError, match=words): vbench_command(tmp_path, tmp_path, ["dynamic_degree"], cfg)
    assert vbench_command(tmp_path, tmp_path, ["dynamic_degree"], replace(vbench, weights=tmp_path / "none", download=True))
    with pytest.raises(UserError, match="unknown metric 'beauty'"): vbench_command(tmp_path, tmp_path, ["beauty"], vbench)
    with pytest.raises(UserError, match="no .mp4 files"): vbench_folder(tmp_path, ["dynamic_degree"], vbench)

def test_vbenchs_result_is_read_by_file_and_metric():
    written = {"subject_consistency": [0.9, [{"video_path": "/x/b.mp4", "video_results": 0.9}]], "imaging_quality": [0.5, [{"video_path": "/x/b.mp4", "video_results": 50.0}]]}
    assert read_vbench(written) == {"b.mp4": dict(subject_consistency=0.9, imaging_quality=0.5)}

def test_the_published_agreement_is_of_these_metrics():
    stored = json.loads((ROOT / "assets/scaling/agreement.json").read_text())
    truth = world_truth(2, 0)
    for kind in ("blur", "jitter"):
        now = [STANDINS[DAMAGE[kind]](damaged(truth, kind, s)) for s in stored["strengths"]]
        assert np.allclose(now, stored["scores"][DAMAGE[kind]][kind][0], atol=2e-3)
