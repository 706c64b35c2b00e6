"From words, pictures and films to files: which conditions reach the model, what is refused, what a file says of itself, and how little memory will do."
import json, subprocess, sys, threading, time
from contextlib import contextmanager
from importlib.util import find_spec
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora_nb.autoencoder import dc_ae, hunyuan
from opensora_nb.autoencoder.dc_ae import VideoDCAE
from opensora_nb.autoencoder.hunyuan import HunyuanVAE
from opensora_nb.autoencoder.tiling import Tiling
from opensora_nb.cluster.files import UserError
from opensora_nb.commands.cli import main
from opensora_nb.data.captions import HttpConfig
from opensora_nb.data.video import decode, write_video
from opensora_nb.flow.guidance import Guidance
from opensora_nb.inference.given import given_pixels, picture_tensor, read_picture, read_stretch
from opensora_nb.inference.image_to_video import ImageToVideo as Sampler, SampleConfig
from opensora_nb.inference.memory import Away, Need, Turns, block_bytes, check_fits, decode_bytes, sampling_bytes
from opensora_nb.inference.pipelines import AnyToVideo, ExtendVideo, FluxPainter, ImageToVideo, LoopVideo, Pipeline, TextToImageToVideo, TextToVideo, find_parts, settings_of, write_clip
from opensora_nb.inference.prompts import Assistant, motion_by_rule, motion_score, read_prompts, refine_prompt
from opensora_nb.inference.sizes import ASPECT_RATIOS, admitted, check_frames, clip_size, nearest_ratio
from opensora_nb.mmdit import model as mmdit
from opensora_nb.mmdit.model import MMDiT
from opensora_nb.mmdit.text import TextEncoder

TINY_AE = replace(dc_ae.pocket(), enc_width=(8, 16, 32, 32), dec_width=(8, 16, 32, 32), enc_depth=(0, 1, 1, 1), dec_depth=(0, 1, 1, 1), scaling_factor=0.7)
TINY_VAE = hunyuan.HunyuanVAEConfig(latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
TINY_MMDIT = replace(mmdit.pocket(), hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=2)
QUICK = dict(num_frames=12, height=32, width=32, steps=2)


def grown(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * (0.7 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1 and not seed and 0.2))
    return model.eval()

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A folder laid out by part, with models of a few thousand parameters."
    folder = tmp_path_factory.mktemp("weights")
    grown(VideoDCAE(TINY_AE)).save_pretrained(folder / "autoencoder"); grown(MMDiT(TINY_MMDIT), 1).save_pretrained(folder / "mmdit")
    return folder

@pytest.fixture(scope="module")
def pipe(weights): return AnyToVideo.from_pretrained(weights)

@pytest.fixture(scope="module")
def causal(pipe):
    "The same with a causal autoencoder."
    return AnyToVideo(Sampler(grown(HunyuanVAE(TINY_VAE)), pipe.sampler.model, pipe.sampler.text))

def picture(h=40, w=40, seed=0): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
def film(n, h=32, w=32): return np.random.default_rng(n).integers(0, 256, (n, h, w, 3), np.uint8)

def error(work, *words):
    with pytest.raises(UserError) as e: work()
    line = str(e.value)
    assert "\n" not in line and all(w in line for w in words), line


# ---- conditions ----
@pytest.mark.parametrize("refs, kind, ends", [(1, "i2v_head", [0]), (1, "i2v_tail", [-1]), (1, "i2v_loop", [0, -1]), (2, "i2v_loop", [0, -1])])
def test_given_images_stand_in_their_frames_and_nowhere_else(pipe, refs, kind, ends):
    given = [picture(seed=k) for k in range(refs)]
    clip = pipe("x", given, kind, return_latents=True, **QUICK)
    latents = [pipe.sampler.held(picture_tensor(p, (32, 32))[None, :, None])[0] for p in (given * 2)[:2]]
    expected = {0: latents[0], -1: latents[-1] if len(ends) == 2 else latents[0]}
    for end in ends: assert torch.equal(clip.latents[0][:, [end]], expected[end])
    free = {0, 1, 2} - {e % 3 for e in ends}
    assert all(not torch.allclose(clip.latents[0][:, f], e[:, 0], atol=0.05) for f in free for e in latents) and clip.settings[0]["cond_type"] == kind

@pytest.mark.parametrize("causal_one, kind, frames, n", [(False, "v2v_head", 36, 8), (False, "v2v_tail", 36, 8), (False, "v2v_tail_easy", 68, 16), (True, "v2v_head", 37, 9)])
def test_a_stretch_is_shown_to_the_model_where_it_belongs_and_not_written_back(pipe, causal, causal_one, kind, frames, n):
    pipe, seen = causal if causal_one else pipe, []
    hook = pipe.sampler.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["cond"]), with_kwargs=True)
    try: clip = pipe("x", [film(frames + 30)], kind, return_latents=True, **QUICK | dict(num_frames=frames, height=16, width=16, steps=1))
    finally: hook.remove()
    T = clip.latents.shape[2]
    mask = seen[0][0, :, 0].view(T, -1)
    given = range(n) if "head" in kind else range(T - n, T)
    assert [bool(m) for m in mask.mean(1)] == [f in given for f in range(T)], "the first row sees text and film"
    assert clip.frames.shape == (1, frames, 16, 16, 3) and not seen[0][-1].any(), "the last sees neither"

def test_image_guidance_grows_along_the_clip_for_images_only(pipe):
    run = lambda kind, frames, **g: pipe("x", [film(80)], kind, return_latents=True, **QUICK | dict(num_frames=frames, height=16, width=16), guidance=Guidance(**g)).latents
    assert not torch.equal(run("i2v_head", 36, dynamic_image=True), run("i2v_head", 36, dynamic_image=False))
    assert torch.equal(run("v2v_head", 36, dynamic_image=True), run("v2v_head", 36, dynamic_image=False))

def test_a_causal_autoencoder_gives_4k_plus_1_frames(causal):
    clip = LoopVideo(causal.sampler)("x", picture(), **QUICK | dict(num_frames=9))
    assert clip.frames.shape == (1, 9, 32, 32, 3)
    error(lambda: causal("x", **QUICK), "4k + 1", "9 or 13")

def test_pipelines_by_name_make_what_they_say_and_nothing_else(pipe):
    core = pipe.sampler
    assert [c(core)("x", *a, **QUICK).settings[0]["cond_type"] for c, a in ((TextToVideo, []), (ImageToVideo, [picture()]), (LoopVideo, [picture(), picture(seed=1)]))] == ["t2v", "i2v_head", "i2v_loop"]
    error(lambda: ImageToVideo(core)("x", **QUICK), "give an image")
    error(lambda: ImageToVideo(core)("x", picture(), picture(), **QUICK), "one of the two")
    error(lambda: TextToVideo(core)("x", [picture()], **QUICK), "not i2v_head")

def test_the_model_is_shown_the_image_as_an_image_and_the_clip_gets_it_as_frames(pipe, causal):
    image = picture_tensor(picture(), (32, 32))[None, :, None]
    alone, still = pipe.sampler.encode(image), pipe.sampler.encode(image.expand(-1, -1, 4, -1, -1))
    seen = []
    hook = pipe.sampler.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["cond"]), with_kwargs=True)
    try: clip = pipe("x", [picture()], return_latents=True, **QUICK)
    finally: hook.remove()
    assert torch.equal(seen[0][0, :16, 1:].T.reshape(16, 4, 4), alone[0, :, 0]) and torch.equal(clip.latents[:, :, :1], still) and not torch.allclose(alone, still, atol=1e-3)
    assert torch.equal(causal.sampler.held(image), causal.sampler.encode(image)), "to a causal autoencoder a first frame is an image"

def test_extending_keeps_the_film_and_adds_new_frames_on_the_side_asked(pipe):
    extend, old = ExtendVideo(pipe.sampler), film(34)
    for side, by, frames, kind, new in (("after", "auto", 36, "v2v_head", 4), ("before", "stretch", 40, "v2v_tail", 8), ("after", "image", 12, "i2v_head", 11), ("before", "auto", 12, "i2v_tail", 11)):
        clip = extend("x", old, side, by, **QUICK | dict(num_frames=frames))
        kept = clip.frames[0][:34] if side == "after" else clip.frames[0][-34:]
        assert len(clip.frames[0]) == 34 + new and np.array_equal(kept, old) and clip.settings[0]["cond_type"] == kind
    error(lambda: extend("x", old, by="stretch", **QUICK), "a stretch is 32 frames", "the new clip 12")
    error(lambda: extend("x", old, "sideways", **QUICK), "'after' or 'before'")

def test_text_to_image_to_video_begins_with_the_picture_that_was_drawn(pipe):
    drawn = {}
    def painter(prompt, size, seed): drawn[seed] = picture_tensor(picture(seed=seed), size); return drawn[seed]
    clips = TextToImageToVideo(pipe.sampler, painter=painter)("x", seed=5, num_sample=2, return_latents=True, **QUICK)
    for k, seed in enumerate((5, 6)): assert torch.equal(clips.latents[k][:, :1], pipe.sampler.held(drawn[seed][None, :, None])[0])
    assert TextToImageToVideo.from_pretrained().painter.name == "pocket image model"
    own = TextToImageToVideo(pipe.sampler)("x", **QUICK)
    assert own.frames.shape == (1, 12, 32, 32, 3) and own.settings[0]["refs"] == [dict(name="video model")]


# ---- the same clip by other means ----
def test_passes_one_by_one_tiles_that_cut_nothing_and_samples_by_number_change_nothing(pipe):
    run = lambda **how: pipe("x", [picture()], **QUICK | how).video
    plain = run(num_sample=2)
    assert torch.allclose(run(passes="single", num_sample=2), plain, atol=1e-4) and torch.allclose(run(seed=43), plain[1:], atol=1e-4) and torch.equal(run(num_sample=2, tiling=Tiling(64, 32)), plain)
    assert not torch.allclose(run(solver="adams_bashforth", steps=4), run(steps=4), atol=1e-3), "another solver is another walk"

@pytest.mark.parametrize("offload", ["models", "blocks"])
def test_low_memory_modes_give_the_same_clip_and_leave_nothing_behind(weights, pipe, offload):
    thrifty = AnyToVideo.from_pretrained(weights, offload=offload, device="cpu")
    a, b = (p("x", [picture()], **QUICK).video for p in (pipe, thrifty))
    turns, model = thrifty.sampler.turn, thrifty.sampler.model
    assert torch.equal(a, b) and turns.now == 0
    each = {name: sum(part.bytes for part in parts) for name, parts in turns.away.items()}
    assert turns.peak == max(each["text"], each["model"], each["autoencoder"]), "the largest alone"
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), pipe.sampler.model.parameters()))

def test_streamed_blocks_keep_two_at_a_time_and_go_when_the_work_is_broken_off():
    model = grown(MMDiT(replace(TINY_MMDIT, depth=2, depth_single_blocks=4)), 1)
    turns = Turns(dict(model=[model]), "cpu", "blocks")
    hook = model.single_blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    inputs = dict(img=torch.randn(1, 4, 16), img_ids=torch.zeros(4, 3), txt=torch.randn(1, 2, 384), txt_ids=torch.zeros(2, 3), timesteps=torch.ones(1), y_vec=torch.randn(1, 384))
    with pytest.raises(KeyboardInterrupt), turns("model"): model(**inputs)
    assert turns.now == 0 and turns.peak <= block_bytes({k: tuple(v.shape) for k, v in model.state_dict().items()}, 4) < sum(p.nbytes for p in model.parameters())
    hook.remove()


@pytest.mark.parametrize("stay", [0, 0.3, 0.7, 2])
def test_blocks_that_stay_change_nothing_but_the_bytes(stay):
    model = grown(MMDiT(replace(TINY_MMDIT, depth=2, depth_single_blocks=5)), 1)
    inputs = dict(img=torch.randn(1, 4, 16), img_ids=torch.zeros(4, 3), txt=torch.randn(1, 2, 384), txt_ids=torch.zeros(2, 3), timesteps=torch.ones(1), y_vec=torch.randn(1, 384))
    with torch.no_grad(): plain = model(**inputs)
    total, two = sum(p.nbytes for p in model.parameters()), block_bytes({k: tuple(v.shape) for k, v in model.state_dict().items()}, 4)
    turns = Turns(dict(model=[model]), "cpu", "blocks", int(stay * total))
    with torch.no_grad(), turns("model"): twice = [model(**inputs) for _ in range(2)]
    assert torch.equal(twice[0], plain) and torch.equal(twice[1], plain) and turns.now == 0 and turns.peak <= min(two + stay * total, total)


# ---- memory told beforehand ----
def test_what_does_not_fit_is_refused_with_what_is_missing_and_what_helps(weights):
    error(lambda: Pipeline.from_pretrained(weights, limit_gb=0.001), "GB are missing", "no option helps")
    error(lambda: Pipeline.from_pretrained(weights, limit_gb=0.095), "--limit-gb 0.095 on cpu has 0.10 GB", "it fits with --offload models")
    assert Pipeline.from_pretrained(weights, limit_gb=1.0).sampler and Pipeline.from_pretrained(weights, limit_gb=0.095, offload="models").sampler

@pytest.mark.soak
def test_a_picture_by_flux_is_the_first_frame(pipe, tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["[PAD]", "[UNK]", "[EOS]", "a", "dog"])}, unk_token="[UNK]")); words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = lambda: PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=16)
    FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=4, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
                 text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16, projection_dim=16, eos_token_id=2)), tokenizer=tokenizer(),
                 text_encoder_2=T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)), tokenizer_2=tokenizer(),
                 transformer=FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8))).save_pretrained(tmp_path)
    painter = FluxPainter(tmp_path, steps=2, area="64px")
    painted = painter("a dog", (32, 32), 3)
    assert painted.shape == (3, 32, 32) and torch.equal(painter("a dog", (32, 32), 3), painted) and not torch.equal(painter("a dog", (32, 32), 4), painted)
    clip = TextToImageToVideo(pipe.sampler, painter=painter)("a dog", seed=3, return_latents=True, **QUICK)
    assert torch.equal(clip.latents[0][:, :1], pipe.sampler.held(painted[None, :, None])[0]) and clip.settings[0]["refs"] == [dict(name="FLUX")]

def test_needs_add_up_by_mode():
    need = Need(text=10, model=24, autoencoder=1, block=3, step=2, decode=5)
    assert [need.on_device(m) for m in ("no", "models", "blocks")] == [40, 26, 10]
    options = {"as asked": dict(need=need, offload="no"), "--a": dict(need=need, offload="models"), "--b": dict(need=need, offload="blocks")}
    check_fits(options, "no", 40)
    error(lambda: check_fits(options, "no", 26), "it fits with --a", "or --b")
    error(lambda: check_fits(options, "no", 9), "no option helps")

def test_longer_clips_and_more_rows_need_more():
    f = lambda **c: sampling_bytes(**dict(cfg=TINY_MMDIT, latent=(16, 3, 4, 4), words=64, dtype=torch.float32) | c)
    assert f() < f(batch=2) < f(batch=4) and f() < f(latent=(16, 9, 4, 4)) and f(passes=1) < f()
    with torch.device("meta"): ae = VideoDCAE(TINY_AE)
    assert decode_bytes(ae, 16, 64, 64) > decode_bytes(ae, 16, 64, 64, Tiling(32, 8)) and decode_bytes(ae, 32, 64, 64) > decode_bytes(ae, 16, 64, 64)

def test_eight_bits_without_torchao_are_one_line(weights):
    if find_spec("torchao"): pytest.skip("torchao is installed")
    error(lambda: Pipeline.from_pretrained(weights, weights="int8", device="cpu"), "pip install torchao")

@pytest.mark.parametrize("offload", ["no", "models", "blocks"])
def test_eight_bits_are_nearly_the_same_clip_in_fewer_bytes_whatever_lies_where(weights, pipe, offload):
    pytest.importorskip("torchao")
    small = AnyToVideo.from_pretrained(weights, weights="int8", offload=offload, device="cpu")
    plain, clip = (p("x", [picture()], **QUICK).video for p in (pipe, small))
    assert 0 < (clip - plain).abs().mean() < 0.05
    if offload != "no": assert small.sampler.turn.now == 0
    model = Away(small.sampler.model, torch.device("cpu"))
    assert model.bytes < 0.5 * sum(p.nbytes for p in pipe.sampler.model.parameters()), "numbers and scales are counted, not what they stand for"


# ---- where weights are ----
def test_parts_are_found_under_all_their_names(tmp_path, weights):
    (tmp_path / "google/t5-v1_1-xxl").mkdir(parents=True)
    for name in ("Open_Sora_v2.safetensors", "hunyuan_vae.safetensors", "Open_Sora_v2_Video_DC_AE.safetensors", "F32T4C128_AE.safetensors"): (tmp_path / name).write_bytes(b"x")
    assert {k: v.name for k, v in find_parts(tmp_path).items()} == dict(mmdit="Open_Sora_v2.safetensors", autoencoder="hunyuan_vae.safetensors", text=tmp_path.name)
    assert {k: v.name for k, v in find_parts(tmp_path, True).items() if k != "text"} == dict(mmdit="Open_Sora_v2_Video_DC_AE.safetensors", autoencoder="F32T4C128_AE.safetensors")
    assert set(find_parts(weights)) == {"mmdit", "autoencoder"}
    error(lambda: find_parts(tmp_path / "google"), "holds no mmdit"); error(lambda: find_parts(tmp_path / "hunyuan_vae.safetensors"), "is a file")
    error(lambda: Pipeline.from_pretrained(weights, device="cuda:99"), "there is no cuda:99"); error(lambda: Pipeline.from_pretrained(weights, device="toaster"), "toaster")


# ---- files ----
def test_a_file_says_how_it_is_made_again(pipe, tmp_path):
    clip = pipe("a “quoted” prompt, über alles", [picture()], seed=9, motion_score=3, fps=12, **QUICK)
    [path] = clip.save(tmp_path / "a.mp4")
    told = settings_of(path)
    assert told == clip.settings[0] == json.loads((tmp_path / "a.json").read_text())
    again = pipe(told["prompt"], [picture()], told["cond_type"], seed=told["seed"], motion_score=told["motion_score"], guidance=Guidance(**{**told["guidance"], "interval": tuple(told["guidance"].get("interval", (0, 1)))}),
                 height=told["size"][0], width=told["size"][1], **{k: told[k] for k in ("num_frames", "steps", "fps", "solver", "negative_prompt")})
    assert np.array_equal(again.frames, clip.frames) and again.save(tmp_path / "b.mp4")[0].read_bytes() == path.read_bytes()
    assert decode(path).shape == (12, 32, 32, 3) and sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4", "b.json", "b.mp4"]

def test_files_that_say_nothing_are_one_line(tmp_path):
    write_video(tmp_path / "plain.mp4", film(4)); (tmp_path / "text.mp4").write_text("hello")
    error(lambda: settings_of(tmp_path / "plain.mp4"), "does not say how it was made"); error(lambda: settings_of(tmp_path / "text.mp4"), "not a video"); error(lambda: settings_of(tmp_path / "none.mp4"), "no such clip")

def test_a_clip_broken_off_in_decoding_leaves_no_file(weights, tmp_path, monkeypatch):
    from opensora_nb.autoencoder import dc_ae as module
    pipe = AnyToVideo.from_pretrained(weights)
    hook = pipe.sampler.autoencoder.decoder.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): pipe("x", **QUICK).save(tmp_path)
    assert not list(tmp_path.iterdir())
    hook.remove(); assert pipe("x", **QUICK).save(tmp_path)

def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, weights, capsys):
    disk = tmp_path / "disk"; disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(disk)], capture_output=True).returncode: pytest.skip("no file system can be mounted here")
    try:
        assert main(["generate", "--prompt", "x", "--models", str(weights), *OPTIONS, "--no-progress", "--out", str(disk)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "No space left on device" in err and not list(disk.iterdir())
    finally: subprocess.run(["umount", str(disk)], check=True)


# ---- the command ----
OPTIONS = "--num-frames 12 --size 32 32 --steps 2".split()

def told(folder): return {p.name: settings_of(p) for p in sorted(folder.glob("*.mp4"))}
def lines(capsys): return [line.split("  (")[1] for line in capsys.readouterr().out.splitlines()]

def test_a_table_is_shared_by_processes_named_by_row_and_seed_and_goes_on_where_it_stopped(weights, tmp_path, monkeypatch, capsys):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("text,ref,motion_score,seed\na dog runs,,auto,\na cat,a.png,2,7\nsnow,a.png;a.png,,\n")
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--prompts", "t.csv", "--models", str(weights), *OPTIONS, "--num-sample", "2", "--out", "clips", "--no-progress"]
    for rank in "01":
        monkeypatch.setenv("RANK", rank); monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(command) == 0 and len(lines(capsys)) == 3
    clips = told(tmp_path / "clips")
    assert list(clips) == [f"{k:04d}-{s:05d}.mp4" for k, s in ((0, 42), (0, 43), (1, 7), (1, 8), (2, 42), (2, 43))]
    assert [(c["cond_type"], c["motion_score"], c["seed"], len(c["refs"])) for c in list(clips.values())[::2]] == [("t2v", 6, 42, 0), ("i2v_head", 2, 7, 1), ("i2v_loop", 4, 42, 2)]
    monkeypatch.delenv("RANK"); monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "clips/0001-00008.mp4").unlink(); Image.fromarray(picture(seed=3)).save(tmp_path / "a.png")
    assert main(command) == 0 and [line == "there already)" for line in lines(capsys)] == [True, True, False, False, False, False], "another picture of the same name is another picture"
    assert main(command) == 0 and set(lines(capsys)) == {"there already)"}
    assert main([*command, "--motion-score", "1", "--refine-prompt", "True"]) == 0 and "there already)" not in lines(capsys)
    assert main([*command, "--motion-score", "1", "--refine-prompt", "True"]) == 0 and set(lines(capsys)) == {"there already)"}

def test_conditions_longer_films_and_drawn_pictures_as_typed(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video("film.mp4", film(36)); Image.fromarray(picture()).save("a.png")
    base = ["generate", "--models", str(weights), *OPTIONS, "--no-progress", "--prompt", "x"]
    for out, more in (("tail", "--ref a.png --cond-type i2v_tail"), ("loop", "--ref a.png a.png"), ("stretch", "--ref film.mp4 --cond-type v2v_head --num-frames 36"), ("longer", "--ref film.mp4 --extend after"), ("drawn", "--t2i2v --offload models --device cpu"),
                      ("wide", "--image a.png --aspect-ratio 16:9 --resolution 32px --passes single --solver heun --tiling")):
        command = [*base, *more.split(), "--out", out]
        if out == "wide": command = [c for c in command if c not in ("--size", "32")]
        assert main(command) == 0, capsys.readouterr().err
        capsys.readouterr(); assert main(command) == 0 and lines(capsys) == ["there already)"], out
    kinds = {p.parent.name: settings_of(p)["cond_type"] for p in tmp_path.glob("*/00042.mp4")}
    assert kinds == dict(tail="i2v_tail", loop="i2v_loop", stretch="v2v_head", longer="i2v_head", drawn="i2v_head", wide="i2v_head")
    assert len(decode("longer/00042.mp4")) == 36 + 11 and settings_of("wide/00042.mp4")["size"] == [24, 40]

def test_a_searched_clip_says_how_it_was_searched_and_is_made_once(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()).save("a.png")
    base = ["generate", "--models", str(weights), "--no-progress", "--prompt", "x", "--num-frames", "12", "--size", "32", "32", "--steps", "4", "--scaling.budget", "light", "--scaling.weights", "aesthetic_quality", "1"]
    for out, more in (("text", ""), ("loop", "--ref a.png a.png"), ("drawn", "--t2i2v")):
        assert main([*base, *more.split(), "--out", out]) == 0, capsys.readouterr().err
        capsys.readouterr(); assert main([*base, *more.split(), "--out", out]) == 0 and lines(capsys) == ["there already)"], out
        assert main([*base[:-5], *more.split(), "--out", f"{out}-alone"]) == 0
        told, plain = settings_of(f"{out}/00042.mp4"), settings_of(f"{out}-alone/00042.mp4")
        assert told.pop("scaling")["steps"] == [0] and told == plain, "but for the search"
    assert settings_of("loop/00042.mp4")["cond_type"] == "i2v_loop" and not np.array_equal(decode("text/00042.mp4"), decode("text-alone/00042.mp4"))

@pytest.mark.parametrize("more, said", [("", "name prompts"), ("--prompt x --prompts t.csv", "one of the two"), ("--prompt x --image a.png --ref a.png", "leave one of the two out"), ("--prompt x --size 32 32 --aspect-ratio 1:1", "both name a size"), ("--prompt x --t2i2v --image a.png", "draws its own"),
                                        ("--prompt x --extend after", "name it with --ref"), ("--prompt x --cond-type i2v_tail", "needs what it is given"), ("--prompt x --num-frames 10", "ask for 8 or 12"), ("--prompts t.csv", "no such table of prompts"), ("--prompt x --models nowhere", "no folder nowhere"),
                                        ("--prompt x --motion-score auto --http.base-url ftp://x --http.model y", "no address"), ("--prompt x --t2i2v --image-model nowhere", "no FLUX pipeline at nowhere"), ("--prompt x --ref a.png a.png a.png --cond-type i2v_loop", "2 references"), ("--prompt x --ref a.png --cond-type t2v", "0 references"),
                                        ("--prompt x --scaling.budget light --scaling.weights beauty 1", "no verifier measures beauty"), ("--prompt x --scaling.budget light --cache 0.05", "leave one of them out"), ("--prompt x --scaling.budget light --scaling.by vbench", "make vbench"),
                                        ("--prompt x --kernels triton --device cpu", "triton"), ("--prompt x --attention flash", "flash")])
def test_requests_that_cannot_be_are_one_line_and_leave_nothing(weights, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Image.fromarray(picture()).save("a.png")
    models = [] if "--models" in more else ["--models", str(weights)]
    assert main(["generate", *models, *([] if "size" in more or "num-frames" in more else OPTIONS), *more.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and said in err and [p.name for p in tmp_path.iterdir()] == ["a.png"], err


# ---- pictures, films, sizes ----
@pytest.mark.parametrize("mode", ["CMYK", "P", "I;16", "L", "RGBA", "1", "LA"])
def test_pictures_of_any_mode_become_the_clips_size(tmp_path, mode):
    image = Image.fromarray(picture(51, 37)).convert("RGB")
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(path := tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}")
    x = picture_tensor(path, (32, 48))
    assert x.shape == (3, 32, 48) and x.min() >= -1 and x.max() <= 1 and x.std() > 0.05

def test_pictures_that_cannot_be_used_are_one_line(tmp_path):
    frames = [Image.fromarray(picture(seed=k)) for k in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:]); frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("x")
    for name in ("a.gif", "a.webp", "text.png"): error(lambda: read_picture(tmp_path / name), name, "is not a picture")
    error(lambda: picture_tensor(picture(20, 600), (64, 64)), "600 x 20", "would keep 3%"); error(lambda: picture_tensor(picture(600, 20), (64, 64)), "another aspect ratio"); error(lambda: picture_tensor(picture(5, 5), (64, 64)), "at least 16")
    error(lambda: read_picture(np.zeros((4, 4, 3))), "uint8"); error(lambda: read_picture(7), "int"); error(lambda: read_picture(torch.full((3, 32, 32), torch.inf)), "infinite")

def test_a_film_is_thinned_to_the_clips_rate_and_a_picture_of_it_is_its_outermost_frame(tmp_path):
    old = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None, None] * 6, 32, 1).repeat(32, 2).repeat(3, 3)
    path = write_video(tmp_path / "a.mp4", old, fps=48)
    half = read_stretch(path, 20, 0, (32, 32), fps=24)
    assert np.allclose((half.mean((0, 2, 3)) + 1) * 127.5, np.arange(0, 40, 2) * 6, atol=4)
    ends = given_pixels("i2v_loop", [path], (32, 32), False)
    assert [round(((x.mean() + 1) * 127.5).item() / 6) for x in ends.values()] == [0, 39]

@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_every_ratio_of_every_resolution_is_a_size(multiple):
    for resolution in ("256px", "768px"):
        for ratio in ASPECT_RATIOS:
            h, w = clip_size(resolution, ratio, multiple)
            assert h % multiple == w % multiple == 0 and nearest_ratio(*clip_size("768px", ratio, 16)) == ratio
    error(lambda: clip_size("256px", "0:3"), "cannot make a size")

def test_lengths_are_admitted_or_the_nearest_named():
    for causal in (True, False):
        for n in range(1, 80):
            if admitted(n, causal): assert check_frames(n, causal) == n
            else:
                with pytest.raises(UserError) as e: check_frames(n, causal)
                low, high = (int(x) for x in str(e.value).rsplit("for ", 1)[1].split(" or "))
                assert low < n < high and admitted(low, causal) and admitted(high, causal) and not any(admitted(k, causal) for k in range(low + 1, high))

@pytest.mark.parametrize("how, said", [(dict(num_frames=10), "8 or 12"), (dict(steps=0), "steps must be"), (dict(height=60), "multiples of 8"), (dict(motion_score=-1), "not below 0"), (dict(motion_score="lots"), "or auto"), (dict(solver="magic"), "known are euler"),
                                       (dict(num_sample=0), "num_sample"), (dict(aspect_ratio="wide"), "cannot make a size"), (dict(cache=float("nan")), "cache"), (dict(lenght=3), "unknown settings lenght")], ids=str)
def test_settings_that_cannot_be_are_one_line(pipe, how, said): error(lambda: pipe("x", **{**({} if "aspect_ratio" in how else QUICK), **how}), said)

def test_empty_prompts_are_refused_and_endless_ones_read_as_far_as_they_go(pipe):
    said = []
    talking = AnyToVideo(pipe.sampler, say=said.append)
    for empty in ("", " \n\t"): error(lambda: talking(empty, **QUICK), "prompt is empty")
    clip = talking("word " * 10_000, **QUICK)
    assert len(said) == 1 and "10000 words" in said[0] and torch.isfinite(clip.video).all()

def test_numbers_that_are_none_are_said_and_not_written(weights):
    broken = AnyToVideo.from_pretrained(weights)
    with torch.no_grad(): broken.sampler.model.final_layer.linear.bias.fill_(float("nan"))
    error(lambda: broken("x", **QUICK), "numbers that are none")


# ---- words ----
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_POST(self):
        self.server.asked.append((self.path, self.headers.get("Authorization"), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        status, text = self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1]
        if text is None: time.sleep(1); return
        data = text if isinstance(text, bytes) else json.dumps(dict(choices=[dict(message=dict(content=text))])).encode()
        self.send_response(status); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)

@contextmanager
def server(*answers, **more):
    "(Assistant, what it was asked, what it said)"
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.daemon_threads, s.answers, s.asked = True, answers, []
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    said = []
    try: yield Assistant(HttpConfig(f"http://127.0.0.1:{s.server_port}/v1", "small", **dict(tries=2, backoff_s=0.01, timeout_s=20) | more), said.append), s.asked, said
    finally: s.shutdown(); s.server_close()

@pytest.mark.parametrize("answer, score, words", [("7", 7, 0), ("Score: 3.", 3, 0), ("2.5", 2.5, 0), ("between 3 and 5", 6, 1), ("very much", 6, 1), ("400", 6, 1), ("-3", 6, 1), ("nan", 6, 1)])
def test_a_score_is_believed_only_if_it_is_one(answer, score, words):
    with server((200, answer)) as (assistant, asked, said):
        assert motion_score("a dog runs", assistant) == score and len(said) == words and "a dog runs" in asked[0][2]["messages"][0]["content"]

@pytest.mark.parametrize("faults", [[(500, "")], [(200, b"no json")], [(200, b"{}")], [(429, "")]], ids=str)
def test_a_server_that_fails_is_asked_again_and_then_the_rule_stands_in(faults):
    with server(*faults) as (assistant, asked, said): assert motion_score("a dog runs", assistant) == motion_by_rule("a dog runs") == 6 and len(asked) == 2 and len(said) == 1
    with server(*faults, (200, "5")) as (assistant, asked, said): assert motion_score("a dog runs", assistant) == 5 and not said

def test_a_server_that_does_not_answer_is_given_up_in_time():
    with server((200, None), timeout_s=0.2, tries=1) as (assistant, asked, said):
        began = time.monotonic()
        assert motion_score("a dog runs", assistant) == 6 and len(said) == 1 and time.monotonic() - began < 5

def test_a_refused_key_ends_it_and_is_in_no_message(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "sk-very-secret")
    with server((401, b'{"error": {"message": "bad key sk-very-secret"}}'), key_env="SECRET_KEY") as (assistant, asked, said):
        with pytest.raises(UserError) as e: motion_score("a dog", assistant)
        assert asked[0][1] == "Bearer sk-very-secret" and "sk-very-secret" not in str(e.value) + "".join(said) and "SECRET_KEY" in str(e.value)

def test_refined_prompts_are_texts_or_the_rules():
    long = "A brown dog races over a meadow under a wide evening sky while the camera follows it closely."
    with server((200, long)) as (assistant, asked, said): assert refine_prompt("a dog", assistant, True) == long and "begins with a picture" in asked[0][2]["messages"][0]["content"]
    with server((200, "No.")) as (assistant, asked, said): assert refine_prompt("a dog", assistant) == refine_prompt("a dog") == "a dog. The light is soft and even. The camera stands still. The style is realistic." and len(said) == 1

def test_tables_as_the_release_writes_them(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text('\ufefftext,ref\r\n"one, two",a.png;a.png\r\nthree,\r\n', encoding="utf-8")
    rows = read_prompts(tmp_path / "t.csv")
    assert [(r.text, len(r.refs)) for r in rows] == [("one, two", 2), ("three", 0)]
    (tmp_path / "t.txt").write_text("one\n\ntwo\n"); assert [r.text for r in read_prompts(tmp_path / "t.txt")] == ["one", "two"]
    (tmp_path / "b.csv").write_bytes(b"text\n\xff\xfe"); error(lambda: read_prompts(tmp_path / "b.csv"), "not UTF-8")
    error(lambda: read_prompts(tmp_path), "is a folder"); error(lambda: read_prompts(tmp_path / "none.csv"), "no such table")

@pytest.mark.soak
def test_two_processes_of_torchrun_share_a_table(weights, tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo\nthree\n")
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opensora_nb.commands.cli", "generate", "--prompts", "t.txt", "--models", str(weights), *OPTIONS, "--out", "clips"], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0 and sorted(told(tmp_path / "clips")) == [f"{k:04d}-00042.mp4" for k in range(3)], r.stderr
