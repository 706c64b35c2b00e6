"`osnb bench mmdit`: it runs to the end, outputs and gradients are equal to diffusers', and what cannot run is a row. No figure about speed is tested."
import json, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import pytest, torch

from opensora_nb.mmdit.bench import Case, Diffusers, GPUCase, MMDiTBench, Policy, bench_gpu_case, bench_load, bench_steps, build, differences, inputs, operations, quick, ratio_figure, recomputing, report, steps_figure, train
from opensora_nb.mmdit.model import MMDiTConfig, flux_image, open_sora_v2, pocket
ROOT = Path(__file__).parents[1]
SMALL = quick(MMDiTBench()).cases[0]

@pytest.mark.skipif(not find_spec("diffusers"), reason="diffusers is not installed")
def test_output_and_gradient_are_diffusers_and_a_changed_weight_is_seen():
    model, given = build(SMALL.model), inputs(SMALL)
    theirs = Diffusers(model)
    assert all(value < 1e-4 for value in differences(model, theirs, given).values())
    theirs.net.proj_out.bias = torch.nn.Parameter(theirs.net.proj_out.bias.detach() + 0.1)                # weights are shared, so theirs becomes another one
    assert max(differences(model, theirs, given).values()) > 1e-4

@pytest.mark.parametrize("cfg, tokens, batch", [(pocket(), 64, 2), (MMDiTConfig(hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=2, in_channels=8, context_in_dim=24, vec_in_dim=20), 36, 1)])
def test_operations_are_those_that_pytorch_counts(cfg, tokens, batch):
    from torch.utils.flop_counter import FlopCounterMode
    case = Case("count", cfg, (tokens // 4, 2, 2), batch, 7)
    model, given = build(cfg), inputs(case)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter: model(**given)
    assert operations(cfg, tokens, 7, batch)["all"] * 1e12 == pytest.approx(counter.get_total_flops(), rel=0.01)

def test_the_published_model_needs_what_is_known_of_it():
    needs = operations(open_sora_v2(), 76032)
    assert 2.5e3 < needs["all"] < 10e3 and needs["attention"] > 0.6 * needs["all"] and operations(flux_image(), 4096)["all"] < needs["all"] / 20

def test_recomputed_blocks_give_the_same_gradients_and_are_as_before_afterwards():
    model, given, grads = build(SMALL.model), inputs(SMALL), []
    for policy in (Policy(), Policy(1, 1), Policy(99, 99, keep_attention=False)):
        with recomputing(model, policy): train(model, given)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()])); model.zero_grad()
        assert not any("forward" in vars(m) for m in model.modules())
    assert all(torch.allclose(g, grads[0], atol=1e-6) for g in grads) and "1 double and 1 single blocks recomputed, attention kept" == str(Policy(1, 1))

def test_gpu_rows_are_made_by_the_same_lines_on_any_device_and_a_failure_is_a_row():
    model = build(SMALL.model)
    rows = list(bench_gpu_case(model, SMALL, {"eager": {}, "no such": dict(attention="flash3")}, (Policy(1, 1),), 1, torch.device("cpu"), 0.5, say=lambda line: None))
    assert [r["what"] for r in rows if "missing" not in r] == ["forward", "forward + backward"] and any("missing" in r for r in rows)
    for r in rows:
        json.dumps(r)
        if "missing" not in r: assert r["limit_share"] == pytest.approx(r["operations_1e12"] / r["median_s"] / 0.5)

@pytest.mark.slow
def test_a_checkpoint_is_loaded_without_a_second_copy():
    rows = bench_load(MMDiTConfig(hidden_size=768, num_heads=6, depth=2, depth_single_blocks=6), (1, 3), say=lambda line: None)
    for r in rows: assert r["same"] and r["rise_mb"] < r["weights_mb"] + r["largest_file_mb"] + 60, "the weights and one shard; the rest is what PyTorch itself takes"
    assert rows[1]["largest_file_mb"] < 0.5 * rows[0]["largest_file_mb"]

@pytest.mark.slow
def test_steps_that_cannot_run_here_are_rows():
    rows = bench_steps(SMALL, 1, ways=("torch", "triton"), say=lambda line: None)
    assert all(r["seconds"] > 0 for r in rows if r["way"] == "torch") and (torch.cuda.is_available() or any("need a GPU" in r.get("missing", "") for r in rows if r["way"] == "triton"))

@pytest.mark.slow
@pytest.mark.soak
def test_the_quick_suite_runs_from_the_command_line(tmp_path):
    r = subprocess.run([sys.executable, "-m", "opensora_nb.commands.cli", "bench", "mmdit", "--quick", "--device", "cpu", "--workers", "1", "--out", tmp_path / "figures.json"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    check_schema(result)
    assert report(result) in r.stdout and str(tmp_path) not in json.dumps({k: v for k, v in result.items() if k != "command"})

def check_schema(result):
    assert result["suite"] == "mmdit" and result["machine"]["cpu"] and {"torch", "diffusers"} <= result["machine"]["versions"].keys()
    for row in result["rows"]:
        if "missing" in row: continue
        assert row["ratio"] == pytest.approx(row["median_s"]["diffusers"] / row["median_s"]["ours"]) and all(w["seconds"] for w in row["ways"].values())
    for row in result["equality"]: assert row["equal"] == (row["largest_difference"] <= row["allowed"])
    assert "missing" in result["gpu"] or result["gpu"]["rows"]

def test_the_record_that_the_page_shows_is_whole_and_says_where_it_was_made():
    result = json.loads((ROOT / "assets/bench/mmdit.json").read_text())
    check_schema(result)
    assert result["command"].startswith("osnb bench mmdit") and "--quick" not in result["command"] and all(e["equal"] for e in result["equality"])
    assert report(result) and len(ratio_figure(result).patches) and len(steps_figure(result))
