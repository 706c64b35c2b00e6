"`osnb train` for real: alone and under torchrun, on clips of several sizes, on shards, with low rank, from other weights; what is refused."
import os, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from opensora_nb.autoencoder import dc_ae
from opensora_nb.autoencoder.dc_ae import VideoDCAE
from opensora_nb.cluster.checkpoint import checkpoints
from opensora_nb.cluster.engine import make_engine
from opensora_nb.cluster.files import UserError
from opensora_nb.commands.train import Config, asked_recipe, run
from opensora_nb.data.buckets import BucketTable, release_tables
from opensora_nb.data.cache import world_cache
from opensora_nb.data.latents import CachedClips, cache_latents
from opensora_nb.data.loader import ClipTable
from opensora_nb.data.video import write_video
from opensora_nb.mmdit import model as mmdit
from opensora_nb.mmdit.conditioning import ALL_KINDS
from opensora_nb.mmdit.model import MMDiT
from opensora_nb.mmdit.text import TextEncoder, decorate
from opensora_nb.training import recipes
from opensora_nb.training.diffusion import CachedLatents, DiffusionRecipe, Encoders, LiveClips, train_diffusion
from opensora_nb.training.loop import LoopConfig, read_log

pytestmark = pytest.mark.slow
OSNB = [sys.executable, "-m", "opensora_nb.commands.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opensora_nb.commands.cli"]
TINY_AE = replace(dc_ae.pocket(), enc_width=(8, 16, 32, 32), dec_width=(8, 16, 32, 32), enc_depth=(0, 1, 1, 1), dec_depth=(0, 1, 1, 1))
TINY = replace(mmdit.pocket(), hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=1)
TABLE = BucketTable({"40px": {1: (1.0, 3), 8: (1.0, 2), 16: (1.0, 2)}}, multiple=8)
LOOP = LoopConfig(steps=6, batch_size=4, batches_per_step=2, lr=2e-3, precision="fp32", ema=0.9, save_every=3, sample_every=99, eps=1e-8)
BUCKETED = DiffusionRecipe(TINY, LOOP, dict(t2v=1, i2v_head=2, i2v_loop=1), table=TABLE, autoencoder="pocket")

def shell(command, *args, **more):
    r = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)
    return r.returncode, r.stdout, r.stderr

def error(work, *words):
    with pytest.raises(UserError) as e: work()
    line = str(e.value)
    assert "\n" not in line and len(line) < 500 and all(w in line for w in words), line

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A training table of clips of two shapes and two lengths, and pictures; a clip cache; the bucket table."
    place, rng, rows = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), []
    for i in range(10):
        h, w, t = ((48, 48, 20), (48, 64, 10))[i % 2]
        ground = rng.integers(0, 255, (h // 8, w // 8 + 3, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        write_video(place / f"clip-{i}.mp4", np.stack([ground[:, k : k + w] for k in range(t)]), 24)
        rows.append(f"clip-{i}.mp4,a pattern that moves number {i},{t},{h},{w},24")
    from PIL import Image
    for i in range(3): Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(place / f"p-{i}.png"); rows.append(f"p-{i}.png,a picture {i},1,48,48,")
    (place / "table.csv").write_text("path,text,num_frames,height,width,fps\n" + "\n".join(rows) + "\n")
    TABLE.save(place / "buckets.json")
    world_cache(place / "four.safetensors", 7, 4, progress=False)
    return place

@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return Encoders(VideoDCAE(TINY_AE), TextEncoder())

@pytest.fixture(scope="module")
def live(folder, models): return LiveClips(ClipTable.read(folder / "table.csv"), TABLE, "table.csv", 0, models)


# ---- one process, two processes ----
PAIR = ("pocket", "--muon", 0, "--data", "four.safetensors", "--init", "shipped", "--batch-size", 4, "--batches-per-step", 2, "--precision", "fp32", "--save-every", 5, "--lr", 1e-4, "--warmup", 0, "--sample-every", 0)

def test_one_process_and_two_give_one_curve_and_the_one_goes_on_where_the_two_stopped(folder, tmp_path):
    common = (*PAIR, "--steps", 20, "--out", tmp_path)
    for command, args in ((OSNB, ("--name", "one")), (TORCHRUN, ("--name", "ddp", "--engine", "ddp"))):
        code, out, err = shell(command, "train", *common, *args, cwd=folder)
        assert code == 0 and "weights:" in out, err[-2000:]
    p = subprocess.Popen([*map(str, (*TORCHRUN, "train", *common, "--name", "mixed", "--engine", "fsdp"))], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not checkpoints(tmp_path / "mixed/checkpoints"): assert p.poll() is None, p.stderr.read()[-2000:]; time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-f", f"{tmp_path} .*--name mixed"]); p.communicate()           # torchrun and its workers, who would go on without it
    assert (sharded := len(read_log(tmp_path / "mixed")["step"])) >= 5 and not (tmp_path / "mixed/model").exists()
    code, out, err = shell(OSNB, "train", *common, "--name", "mixed", cwd=folder)
    assert code == 0, err[-2000:]
    one, *others = (read_log(tmp_path / name) for name in ("one", "ddp", "mixed"))
    for log in others:
        assert log["step"] == list(range(1, 21)) and log["samples"] == one["samples"] == [4 * i for i in range(1, 21)]
        for name in ("loss", "grad_norm"): assert np.abs(np.subtract(log[name], one[name])).max() <= 1e-5 * max(one[name]), name
    a, *rest = (MMDiT.from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "ddp", "mixed"))
    assert all((a[k] - b[k]).abs().max() < 1e-4 for b in rest for k in a)

@pytest.mark.soak
def test_a_run_of_shards_in_low_precision_computes_again_puts_aside_and_shares_clips(folder, tmp_path):
    three = ["3" if word == "2" else word for word in TORCHRUN]                    # the pocket model has three heads
    code, out, err = shell(three, "train", *PAIR, "--steps", 3, "--out", tmp_path, "--engine", "zero2", "--precision", "bf16", "--checkpointing", 1, 4, "--offload", True, "--context-parallel", 3, cwd=folder)
    assert code == 0, err[-2000:]
    log = read_log(tmp_path / "pocket")
    assert all(np.isfinite(log["loss"])) and MMDiT.from_pretrained(tmp_path / "pocket/model").cfg == mmdit.pocket()


# ---- clips of all sizes ----
def test_clips_of_several_sizes_are_learned_from_and_a_run_goes_on_with_the_samples_it_has_not_seen(live, tmp_path):
    whole = train_diffusion(live, BUCKETED, tmp_path / "whole", quiet=True)
    first = train_diffusion(live, BUCKETED, tmp_path / "again", quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), first.state_dict().values()))
    log = read_log(tmp_path / "whole")
    assert len(set(np.diff([0, *log["samples"]]))) > 1 and all(np.isfinite(log["loss"])) and all(v > 0 for v in log["tflops_per_s"])
    last = checkpoints(tmp_path / "again/checkpoints")[-1]
    for p in last.iterdir(): p.unlink()
    last.rmdir()
    (tmp_path / "again/log.jsonl").write_text("".join((tmp_path / "again/log.jsonl").read_text().splitlines(True)[:3]))
    resumed = train_diffusion(live, BUCKETED, tmp_path / "again", quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values())) and read_log(tmp_path / "again")["loss"] == log["loss"]

def test_shards_give_what_the_encoders_give(folder, models, live, tmp_path):
    table = ClipTable.read(folder / "table.csv")
    made = cache_latents(table, TABLE, models.cached, tmp_path / "shards", models.embedded, decorate, seed=LOOP.seed, workers=0, dtype=None, quiet=True)
    cached = CachedLatents(made, TABLE, "shards", 0)
    assert all(cached.kinds()[k] == live.kinds()[k] for k in ("channels", "text", "causal"))
    for batch in (b for b, _ in zip(cached.feed(LOOP, make_engine("single", "cpu")), range(6))):
        given = cached.batch(batch, torch.Generator())
        T, H, W = batch.bucket.frames, batch.bucket.height, batch.bucket.width
        assert given.latents.shape == (len(batch.rows), *models.autoencoder.latent_shape(T, H, W)) and given.tokens.shape[1] == cached.tokens_of(batch, 1)[1]
    logs = []
    for name, source in (("live", live), ("cached", cached)):
        train_diffusion(source, replace(BUCKETED, condition_weights=ALL_KINDS), tmp_path / name, quiet=True)
        logs.append(read_log(tmp_path / name))
    assert all(np.isfinite(log["loss"]).all() for log in logs) and logs[1]["loss"][-1] < 1.2 * logs[1]["loss"][0]

def test_the_command_takes_buckets_and_shards(folder, tmp_path):
    code, out, err = shell(OSNB, "train", "pocket", "--data", folder / "table.csv", "--buckets", folder / "buckets.json", "--cache", tmp_path / "shards", "--steps", 2, "--out", tmp_path, "--init", "shipped", "--workers", 1)
    assert code == 0, err[-2000:]
    assert len(CachedClips(tmp_path / "shards")) == 13 and read_log(tmp_path / "pocket")["step"] == [1, 2]
    from opensora_nb.training.follow import contact_sheet, sample_files
    assert [step for step, _ in sample_files(tmp_path / "pocket")] == [step for step, _ in sample_files(tmp_path / "pocket", ".gif")] == [2] and contact_sheet(tmp_path / "pocket").width == 964

def test_a_loss_that_is_not_finite_names_the_clips_and_the_last_good_checkpoint(live, tmp_path, monkeypatch):
    before, calls = LiveClips.batch, []
    def spoiled(self, batch, generator):
        calls.append(batch)
        given = before(self, batch, generator)
        return replace(given, latents=given.latents * float("nan")) if len(calls) == 9 else given
    monkeypatch.setattr(LiveClips, "batch", spoiled)
    error(lambda: train_diffusion(live, BUCKETED, tmp_path / "run", quiet=True), "not finite at step 5", ".mp4", "step-0000003")
    assert [p.name for p in checkpoints(tmp_path / "run/checkpoints")] == ["step-0000003"]


# ---- low rank, other weights ----
def test_low_rank_leaves_the_model_as_it_was_but_for_its_matrices(live, tmp_path):
    torch.manual_seed(0)
    model = MMDiT(TINY)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn(p.shape))
    model.save_pretrained(tmp_path / "start")
    tuned = train_diffusion(live, replace(BUCKETED, lora_rank=2), tmp_path / "run", start=tmp_path / "start", quiet=True)
    before, after = model.state_dict(), tuned.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert before.keys() == after.keys() and moved and all(k.split(".")[-2] in mmdit.LORA_TARGETS for k in moved)
    assert (tmp_path / "run/lora/adapter_model.safetensors").stat().st_size < 0.2 * (tmp_path / "run/model/model.safetensors").stat().st_size
    assert sum(p.stat().st_size for p in checkpoints(tmp_path / "run/checkpoints")[-1].iterdir()) < (tmp_path / "run/model/model.safetensors").stat().st_size, "what is frozen is in no checkpoint"
    from peft import PeftModel
    again = PeftModel.from_pretrained(MMDiT.from_pretrained(tmp_path / "start"), tmp_path / "run/lora").merge_and_unload()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(again.state_dict().values(), after.values()))

def test_a_model_of_another_autoencoder_or_without_a_condition_gets_new_layers_where_it_must_and_says_so(live, tmp_path, capsys):
    torch.manual_seed(0)
    MMDiT(replace(TINY, in_channels=32, patch_size=2, cond_embed=False)).save_pretrained(tmp_path / "start")
    tuned = train_diffusion(live, replace(BUCKETED, loop=replace(LOOP, steps=1)), tmp_path / "run", start=tmp_path / "start")
    said = capsys.readouterr().out
    assert "img_in" in said and "re-initialised" in said and "cond_in" in said and tuned.cfg == TINY and read_log(tmp_path / "run")["step"] == [1]


# ---- recipes ----
def test_recipes_are_the_reports():
    r = {name: make() for name, make in recipes.RECIPES.items()}
    for name, lr, steps, switch in (("stage1_256px_t2v", 5e-5, 85_000, ((40_000, 3e-5),)), ("stage2_256px_ti2v", 5e-5, 13_000, ()), ("stage3_768px_ti2v", 1e-5, 13_000, ()), ("hcae_adapt_short", 3e-5, 17_000, ()), ("hcae_adapt_long", 3e-5, 8000, ())):
        loop = r[name].loop
        assert (loop.lr, loop.steps, loop.lr_switch) == (lr, steps, switch) and (loop.betas, loop.eps, loop.weight_decay, loop.clip, loop.ema, loop.precision, loop.seed) == ((0.9, 0.999), 1e-15, 0.0, 1.0, 0.0, "bf16", 42)
        assert r[name].drop_text == pytest.approx(0.31622777)
    assert [r[n].checkpointing for n in ("image", "stage1_256px_t2v", "stage2_256px_ti2v", "stage3_768px_ti2v", "hcae_adapt_long")] == [(8, 38)] * 3 + [(19, 38)] * 2
    assert [r[n].context_parallel for n in ("stage1_256px_t2v", "stage2_256px_ti2v", "stage3_768px_ti2v", "hcae_adapt_long")] == [1, 1, 4, 1]
    assert not r["stage1_256px_t2v"].model.cond_embed and r["stage2_256px_ti2v"].model.cond_embed and r["hcae_adapt_short"].model.in_channels == 128
    assert r["stage2_256px_ti2v"].condition_weights == dict(t2v=1, i2v_head=5, i2v_loop=1, i2v_tail=1) and r["hcae_adapt_short"].condition_weights == dict(t2v=1, i2v_head=7)
    assert r["stage1_256px_t2v"].table == release_tables()["stage1"] and r["stage3_768px_ti2v"].table == release_tables()["stage2"]

def test_what_is_asked_for_takes_the_place_of_the_recipes(folder):
    recipe = asked_recipe(Config(recipe="stage3_768px_ti2v", lr=1e-6, checkpointing=(1, 2), lora_rank=8, buckets=folder / "buckets.json"))
    assert (recipe.loop.lr, recipe.checkpointing, recipe.lora_rank, recipe.table) == (1e-6, (1, 2), 8, TABLE) and recipe.loop.steps == 13_000


# ---- what is refused ----
@pytest.mark.parametrize("args, words", [(("stage1_256px_t2v",), ("--autoencoder", "--text-encoders")), (("pocket", "--buckets", "buckets.json"), ("--data",)), (("pocket", "--buckets", "table.csv"), ("table.csv is no bucket table",)),
                                         (("pocket", "--lr", "0"), ("lr must be",)), (("pocket", "--engine", "fsdp"), ("torchrun",)), (("pocket", "--context-parallel", "4"), ("a multiple of 4 processes, and 1 was started", "--nproc-per-node 4")), (("pocket", "--data", "four.safetensors", "--batches-per-step", "3", "--batch-size", "2"), ("3 batches a step of 2 samples",)),
                                         (("pocket", "--init", "nowhere"), ("no weights at nowhere",)), (("pocket", "--data", "missing.csv"), ("missing.csv",)), (("pocket", "--data", "bare.csv"), ("num_frames",)),
                                         (("pocket", "--data", "bare.csv", "--buckets", "buckets.json"), ("bare.csv", "num_frames")), (("pocket", "--data", "table.csv", "--buckets", "large.json"), ("none of 13 clips fits a bucket", "height 48 to 48")),
                                         (("pocket", "--data", "gone.csv", "--buckets", "buckets.json", "--workers", "0"), ("could not be loaded", "not a video at all", "right table"))], ids=lambda x: " ".join(map(str, x))[:40])
def test_what_cannot_be_is_one_line(folder, tmp_path, args, words, monkeypatch):
    monkeypatch.chdir(folder)
    Path("bare.csv").write_text("path,text\na.mp4,b\n")
    Path("gone.csv").write_text("path,text,num_frames,height,width,fps\n" + "bare.csv,not a video,20,48,48,24\n" * 4)
    BucketTable({"768px": {129: (1.0, 2)}}).save("large.json")
    error(lambda: run(tyro.cli(Config, args=[*args, "--out", str(tmp_path / "runs")])), *words)
    assert not list((tmp_path / "runs").rglob("checkpoints"))

def test_a_misspelt_recipe_or_field_gets_the_nearest_name(folder, tmp_path):
    code, out, err = shell(OSNB, "train", "pocket", "--batch-sise", "1", "--out", tmp_path, cwd=folder)
    assert code == 2 and "--batch-size" in err and "Traceback" not in err, err
