"What a training takes: formulas against what PyTorch counts, saves and holds; the report's figures; what the command refuses."
import json, math, os, subprocess, sys
from dataclasses import asdict, replace

import pytest
import torch

from opensora_nb.autoencoder.bench import LIMITS as AE_LIMITS
from opensora_nb.autoencoder.dc_ae import pocket as pocket_dc_ae
from opensora_nb.autoencoder.hunyuan import HunyuanVAEConfig, pocket as pocket_causal
from opensora_nb.autoencoder.tiling import Tiling
from opensora_nb.cluster.files import UserError
from opensora_nb.commands.cli import main
from opensora_nb.mmdit.bench import LIMITS, Case, Policy, build, inputs, recomputing
from opensora_nb.mmdit.model import DoubleBlock, MMDiT, MMDiTConfig, SingleBlock, flux_image, high_compression, open_sora_v2
from opensora_nb.mmdit.rope import rope_table
from opensora_nb.training import plan as planning
from opensora_nb.training.diffusion import Encoders, add_lora
from opensora_nb.training.plan import GPUS, ROOM, How, Job, Shape, TextSizes, block_bytes, clip_cost, encode_operations, encode_peak, gpu_named, grid, job_of, kept_bytes, lora_parameters, measure_growth, memory, moments, parameters, plan, plan_record, predict, report_jobs, saved_bytes, standing, step_operations, what_helps
from opensora_nb.training.recipes import RECIPES, REPORTED

SMALL = MMDiTConfig(in_channels=16, patch_size=1, context_in_dim=24, vec_in_dim=20, hidden_size=128, num_heads=4, depth=2, depth_single_blocks=3, axes_dim=(8, 12, 12))
FUSED = replace(SMALL, fused_qkv=True, rope_layout="interleaved")
WIDE_HEADS = replace(SMALL, num_heads=2, axes_dim=(16, 24, 24), mlp_ratio=2.0)


def saved_by(block, cfg, kind, words, tokens, batch, precision, kernels="torch"):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    stream = lambda n: torch.randn(batch, n, cfg.hidden_size).to(dtype).requires_grad_()
    rope, vec = rope_table(torch.rand(words + tokens, 3), cfg.axes_dim, layout=cfg.rope_layout), torch.randn(batch, cfg.hidden_size).to(dtype)
    streams = [stream(tokens), stream(words)] if kind == "double" else [stream(words + tokens)]
    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"): return block(*streams, vec, rope)
    return saved_bytes(call, [*block.parameters(), vec, *(rope if kernels == "triton" else ())])

def a_block(cfg, kind, precision): return (DoubleBlock if kind == "double" else SingleBlock)(cfg).to(torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.parametrize("cfg", [SMALL, FUSED, WIDE_HEADS], ids=["split", "fused", "other ratios"])
@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("precision", ["bf16", "autocast", "fp32"])
def test_a_block_keeps_what_the_formula_says(cfg, kind, precision):
    for words, tokens, batch in ((24, 72, 1), (10, 101, 3)):
        there = saved_by(a_block(cfg, kind, precision), cfg, kind, words, tokens, batch, precision)
        assert sum(block_bytes(cfg, kind, words, tokens, batch, How(precision, device="cpu")).values()) == pytest.approx(there, rel=0.02)

@pytest.mark.parametrize("kind", ["double", "single"])
def test_low_rank_adapters_keep_less_by_what_the_formula_says(kind):
    pytest.importorskip("peft")
    for precision in ("autocast", "fp32"):
        model = MMDiT(SMALL)
        add_lora(model, 8)
        block = (model.double_blocks if kind == "double" else model.single_blocks)[0]
        there = saved_by(block, SMALL, kind, 24, 120, 2, precision)
        said, full = (sum(block_bytes(SMALL, kind, 24, 120, 2, How(precision, device="cpu", lora_rank=r)).values()) for r in (8, 0))
        assert said == pytest.approx(there, rel=0.02) and said < 0.9 * full
        learns = sum(p.numel() for p in block.parameters() if p.requires_grad)
        assert lora_parameters(SMALL, 8)[kind] == learns

TRITON = """import json, sys, torch
sys.path.insert(0, "tests")
from test_plan import *
found = []
for kind, precision in (("double", "bf16"), ("single", "bf16"), ("single", "fp32")):
        block = a_block(SMALL, kind, precision)
        from opensora_nb.mmdit.kernels import choose_kernels
        block.kernels = choose_kernels("triton")
        found.append((saved_by(block, SMALL, kind, 8, 24, 2, precision, "triton"), sum(block_bytes(SMALL, kind, 8, 24, 2, How(precision, "triton")).values())))
print(json.dumps(found))
"""

@pytest.mark.slow
def test_our_kernels_keep_what_the_formula_says():
    pytest.importorskip("triton")
    r = subprocess.run([sys.executable, "-c", TRITON], env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-500:]
    for there, said in json.loads(r.stdout.splitlines()[-1]): assert said == pytest.approx(there, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "autocast", "fp32"])
def test_the_fullest_moment_is_what_lives_at_once(precision):
    for checkpointing, size in (((0, 0), 1), ((1, 2), 2), ((2, 3), 2)):
        job = Job("small", SMALL, (Shape(13, 64, 64, size),), pocket_causal(), words=24, encoders=False, checkpointing=checkpointing, engine="single", precision=precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model, given = build(SMALL, dtype=dtype), inputs(Case("", SMALL, grid(SMALL, job.autoencoder, 13, 64, 64), size, 24), dtype=dtype)
        with recomputing(model, Policy(*checkpointing, keep_attention=False)), planning._live_bytes([*model.parameters(), *given.values()]) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"): loss = model(**given).float().square().mean()
            loss.backward()
        said = max(sum(parts.get(k, 0) for k in ("copies", "gradients", "activations", "working")) for _, parts in moments(job, job.shapes[0], 1, "cpu"))
        assert said == pytest.approx(live.peak, rel=0.1), checkpointing

@pytest.mark.slow
def test_a_process_grows_by_what_was_predicted():
    cfg = replace(SMALL, hidden_size=192, num_heads=6)
    found = {}
    for checkpointing in ((0, 0), (2, 3)):
        job = Job("narrow", cfg, (Shape(13, 128, 128, 1),), HunyuanVAEConfig(), words=64, encoders=False, checkpointing=checkpointing, engine="single", precision="fp32")
        found[checkpointing] = measure_growth(job, job.shapes[0])["bytes"]
        assert predict(job)[0] == pytest.approx(found[checkpointing], rel=0.15) and predict(job)[1] is None
    assert found[2, 3] < 0.7 * found[0, 0]


def test_operations_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    for cfg in (SMALL, FUSED, replace(WIDE_HEADS, cond_embed=False, guidance_embed=True)):
        with torch.device("meta"): model = MMDiT(cfg)
        given = inputs(Case("", cfg, (2, 3, 7), 2, 9), "meta")
        if cfg.guidance_embed: given["guidance"] = torch.ones(2, device="meta")
        found = {}
        for policy in (Policy(), Policy(1, 2, keep_attention=False)):
            with recomputing(model, policy), FlopCounterMode(display=False) as counter: model(**given).sum().backward()
            found[policy] = counter.get_total_flops()
        said = step_operations(cfg, 42, 9, 2, (1, 2))
        inputs_only = 2 * 2 * cfg.hidden_size * (42 * (cfg.in_channels + cfg.cond_channels * cfg.cond_embed) + 9 * cfg.context_in_dim + 256 * (1 + cfg.guidance_embed) + cfg.vec_in_dim)
        assert said["model"] - inputs_only == pytest.approx(found[Policy()], rel=1e-9)
        assert said["recomputed"] == pytest.approx(found[Policy(1, 2, keep_attention=False)] - found[Policy()], rel=0.05)      # modulation is computed again as well, and a block's last product is not
        assert said["all"] == said["model"] + said["recomputed"]

def test_low_rank_operations_are_those_that_pytorch_counts():
    pytest.importorskip("peft")
    from torch.utils.flop_counter import FlopCounterMode
    cfg = replace(SMALL, depth=1, depth_single_blocks=2)
    model = MMDiT(cfg)
    add_lora(model, 8)
    given = inputs(Case("", cfg, (2, 6, 8), 1, 16), "meta")
    with FlopCounterMode(display=False) as counter: model.to("meta")(**given).sum().backward()
    assert step_operations(cfg, 96, 16, 1, lora_rank=8)["model"] == pytest.approx(counter.get_total_flops(), rel=0.1)       # nothing flows back before the first block's queries

def test_encoding_in_tiles_counts_the_tiles():
    cfg = pocket_dc_ae()
    whole, tiled = encode_operations(cfg, 8, 64, 64), encode_operations(cfg, 8, 64, 64, Tiling(32, None, 0.0))
    assert tiled == 4 * encode_operations(cfg, 8, 32, 32) and 0.8 < tiled / whole < 1.2
    assert encode_peak(cfg, 8, 64, 64, Tiling(32, None)) < encode_peak(cfg, 8, 64, 64)
    assert encode_operations(pocket_causal(), 6, 32, 32) == encode_operations(pocket_causal(), 9, 32, 32)          # filled up

@pytest.mark.slow
def test_text_encoders_are_those_that_transformers_builds():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    s = TextSizes(64, 32, 96, 2, 100, 12, 48, 80, 3, 90, 10)
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(vocab_size=100, d_model=64, d_kv=8, num_heads=4, d_ff=96, num_layers=2, feed_forward_proj="gated-gelu"))
        clip = CLIPTextModel(CLIPTextConfig(vocab_size=90, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=10))
    assert s.parameters == pytest.approx(sum(p.numel() for m in (t5, clip) for p in m.parameters()), rel=0.03)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        t5(input_ids=torch.zeros(1, 12, dtype=torch.long, device="meta")); clip(input_ids=torch.zeros(1, 10, dtype=torch.long, device="meta"))
    assert s.operations == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_cards_are_those_of_the_benches():
    for limits in (LIMITS, AE_LIMITS):
        for name, tflops in limits.items(): assert gpu_named(name).tflops == tflops
    assert len({g.name for g in GPUS}) == len(GPUS) and gpu_named("nvidia geforce rtx-4090").name == "RTX 4090"

def test_the_report_is_reproduced():
    rows = planning.table45("stage1_256px_t2v")
    assert [r["tokens"] for r in rows] == [2304, 4352, 6400, 8448, 256, 2304, 4096]
    assert all(r["printed_step_s"] == pytest.approx(7.56, abs=0.07) for r in rows) and all(r["step_s"] == pytest.approx(r["printed_step_s"], rel=0.12) for r in rows)
    assert all(46 <= r["printed_step_s"] <= 50 for r in planning.table45("stage3_768px_ti2v"))
    longest = rows[3]
    assert longest["model_mfu"] == pytest.approx(0.209, abs=0.002) and longest["recomputed_mfu"] == pytest.approx(0.265, abs=0.002)      # by hand: 3 x 171.9e12, 0.4 clips a second and GPU, 989.4e12
    assert sum(r["printed_usd"] for r in planning.table3()) == pytest.approx(199_600)
    assert all(clip_cost(m, a, clip, 150, card)["gpu_seconds"] == pytest.approx(printed, rel=0.1) for m, a, clip, card, printed in planning.PRINTED_CLIPS.values())

def test_what_helps_does_help():
    for card, gpus in (("H100", 224), ("A100", 64), ("L40S", 64)):
        given = plan(report_jobs()["stage1_256px_t2v"][0], card, gpus)
        said = what_helps(given)
        assert not given.fits and "GiB too much" in said
        change = {}
        for name, value in (("--engine fsdp", dict(engine="fsdp")), ("--checkpointing 19 38", dict(checkpointing=(19, 38))), ("--offload True", dict(offload=True)), ("--encoders False", dict(encoders=False)), *((f"--context-parallel {n}", dict(context_parallel=n)) for n in (2, 4, 8))):
            if name in said: change |= value
        fixed = plan(replace(given.job, **change), card, gpus)
        assert fixed.fits == ("bring" in said.rsplit(":", 1)[1]) and (fixed.fits or "not enough" in said)
    assert what_helps(plan(report_jobs()["stage1_256px_t2v"][0], "H200", 224)) == ""

def test_memory_falls_with_all_that_is_meant_to_lower_it():
    job, gpus = report_jobs()["stage1_256px_t2v"]
    job, shape = replace(job, encoders=False), job.shapes[3]
    peak = lambda n=gpus, **change: memory(replace(job, **change), shape, n)["peak"]
    assert peak(checkpointing=(19, 38)) < peak() < peak(checkpointing=(0, 38)) < peak(checkpointing=(0, 0))
    assert peak(offload=True) < peak() and peak(kernels="triton") < peak() and peak(context_parallel=2) < peak() and peak(lora_rank=8) < peak(8)
    assert peak(engine="fsdp") < peak(engine="zero2") < peak(engine="ddp") and peak(224) < peak(8)
    assert peak(checkpointing=(19, 38)) < peak(checkpointing=(19, 38), keep_attention=True) < peak(checkpointing=(0, 0))
    assert peak(average=True) == pytest.approx(peak() + 4 * 11_891_178_560)
    held = standing(replace(job, engine="zero2"), 10)
    assert held["weights"] == 2 * 11_891_178_560 and held["optimizer"] == pytest.approx(12 * 11_891_178_560 / 10)

def test_time_and_dollars_are_arithmetic():
    job, gpus = report_jobs()["stage3_768px_ti2v"]
    one, two = plan(job, "H200", gpus), plan(replace(job, context_parallel=8), "H200", gpus)
    assert one.replicas == 48 and two.seconds < one.seconds and one.gpu_days == pytest.approx(job.steps * one.seconds * gpus / 86_400) and one.usd == pytest.approx(one.gpu_days * 48)
    kept = plan(replace(job, keep_attention=True), "H200", gpus)
    assert kept.rows[3].operations["recomputed"] < 0.3 * one.rows[3].operations["recomputed"]
    record = json.loads(json.dumps(plan_record(one)))
    assert record["fits"] and record["rows"][3]["tokens"] == 76_032 and record["parameters"] == 11_891_390_528

def test_every_recipe_is_a_job():
    for name, make in RECIPES.items():
        job = job_of(make(), name, 8)
        assert job.steps == make().loop.steps and job.checkpointing == make().checkpointing and (job.context_parallel, job.lora_rank) == (make().context_parallel, make().lora_rank)
        assert parameters(job.model)["all"] == parameters(make().model)["all"]
    release = {(s.frames, s.height, s.size) for s in job_of(RECIPES["stage1_256px_t2v"](), "stage1_256px_t2v", 224).shapes}
    assert release == {(s.frames, s.height, s.size) for s in report_jobs()["stage1_256px_t2v"][0].shapes}, "the release's table is the report's"
    assert job_of(RECIPES["pocket"](), "pocket", 1).engine == "single" and job_of(RECIPES["pocket"](), "pocket", 4).engine == "ddp"

def test_long_clips_are_encoded_one_after_the_other(monkeypatch):
    from opensora_nb.training import diffusion
    seen = []
    class Counting(torch.nn.Module):
        def encode(self, video, tiling=None): seen.append(len(video)); return video.mean((3, 4), keepdim=True)
    encoders = Encoders(Counting(), lambda texts: (torch.zeros(1, 1, 1), torch.zeros(1, 1)))
    video = torch.rand(5, 3, 4, 8, 8)
    whole = encoders.encode(video)
    monkeypatch.setattr(diffusion, "ENCODE_PIXELS", 2 * 4 * 8 * 8)
    assert torch.equal(encoders.encode(video), whole) and seen == [5, 2, 2, 1]


def test_what_cannot_be_meant_is_one_line():
    job = report_jobs()["stage3_768px_ti2v"][0]
    for call, says in ((lambda: plan(job, "H201"), "did you mean"), (lambda: plan(job, gpus=6), "take 4 or 8"), (lambda: plan(job, gpus=2), "take 4,"), (lambda: plan(job, gpus=0), "at least 1 GPU"), (lambda: plan(job, mfu=0), "mfu is a share"),
                       (lambda: plan(replace(job, context_parallel=1, engine="single"), gpus=2), "one GPU"), (lambda: replace(job, engine="zero3"), "engine is one of"), (lambda: replace(job, shapes=()), "at least one kind"),
                       (lambda: replace(job, shapes=(Shape(0, 64, 64, 1),)), "at least 1"), (lambda: replace(job, precision="fp8").how(), "precision is one of"), (lambda: replace(job, lora_rank=-1), "must not be negative"), (lambda: plan(job, usd_per_hour=math.nan), "usd_per_hour")):
        with pytest.raises(UserError, match=says) as e: call()
        assert "\n" not in str(e.value)

def test_the_command_prints_a_table_and_refuses_in_one_line(capsys):
    assert main(["plan", "pocket", "--gpu", "l40s", "--batch", "4"]) == 0
    assert "5.2" not in (out := capsys.readouterr().out.splitlines()[0]) and "L40S" in out
    assert main(["plan", "stage3_768px_ti2v", "--json", "--gpus", "8", "--engine", "fsdp", "--clip", "33", "768", "768"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["tokens"] == 20_736
    for words, says in ((["pokcet"], "did you mean 'pocket'"), (["pocket", "--gpu", "H2000"], "did you mean 'H200'"), (["stage3_768px_ti2v", "--gpus", "6"], "do not divide"), (["pocket", "--gpus", "-1"], "at least 1 GPU"),
                        (["stage1_256px_t2v", "--gpu", "H100"], "does not fit"), (["pocket", "--steps", "0"], "steps must be at least 1"), (["pocket", "--clip", "0", "64", "64"], "at least 1"), (["pocket", "--buckets", "nothing.json"], "nothing.json")):
        assert main(["plan", *words]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
