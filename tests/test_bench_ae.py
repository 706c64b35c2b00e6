"`osnb bench ae`: it runs to the end, outputs and gradients are equal to diffusers' and to the plain twin's, and what is missing is a row. No figure about speed is tested."
import json, subprocess, sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
import pytest, torch
from opensora_nb.autoencoder.bench import (ALLOWED, AEBench, Case, Diffusers, GPUCase, bench_case, bench_gpu, bench_gpu_case, build, differences, encode_peak, half_causal, half_dcae, operations, plain_twin, quick,
                                           ratio_figure, report, take_turns)
from opensora_nb.autoencoder.dc_ae import Conv3d, Depthwise, VideoDCAE, VideoDCAEConfig
from opensora_nb.autoencoder.hunyuan import HunyuanVAEConfig
from opensora_nb.autoencoder.speed import FastConv3d, FoldedUp, optimize
from opensora_nb.autoencoder.tiling import Tiling
ROOT = Path(__file__).parents[1]
TINY, CAUSAL = (case.model for case in quick(AEBench()).cases)

def test_the_plain_twin_has_the_same_weights_and_nothing_of_ours_in_its_convolutions():
    model = build(TINY)
    twin = plain_twin(model)
    assert not any(isinstance(m, (Conv3d, Depthwise, FastConv3d, FoldedUp)) for m in twin.modules()) and any(isinstance(m, Depthwise) for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values())) and list(twin.state_dict()) == list(model.state_dict())
    assert all(p.is_contiguous() for p in twin.parameters())

@pytest.mark.slow
@pytest.mark.skipif(not find_spec("diffusers"), reason="diffusers is not installed")
@pytest.mark.parametrize("cfg", [CAUSAL, replace(CAUSAL, scaling_factor=0.7, shift_factor=0.2)])
def test_the_causal_autoencoder_and_diffusers_are_equal_forward_and_backward(cfg):
    model = build(cfg)
    theirs, video = Diffusers(model), torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert {n.removeprefix("net.") for n, _ in theirs.named_parameters()} == {n for n, _ in model.named_parameters()}
    for ours in (model, optimize(build(cfg))): assert all(value <= ALLOWED[what] for what, value in differences(ours, theirs, video).items())
    with torch.no_grad(): theirs.net.decoder.conv_out.conv.bias += 0.1
    assert differences(model, theirs, video)["video"] > ALLOWED["video"]

def test_turns_are_reversed_and_the_first_call_is_not_counted():
    said = []
    found = take_turns({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, 3, least=0)
    assert "".join(said) == "ab" + "ab" + "ba" + "ab" and all(len(t["seconds"]) == len(t["cpu_seconds"]) == 3 for t in found.values())

def test_what_is_not_installed_is_a_row(monkeypatch):
    monkeypatch.setattr("opensora_nb.autoencoder.bench.find_spec", lambda name: None)
    rows, equality = bench_case(Case("causal", CAUSAL, (1, 5, 16, 16)), 1, say=lambda line: None)
    assert rows[0]["missing"] == "not installed" and rows[0]["against"] == "diffusers" and len(rows) == 1 and equality == []

def test_without_a_gpu_there_is_a_line_and_no_figure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu(AEBench().gpu, 1).keys() == {"missing"}

@pytest.mark.parametrize("case", [GPUCase("tiny", TINY, (2, 8, 32, 32), ways=("eager", "optimized")), GPUCase("tiled", CAUSAL, (1, 9, 64, 48), Tiling(32, None), ways=("eager",))])
def test_gpu_rows_are_made_by_the_same_lines_on_any_device(case):
    rows = bench_gpu_case(case, 2, torch.device("cpu"), 0.5, say=lambda line: None)
    assert [(r["what"], r["way"]) for r in rows] == [(what, way) for way in case.ways for what in ("encode", "decode")]
    for r in rows:
        assert len(r["seconds"]) == 2 and r["clips_per_s"] == case.clip[0] / r["median_s"] and r["limit_share"] == pytest.approx(r["operations_1e12"] / r["median_s"] / 0.5) and r["peak_gb"] is None
        json.dumps(r)

def test_a_gpu_case_that_fails_is_a_row_with_its_reason(monkeypatch):
    def broken(self, *args, **kwargs): raise RuntimeError("CUDA out of memory.\n Tried to allocate")
    monkeypatch.setattr(VideoDCAE, "encode", broken)
    encode, decode = bench_gpu_case(GPUCase("tiny", TINY, (1, 4, 16, 16), ways=("eager",)), 1, torch.device("cpu"), None, say=lambda line: None)
    assert encode["missing"] == "CUDA out of memory. Tried to allocate" and "missing" not in decode

def test_operations_are_those_of_the_layers():
    one = VideoDCAEConfig(8, ("ResBlock",), (8,), (1,), (8,), (1,), (False,), (False,))
    block, positions = 2 * 27 * 8 * 8, 4 * 8 * 8                                             # of a convolution and position
    found = operations(one, (2, 4, 8, 8), optimized=False)
    assert found["encode"] == pytest.approx(2 * positions * (2 * 27 * 3 * 8 + 3 * block) / 1e12)    # first, two in the block, last
    assert found["decode"] == pytest.approx(2 * positions * (3 * block + 2 * 27 * 8 * 3) / 1e12)
    for cfg, clip in ((VideoDCAEConfig(), (1, 4, 64, 64)), (HunyuanVAEConfig(), (1, 5, 64, 64)), (half_dcae(), (1, 4, 64, 64)), (half_causal(), (1, 6, 64, 64))):
        assert all(v > 0 for v in operations(cfg, clip, optimized=True).values())

@pytest.mark.slow
@pytest.mark.soak
def test_the_peak_is_that_of_a_fresh_process_and_tiles_lower_it():
    big = replace(TINY, enc_width=(64, 64, 64))
    whole, tiles = (encode_peak(big, (64, 128, 128), tiling, 1) for tiling in (None, Tiling(64, 16)))
    for r in (whole, tiles): assert r["finite"] and r["latent"] == [1, 8, 16, 32, 32] and r["peak_mb"] > r["before_mb"] > 0
    assert whole["peak_mb"] - whole["before_mb"] > 1.5 * (tiles["peak_mb"] - tiles["before_mb"]) > 0

def test_a_process_that_fails_is_a_line():
    assert "the process ended with 1: ValueError" in encode_peak(TINY, (8, 33, 32), None, 1)["missing"]

def test_compiled_calls_are_a_way_of_ours_and_a_compiler_that_fails_is_a_line(monkeypatch):
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend="eager", **how))            # the tracing without the generating of code
    rows, equality = bench_case(Case("tiny", TINY, (1, 4, 16, 16), True), 1, say=lambda line: None)
    assert [(e["case"], e["what"]) for e in equality if e["equal"]] == [(case, what) for case in ("tiny", "tiny, compiled") for what in ("latent", "video", "gradient")]
    for row in rows: assert list(row["ways"]) == ["ours", "ours, compiled", "plain twin"] and row["compiled"]["first_s"] >= 0 and row["compiled"]["ratio"] > 0 and row["best"] == "plain twin"
    def broken(self): raise RuntimeError("no C++\ncompiler")
    def fails(self, **how): self._compiled_call_impl = lambda *args, **kwargs: broken(self)
    monkeypatch.setattr(torch.nn.Module, "compile", fails)
    rows, _ = bench_case(Case("tiny", TINY, (1, 4, 16, 16), True), 1, say=lambda line: None)
    for row in rows: assert row["compiled"] == dict(missing="torch.compile failed here: no C++ compiler") and list(row["ways"]) == ["ours", "plain twin"] and row["ratio"] > 0

@pytest.mark.soak
@pytest.mark.slow
def test_the_quick_suite_runs_from_the_command_line_and_all_numbers_are_equal(tmp_path):
    r = subprocess.run([sys.executable, "-m", "opensora_nb.commands.cli", "bench", "ae", "--quick", "--workers", "1", "--out", tmp_path / "new" / "figures.json"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stderr
    result = json.loads((tmp_path / "new" / "figures.json").read_text())
    check_schema(result)
    assert report(result) in r.stdout and str(tmp_path) not in json.dumps({k: v for k, v in result.items() if k != "command"})
    assert result["settings"]["threads"] == 1 and all(e["equal"] for e in result["equality"])
    assert len(ratio_figure(result).patches) == sum("ratio" in r for r in result["rows"])

def check_schema(result):
    assert {"suite", "date", "command", "machine", "settings", "rows", "equality", "others_share", "memory", "gpu"} == result.keys() - {"elsewhere"} and result["suite"] == "ae"
    assert result["machine"]["cpu"] and {"torch", "diffusers"} <= result["machine"]["versions"].keys()
    for row in result["rows"]:
        if "missing" in row: continue
        assert row["ratio"] == pytest.approx(row["theirs_s"] / row["ours_s"]) and row["best"] in row["ways"] and all(len(w["seconds"]) >= result["settings"]["repetitions"] for w in row["ways"].values())
    for row in result["equality"]: assert row["equal"] == (row["largest_difference"] <= row["allowed"])
    assert "missing" in result["memory"] or result["memory"]["finite"]
    assert "missing" in result["gpu"] or result["gpu"]["rows"]

@pytest.mark.skipif(not (ROOT / "assets/bench/ae.json").exists(), reason="no record yet")
def test_the_record_that_the_page_shows_is_whole_and_says_where_it_was_made():
    result = json.loads((ROOT / "assets/bench/ae.json").read_text())
    check_schema(result)
    assert result["command"].startswith("osnb bench ae") and "--quick" not in result["command"] and result["settings"]["repetitions"] >= 3
    assert all(e["equal"] for e in result["equality"]) and report(result) and not any("missing" in row for row in result["rows"])
    assert result["memory"]["peak_mb"] < result["memory"]["limit_mb"]
