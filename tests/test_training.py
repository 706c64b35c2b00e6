"The two trainings on a handful of clips, and the caches that they read: what a run leaves behind, what is used again, what is refused."
import json, signal, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from opensora_nb.autoencoder import dc_ae
from opensora_nb.autoencoder.alignment import AlignmentConfig
from opensora_nb.autoencoder.dc_ae import VideoDCAE
from opensora_nb.autoencoder.discriminator import AdversarialConfig, PatchDiscriminator3D
from opensora_nb.autoencoder.hunyuan import HunyuanVAE, HunyuanVAEConfig
from opensora_nb.autoencoder.losses import PerceptualLoss, ReconstructionLossConfig, reconstruction_loss
from opensora_nb.cluster.checkpoint import checkpoints, load_checkpoint
from opensora_nb.cluster.files import UserError
from opensora_nb.data.cache import ClipCache, curated_cache, world_cache
from opensora_nb.data.curate import CurateConfig, curate
from opensora_nb.data.manifest import read_manifest, write_manifest
from opensora_nb.data.scores import motion_score
from opensora_nb.data.video import decode, write_video
from opensora_nb.data.world import render, rgb_luma, sample_truth, world_truth
from opensora_nb.mmdit import model as mmdit
from opensora_nb.mmdit.model import MMDiT
from opensora_nb.mmdit.text import TextEncoder, decorate
from opensora_nb.training.autoencoder import RECIPES, AutoencoderRecipe, latent_scale, mean_psnr, to_video, train_autoencoder, window
from opensora_nb.training.diffusion import DiffusionRecipe, LatentCache, diffusion_loss, encode_cache, latent_cache, train_diffusion
from opensora_nb.training.loop import LoopConfig, read_log

def numbers(log): return {k for k in log if not k.startswith("seconds")} - {"samples_per_s", "memory_gb", "tflops_per_s"}      # columns that are the same in a run that does the same

TINY_AE = replace(dc_ae.pocket(), enc_width=(8, 16, 32, 32), dec_width=(8, 16, 32, 32), enc_depth=(0, 1, 1, 1), dec_depth=(0, 1, 1, 1))
TINY_MMDIT = replace(mmdit.pocket(), hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=1)
TINY_CAUSAL = HunyuanVAEConfig((8, 8, 16, 16), layers_per_block=1, latent_channels=8, norm_num_groups=4, scaling_factor=1.0)
LOOP = LoopConfig(steps=16, batch_size=3, lr=5e-3, warmup=3, betas=(0.9, 0.99), eps=1e-8, ema=0.8, precision="fp32", save_every=8)
AE = AutoencoderRecipe(TINY_AE, LOOP, ReconstructionLossConfig(perceptual_weight=0.0), num_frames=4, image_share=0.25)
DIFFUSION = DiffusionRecipe(TINY_MMDIT, replace(LOOP, steps=30, batch_size=6, save_every=10, sample_every=50), dict(t2v=1, i2v_head=1, i2v_loop=1))


@pytest.fixture(scope="module")
def clips(tmp_path_factory): return world_cache(tmp_path_factory.mktemp("clips") / "world.safetensors", seed=11, count=6, size=32, num_frames=8)

@pytest.fixture(scope="module")
def text(): return TextEncoder()

@pytest.fixture(scope="module")
def autoencoder(clips, tmp_path_factory):
    "Run folder of a trained autoencoder, and what `train_autoencoder` returned."
    run = tmp_path_factory.mktemp("runs") / "ae"
    return run, train_autoencoder(clips, clips, AE, run, quiet=True)

@pytest.fixture(scope="module")
def latents(clips, autoencoder, text): return encode_cache(clips, autoencoder[1], text, quiet=True)

def error(work, *words):
    "The one line of the UserError that `work` raises."
    with pytest.raises(UserError) as e: work()
    line = str(e.value)
    assert "\n" not in line and len(line) < 400 and all(w in line for w in words), line
    return line

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

def is_a_run(run, steps, saved, sampled):
    config, log = json.loads((run / "config.json").read_text()), read_log(run)
    assert config["loop"]["steps"] == steps and config["data"] and config["model"]
    assert log["step"] == list(range(1, steps + 1)) and all(np.isfinite(v) for k in ("loss", "grad_norm", "lr", "seconds") for v in log[k])
    assert [p.name for p in checkpoints(run / "checkpoints")] == [f"step-{s:07d}" for s in saved]
    assert sorted(p.name for p in (run / "samples").glob("*")) == sampled and list((run / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (run / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert not [p for p in run.rglob(".*")]
    return log


# ---- the autoencoder ----
def test_an_autoencoder_learns_and_leaves_a_run(clips, autoencoder):
    run, model = autoencoder
    log = is_a_run(run, 16, (8, 16), ["0000016.png"])
    assert np.mean(log["loss"][-4:]) < 0.85 * np.mean(log["loss"][:3]) and log["loss"] == log["l1"]
    torch.manual_seed(LOOP.seed)
    assert mean_psnr(model, clips.clips) > mean_psnr(VideoDCAE(TINY_AE), clips.clips) + 0.5

@torch.no_grad()
def test_the_saved_autoencoder_is_the_returned_one_and_gives_unit_variance(clips, autoencoder):
    run, model = autoencoder
    again, x = VideoDCAE.from_pretrained(run / "model"), to_video(clips.clips)
    assert again.cfg == model.cfg == replace(TINY_AE, scaling_factor=model.scaling_factor)
    assert torch.allclose(again(x), model(x), atol=1e-5) and abs(model.encode(x).std() - 1) < 0.01 and abs(latent_scale(model, clips.clips) / model.scaling_factor - 1) < 0.01

@torch.no_grad()
def test_a_checkpoint_is_a_model_as_well(clips, autoencoder):
    run, model = autoencoder
    last = VideoDCAE.from_pretrained(checkpoints(run / "checkpoints")[-1])
    assert last.scaling_factor == 1 and torch.allclose(last(to_video(clips.clips)), model(to_video(clips.clips)), atol=1e-5)

def test_training_goes_on_from_weights_and_measures_the_scale_anew(clips, autoencoder, tmp_path):
    run, model = autoencoder
    start = run / "model"
    more = train_autoencoder(clips, clips, replace(AE, loop=replace(LOOP, steps=2, lr=1e-6, save_every=2)), tmp_path / "more", start=start, quiet=True)
    assert read_log(tmp_path / "more")["loss"][0] < 0.9 * read_log(run)["loss"][0]
    with torch.no_grad(): assert abs(more.scaling_factor / model.scaling_factor - 1) < 0.01 and torch.allclose(more.encode(to_video(clips.clips)), model.encode(to_video(clips.clips)), atol=0.02)

def test_the_perceptual_part_is_weighed_and_logged(clips, tmp_path):
    recipe = replace(AE, loop=replace(LOOP, steps=2, save_every=2), loss=ReconstructionLossConfig(0.5, 2))
    train_autoencoder(clips, clips, recipe, tmp_path, quiet=True)
    log = read_log(tmp_path)
    assert all(abs(l - (a + 0.5 * p)) < 1e-5 and p > 0 for l, a, p in zip(log["loss"], log["l1"], log["perceptual"]))

@torch.no_grad()
def test_perceptual_distance_is_zero_for_equal_frames_and_grows_with_blur(clips):
    perceptual, x = PerceptualLoss(), to_video(clips.clips)[:2]
    blur = lambda k: torch.nn.functional.avg_pool3d(x, (1, k, k), 1, (0, k // 2, k // 2))
    parts = [reconstruction_loss(x, y, ReconstructionLossConfig(), perceptual, torch.Generator().manual_seed(0))["perceptual"].item() for y in (x, blur(3), blur(7))]
    assert parts[0] == 0 and 0 < parts[1] < parts[2] and not perceptual.train().net.training and not any(p.requires_grad for p in perceptual.parameters())

def test_windows_stay_inside_their_clip_and_are_mirrored_or_reversed_whole(clips):
    seen = set()
    for seed in range(40):
        w = window(clips, [2], 3, torch.Generator().manual_seed(seed))[0]
        clip = to_video(clips.clips[2:3])[0]
        found = [(s, m, r) for s in range(6) for m in (0, 1) for r in (0, 1)
                 if torch.equal(w, clip[:, s : s + 3].flip([d for d, on in ((-1, m), (1, r)) if on]))]
        assert len(found) == 1
        seen.add(found[0])
    assert {s for s, _, _ in seen} == set(range(6)) and {(m, r) for _, m, r in seen} == {(0, 0), (0, 1), (1, 0), (1, 1)}

# ---- the two phases ----
def test_the_recipes_are_the_reports():
    for first, second, channels in (("dcae_128", "dcae_128_gan", 128), ("dcae_256", "dcae_256_gan", 256)):
        a, b = RECIPES[first](), RECIPES[second]()
        assert a.model.latent_channels == channels and (a.model.spatial_compression, a.model.temporal_compression) == (32, 4)
        assert (a.loop.steps, b.loop.steps) == (250_000, 200_000) and a.adversarial is None and b.adversarial.weight == 0.05 and b.adversarial.start == 0
        for recipe in (a, b):
            assert (recipe.num_frames, recipe.size, recipe.loop.batch_size, recipe.images_per_clip) == (32, 256, 8, 1)                       # batch 1 on 8 GPUs
            assert (recipe.loop.lr, recipe.loop.betas, recipe.loop.eps, recipe.loop.final_lr, recipe.loop.warmup) == (5e-5, (0.9, 0.999), 1e-15, 1.0, 0)
            assert (recipe.loss.perceptual_weight, recipe.loss.perceptual_network, recipe.loss.perceptual_frames, recipe.loss.kl_weight) == (0.5, "lpips-vgg", 32, 0.0)
            assert (recipe.image_share, recipe.loop.ema, recipe.loop.clip, recipe.loop.precision) == (0.2, 0.99, 1.0, "bf16")                 # these are the release's
        assert (b.adversarial.lr, b.adversarial.betas, b.adversarial.eps, b.adversarial.loss, b.adversarial.cap) == (1e-4, (0.9, 0.999), 1e-15, "hinge", 1e4)
        assert (b.adversarial.width, b.adversarial.layers) == (64, 5) and replace(b, loop=a.loop, adversarial=None, checkpointing=a.checkpointing) == a
        with torch.device("meta"): assert sum(p.numel() for p in PatchDiscriminator3D(3, b.adversarial.width, b.adversarial.layers).parameters()) == 18_823_553

def test_the_pocket_recipes_halve_once_more_or_add_the_adversary():
    pocket, f16, gan = (RECIPES[name]() for name in ("pocket_dcae", "pocket_dcae_f16", "pocket_dcae_gan"))
    assert (pocket.loop.steps, f16.loop.steps) == (5200, 4400) and (pocket.num_frames, pocket.size) == (12, 64)
    shapes = [VideoDCAE(r.model).latent_shape(32, 64, 64) for r in (pocket, f16)]
    assert shapes == [(16, 8, 8, 8), (64, 8, 4, 4)] and np.prod(shapes[0]) == np.prod(shapes[1])
    assert replace(gan, adversarial=None, loop=pocket.loop) == pocket and gan.adversarial.weight == 0.05 and 2 ** gan.adversarial.layers <= 64

GAN = replace(AE, loop=replace(LOOP, steps=12, save_every=4), adversarial=AdversarialConfig(lr=2e-3, eps=1e-8, width=4, layers=2, start=2))
PROGRAM = f"""
import sys, torch
from dataclasses import replace
from test_training import GAN, train_autoencoder, ClipCache
torch.set_num_threads(1)
clips = ClipCache.load(sys.argv[1])
train_autoencoder(clips, clips, GAN, sys.argv[2], quiet=True)
"""

@pytest.fixture(scope="module")
def second_phase(clips, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "gan"
    yield run, train_autoencoder(clips, clips, GAN, run, quiet=True)
    torch.set_num_threads(threads)

def test_the_second_phase_has_two_players_and_leaves_one_model(second_phase):
    run, model = second_phase
    log = is_a_run(run, 12, (8, 12), ["0000012.png"])
    played = [v is not None for v in log["adaptive_weight"]]
    assert played == [v is not None for v in log["discriminator_loss"]] == [False] * 2 + [True] * 10
    for i in range(2, 12): assert log["loss"][i] == pytest.approx(log["l1"][i] + 0.05 * log["adaptive_weight"][i] * log["adversarial"][i], abs=1e-5) and log["adversarial_gradient"][i] > 0
    assert log["loss"][:2] == log["l1"][:2]
    _, state = load_checkpoint(checkpoints(run / "checkpoints")[-1])
    fresh = PatchDiscriminator3D(3, 4, 2).state_dict()
    assert state["rival"]["weights"].keys() == fresh.keys() and VideoDCAE.from_pretrained(run / "model").state_dict().keys() == model.state_dict().keys() == VideoDCAE(TINY_AE).state_dict().keys()
    assert json.loads((run / "config.json").read_text())["adversarial"] == json.loads(json.dumps(asdict(GAN.adversarial)))

@pytest.mark.slow
def test_a_second_phase_that_is_killed_ends_like_one_that_was_not(clips, second_phase, tmp_path):
    clips.save(tmp_path / "clips.safetensors")
    (tmp_path / "program.py").write_text(PROGRAM)
    run, end = tmp_path / "run", time.monotonic() + 200
    p = subprocess.Popen([sys.executable, tmp_path / "program.py", tmp_path / "clips.safetensors", run], stderr=subprocess.PIPE, text=True, env=dict(__import__("os").environ, PYTHONPATH=str(Path(__file__).parent)))
    while not checkpoints(run / "checkpoints"):
        assert p.poll() is None and time.monotonic() < end, p.stderr.read()
        time.sleep(0.005)
    p.send_signal(signal.SIGKILL)
    assert p.wait(60) == -signal.SIGKILL and not (run / "model").exists()
    again = train_autoencoder(clips, clips, GAN, run, quiet=True)
    log, straight = read_log(run), read_log(second_phase[0])
    assert log["step"] == list(range(1, 13)) and log.keys() == straight.keys()
    for k in numbers(log): assert np.allclose(np.array(log[k], float), np.array(straight[k], float), rtol=1e-6, atol=1e-6, equal_nan=True), k
    for a, b in zip(again.state_dict().values(), second_phase[1].state_dict().values()): assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)

@pytest.mark.slow
def test_a_discriminator_that_wins_stops_the_run_and_the_last_checkpoint_stays(clips, tmp_path):
    hard = replace(GAN, loop=replace(GAN.loop, steps=200, lr=1e-12, save_every=5, warmup=0), image_share=0.0, adversarial=AdversarialConfig(lr=5e-3, betas=(0.5, 0.9), eps=1e-8, width=16, layers=2, patience=6))
    line = error(lambda: train_autoencoder(clips, clips, hard, tmp_path / "run", quiet=True), "the discriminator has taught nothing for 6 steps", "it has won", "the last checkpoint is from before")
    log, kept = read_log(tmp_path / "run"), checkpoints(tmp_path / "run/checkpoints")
    last = log["step"][-1]
    assert f"stopped at step {last}" in line and last < 200 and [s for s, w in zip(log["step"], log["warning"]) if w][-2:] == [last - 5, last] and not (tmp_path / "run/model").exists()
    assert kept and int(kept[-1].name[5:]) < last - 4 and all(v < 0.01 for v in log["discriminator_loss"][-6:])

def test_a_discriminator_too_deep_for_the_clips_is_one_line(clips, tmp_path):
    error(lambda: train_autoencoder(clips, clips, replace(GAN, adversarial=AdversarialConfig(layers=6)), tmp_path / "run", quiet=True), "32 x 32", "6 layers")
    assert not (tmp_path / "run").exists()

def test_recomputing_blocks_changes_no_number(clips, tmp_path):
    short = replace(GAN, loop=replace(LOOP, steps=3, save_every=3), adversarial=replace(GAN.adversarial, start=0))
    for name, on in (("plain", False), ("again", True)): train_autoencoder(clips, clips, replace(short, checkpointing=on), tmp_path / name, quiet=True)
    a, b = read_log(tmp_path / "plain"), read_log(tmp_path / "again")
    assert all(np.allclose(a[k], b[k], rtol=1e-5) for k in numbers(a))

def test_latent_distillation_trains_its_projection_and_saves_it_beside_the_weights(clips, autoencoder, tmp_path):
    aligned = replace(AE, loop=replace(LOOP, steps=6, save_every=3), alignment=AlignmentConfig(weight=0.5, stage=3), image_share=0.0)
    model = train_autoencoder(clips, clips, aligned, tmp_path / "run", start=autoencoder[0] / "model", quiet=True)
    log = read_log(tmp_path / "run")
    assert all(l == pytest.approx(a + 0.5 * d, abs=1e-5) for l, a, d in zip(log["loss"], log["l1"], log["alignment"])) and log["similarity"][-1] > log["similarity"][0]
    first, last = (load_checkpoint(p)[1]["helper"] for p in checkpoints(tmp_path / "run/checkpoints"))
    assert first.keys() == {"projection.weight", "projection.bias"} and not torch.equal(first["projection.weight"], last["projection.weight"])
    assert model.state_dict().keys() == VideoDCAE(TINY_AE).state_dict().keys()

def test_what_the_model_cannot_be_charged_for_is_one_line(clips, tmp_path):
    error(lambda: train_autoencoder(clips, clips, replace(AE, loss=ReconstructionLossConfig(0.0, kl_weight=1e-3)), tmp_path / "run", quiet=True), "kl_weight", "has none")
    error(lambda: train_autoencoder(clips, clips, replace(AE, loss=ReconstructionLossConfig(perceptual_network="lpips-vgg")), tmp_path / "run", quiet=True), "lpips-vgg needs its weights")
    with pytest.raises(ValueError, match="choose one"): replace(AE, loss=ReconstructionLossConfig(0.0, kl_weight=1e-3), alignment=AlignmentConfig(weight=1.0))
    assert not (tmp_path / "run").exists()

# ---- the causal autoencoder, by the same function ----
CAUSAL = replace(AE, model=TINY_CAUSAL, num_frames=5, loop=replace(LOOP, steps=12))

@pytest.mark.parametrize("residual", [False, True])
def test_the_causal_autoencoder_trains_by_the_same_function(clips, tmp_path, residual):
    model = train_autoencoder(clips, clips, replace(CAUSAL, model=replace(TINY_CAUSAL, residual=residual)), tmp_path, quiet=True)
    log = is_a_run(tmp_path, 12, (8, 12), ["0000012.png"])
    assert np.mean(log["l1"][-4:]) < 0.9 * np.mean(log["l1"][:3]) and model.cfg == replace(TINY_CAUSAL, residual=residual, scaling_factor=model.scaling_factor)
    again, x = HunyuanVAE.from_pretrained(tmp_path / "model"), to_video(clips.clips)
    with torch.no_grad(): assert again.cfg == model.cfg and abs(model.encode(x).std() - 1) < 0.01 and torch.allclose(again(x), model(x), atol=1e-5) and model(x).shape == x.shape

def test_a_posterior_is_sampled_where_a_divergence_is_asked_for(clips, tmp_path):
    asked = replace(CAUSAL, loss=ReconstructionLossConfig(0.0, kl_weight=0.1), loop=replace(LOOP, steps=3, save_every=3))
    for name in "ab": train_autoencoder(clips, clips, asked, tmp_path / name, quiet=True)
    log, other = read_log(tmp_path / "a"), read_log(tmp_path / "b")
    assert log["loss"] == other["loss"] and all(k > 0 and l == pytest.approx(a + 0.1 * k, rel=1e-4) for l, a, k in zip(log["loss"], log["l1"], log["kl"]))

def test_the_causal_autoencoder_meets_the_discriminator_and_the_alignment(clips, tmp_path):
    both = replace(CAUSAL, adversarial=replace(GAN.adversarial, start=0), alignment=AlignmentConfig(weight=0.1, stage=2), loop=replace(LOOP, steps=3, save_every=3), checkpointing=True)
    train_autoencoder(clips, clips, both, tmp_path, quiet=True)
    log = read_log(tmp_path)
    assert all(l == pytest.approx(a + 0.1 * d + 0.05 * w * g, abs=1e-5) for l, a, d, w, g in zip(log["loss"], log["l1"], log["alignment"], log["adaptive_weight"], log["adversarial"]))

def test_windows_of_a_causal_autoencoder_are_4k_plus_1(clips, tmp_path):
    error(lambda: train_autoencoder(clips, clips, replace(CAUSAL, num_frames=8), tmp_path / "run", quiet=True), "4k + 1 frames", "num_frames 8")
    assert not (tmp_path / "run").exists()
    plain, residual = (RECIPES[name]() for name in ("pocket_hunyuan", "pocket_hunyuan_residual"))
    assert plain.num_frames == 13 and not plain.model.residual and replace(residual, model=replace(residual.model, residual=False)) == plain == replace(RECIPES["pocket_dcae"](), model=plain.model, num_frames=13)
    assert HunyuanVAE(plain.model).latent_shape(13, 64, 64) == (16, 4, 8, 8)

def test_weights_of_the_other_autoencoder_are_one_line(clips, autoencoder, tmp_path):
    error(lambda: train_autoencoder(clips, clips, CAUSAL, tmp_path / "run", start=autoencoder[0] / "model", quiet=True), "autoencoder")
    assert not (tmp_path / "run").exists()

@torch.no_grad()
def test_weights_that_are_no_numbers_stop_the_first_step(clips, autoencoder, tmp_path):
    bad = VideoDCAE.from_pretrained(autoencoder[0] / "model")
    bad.last_layer[0] = float("nan")
    bad.save_pretrained(tmp_path / "bad")
    with torch.enable_grad(): error(lambda: train_autoencoder(clips, clips, AE, tmp_path / "run", start=tmp_path / "bad", quiet=True), "not finite at step 1")
    assert not checkpoints(tmp_path / "run/checkpoints") and not (tmp_path / "run/model").exists()

@pytest.mark.parametrize("change, words", [(dict(num_frames=9), ("8 frames", "9")), (dict(images_per_clip=9), ("8 frames", "9"))], ids=str)
def test_clips_too_short_for_the_recipe_are_one_line_and_start_no_run(clips, tmp_path, change, words):
    error(lambda: train_autoencoder(clips, clips, replace(AE, **change), tmp_path / "run", quiet=True), *words)
    assert not (tmp_path / "run").exists()

def test_clips_of_a_size_that_does_not_divide_are_one_line_and_start_no_run(clips, tmp_path):
    odd = replace(clips, clips=clips.clips[:, :, :30])
    error(lambda: train_autoencoder(odd, odd, AE, tmp_path / "run", quiet=True), "multiples of 8", "30 x 32")
    assert not (tmp_path / "run").exists()

def test_another_recipe_in_the_same_folder_is_refused_and_changes_nothing(clips, autoencoder):
    before = contents(autoencoder[0])
    error(lambda: train_autoencoder(clips, clips, replace(AE, image_share=0.5), autoencoder[0], quiet=True), "image_share is 0.25 there, 0.5 here")
    assert contents(autoencoder[0]) == before


# ---- the transformer ----
def test_a_transformer_learns_and_leaves_a_run_that_is_the_returned_model(latents, tmp_path):
    drawn = []
    def sample(model, path, step): path.parent.mkdir(exist_ok=True); path.with_suffix(".txt").write_text(str(step)); drawn.append(step)
    model = train_diffusion(latents, DIFFUSION, tmp_path / "run", sample=sample, quiet=True)
    log = is_a_run(tmp_path / "run", 30, (20, 30), ["0000030.txt"])
    assert drawn == [30] and 1.5 < log["loss"][0] < 2.6 and np.mean(log["loss"][-8:]) < 0.85 * np.mean(log["loss"][:4])
    again = MMDiT.from_pretrained(tmp_path / "run/model")
    assert again.cfg == TINY_MMDIT and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))

    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["condition_weights"] == DIFFUSION.condition_weights and config["model"]["hidden_size"] == 64
    more = train_diffusion(latents, replace(DIFFUSION, loop=replace(DIFFUSION.loop, steps=1)), tmp_path / "more", start=tmp_path / "run/model", quiet=True)
    assert read_log(tmp_path / "more")["loss"][0] < 0.9 * log["loss"][0] and more.cfg == TINY_MMDIT

def loss_of(model, cache, rows, recipe, seed):
    g = torch.Generator().manual_seed(seed)
    return diffusion_loss(model, cache.batch(SimpleNamespace(rows=rows), g).to("cpu"), recipe, g)

@torch.no_grad()
def test_a_step_is_decided_by_its_generator(latents):
    model = MMDiT(TINY_MMDIT).eval()
    for p in model.parameters(): p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    a, b, c = (loss_of(model, latents, [0, 3, 4], DIFFUSION, seed)["loss"].item() for seed in (1, 1, 2))
    assert a == b != c

@torch.no_grad()
def test_an_image_that_is_given_helps(latents):
    "The reference channels reach the model: with them the same noise and time give another prediction."
    model = MMDiT(TINY_MMDIT).eval()
    for p in model.parameters(): p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    loss = lambda **weights: loss_of(model, latents, [0, 1], replace(DIFFUSION, condition_weights=weights), 1)["loss"].item()
    assert len({loss(t2v=1), loss(i2v_head=1), loss(i2v_tail=1), loss(i2v_loop=1)}) == 4

def test_latents_of_other_channels_are_one_line_and_start_no_run(latents, tmp_path):
    eight = replace(latents, latents=latents.latents[:, :8], first=latents.first[:, :8], last=latents.last[:, :8])
    error(lambda: train_diffusion(eight, DIFFUSION, tmp_path / "run", quiet=True), "16 channels", "gives 8")
    assert not (tmp_path / "run").exists()

def test_texts_of_another_width_are_one_line_and_start_no_run(latents, tmp_path):
    error(lambda: train_diffusion(latents, replace(DIFFUSION, model=replace(TINY_MMDIT, context_in_dim=128)), tmp_path / "run", quiet=True), "384", "128")
    assert not (tmp_path / "run").exists()

def test_a_wrong_start_is_one_line_and_starts_no_run(latents, clips, autoencoder, tmp_path):
    error(lambda: train_diffusion(latents, DIFFUSION, tmp_path / "run", start=tmp_path / "nowhere", quiet=True), "no weights at")
    error(lambda: train_diffusion(latents, DIFFUSION, tmp_path / "run", start=autoencoder[0] / "model", quiet=True), "transformer")
    error(lambda: train_autoencoder(clips, clips, AE, tmp_path / "run", start=tmp_path / "nowhere", quiet=True), "no weights at")
    assert not (tmp_path / "run").exists()


# ---- the latent cache ----
@torch.no_grad()
def test_the_latent_cache_holds_what_the_models_say(clips, autoencoder, text, latents):
    model, x = autoencoder[1], to_video(clips.clips)
    near = lambda a, b: (a.float() - b).abs().max() <= 2 ** -7 * b.abs().max()                   # bfloat16 has 8 bits
    assert len(latents) == 6 and latents.latents.shape == (6, 16, 2, 4, 4) and latents.tokens.shape == (6, 2, 64, 384)
    assert near(latents.latents, model.encode(x)) and near(latents.first, model.encode(x[:, :, :1])) and near(latents.last, model.encode(x[:, :, -1:]))
    tokens, pooled = text([decorate(clips.captions[4][1], clips.fps, float(clips.motion[4])), ""])
    assert near(latents.tokens[4, 1], tokens[0]) and near(latents.pooled[4, 1], pooled[0]) and near(latents.null_tokens[0], tokens[1]) and near(latents.null_pooled[0], pooled[1])

def test_the_latent_cache_is_read_again_and_made_anew_when_anything_changes(clips, autoencoder, text, tmp_path):
    file, model = tmp_path / "latents.safetensors", autoencoder[1]
    made = latent_cache(file, clips, model, text, quiet=True)
    first = file.stat()
    again = latent_cache(file, clips, model, text, quiet=True)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (first.st_mtime_ns, first.st_ino) and again.origin == made.origin and torch.equal(again.latents, made.latents)
    other, scaled = VideoDCAE(model.cfg), VideoDCAE(replace(model.cfg, scaling_factor=2 * model.scaling_factor))
    for m in (other, scaled): m.load_state_dict(model.state_dict())
    with torch.no_grad(): next(other.parameters())[0, 0, 0, 0, 0] += 0.1
    changed = [latent_cache(file, c, m, text, quiet=True) for c, m in
               ((clips, other), (clips, scaled), (replace(clips, captions=[["no words", "none"]] * 6), model), (replace(clips, motion=clips.motion + 3), model))]
    assert len({c.origin for c in changed} | {made.origin}) == 5, "same name, same count, other contents"
    assert torch.allclose(changed[1].latents.float(), made.latents.float() / 2) and not torch.equal(changed[0].latents, made.latents) and not torch.equal(changed[2].tokens, made.tokens)

def test_in_a_folder_each_autoencoder_has_latents_of_its_own(clips, autoencoder, text, tmp_path):
    model = autoencoder[1]
    scaled = VideoDCAE(replace(model.cfg, scaling_factor=1.0)); scaled.load_state_dict(model.state_dict())
    made = [latent_cache(tmp_path / "data", clips, m, text, quiet=True) for m in (model, scaled)]
    files = contents(tmp_path / "data")
    assert len(files) == 2 and [latent_cache(tmp_path / "data", clips, m, text, quiet=True).origin for m in (model, scaled)] == [m.origin for m in made] and contents(tmp_path / "data") == files

def test_a_file_that_is_no_latent_cache_is_one_line(clips, autoencoder, text, tmp_path):
    for name, data in (("text", b"hello"), ("empty", b""), ("clips", None)):
        if data is None: clips.save(tmp_path / name)
        else: (tmp_path / name).write_bytes(data)
        error(lambda: LatentCache.load(tmp_path / name), "is not a latent cache")
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
        error(lambda: latent_cache(tmp_path / f"{name}.safetensors", clips, autoencoder[1], text, quiet=True), "is not a latent cache")
    error(lambda: LatentCache.load(tmp_path / "nowhere"), "no such latent cache")


# ---- the clip cache ----
def test_a_clip_cache_comes_back_as_it_was(clips, tmp_path):
    clips.save(tmp_path / "c.safetensors")
    again = ClipCache.load(tmp_path / "c.safetensors")
    assert (again.clips == clips.clips).all() and again.captions == clips.captions and (again.motion == clips.motion).all() and (again.fps, again.origin) == (clips.fps, clips.origin)

def test_the_world_cache_is_rendered_once_and_is_the_pocket_world(clips, tmp_path):
    file = tmp_path / "w.safetensors"
    a = world_cache(file, 11, 2, 32, 8)
    before = file.stat().st_mtime_ns
    b = world_cache(file, 11, 2, 32, 8)
    assert file.stat().st_mtime_ns == before and (a.clips == b.clips).all() and (a.clips == clips.clips[:2]).all() and (a.clips[1] == render(world_truth(11, 1), 32, 8)).all()
    assert a.motion[0] == np.float32(motion_score(rgb_luma(a.clips[0]))) and all(len(forms) == 2 and len(forms[0]) > len(forms[1]) for forms in a.captions)
    error(lambda: world_cache(file, 12, 2, 32, 8), "seed 11", "seed 12")

def test_a_share_of_the_world_moves_fast(clips, tmp_path):
    late = world_cache(tmp_path / "late", 11, 4, 32, 8, first=2)
    assert (late.clips == clips.clips[2:6]).all() and late.captions == clips.captions[2:6] and "4 clips from number 2, 8 frames" in late.origin
    half = world_cache(tmp_path / "half", 11, 4, 32, 8, first=2, fast_share=0.5)
    assert half.captions == late.captions and (half.clips[::2] == late.clips[::2]).all() and all((a != b).any() for a, b in zip(half.clips[1::2], late.clips[1::2])) and "0.5 of them fast" in half.origin
    fast = [world_truth(3, i, 1.0) for i in range(12)]
    assert fast == [sample_truth(np.random.default_rng((3, i)), (5.0, 9.5)) for i in range(12)] and sum(world_truth(3, i, 0.25) == truth for i, truth in enumerate(fast)) == 3
    scores = [motion_score(rgb_luma(render(truth, 64, 32))) for truth in fast]
    assert np.median(scores) > 6 and max(scores) > 8

def test_a_file_that_is_no_clip_cache_is_one_line(clips, tmp_path):
    clips.save(good := tmp_path / "good")
    data = good.read_bytes()
    for name, made in (("text", b"hello"), ("empty", b""), ("cut off", data[:-100]), ("header", data[:20])):
        (tmp_path / name).write_bytes(made)
        error(lambda: ClipCache.load(tmp_path / name), "is not a clip cache", name)
    save_file(dict(clips=clips.clips), tmp_path / "weights")
    error(lambda: ClipCache.load(tmp_path / "weights"), "is not a clip cache")
    error(lambda: ClipCache.load(tmp_path / "nowhere"), "no such clip cache")
    error(lambda: ClipCache.load(tmp_path), "is not a clip cache")

@pytest.mark.parametrize("change", [dict(motion=np.zeros(5, np.float32)), dict(captions=[["a"]] * 5), dict(clips=np.zeros((6, 8, 32, 32, 3))), dict(captions=[["a"]] * 3 + [["a", "b"]] * 3)], ids=["motion", "captions", "floats", "forms"])
def test_a_clip_cache_that_does_not_hang_together_is_refused(clips, change):
    with pytest.raises(ValueError): replace(clips, **change)


# ---- a curated folder ----
@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    "Two films of the pocket world: three seconds of one shot, and two shots of two and a half."
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("home") / "curated"
    shots = [render(world_truth(3, i), size=128, num_frames=n) for i, n in enumerate((72, 60, 60))]
    write_video(raw / "a.mp4", shots[0]); write_video(raw / "b.mp4", np.concatenate(shots[1:]))
    (raw / "broken.mp4").write_bytes(b"nothing")
    return out, curate(CurateConfig(raw, out, progress=False))

@pytest.mark.slow
def test_a_curated_folder_becomes_windows_of_its_kept_clips(curated):
    folder, manifest = curated
    kept = [row for row in read_manifest(folder).iter_rows(named=True) if row["status"] == "kept"]
    assert kept, manifest.select("source", "status", "reason")
    cache = curated_cache(folder, size=32, num_frames=16)
    assert len(cache) == sum(row["num_frames"] // 16 for row in kept) and cache.clips.shape[1:] == (16, 32, 32, 3) and cache.fps == 24 and cache.captions == [[""]] * len(cache)
    assert (cache.clips[:2] == decode(folder / kept[0]["path"], size=32)[:32].reshape(2, 16, 32, 32, 3)).all()
    assert all(m == np.float32(motion_score(rgb_luma(c))) for m, c in zip(cache.motion, cache.clips))

def test_half_the_rate_takes_every_second_frame(curated):
    kept = [row for row in read_manifest(curated[0]).iter_rows(named=True) if row["status"] == "kept"]
    cache = curated_cache(curated[0], size=32, num_frames=8, fps=12)
    assert (cache.clips[0] == decode(curated[0] / kept[0]["path"], size=32)[:16:2]).all() and cache.fps == 12

def test_captions_of_the_manifest_are_used_and_tell_caches_apart(curated, tmp_path):
    import polars as pl, shutil
    folder = shutil.copytree(curated[0], tmp_path / "curated")
    write_manifest(read_manifest(folder).with_columns(text=pl.lit("a red ball")), folder / "manifest.parquet")
    assert set(map(tuple, curated_cache(folder, 32, 16).captions)) == {("a red ball",)}

def test_a_curated_folder_without_anything_usable_is_one_line(curated, tmp_path):
    error(lambda: curated_cache(curated[0], 32, num_frames=500), "no kept clip", "500 frames")
    error(lambda: curated_cache(tmp_path, 32), "no such manifest")
    error(lambda: curated_cache(tmp_path / "nowhere", 32), "no such curated folder")

def test_a_clip_that_is_gone_is_one_line(curated, tmp_path):
    import shutil
    folder = shutil.copytree(curated[0], tmp_path / "curated")
    next((folder / "clips").iterdir()).unlink()
    error(lambda: curated_cache(folder, 32, 16), "clips")
