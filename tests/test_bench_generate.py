"`osnb bench generate`: it runs to the end, its parts add up, what cannot run is a row. No figure about speed is tested."
import json, math, subprocess, sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest, torch

from opensora_nb.autoencoder.dc_ae import pocket as pocket_dcae
from opensora_nb.autoencoder.hunyuan import pocket as pocket_causal
from opensora_nb.flow.guidance import guidance_plan
from opensora_nb.flow.presets import preset
from opensora_nb.inference.bench import AIMS, GPU_CLIPS, POCKET_WAYS, GPUClip, GenerateBench, bench_gpu, bench_gpu_clip, fewer, made_autoencoder, quick, report, timed, totals
from opensora_nb.mmdit.bench import build
from opensora_nb.mmdit.model import high_compression, open_sora_v2, pocket

def tiny(sizes, **changes):
    p = replace(preset("high_compression"), resolution="32px", aspect_ratio="1:1", num_frames=8, steps=12, model=replace(pocket(), depth=1, depth_single_blocks=2), tiling=None, **changes)
    return GPUClip("tiny", p, sizes, words=4)

@pytest.mark.parametrize("autoencoder, frames, kind", [(pocket_dcae(), 8, "dcae"), (pocket_causal(), 9, "hunyuan")])
def test_a_clip_is_the_sum_of_its_parts_with_either_autoencoder(autoencoder, frames, kind):
    clip = tiny(autoencoder, autoencoder=kind)
    clip = replace(clip, preset=replace(clip.preset, num_frames=frames, model=replace(clip.preset.model, in_channels=autoencoder.latent_channels)))
    row = bench_gpu_clip(clip, build(clip.preset.model), torch.device("cpu"), 1, 0.5, {"plain": {}}, offload=False, say=lambda line: None)
    json.dumps(row)
    assert "missing" not in row, row
    latent_frames = made_autoencoder(autoencoder, "cpu", torch.float32).latent_shape(frames, 32, 32)[1]
    kinds, parts = Counter(len(s.passes) for s in guidance_plan(clip.preset.guidance, 12, latent_frames)), {k: v["median_s"] for k, v in row["parts"].items()}
    by_hand = sum(count * min(n * parts["one"], parts.get(f"batch_{n}", math.inf)) for n, count in kinds.items())
    assert row["sampling_s"] == pytest.approx(by_hand) and row["total_s"] == pytest.approx(by_hand + parts["encode"] + parts["decode"]) and row["cached_s"] == pytest.approx(by_hand / 2 + parts["encode"] + parts["decode"])
    assert row["passes"] == sum(n * c for n, c in kinds.items()) == 11 * 3 + 1 and "clip is their sum" in row["extrapolated"]

def test_what_fails_is_said_and_the_rest_goes_on():
    clip = tiny(pocket_dcae())
    model = build(clip.preset.model)
    row = bench_gpu_clip(clip, model, torch.device("cpu"), 1, None, {"nonsense": dict(attention="flash9"), "plain": {}}, offload=False, say=lambda line: None)
    assert row["way"] == "plain" and "flash9" in row["ways_missing"]["nonsense"] and row["cached_s"] is None
    assert "no way to run" in bench_gpu_clip(clip, model, torch.device("cpu"), 1, None, {"nonsense": dict(attention="flash9")}, say=lambda line: None)["missing"]
    def full(): raise torch.OutOfMemoryError("no room")
    def broken(): raise RuntimeError("a kernel\nfailed")
    assert timed(full, 1, torch.device("cpu")) == dict(missing="out of memory") and timed(broken, 1, torch.device("cpu")) == dict(missing="a kernel failed")
    kept = totals(dict(one=dict(median_s=1.0), batch_3=dict(missing="out of memory"), encode=dict(median_s=0.0), decode=dict(median_s=0.0)), Counter({3: 2}), None)
    assert kept["total_s"] == 6 and kept["faster"] == {"3": "one by one"}

def test_offloading_leaves_the_models_as_they_were():
    clip = tiny(pocket_dcae())
    clip = replace(clip, preset=replace(clip.preset, model=replace(clip.preset.model, depth=4, depth_single_blocks=8)))
    model = build(clip.preset.model)
    before, places = {k: v.clone() for k, v in model.state_dict().items()}, {k: v.device for k, v in model.state_dict().items()}
    found = bench_gpu_clip(clip, model, torch.device("cpu"), 1, None, {"plain": {}}, say=lambda line: None)["offload"]
    assert found["blocks"]["weights_gb"] < found["models"]["weights_gb"]
    assert all(torch.equal(v, before[k]) and v.device == places[k] for k, v in model.state_dict().items())
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in (*model.double_blocks, *model.single_blocks))

def test_the_clips_are_the_reports():
    by_name = {c.name: c for c in GPU_CLIPS}
    assert [c.aim_s for c in GPU_CLIPS] == [35, 105, 1000] and all(c.preset.steps == 50 for c in GPU_CLIPS)
    assert by_name["768 px, 128 frames, DC-AE"].preset.model == high_compression() and by_name["768 px, 129 frames"].preset.model == open_sora_v2()
    assert [c.preset.num_frames for c in GPU_CLIPS] == [129, 128, 129]
    assert POCKET_WAYS["exact"].steps == 30 and POCKET_WAYS["exact"].num_frames == 32 and set(AIMS) <= set(POCKET_WAYS) and fewer(20).guidance.steady_steps == 7

def test_without_a_card_nothing_is_claimed():
    if torch.cuda.is_available(): pytest.skip("there is one here")
    for device, why in (("auto", "no CUDA device"), ("cuda", "no CUDA device"), ("cpu", "not asked for")):
        assert why in (found := bench_gpu(GenerateBench(device=device), None))["missing"] and "not measured" in found["missing"]

@pytest.mark.soak
@pytest.mark.slow
def test_the_command_writes_its_record(tmp_path):
    done = subprocess.run([sys.executable, "-m", "opensora_nb.commands.cli", "bench", "generate", "--quick", "--device", "cpu", "--workers", "1", "--out", tmp_path / "generate.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "generate.json").read_text())
    assert "GPU: not measured" in done.stdout and report(result) in done.stdout and [r["way"] for r in result["rows"]] == list(POCKET_WAYS)
    assert result["rows"][0]["psnr_db"] is None and all(r["psnr_db"] > 10 for r in result["rows"][1:]) and result["rows"][1]["psnr_db"] > 50
