"Tokens, given frames, dropout and sizes: properties and faults."
import itertools
from collections import Counter

import pytest
import torch

from opensora_nb.cluster.files import UserError
from opensora_nb.mmdit.conditioning import (ALL_KINDS, HEAD_ONLY, KINDS, cached_references, check_weights, drop_text, fits, given_frames, hold_ends, image_condition, image_size, latent_frames, model_inputs, noise_shape, pack,
                                            position_ids, reference_latents, round_size, sample_condition_kinds, training_condition, unpack)
from opensora_nb.mmdit.model import MMDiT, MMDiTConfig

def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- tokens ----
@pytest.mark.parametrize("B, C, T, H, W, patch", [(1, 1, 1, 1, 1, 1), (2, 3, 4, 6, 10, 2), (2, 16, 8, 8, 8, 1), (1, 4, 3, 6, 9, 3)])
def test_unpack_undoes_pack_and_positions_name_each_token(B, C, T, H, W, patch):
    latent = noise(B, C, T, H, W)
    tokens, ids = pack(latent, patch), position_ids(T, H, W, patch)
    assert tokens.shape == (B, T * (H // patch) * (W // patch), C * patch ** 2) and torch.equal(unpack(tokens, T, H, W, patch), latent)
    assert ids.shape == (tokens.shape[1], 3) and len(ids.unique(dim=0)) == len(ids)
    for i, (t, h, w) in enumerate(ids.int().tolist()):
        assert torch.equal(tokens[:, i], latent[:, :, t, h * patch : (h + 1) * patch, w * patch : (w + 1) * patch].flatten(1))

def test_the_mask_comes_first_in_a_packed_condition():
    cond = image_condition((1, 5, 2, 4, 4), {0: noise(1, 5, 4, 4)}, "i2v_head")
    tokens = pack(cond, 2)
    assert tokens.shape[-1] == 6 * 4 and tokens[0, :4, :4].eq(1).all() and tokens[0, 4:].eq(0).all()

def test_a_latent_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="3 x 4"): pack(noise(1, 2, 1, 3, 4), 2)


# ---- given frames ----
def test_each_row_has_its_own_kind():
    kinds = ["i2v_tail", "t2v", "i2v_loop", "i2v_head"]
    refs = {0: noise(4, 3, 2, 2), -1: noise(4, 3, 2, 2, seed=1)}
    mixed = image_condition((4, 3, 6, 2, 2), refs, kinds)
    for row, kind in enumerate(kinds):
        alone = image_condition((1, 3, 6, 2, 2), {k: v[row : row + 1] for k, v in refs.items()}, kind)
        assert torch.equal(mixed[row : row + 1], alone)
        given = sorted(f % 6 for f in given_frames(kind))
        assert mixed[row, 0].flatten(1).mean(1).nonzero().flatten().tolist() == given
        assert mixed[row, 1:, [f for f in range(6) if f not in given]].eq(0).all()

def test_a_single_latent_frame_is_given_nothing():
    for kind in KINDS: assert image_condition((2, 3, 1, 2, 2), {0: noise(2, 3, 2, 2), -1: noise(2, 3, 2, 2)}, kind).eq(0).all()

def test_two_latent_frames_can_be_a_loop():
    assert image_condition((1, 3, 2, 2, 2), {0: noise(1, 3, 2, 2), -1: noise(1, 3, 2, 2)}, "i2v_loop")[:, 0].eq(1).all()

@pytest.mark.parametrize("causal", [False, True])
def test_stretches_are_given_whole_and_encoded_as_the_autoencoder_needs_it(causal):
    def encode(x):
        calls.append(x.shape[2])
        frames = x.mean((3, 4), keepdim=True)
        if x.shape[2] == 1: return frames
        return torch.cat([frames[:, :, :1], frames[:, :, 1:].unflatten(2, (-1, 4)).mean(3)], 2) if causal else frames.unflatten(2, (-1, 4)).mean(3)
    calls, video = [], noise(4, 3, 73 if causal else 72, 2, 2)
    latent = encode(video); calls.clear()
    kinds = ["v2v_head", "v2v_tail_easy", "i2v_loop", "t2v"]
    cond = training_condition(video, latent, kinds, encode, causal)
    assert cond[:, 0].sum((1, 2, 3)).tolist() == [8 + causal, 16 + causal, 2, 0] and calls == ([1, 33, 65] if causal else [1])
    stretch = encode(video[:1, :, :33])[0] if causal else latent[0, :, :8]
    assert torch.equal(cond[0, 1:, : 8 + causal], stretch)
    for row in range(4): assert cond[row, 1:, cond[row, 0, :, 0, 0] == 0].eq(0).all()

def test_kinds_that_leave_nothing_are_neither_drawn_nor_made():
    generator = torch.Generator().manual_seed(0)
    for T, causal in itertools.product((1, 2, 8, 9, 10, 17, 18), (False, True)):
        drawn = set(sample_condition_kinds(300, generator, dict.fromkeys(KINDS, 1.0), T, causal))
        assert drawn == {k for k in KINDS if fits(k, T, causal)} and {"t2v", "i2v_head"} <= drawn
        for kind in set(KINDS) - drawn:
            with pytest.raises(ValueError, match="nothing is left"): image_condition((1, 2, T, 2, 2), {e: noise(1, 2, 17, 2, 2) for e in (0, -1)}, kind, causal)

@pytest.mark.parametrize("kind, T", list(itertools.product(KINDS, (1, 3, 6, 7, 40))))
def test_held_ends_keep_length_and_end_on_the_given_frames(kind, T):
    video = noise(2, 3, T, 2, 2)
    held = hold_ends(video, kind)
    assert held.shape == video.shape
    if 0 in given_frames(kind): assert torch.equal(held[:, :, 0], video[:, :, 0])
    if list(given_frames(kind)) == [-1]: assert torch.equal(held[:, :, -1], video[:, :, -1])

@pytest.mark.parametrize("kinds, refs, word", [("i2v", {}, "unknown"), (["t2v"], {}, "1 kinds"), ("i2v_tail", {0: torch.zeros(2, 3, 2, 2)}, "frame -1")])
def test_conditions_that_cannot_be_made_say_why(kinds, refs, word):
    with pytest.raises(ValueError, match=word): image_condition((2, 3, 4, 2, 2), refs, kinds)

def test_references_are_the_clips_own_first_and_last_frames_in_the_right_rows():
    video, encode = noise(4, 3, 9, 4, 4), lambda x: 2 * x
    kinds = ["t2v", "i2v_tail", "i2v_loop", "i2v_head"]
    refs = reference_latents(video, noise(4, 3, 3, 4, 4), kinds, encode)
    assert torch.equal(refs[0][[2, 3], :, 0], 2 * video[[2, 3], :, 0]) and torch.equal(refs[-1][[1, 2], :, 0], 2 * video[[1, 2], :, -1])
    assert refs[0][[0, 1]].eq(0).all() and refs[-1][[0, 3]].eq(0).all()
    cond = training_condition(video, noise(4, 3, 3, 4, 4).bfloat16(), kinds, encode)
    assert cond.shape == (4, 4, 3, 4, 4) and cond.dtype == torch.bfloat16

@pytest.mark.parametrize("kind", KINDS)
def test_encoded_beforehand_is_encoded_now(kind):
    "For an autoencoder that is not causal, a cache of latents with first and last frames holds all that any kind is given."
    def encode(x): return x.mean((3, 4), keepdim=True).expand(-1, -1, -1, 2, 2) if x.shape[2] == 1 else x.unflatten(2, (-1, 4)).mean((3, 4, 5)).view(*x.shape[:2], -1, 1, 1).expand(-1, -1, -1, 2, 2)
    video, kinds = noise(3, 3, 72, 2, 2), [kind, "i2v_loop", "v2v_tail"]
    latent = encode(video)
    refs = cached_references(latent, encode(video[:, :, :1]), encode(video[:, :, -1:]), kinds)
    assert torch.equal(image_condition(latent.shape, refs, kinds), training_condition(video, latent, kinds, encode))
    assert cached_references(latent[:, :, :1], latent, latent, kinds) == {}

def test_every_kind_can_be_trained_on_cached_latents():
    from dataclasses import replace
    from types import SimpleNamespace
    from opensora_nb.training.diffusion import DiffusionRecipe, LatentCache, diffusion_loss
    cfg = MMDiTConfig(in_channels=3, patch_size=1, context_in_dim=6, vec_in_dim=5, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6))
    torch.manual_seed(0)
    model, cache = MMDiT(cfg), LatentCache(noise(2, 3, 20, 2, 2), noise(2, 3, 1, 2, 2), noise(2, 3, 1, 2, 2), noise(2, 1, 4, 6), noise(2, 1, 5), noise(1, 4, 6), noise(1, 5))
    for kind in KINDS:
        recipe = DiffusionRecipe(cfg, condition_weights={kind: 1.0})
        for cached in (cache, replace(cache, latents=cache.latents[:, :, :2])):                   # too short for a stretch: nothing is given
            g = torch.Generator().manual_seed(0)
            assert diffusion_loss(model, cached.batch(SimpleNamespace(rows=[0, 1]), g), recipe, g)["loss"].isfinite()
    with pytest.raises(UserError, match="unknown condition kinds i2v_middle"): DiffusionRecipe(cfg, condition_weights=dict(i2v_middle=1))      # before anything is read or made
    with pytest.raises(ValueError, match="drop_text"): DiffusionRecipe(cfg, drop_text=1.5)

def test_an_image_in_training_is_never_encoded_twice():
    def encode(x): raise AssertionError("nothing was asked for")
    assert training_condition(noise(2, 3, 1, 4, 4), noise(2, 3, 1, 4, 4), ["i2v_head"] * 2, encode).eq(0).all()
    assert training_condition(noise(2, 3, 8, 4, 4), noise(2, 3, 2, 4, 4), ["t2v"] * 2, encode).eq(0).all()

def test_no_condition_and_a_zero_condition_are_the_same_to_the_model():
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(in_channels=8, patch_size=2, context_in_dim=6, vec_in_dim=5, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6)))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)      # no zeros, so that a condition would be seen
    latent, text = noise(2, 2, 3, 4, 4), (torch.rand(2), noise(2, 7, 6), noise(2, 5))
    zero, none = (model(**model_inputs(latent, *text, cond, patch=2)) for cond in (image_condition(latent.shape, {}, "t2v"), None))
    seen = model(**model_inputs(latent, *text, image_condition(latent.shape, {0: noise(2, 2, 4, 4)}, "i2v_head"), patch=2))
    assert torch.allclose(zero, none, atol=1e-5) and not torch.allclose(seen, none, atol=1e-2)
    assert unpack(none, 3, 4, 4, 2).shape == latent.shape


# ---- dropout ----
@pytest.mark.parametrize("weights", (HEAD_ONLY, ALL_KINDS, dict(i2v_loop=0.2, t2v=0.3)))
def test_kinds_come_in_the_proportion_of_their_weights(weights):
    n = 20_000
    drawn, total = Counter(sample_condition_kinds(n, torch.Generator().manual_seed(0), weights)), sum(weights.values())
    assert set(drawn) == set(weights)
    for kind, weight in weights.items(): assert drawn[kind] / n == pytest.approx(weight / total, abs=0.015)       # four standard deviations

def test_an_eighth_goes_without_an_image(): assert HEAD_ONLY["t2v"] / sum(HEAD_ONLY.values()) == ALL_KINDS["t2v"] / sum(ALL_KINDS.values()) == 0.125

def test_same_seed_same_kinds():
    a, b = (sample_condition_kinds(50, torch.Generator().manual_seed(5), ALL_KINDS) for _ in range(2))
    assert a == b

@pytest.mark.parametrize("weights", ({}, {"t2v": 0}, {"t2v": -1, "i2v_head": 2}, {"v2v_headd": 1}, {"t2v": float("nan")}, {"t2v": float("inf")}))
def test_weights_that_mean_nothing_are_refused_in_one_line(weights):
    for call in (lambda: sample_condition_kinds(1, weights=weights), lambda: check_weights(weights)):
        with pytest.raises(UserError) as e: call()
        assert "\n" not in str(e.value)

def test_text_encodings_are_dropped_independently_and_whole():
    n = 20_000
    tokens, pooled = drop_text(torch.ones(n, 3, 2), torch.ones(n, 2), torch.zeros(1, 3, 2), torch.zeros(1, 2), generator=torch.Generator().manual_seed(0))
    t, p = tokens.flatten(1).mean(1), pooled.mean(1)
    assert set(t.tolist()) | set(p.tolist()) == {0.0, 1.0}
    assert (1 - t).mean().item() == pytest.approx(0.1 ** 0.5, abs=0.012) and ((1 - t) * (1 - p)).mean().item() == pytest.approx(0.1, abs=0.01)

def test_dropout_keeps_dtype_and_leaves_its_input_alone():
    tokens, pooled = noise(4, 3, 2).bfloat16(), noise(4, 2).bfloat16()
    before = tokens.clone()
    dropped = drop_text(tokens, pooled, torch.zeros(1, 3, 2), torch.zeros(1, 2), p=1.0)
    assert all(x.dtype == torch.bfloat16 and x.eq(0).all() for x in dropped) and torch.equal(tokens, before)


# ---- sizes ----
@pytest.mark.parametrize("resolution, ratio, multiple", list(itertools.product(("256px", "512px", "768px", "1024px", "360p", "720p"), ("2.39:1", "16:9", "4:3", "1:1", "1:1.85", "9:16"), (16, 32))))
def test_sizes_divide_fill_the_area_and_turn_with_the_ratio(resolution, ratio, multiple):
    h, w = image_size(resolution, ratio, multiple)
    across, down = ratio.split(":")
    area = int(resolution[:-2]) ** 2 if resolution.endswith("px") else int(resolution[:-1]) ** 2 * 16 / 9
    assert h % multiple == w % multiple == 0 and 0.7 * area < h * w <= area + 1e-6
    assert image_size(resolution, f"{down}:{across}", multiple) == (w, h)
    assert w / h == pytest.approx(float(across) / float(down), rel=0.3)

@pytest.mark.parametrize("bad", (("256", "16-9"), ("px", "1:1"), ("256px", "0:0"), ("256px", "nan:1"), ("256px", "inf:1"), ("-256px", "-1:1"), ("0px", "1:1"), ("64px", "40:1"), ("", "")))
def test_sizes_that_cannot_be_read_are_refused_in_one_line(bad):
    with pytest.raises(UserError) as e: image_size(*bad)
    assert "\n" not in str(e.value)

def test_noise_covers_the_rounded_picture():
    for h, w in ((1, 1), (250, 333), (576, 1024)):
        H, W = noise_shape(h, w, 4, 16)[-2:]
        assert (H * 8, W * 8) == round_size(h, w)                        # 8x autoencoder, patch 2

def test_latent_frames_of_every_length():
    assert [latent_frames(n) for n in (1, 2, 4, 5, 8, 128)] == [1, 1, 1, 1, 2, 32]
    assert [latent_frames(n, causal=True) for n in (1, 4, 5, 33, 129)] == [1, 1, 2, 9, 33]
