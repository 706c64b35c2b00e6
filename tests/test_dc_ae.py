"The video autoencoder: lengths, shapes, what sees what, the scaling factor, and weights on disk."
import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from opensora_nb.autoencoder.dc_ae import ChannelRMSNorm, Conv3d, VideoDCAE, VideoDCAEConfig, dc_ae_256, pocket, shortcut_down, shortcut_up
from opensora_nb.cluster.files import UserError

CONVS = VideoDCAEConfig(4, ("ResBlock",) * 3, (8, 8, 16), (1, 1, 1), (8, 8, 16), (1, 1, 1), (True, True, False), (True, True, False))    # 4 x 4 x 4
SMALL = replace(CONVS, block_type=("ResBlock", "ResBlock", "EViTS5_GLU"), enc_width=(8, 8, 32), dec_width=(8, 8, 32))                    # with attention


def grown(cfg=SMALL, seed=0):
    "A model in the middle of its life: norms that start at zero would hide whole branches."
    model, g = VideoDCAE(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.3)
    return model.eval()

def video(*shape, seed=1): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1

def error(work, *words):
    "The one line of the UserError that `work` raises."
    with pytest.raises(UserError) as e: work()
    line = str(e.value)
    assert "\n" not in line and len(line) < 400 and all(w in line for w in words), line
    return line


# ---- lengths and shapes ----
@torch.no_grad()
def test_every_length_comes_back():
    model = grown()
    for T in range(1, 14):
        x = video(2, 3, T, 8, 12)
        z = model.encode(x)
        assert z.shape[1:] == model.latent_shape(T, 8, 12) == (4, -(-T // 4), 2, 3), T
        assert model.decode(z, T).shape == model(x).shape == x.shape and torch.equal(model.decode(z, T), model(x)), T
        assert model.decode(z).shape[2] == (1 if T <= 4 else z.shape[2] * 4), T

@pytest.mark.parametrize("cfg", [pocket(), replace(CONVS, temporal_downsample=(False,) * 3, temporal_upsample=(False,) * 3),
                                 replace(CONVS, temporal_downsample=(True, False, False), temporal_upsample=(False, True, False))], ids=["pocket", "images only", "halved once"])
@torch.no_grad()
def test_every_length_comes_back_whatever_the_compression(cfg):
    model = VideoDCAE(cfg).eval()
    s = cfg.spatial_compression
    for T in (1, 2, 3, 5, 6): assert model(video(1, 3, T, s, s)).shape == (1, 3, T, s, s) and model.encode(video(1, 3, T, s, s)).shape[1:] == model.latent_shape(T, s, s)

@torch.no_grad()
def test_an_odd_length_is_filled_up_with_its_last_frame():
    model, x = grown(), video(1, 3, 6, 8, 8)
    full = torch.cat([x, x[:, :, -1:], x[:, :, -1:]], 2)
    assert torch.equal(model.encode(x), model.encode(full)) and torch.equal(model(x), model(full)[:, :, :6])

@torch.no_grad()
def test_an_image_keeps_its_one_frame_and_is_no_still_clip():
    model, x = grown(), video(1, 3, 1, 8, 8)
    z = model.encode(x)
    assert z.shape[2] == 1 and model.decode(z).shape[2] == 1 and torch.equal(model.decode(z), model.decode(z, 1))
    assert model.decode(z, 4).shape[2] == 4 and not torch.allclose(model.decode(z, 4)[:, :, :1], model.decode(z, 1))     # the same latent, read as a clip

@torch.no_grad()
def test_more_frames_than_the_latent_holds_and_sizes_that_do_not_divide_are_refused():
    model = grown()
    for n in (0, -1, 9): 
        with pytest.raises(ValueError, match=f"2 latent frames decode to 1 to 8 frames, not {n}"): model.decode(torch.zeros(1, 4, 2, 2, 2), n)
    for h, w in ((6, 8), (8, 9)):
        with pytest.raises(ValueError, match=f"multiples of 4, got {h} x {w}"): model.encode(video(1, 3, 4, h, w))

@torch.no_grad()
def test_the_same_clip_gives_the_same_latent_alone_and_in_a_batch():
    model, x = grown(), video(3, 3, 8, 8, 8)
    assert torch.equal(model.encode(x), model.encode(x)) and torch.equal(model(x), model(x))
    assert torch.allclose(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-5)           # other sums in another order, no more


# ---- what sees what ----
def reach(cfg, T=48, at=24):
    "Latent frames that a change of video frame `at` moves, and video frames that a change of latent frame `at / 4` moves, by more than rounding."
    model, x = grown(cfg), video(1, 3, T, 8, 8)
    changed = lambda a, b: ((a - b).abs().amax((0, 1, 3, 4)) > 1e-5 * a.abs().max()).nonzero().flatten().tolist()
    y = x.clone(); y[:, :, at] = -y[:, :, at]
    z = model.encode(x)
    w = z.clone(); w[:, :, at // 4] = -w[:, :, at // 4]
    return changed(z, model.encode(y)), changed(model.decode(z), model.decode(w))

@torch.no_grad()
def test_without_attention_a_change_stays_near_in_time():
    latent, frames = reach(CONVS)
    assert 6 in latent and max(abs(t - 6) for t in latent) <= 5                # 2 to 3 convolutions of 3 frames at each of 1, 2 and 4 frames a step
    assert 24 in frames and 24 - 20 <= min(frames) and max(frames) <= 27 + 20

@torch.no_grad()
def test_attention_carries_it_everywhere():
    latent, frames = reach(SMALL)
    assert latent == list(range(12)) and frames == list(range(48))


# ---- shortcuts ----
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.sampled_from(list(product((1, 2), (1, 2), (1, 2)))), st.sampled_from((1, 2, 4)))
def test_shortcuts_conserve_the_mean_and_up_then_down_is_the_identity(t, h, w, factors, group):
    p, q, r = factors
    x = video(2, 8, t * p, h * q, w * r)
    down = shortcut_down(x, 8 * p * q * r // group, factors)
    assert down.shape == (2, 8 * p * q * r // group, t, h, w) and torch.allclose(down.mean((1, 2, 3, 4)), x.mean((1, 2, 3, 4)), atol=1e-6)
    small = video(2, 8, t, h, w, seed=2)
    up = shortcut_up(small, 8 // group if 8 // group * p * q * r >= 8 else 8, factors)
    assert up.shape[2:] == (t * p, h * q, w * r) and torch.allclose(up.mean((1, 2, 3, 4)), small.mean((1, 2, 3, 4)), atol=1e-6)
    assert torch.allclose(shortcut_down(up, 8, factors), small, atol=1e-6)


# ---- the convolution ----
@pytest.mark.parametrize("batch, kernel, stride", [(1, 3, 1), (1, 3, 2), (1, 3, (1, 2, 2)), (2, 3, 1), (1, 1, 1)])
def test_the_convolution_is_pytorchs(batch, kernel, stride):
    ours = Conv3d(4, 8, kernel, stride, kernel // 2)
    theirs = torch.nn.Conv3d(4, 8, kernel, stride, kernel // 2)
    theirs.load_state_dict(ours.state_dict())
    x = video(batch, 4, 4, 8, 8).requires_grad_()
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        grads = []
        for conv in (ours, theirs):
            y = conv(x.contiguous(memory_format=layout))
            grads.append((y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])))
        for a, b in zip(*grads): assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16): assert ours(x).dtype == torch.bfloat16
    assert ours.to(torch.float64)(x.double()).dtype == torch.float64

@torch.no_grad()
def test_the_norm_leaves_its_input_alone():
    norm, x = ChannelRMSNorm(4), video(1, 4, 2, 4, 4)
    kept = x.clone()
    with torch.enable_grad(): trained = norm(x)
    assert torch.equal(norm(x), trained) and torch.equal(x, kept)


# ---- configs ----
@pytest.mark.parametrize("change, words", [
    (dict(enc_depth=(1, 1)), "one entry a stage"), (dict(block_type=("ResBlock", "ResBlock", "Resblock")), "unknown block type"),
    (dict(enc_width=(8, 8, 80)), "the shortcut from 8 to 80"), (dict(dec_width=(8, 12, 20)), "the shortcut from"),
    (dict(latent_channels=3), "latent_channels to divide 16, got 3"), (dict(latent_channels=0), "latent_channels"), (dict(latent_channels=32), "got 32"),
    (dict(temporal_upsample=(True, False, False)), "a different number of times"), (dict(scaling_factor=0.0), "scaling_factor"), (dict(scaling_factor=float("nan")), "scaling_factor")])
def test_a_config_that_cannot_be_built_says_why(change, words):
    with pytest.raises(ValueError, match=words): replace(CONVS, **change)

def test_attention_needs_heads_of_32_channels():
    with pytest.raises(ValueError, match="divisible by 32, got 16"): VideoDCAE(replace(SMALL, enc_width=(8, 8, 16)))

def test_a_config_from_json_is_the_config():
    assert VideoDCAEConfig(**json.loads(json.dumps(CONVS.__dict__))) == CONVS and hash(CONVS) == hash(replace(CONVS))

def test_the_published_model_has_its_size():
    with torch.device("meta"): sizes = {make: sum(p.numel() for p in VideoDCAE(make()).parameters()) for make in (VideoDCAEConfig, dc_ae_256)}
    assert sizes[VideoDCAEConfig] == 459_462_147 and sizes[dc_ae_256] > sizes[VideoDCAEConfig]
    assert (VideoDCAEConfig().spatial_compression, VideoDCAEConfig().temporal_compression) == (32, 4)


# ---- the scaling factor ----
@torch.no_grad()
def test_the_scaling_factor_is_applied_once_each_way():
    plain, x = grown(), video(1, 3, 8, 8, 8)
    scaled = VideoDCAE(replace(SMALL, scaling_factor=4.0)).eval()            # a power of two: nothing is rounded
    scaled.load_state_dict(plain.state_dict())
    assert torch.equal(scaled.encode(x), plain.encode(x) / 4) and torch.equal(scaled.decode(plain.encode(x) / 4), plain.decode(plain.encode(x)))
    assert torch.equal(scaled(x), plain(x)) and (scaled.scaling_factor, plain.scaling_factor, scaled.shift_factor) == (4.0, 1.0, 0.0)


# ---- weights on disk ----
@pytest.fixture
def saved(tmp_path):
    model = grown(replace(SMALL, scaling_factor=0.5))
    model.save_pretrained(tmp_path)
    return tmp_path, model

@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(saved):
    folder, model = saved
    for where in (folder, folder / "model.safetensors", str(folder)):
        again = VideoDCAE.from_pretrained(where)
        assert again.cfg == model.cfg and not again.training and torch.equal(again(x := video(1, 3, 5, 8, 8)), model(x))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]

@torch.no_grad()
def test_bfloat16_halves_the_file_and_loads_as_float32(saved, tmp_path):
    folder, model = saved
    model.save_pretrained(tmp_path / "half", torch.bfloat16)
    assert (tmp_path / "half/model.safetensors").stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size
    assert {p.dtype for p in VideoDCAE.from_pretrained(tmp_path / "half").parameters()} == {torch.float32}

def test_a_loaded_model_does_not_hang_on_the_file(saved):
    folder, model = saved
    again = VideoDCAE.from_pretrained(folder)
    grown(model.cfg, seed=5).save_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))

def test_missing_weights_are_one_line(tmp_path):
    error(lambda: VideoDCAE.from_pretrained(tmp_path / "nowhere"), "no weights at", "nowhere")
    error(lambda: VideoDCAE.from_pretrained(tmp_path), "no .safetensors file in folder")

def test_broken_weights_are_one_line(saved):
    folder, file = saved[0], saved[0] / "model.safetensors"
    data = file.read_bytes()
    for kept in (0, 5, 1000, len(data) - 1):
        file.write_bytes(data[:kept])
        error(lambda: VideoDCAE.from_pretrained(folder), "cannot read the weights", "model.safetensors")
    (folder / "weights.pt").write_bytes(b"PK")
    error(lambda: VideoDCAE.from_pretrained(folder / "weights.pt"), "must be a .safetensors file")

def test_another_models_weights_are_one_line(saved):
    folder, file = saved[0], saved[0] / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "decoder.project_in.main.conv.bias"}, file)
    error(lambda: VideoDCAE.from_pretrained(folder), "1 names or shapes differ", "decoder.project_in.main.conv.bias")
    save_file(weights | dict(extra=torch.zeros(2)), file)
    error(lambda: VideoDCAE.from_pretrained(folder), "1 names or shapes differ", "extra")
    save_file(weights, file); (folder / "config.json").unlink()
    error(lambda: VideoDCAE.from_pretrained(folder), "does not fit this autoencoder")        # taken for the published model
    assert VideoDCAE.from_pretrained(folder, saved[1].cfg).cfg == saved[1].cfg

@pytest.mark.parametrize("change", [dict(enc_depth=[1, 1]), dict(colour="red"), dict(enc_width="wide"), dict(scaling_factor=0)], ids=str)
def test_a_config_that_is_none_is_one_line(saved, change):
    file = saved[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    error(lambda: VideoDCAE.from_pretrained(saved[0]), "config.json")
    file.write_text("{")
    error(lambda: VideoDCAE.from_pretrained(saved[0]), "config.json is not JSON")
