"The causal autoencoder: lengths, what sees what, the posterior, the fast ways against the plain ones, training's wishes, and weights on disk."
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from opensora_nb.autoencoder import hunyuan
from opensora_nb.autoencoder.dc_ae import VideoDCAE, VideoDCAEConfig, shortcut_down, shortcut_up
from opensora_nb.autoencoder.hunyuan import (CausalConv, Down, HunyuanVAE, HunyuanVAEConfig, Posterior, Up, causal_pad, causal_shortcut, frame_causal_attention,
                                             group_moments, load_autoencoder, nearest_up, pocket)
from opensora_nb.autoencoder.tiling import Tiling
from opensora_nb.cluster.files import UserError

SMALL = HunyuanVAEConfig((4, 4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2)                                                    # 4 x 4 x 4
DC_AE = VideoDCAEConfig(4, ("ResBlock",) * 3, (8, 8, 16), (1, 1, 1), (8, 8, 16), (1, 1, 1), (True, True, False), (True, True, False))


def grown(cfg=SMALL, seed=0):
    "A model whose every parameter matters."
    model, g = HunyuanVAE(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.3)
    return model.eval()

def seeded(seed=1): return torch.Generator().manual_seed(seed)

def video(*shape, seed=1): return torch.rand(*shape, generator=seeded(seed)) * 2 - 1

def error(work, *words):
    "The one line of the UserError that `work` raises."
    with pytest.raises(UserError) as e: work()
    line = str(e.value)
    assert "\n" not in line and len(line) < 400 and all(w in line for w in words), line
    return line

def off(a, b): return ((a - b).abs().max() / b.abs().max()).item()

def gradients(model, x):
    model.zero_grad(); model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


# ---- lengths and sizes ----
@torch.no_grad()
def test_every_length_comes_back():
    model = grown()
    for T in range(1, 11):
        x = video(2, 3, T, 8, 12)
        z = model.encode(x)
        assert z.shape[1:] == model.latent_shape(T, 8, 12) == (2, 1 + -(-(T - 1) // 4), 2, 3), T
        assert model.decode(z, T).shape == model(x).shape == x.shape and torch.equal(model.decode(z, T), model(x)), T
        assert model.decode(z).shape[2] == 4 * (z.shape[2] - 1) + 1, T

@pytest.mark.parametrize("temporal", [1, 2, 4, 8])
@torch.no_grad()
def test_every_length_comes_back_whatever_the_compression(temporal):
    model = HunyuanVAE(HunyuanVAEConfig((2, 2, 4, 4), 1, 2, 2, temporal)).eval()
    for T in (1, 2, 5, 9):
        z = model.encode(x := video(1, 3, T, 8, 8))
        assert z.shape[1:] == model.latent_shape(T, 8, 8) and z.shape[2] == 1 + -(-(T - 1) // temporal) and model(x).shape == x.shape, T

@torch.no_grad()
def test_a_length_between_two_is_filled_up_with_its_last_frame():
    model, x = grown(), video(1, 3, 7, 8, 8)
    full = torch.cat([x, x[:, :, -1:], x[:, :, -1:]], 2)
    assert torch.equal(model.encode(x), model.encode(full)) and torch.equal(model(x), model(full)[:, :, :7])

@torch.no_grad()
def test_wrong_videos_and_latents_are_one_line():
    model, good = grown(), video(1, 3, 5, 8, 8)
    torn = good.clone(); torn[0, 1, 3, 2, 2] = float("nan")
    endless = good.clone(); endless[0, 0, 0, 0, 0] = float("inf")
    for wrong, words in ((good[:, :2], "three channels"), (good[0], "three channels"), (good[:, :, :0], "at least one frame"), (good[..., :7, :], "multiples of 4, got 7 x 8: the nearest are 4 x 8"),
                         (good[..., :6], "multiples of 4"), ((good * 127).byte(), "floating point"), (torn, "the first is frame 3"), (endless, "the first is frame 0")):
        for call in (model.encode, model.posterior, model, lambda x: model.encode_features(x, 1)):
            with pytest.raises(ValueError, match=words) as e: call(wrong)
            assert "\n" not in str(e.value)
    for T, H, W in ((0, 8, 8), (-3, 8, 8), (5, 9, 8)):
        with pytest.raises(ValueError): model.latent_shape(T, H, W)
    for n in (0, -1, 10):
        with pytest.raises(ValueError, match=f"3 latent frames decode to 1 to 9 frames, not {n}"): model.decode(torch.zeros(1, 2, 3, 2, 2), n)
    with pytest.raises(ValueError, match="a latent must be"): model.decode(torch.zeros(1, 3, 3, 2, 2))

@torch.no_grad()
def test_the_same_clip_gives_the_same_latent_alone_and_in_a_batch():
    model, x = grown(), video(3, 3, 5, 8, 8)
    assert torch.equal(model.encode(x), model.encode(x)) and off(model(x)[1:2], model(x[1:2])) < 1e-4


# ---- what sees what ----
def held(model, video, changes, patch):
    "Encodings of a video and of changed ones for which every norm keeps the moments of the first."
    kept = []
    def keep(*args): kept.append(group_moments(*args)); return kept[-1]
    patch.setattr(hunyuan, "group_moments", keep)
    found = [model.encode(video)]
    for changed in changes:
        again = iter(kept)
        patch.setattr(hunyuan, "group_moments", lambda *args: next(again))
        found.append(model.encode(changed))
    patch.undo()
    return found

@torch.no_grad()
def test_a_latent_frame_knows_nothing_of_later_frames_but_their_share_in_the_norms(monkeypatch):
    model, x = grown(), video(1, 3, 13, 8, 8)
    changes = [x.clone() for _ in range(13)]
    for t, y in enumerate(changes): y[:, :, t] = -y[:, :, t]
    latent, *others = held(model, x, changes, monkeypatch)
    for t, other in enumerate(others):
        own, change = (t + 3) // 4, (other - latent).abs().amax((0, 1, 3, 4))
        assert not change[:own].any() and change[own:].all(), t                            # not small: nothing
    true = model.encode(x)
    leak = [(model.encode(y) - true)[:, :, 0].abs().mean() / true[:, :, 0].std() for y in changes[1:]]
    assert 0 < min(leak) and max(leak) < 0.5                                               # with the norms: a little of every frame

@torch.no_grad()
def test_attention_and_convolutions_look_back_only():
    x, y = video(1, 4, 6, 4, 4), video(1, 4, 6, 4, 4)
    y[:, :, 4:] += 1
    y[:, :, :4] = x[:, :, :4]
    for layer in (CausalConv(4, 4), Up(4, (1, 2, 2)), Up(4, (2, 2, 2)), Up(4, (2, 2, 2), True), Down(4, (1, 2, 2), True)):
        a, b = layer(x), layer(y)
        same = 7 if a.shape[2] == 11 else 4
        assert torch.equal(a[:, :, :same], b[:, :, :same]) and not torch.allclose(a[:, :, same], b[:, :, same]), layer
    q = video(2, 24, 8)
    changed = q.clone(); changed[:, 16:] += 1
    assert torch.equal(frame_causal_attention(q, q, q, 8)[:, :16], frame_causal_attention(changed, changed, changed, 8)[:, :16])

@torch.no_grad()
def test_the_latent_of_an_image_is_nearly_the_first_of_a_still_video():
    model, image = grown(), video(1, 3, 1, 16, 16)
    first = model.encode(image.expand(-1, -1, 9, -1, -1))[:, :, :1]
    assert off(model.encode(image), first) < 1e-4                                          # a still video has the image's moments: no leak
    moving = torch.cat([image, video(1, 3, 8, 16, 16, seed=2)], 2)
    assert 1e-4 < off(model.encode(image), model.encode(moving)[:, :, :1]) < 0.5


# ---- the fast ways against the plain ones ----
def plain_pad(x, front, edge, norm=None): return F.pad(x if norm is None else F.silu(norm(x)), (edge,) * 4 + (front, 0), mode="replicate")

@pytest.mark.parametrize("front, edge, groups", [(2, 1, 2), (0, 1, 4), (2, 1, None), (1, 1, None), (0, 0, 1)])
def test_padding_is_norm_silu_and_copies_forward_and_backward(front, edge, groups):
    norm = groups and nn.GroupNorm(groups, 4, 1e-6).double()
    if norm: nn.init.normal_(norm.weight); nn.init.normal_(norm.bias)
    x = video(2, 4, 3, 4, 3).double().requires_grad_()
    assert torch.allclose(causal_pad(x, front, edge, norm), plain_pad(x, front, edge, norm))
    call = (lambda x, w, b: hunyuan._Pad.apply(x, w, b, groups, 1e-6, front, edge)) if norm else lambda x: causal_pad(x, front, edge)
    assert torch.autograd.gradcheck(call, (x, norm.weight, norm.bias) if norm else (x,), fast_mode=True)

def test_padding_in_stretches_is_padding_at_once():
    norm, x = nn.GroupNorm(2, 8), video(1, 8, 7, 96, 96).requires_grad_()
    assert len(hunyuan._stretches(x)) > 1
    ours, theirs = causal_pad(x, 2, 1, norm), plain_pad(x, 2, 1, norm)
    g = video(*theirs.shape)
    assert off(ours, theirs) < 1e-5
    for a, b in zip(torch.autograd.grad(ours, (x, *norm.parameters()), g), torch.autograd.grad(theirs, (x, *norm.parameters()), g)): assert off(a, b) < 1e-4

def test_moments_keep_their_digits_far_from_zero():
    x = 1000 + torch.randn(1, 8, 5, 64, 64, generator=seeded())
    mean, rstd = group_moments(x.contiguous(memory_format=torch.channels_last_3d), 4, 1e-6)
    assert ((x - mean) * rstd - F.group_norm(x.double(), 4, eps=1e-6)).abs().max() < 1e-3

class Other(nn.Module):
    "What stands in a convolution's place when it is split over processes: the same result, a weight that is not there."
    def __init__(self, conv):
        super().__init__()
        self.inner = [conv]

    def forward(self, x): return F.conv3d(x, self.inner[0].weight, self.inner[0].bias, self.inner[0].stride)

@pytest.mark.parametrize("residual", [False, True])
def test_merged_kernels_are_the_plain_network(residual):
    model = grown(replace(SMALL, residual=residual))
    plain = grown(replace(SMALL, residual=residual))
    for module in plain.modules():
        if isinstance(module, CausalConv): module.conv = Other(module.conv)
    for T in (1, 5):
        x = video(2, 3, T, 8, 8)
        with torch.no_grad(): assert off(model(x), plain(x)) < 1e-4, T

def test_merged_kernels_have_the_plain_gradient():
    up, x = Up(4, (2, 2, 2)), video(1, 4, 3, 3, 4).requires_grad_()
    g, wrt = video(1, 4, 5, 6, 8), (x, *up.parameters())
    for a, b in zip(torch.autograd.grad(up(x), wrt, g), torch.autograd.grad(up.conv(nearest_up(x, (2, 2, 2))), wrt, g)): assert off(a, b) < 1e-4

@pytest.mark.parametrize("size, front, edge", [((3, 4, 4), 2, 1), ((1, 3, 4), 0, 1), ((1, 1, 1), 0, 1), ((2, 1, 2), 2, 1), ((3, 2, 2), 2, 0)])
@pytest.mark.parametrize("normed", [True, False])
def test_a_compiler_is_given_a_padding_with_the_channels_last(size, front, edge, normed):
    torch.compiler.reset()
    norm, x = nn.GroupNorm(2, 4) if normed else None, (video(1, 4, *size) + 3).requires_grad_()
    compiled = torch.compile(lambda x: causal_pad(x, front, edge, norm), backend="aot_eager", fullgraph=True)(x)
    wrt, plain = (x, *norm.parameters()) if normed else (x,), plain_pad(x, front, edge, norm)
    assert off(compiled, plain) < 1e-5 and off(compiled, causal_pad(x, front, edge, norm)) < 1e-5 and compiled.is_contiguous(memory_format=torch.channels_last_3d)
    g = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5))
    for a, b in zip(torch.autograd.grad(compiled, wrt, g), torch.autograd.grad(plain, wrt, g)): assert off(a, b) < 1e-4 or float((a - b).abs().max()) < 1e-4

def test_in_bfloat16_a_compiler_is_given_the_plain_padding():
    norm, x = nn.GroupNorm(2, 4).bfloat16(), video(1, 4, 3, 4, 4).bfloat16()
    with torch.no_grad(): assert torch.equal(torch.compile(lambda x: causal_pad(x, 2, 1, norm), backend="eager", fullgraph=True)(x), plain_pad(x, 2, 1, norm))

@pytest.mark.parametrize("factors,frames", [((2, 2, 2), 3), ((1, 2, 2), 3), ((2, 2, 2), 1)])
def test_a_compiler_is_given_the_enlarged_clip_without_writes_in_strides(factors, frames):
    up, x = Up(4, factors), video(1, 4, frames, 3, 4).requires_grad_()
    wrt, compiled = (x, *up.parameters()), torch.compile(up, backend="eager", fullgraph=True)
    assert off(compiled(x), up(x)) < 1e-5
    for a, b in zip(torch.autograd.grad(compiled(x).square().sum(), wrt), torch.autograd.grad(up(x).square().sum(), wrt)): assert off(a, b) < 1e-4

@pytest.mark.slow
def test_a_convolution_and_the_upsampling_compile(monkeypatch):
    from opensora_nb.autoencoder import speed
    monkeypatch.setattr(speed, "LEAST_TRACED", 0); monkeypatch.setattr(speed, "LEAST_POSITIONS", 0)
    net, x = speed.optimize(nn.ModuleList([nn.GroupNorm(2, 4), CausalConv(4, 4), Up(4, (1, 2, 2))])), video(1, 4, 4, 4, 4).requires_grad_()
    def run(x): return net[2](net[1](x, net[0]))
    wrt, ours = (x, *net.parameters()), torch.compile(run)(x)
    assert off(ours, run(x)) < 1e-5                  # PyTorch 2.13 cannot compile the writes in strides: "vr must not be None"
    for a, b in zip(torch.autograd.grad(ours.square().sum(), wrt), torch.autograd.grad(run(x).square().sum(), wrt)): assert off(a, b) < 1e-4

def test_bfloat16_and_autocast_run_and_are_near():
    model, x = grown(), video(1, 3, 5, 16, 16)
    exact = gradients(model, x)
    with torch.no_grad(): latent, again = model.encode(x), model(x)
    with torch.autocast("cpu", torch.bfloat16): near = gradients(model, x); cast = model(x)
    assert cast.dtype == torch.bfloat16 and off(cast.float(), again) < 0.1
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in near.values())
    flat = lambda grads: torch.cat([g.flatten() for g in grads.values()])
    assert F.cosine_similarity(flat(near), flat(exact), 0) > 0.98
    model.bfloat16()
    with torch.no_grad(): half = model.encode(x)                                            # a float32 video is brought to the model's type
    assert half.dtype == model(x).dtype == torch.bfloat16 and off(half.float(), latent) < 0.1

def test_shapes_travel_without_numbers():
    with torch.device("meta"): assert HunyuanVAE(SMALL)(torch.empty(1, 3, 5, 8, 8)).shape == (1, 3, 5, 8, 8)


# ---- the residual option ----
def test_the_residual_option_adds_no_name_and_no_number():
    with torch.device("meta"):
        shapes = [{k: tuple(v.shape) for k, v in HunyuanVAE(replace(cfg, residual=on)).state_dict().items()} for cfg in (HunyuanVAEConfig(), pocket()) for on in (False, True)]
    assert shapes[0] == shapes[1] and shapes[2] == shapes[3] and HunyuanVAEConfig().residual is False

@torch.no_grad()
def test_with_silent_convolutions_the_shortcut_carries_the_clip():
    x = video(1, 4, 5, 8, 8)
    for step, shortcut in ((Down, shortcut_down), (Up, shortcut_up)):
        for factors in ((1, 2, 2), (2, 2, 2)):
            for residual in (False, True):
                layer = step(4, factors, residual)
                for p in layer.parameters(): p.zero_()
                assert torch.equal(layer(x), causal_shortcut(shortcut, x, 4, factors) if residual else torch.zeros_like(layer(x)))
    loud, silent = Down(4, (2, 2, 2), True), Down(4, (2, 2, 2))
    silent.load_state_dict(loud.state_dict())
    assert torch.allclose(loud(x) - silent(x), causal_shortcut(shortcut_down, x, 4, (2, 2, 2)), atol=1e-6)

@torch.no_grad()
def test_shortcuts_group_frames_as_the_convolution_does():
    x = video(2, 4, 9, 4, 4)
    down = causal_shortcut(shortcut_down, x, 4, (2, 2, 2))
    for k, frames in enumerate(([0], [1, 2], [3, 4], [5, 6], [7, 8])): assert torch.allclose(down[:, :, k], F.avg_pool2d(x[:, :, frames].mean(2), 2), atol=1e-6)
    assert torch.allclose(causal_shortcut(shortcut_down, nearest_up(x, (2, 2, 2)), 4, (2, 2, 2)), x, atol=1e-6)             # up, then down: nothing is lost
    assert torch.equal(causal_shortcut(shortcut_down, x[:, :, :1], 4, (2, 2, 2)), down[:, :, :1])                           # an image


# ---- the posterior ----
@torch.no_grad()
def test_the_mode_is_the_default_and_a_sample_follows_its_generator():
    model, x = grown(), video(2, 3, 5, 8, 8)
    found = model.posterior(x)
    assert torch.equal(model.encode(x), model.encode(x, sample=False)) and torch.equal(model.encode(x), found.mode() * model.scaling_factor)
    draw = model.encode(x, sample=True, generator=seeded(3))
    assert torch.equal(draw, model.encode(x, sample=True, generator=seeded(3))) and not torch.equal(draw, model.encode(x, sample=True, generator=seeded(4)))
    assert torch.equal(draw, found.sample(seeded(3)) * model.scaling_factor)
    assert torch.equal(model(x, True, seeded(3)), model.decode(draw))
    with pytest.raises(ValueError, match="torch.Generator"): model.encode(x, sample=True)

def test_kl_is_the_distance_from_the_standard_normal():
    g = seeded()
    found = Posterior(torch.randn(3, 2, 1, 2, 2, generator=g), torch.randn(3, 2, 1, 2, 2, generator=g))
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(found.mean, (0.5 * found.logvar).exp()), normal(0.0, 1.0)).flatten(1).sum(1)
    assert found.kl().shape == (3,) and torch.allclose(found.kl(), exact, rtol=1e-5)
    draws = torch.stack([found.sample(g) for _ in range(4000)])
    assert torch.allclose(draws.mean(0), found.mean, atol=0.3) and torch.allclose(draws.std(0), (0.5 * found.logvar).exp(), rtol=0.1)

@torch.no_grad()
def test_the_logarithm_of_the_variance_is_bounded():
    model = grown()
    model.quant_conv.bias[2:] = torch.tensor([1e4, -1e4])
    found = model.posterior(video(1, 3, 1, 8, 8))
    assert found.logvar[:, 0].eq(20).all() and found.logvar[:, 1].eq(-30).all() and found.kl().isfinite()

@torch.no_grad()
def test_scale_and_shift_are_applied_once_each_way():
    plain, x = grown(replace(SMALL, scaling_factor=1.0)), video(1, 3, 5, 8, 8)
    moved = HunyuanVAE(replace(SMALL, scaling_factor=4.0, shift_factor=0.5)).eval()
    moved.load_state_dict(plain.state_dict())
    z = plain.encode(x)
    assert torch.allclose(moved.encode(x), (z - 0.5) * 4) and off(moved.decode((z - 0.5) * 4), plain.decode(z)) < 1e-4 and off(moved(x), plain(x)) < 1e-4
    assert (moved.scaling_factor, moved.shift_factor, moved.causal, VideoDCAE.causal) == (4.0, 0.5, True, False)


# ---- tiles ----
@torch.no_grad()
def test_tiles_that_hold_the_clip_change_nothing_and_smaller_ones_little():
    model, x = grown(), video(1, 3, 17, 24, 16)
    whole = model.encode(x)
    assert torch.equal(model.encode(x, Tiling(24, 20)), whole) and torch.equal(model.decode(whole, tiling=Tiling(24, 20)), model.decode(whole))
    for T in (1, 5, 12, 17):
        z = model.encode(x[:, :, :T], Tiling(16, 8))
        assert z.shape[1:] == model.latent_shape(T, 24, 16) and model.decode(z, T, Tiling(16, 8)).shape == x[:, :, :T].shape, T
    with pytest.raises(ValueError, match="multiple of 4"): model.encode(x, Tiling(10, None))


# ---- what training asks for ----
def test_features_come_with_the_latent_of_the_same_pass():
    model, x = grown(), video(2, 3, 6, 8, 16)
    for stage, size in {1: (9, 4, 8), 2: (3, 2, 4), 3: (3, 2, 4), None: (3, 2, 4)}.items():
        latent, features = model.encode_features(x, stage)
        assert features.shape == (2, model.feature_channels(stage), *(size if stage != 1 else (5, 4, 8))) and off(latent, model.encode(x)) < 1e-5, stage
        features.square().mean().backward()
        assert model.encoder.conv_in.conv.weight.grad.abs().sum() > 0; model.zero_grad()
    assert [model.feature_channels(s) for s in (1, 2, 3, None)] == [4, 4, 8, 2]
    for stage in (0, 4):
        with pytest.raises(ValueError, match=f"stages 1 to 3, not {stage}"): model.encode_features(x, stage)

def test_recomputing_blocks_gives_the_same_gradients_from_less_memory():
    model, x, kept = grown(), video(1, 3, 5, 8, 8), []
    def keep(t): kept.append(t.numel()); return t
    def run():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): y = model(x)
        size = sum(kept)
        model.zero_grad(); y.square().mean().backward()
        return size, {n: p.grad.clone() for n, p in model.named_parameters()}
    size, plain = run()
    model.checkpoint_blocks(True)
    assert model.checkpointing
    less, again = run()
    assert less < 0.5 * size and all(torch.allclose(plain[n], again[n], rtol=1e-4, atol=1e-7) for n in plain)
    model.checkpoint_blocks(False)
    assert not model.checkpointing and run()[0] == size

def test_the_last_layer_is_the_decoders_last_weight_and_every_parameter_learns():
    model = grown()
    found = gradients(model, video(2, 3, 5, 8, 8))
    assert model.last_layer is model.decoder.conv_out.conv.weight and found["decoder.conv_out.conv.weight"].abs().sum() > 0
    silent = {n for n, g in found.items() if not g.abs().sum() > 0}
    assert silent <= {n for n in found if n.startswith("quant_conv")}, silent                # rows of the variance alone have none in the mode
    assert found["quant_conv.weight"][:2].abs().sum() > 0


# ---- configs ----
@pytest.mark.parametrize("change, words", [
    (dict(block_out_channels=(4, 6, 9)), "must divide every width"), (dict(block_out_channels=()), "whole numbers above 0"), (dict(block_out_channels=(4, -4)), "whole numbers above 0"),
    (dict(layers_per_block=0), "layers_per_block"), (dict(latent_channels=2.5), "latent_channels"), (dict(norm_num_groups=0), "norm_num_groups"), (dict(temporal_compression=3), "temporal_compression must be one of"),
    (dict(temporal_compression=8), "one of"), (dict(scaling_factor=0.0), "scaling_factor"), (dict(scaling_factor=float("nan")), "scaling_factor"), (dict(shift_factor=float("inf")), "shift_factor")], ids=str)
def test_a_config_that_cannot_be_built_says_why(change, words):
    with pytest.raises(ValueError, match=words) as e: replace(SMALL, **change)
    assert "\n" not in str(e.value)

def test_configs_of_others_are_understood():
    assert HunyuanVAEConfig.from_dict(json.loads(json.dumps(asdict(SMALL)))) == SMALL and hash(SMALL) == hash(replace(SMALL))
    library = dict(_class_name="AutoencoderKLHunyuanVideo", _diffusers_version="0.32.0", act_fn="silu", block_out_channels=[128, 256, 512, 512], down_block_types=["HunyuanVideoDownBlock3D"] * 4, in_channels=3,
                   latent_channels=16, layers_per_block=2, mid_block_add_attention=True, norm_num_groups=32, out_channels=3, scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4)
    assert HunyuanVAEConfig.from_dict(library) == HunyuanVAEConfig()
    error(lambda: HunyuanVAEConfig.from_dict(library | dict(in_channels=4)), "in_channels must be 3, got 4")
    error(lambda: HunyuanVAEConfig.from_dict(library | dict(spatial_compression_ratio=16)), "spatial_compression_ratio must be 8")
    error(lambda: HunyuanVAEConfig.from_dict(library | dict(colour="red")), "unknown key 'colour'")

def test_published_and_pocket_sizes():
    with torch.device("meta"): full, small = (sum(p.numel() for p in HunyuanVAE(cfg).parameters()) for cfg in (HunyuanVAEConfig(), pocket()))
    assert full == 246_478_803 and 3e5 < small < 2e6
    for cfg in (HunyuanVAEConfig(), pocket()): assert (cfg.spatial_compression, cfg.temporal_compression, cfg.latent_channels) == (8, 4, 16)


# ---- weights on disk ----
@pytest.fixture
def saved(tmp_path):
    model = grown()
    model.save_pretrained(tmp_path)
    return tmp_path, model

@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(saved):
    folder, model = saved
    for where in (folder, folder / "model.safetensors", str(folder)):
        for load in (HunyuanVAE.from_pretrained, load_autoencoder):
            again = load(where)
            assert type(again) is HunyuanVAE and again.cfg == model.cfg and not again.training and torch.equal(again(x := video(1, 3, 5, 8, 8)), model(x))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    model.save_pretrained(folder / "half", torch.bfloat16)
    assert (folder / "half/model.safetensors").stat().st_size < 0.7 * (folder / "model.safetensors").stat().st_size
    assert {p.dtype for p in HunyuanVAE.from_pretrained(folder / "half").parameters()} == {torch.float32}

def test_missing_and_broken_weights_are_one_line(saved):
    folder, file = saved[0], saved[0] / "model.safetensors"
    data = file.read_bytes()
    for load in (HunyuanVAE.from_pretrained, load_autoencoder):
        error(lambda: load(folder / "nowhere"), "no weights at", "nowhere")
        for kept in (0, 5, 1000, len(data) - 1):
            file.write_bytes(data[:kept])
            error(lambda: load(folder), "cannot read the weights", "model.safetensors")
        file.write_bytes(data)
        torch.save({"a": torch.zeros(1)}, folder / "weights.pt")
        error(lambda: load(folder / "weights.pt"), "must be a .safetensors file")
    assert file.read_bytes() == data

def test_another_models_weights_are_one_line(saved, tmp_path):
    folder, file = saved[0], saved[0] / "model.safetensors"
    other = VideoDCAE(DC_AE).save_pretrained(tmp_path / "dc_ae").parent
    assert type(load_autoencoder(other)) is VideoDCAE
    error(lambda: HunyuanVAE.from_pretrained(other), "does not fit this causal autoencoder")
    error(lambda: VideoDCAE.from_pretrained(folder), "does not fit this autoencoder")
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "quant_conv.bias"}, file)
    error(lambda: HunyuanVAE.from_pretrained(folder), "1 names or shapes differ", "quant_conv.bias")
    save_file(weights | dict(extra=torch.zeros(2)), file)
    error(lambda: HunyuanVAE.from_pretrained(folder), "1 names or shapes differ", "extra")
    save_file(weights, file); (folder / "config.json").unlink()
    error(lambda: load_autoencoder(folder), "does not fit this causal autoencoder")          # told by its names, taken for the published model
    assert HunyuanVAE.from_pretrained(folder, SMALL).cfg == SMALL

def test_a_folder_with_both_or_neither_is_one_line(saved, tmp_path):
    both = tmp_path / "both"; both.mkdir()
    for name in ("hunyuan_vae.safetensors", "F32T4C128_AE.safetensors"): save_file(saved[1].state_dict(), both / name)
    error(lambda: load_autoencoder(both), "holds two autoencoders", "name one of the files")
    neither = tmp_path / "neither"; neither.mkdir()
    save_file({"double_blocks.0.weight": torch.zeros(2)}, neither / "model.safetensors")
    error(lambda: load_autoencoder(neither), "neither of the two autoencoders", "double_blocks.0.weight")

@pytest.mark.parametrize("change", [dict(layers_per_block=0), dict(colour="red"), dict(block_out_channels="wide"), dict(scaling_factor=0)], ids=str)
def test_a_config_that_is_none_is_one_line(saved, change):
    file = saved[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    error(lambda: HunyuanVAE.from_pretrained(saved[0]), "config")
    file.write_text("{")
    error(lambda: HunyuanVAE.from_pretrained(saved[0]), "config.json is not JSON")
