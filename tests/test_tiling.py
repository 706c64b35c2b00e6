"Tiles: what they must leave alone, whatever the size; what is refused; and memory that does not grow with the clip."
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from opensora_nb.autoencoder.dc_ae import VideoDCAE, VideoDCAEConfig
from opensora_nb.autoencoder.tiling import RELEASE, Span, Tiling, check_size, check_video, cross_fade, plan, tiled_decode, tiled_encode

TINY = VideoDCAEConfig(2, ("ResBlock",) * 3, (4, 4, 4), (0, 1, 0), (4, 4, 4), (0, 1, 0), (True, True, False), (True, True, False))       # 4 x 4 x 4
OVERLAPS = (0.0, 0.25, 0.3, 0.5, 0.9)

def video(*shape, seed=1): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1

@pytest.fixture(scope="module")
def model():
    model, g = VideoDCAE(TINY), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.3)
    return model.eval()

# networks without context: each latent is the mean of its own pixels, each pixel that of its latent
def encoder(spatial, temporal, causal):
    fours = lambda x: F.avg_pool3d(x, (temporal, spatial, spatial))
    return lambda x: torch.cat([F.avg_pool3d(x[:, :, :1], (1, spatial, spatial)), *([fours(x[:, :, 1:])] if x.shape[2] > 1 else [])], 2) if causal else fours(x)

def decoder(spatial, temporal, causal): return lambda z: F.interpolate(z, scale_factor=(temporal, spatial, spatial))[:, :, (temporal - 1 if causal else 0):]

sizes = st.fixed_dictionaries(dict(t=st.integers(1, 11), h=st.integers(1, 9), w=st.integers(1, 9), size=st.sampled_from((None, 1, 2, 3, 4, 16)), frames=st.sampled_from((None, 1, 2, 3, 4, 16)),
                                   overlap=st.sampled_from(OVERLAPS), spatial=st.sampled_from((1, 2, 3)), temporal=st.sampled_from((1, 2, 4)), causal=st.booleans()))

def of(s):
    "(video, tiling, the other arguments) of a drawn case; sizes are drawn in latent cells."
    T = (s["t"] - 1) * s["temporal"] + 1 if s["causal"] else s["t"] * s["temporal"]
    tiling = Tiling(s["size"] and s["size"] * s["spatial"], s["frames"] and s["frames"] * s["temporal"], s["overlap"])
    return video(1, 3, T, s["h"] * s["spatial"], s["w"] * s["spatial"]), tiling, (s["spatial"], s["temporal"], s["causal"])


# ---- the plan ----
@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.sampled_from((None, 1, 2, 3, 5, 8)), st.floats(0, 0.99), st.booleans())
def test_every_cell_is_kept_once_and_faded_over_what_neighbours_share(cells, tile, overlap, causal):
    spans = plan(cells, tile, overlap, causal)
    assert sum(s.keep for s in spans) == cells and spans[0].start == spans[0].drop == spans[0].blend == 0 and spans[-1].stop == cells
    for before, s in zip(spans, spans[1:]):
        assert before.start + before.drop + before.keep == s.start + s.drop and s.blend == before.stop - s.start - s.drop >= 0 and s.drop == causal
    if tile is not None: assert all(s.stop - s.start <= max(tile + causal, 1) for s in spans)

def test_the_releases_plan():
    assert [s.start * 32 for s in plan(1024 // 32, 256 // 32)] == [0, 192, 384, 576, 768, 960] and {s.blend * 32 for s in plan(1024 // 32, 8)[1:]} == {64}
    assert RELEASE == Tiling(256, 32, 0.25) == Tiling()
    assert plan(10, 4, 0.25, causal=True) == (Span(0, 5, 0, 0, 4), Span(3, 8, 1, 1, 3), Span(6, 10, 1, 1, 3))
    assert plan(4, 4) == (Span(0, 4, 0, 0, 4),) and len(plan(5, 4)) == 2


# ---- networks that cannot know of tiles ----
@settings(max_examples=60, deadline=None)
@given(sizes)
def test_a_network_without_context_gives_the_same_bits_in_tiles(s):
    x, tiling, how = of(s)
    z = tiled_encode(encoder(*how), x, tiling, *how)
    assert torch.equal(z, encoder(*how)(x))
    y = tiled_decode(decoder(*how), z, tiling, *how)
    assert y.shape == x.shape and torch.equal(y, decoder(*how)(z))

@settings(max_examples=30, deadline=None)
@given(sizes)
def test_weights_are_a_partition_of_unity(s):
    "A network that answers with a number of its own for each tile: nothing leaves the range of these numbers."
    x, tiling, how = of(s)
    numbers = iter(range(10**6))
    y = tiled_encode(lambda x: torch.full_like(encoder(*how)(x), 1.0 + next(numbers) % 7), x, tiling, *how)
    assert y.min() >= 1 and y.max() <= 7

def test_no_overlap_only_puts_tiles_side_by_side():
    x = video(1, 3, 8, 12, 8)
    y = tiled_encode(lambda tile: tile - tile.mean(), x, Tiling(4, 4, 0.0), 1, 1)
    for t in (0, 4):
        for h in (0, 4, 8):
            for w in (0, 4):
                part = x[:, :, t : t + 4, h : h + 4, w : w + 4]
                assert torch.equal(y[:, :, t : t + 4, h : h + 4, w : w + 4], part - part.mean())

def test_a_fade_starts_with_the_older_tile_alone_and_leaves_both_as_they_were():
    old, new = torch.zeros(1, 2, 3, 4, 4), torch.ones(1, 2, 3, 6, 4)
    for dtype in (torch.float32, torch.bfloat16):
        faded = cross_fade(old.to(dtype), new.to(dtype), 3)
        assert faded.dtype == dtype and faded[0, 0, 0, :, 0].tolist() == [0, 0.25, 0.5, 0.75, 1, 1]
    assert old.eq(0).all() and new.eq(1).all() and cross_fade(old[:, :, :0], new, 2) is new


# ---- the model ----
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 26), st.integers(1, 6), st.integers(1, 6), st.sampled_from((None, 8, 12)), st.sampled_from((None, 4, 8, 12)), st.sampled_from(OVERLAPS))
def test_every_clip_comes_back_as_long_and_as_large(model, T, h, w, size, frames, overlap):
    x, tiling = video(1, 3, T, 4 * h, 4 * w), Tiling(size, frames, overlap)
    with torch.no_grad():
        z = model.encode(x, tiling)
        y = model.decode(z, T, tiling)
    assert z.shape[1:] == model.latent_shape(*x.shape[2:]) and y.shape == x.shape and y.isfinite().all()

@torch.no_grad()
def test_a_tile_larger_than_the_clip_is_no_tile(model):
    for T, tiling in ((9, Tiling(64, 64)), (8, Tiling(8, 8)), (1, Tiling(8, 4)), (9, Tiling(None, None))):
        x = video(2, 3, T, 8, 8)
        z = model.encode(x)
        assert torch.equal(model.encode(x, tiling), z) and torch.equal(model.decode(z, T, tiling), model.decode(z, T))

@torch.no_grad()
def test_an_image_is_cut_in_space_and_stays_an_image(model):
    x, tiling = video(1, 3, 1, 24, 16), Tiling(8, 4)
    z = model.encode(x, tiling)
    assert z.shape[2] == 1 and model.decode(z, tiling=tiling).shape == x.shape and not torch.equal(z, model.encode(x))
    assert model.decode(z, 3, tiling).shape[2] == 3

@torch.no_grad()
def test_a_last_tile_of_one_latent_frame_keeps_all_its_frames(model):
    "Where the release comes back three frames short: 4 cells and one, in tiles of 4."
    x, tiling = video(1, 3, 20, 8, 8), Tiling(None, 16, 0.0)
    z = model.encode(x, tiling)
    y = model.decode(z, tiling=tiling)
    assert y.shape[2] == 20 and torch.equal(y[:, :, 16:], model.decode(z[:, :, 4:], 4))

@torch.no_grad()
def test_tiles_do_not_mix_clips_and_do_not_touch_their_input(model):
    x, tiling = video(2, 3, 12, 16, 12), Tiling(8, 8)
    kept, z = x.clone(), model.encode(x, tiling)
    latent = z.clone()
    model.decode(z, 12, tiling)
    assert torch.equal(x, kept) and torch.equal(z, latent) and torch.equal(model.encode(x, tiling), z)
    assert torch.allclose(z[1:], model.encode(x[1:], tiling), rtol=0, atol=1e-5)

def test_gradients_go_through_tiles(model):
    x = video(1, 3, 8, 16, 8).requires_grad_()
    model.decode(model.encode(x, Tiling(8, 4)), 8, Tiling(8, 4)).square().mean().backward()
    assert x.grad.isfinite().all() and (x.grad.abs().amax((0, 1, 2)) > 0).all()
    model.zero_grad()


# ---- what is refused ----
def refused(work, *words):
    with pytest.raises(ValueError) as e: work()
    line = str(e.value)
    assert "\n" not in line and len(line) < 250 and all(w in line for w in words), line

@pytest.mark.parametrize("change, words", [(dict(overlap=1.0), "overlap must lie in [0, 1), got 1.0"), (dict(overlap=-0.1), "got -0.1"), (dict(overlap=float("nan")), "got nan"),
                                           (dict(size=0), "size must be a whole number above 0 or None, got 0"), (dict(size=96.0), "got 96.0"), (dict(frames=-4), "frames must be a whole number")], ids=str)
def test_a_tiling_that_is_none_says_so(change, words): refused(lambda: replace(RELEASE, **change), words)

def test_tiles_that_do_not_divide_are_refused_each_way(model):
    x = video(1, 3, 8, 16, 16)
    for way in (lambda t: model.encode(x, t), lambda t: model.decode(torch.zeros(1, 2, 2, 4, 4), 8, t)):
        refused(lambda: way(Tiling(10, None)), "tile's size must be a multiple of 4 pixels", "got 10")
        refused(lambda: way(Tiling(None, 6)), "tile's frames must be a multiple of 4", "got 6")
    refused(lambda: tiled_encode(encoder(2, 4, True), video(1, 3, 8, 4, 4), Tiling(None, 4), 2, 4, True), "a multiple of 4 frames and one, got 8")

def test_clips_that_do_not_fit_name_the_nearest_that_do(model):
    refused(lambda: model.encode(video(1, 3, 4, 30, 64)), "multiples of 4, got 30 x 64", "28 x 64 (crop) or 32 x 64 (pad)")
    refused(lambda: model.latent_shape(8, 3, 8), "nearest are 4 x 8 (pad)")
    check_size(4, 8, 4)
    for h in range(1, 40):
        if h % 8 == 0: check_size(h, 8, 8)
        else: refused(lambda: check_size(h, 8, 8), f"{-(-h // 8) * 8} x 8 (pad)", *([f"{h // 8 * 8} x 8 (crop)"] if h > 8 else []))

def test_wrong_pixels_are_refused_before_anything_is_computed(model):
    x = video(1, 3, 6, 8, 8)
    for value in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone(); spoiled[0, 1, 4, 3, 3] = value
        refused(lambda: model.encode(spoiled), "1 of 6 frames have NaN or infinite pixels, the first is frame 4")
    both = x.clone(); both[0, 0, 2, 0, 0], both[0, 0, 5, 0, 0] = torch.inf, -torch.inf
    refused(lambda: model.encode(both, Tiling(8, 4)), "2 of 6 frames", "frame 2")
    refused(lambda: model.encode(x[:, :1]), "three channels", "(1, 1, 6, 8, 8)")
    refused(lambda: model.encode(x[0]), "(B, 3, T, H, W)")
    refused(lambda: model.encode(x[:, :, :0]), "at least one frame")
    refused(lambda: model.encode((x * 127).to(torch.uint8)), "floating point in [-1, 1], got torch.uint8")
    refused(lambda: model.decode(torch.zeros(1, 5, 2, 2, 2)), "(B, 2, T', H', W')", "(1, 5, 2, 2, 2)")
    check_video(torch.full((1, 3, 4, 512, 512), 1e30, dtype=torch.float64), 4)                # large is not infinite


# ---- training ----
def test_recomputed_blocks_have_the_same_gradients(model):
    def gradients():
        model.zero_grad(); model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]
    x, calls = video(1, 3, 8, 8, 8), []
    hook = model.encoder.stages[1].op_list[0].register_forward_pre_hook(lambda *_: calls.append(1))
    kept, once = gradients(), len(calls)
    model.checkpoint_blocks(True); again = gradients()
    assert model.checkpointing and (once, len(calls)) == (1, 3), "computed once, and with recomputing twice"
    model.checkpoint_blocks(False); hook.remove(); model.zero_grad()
    for a, b in zip(kept, again): assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)

@torch.no_grad()
def test_features_of_a_stage_come_with_the_latent(model):
    x = video(1, 3, 7, 8, 8)
    shapes = {}
    for stage in (1, 2, 3, None):
        latent, features = model.encode_features(x, stage)
        assert torch.equal(latent, model.encode(x)) and features.shape[1] == model.feature_channels(stage)
        shapes[stage] = tuple(features.shape[2:])
    assert shapes == {1: (4, 4, 4), 2: (2, 2, 2), 3: (2, 2, 2), None: (2, 2, 2)} and torch.equal(model.encode_features(x, None)[1], latent)
    for stage in (0, 4): refused(lambda: model.encode_features(x, stage), f"stages 1 to 3, not {stage}")
    assert model.last_layer is model.decoder.project_out.op_list[-1].conv.weight and len(model.last_layer) == 3 and model.causal is False


# ---- memory ----
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["dc_ae", "hunyuan"])
def test_memory_is_flat_in_tiles_and_is_not_without(kind):
    from opensora_nb.autoencoder.hunyuan import HunyuanVAEConfig
    from opensora_nb.autoencoder.large_clips import memory_curve
    width, times = (16,) * 4, (False, True, True, False)
    cfg = VideoDCAEConfig(4, ("ResBlock",) * 4, width, (1, 0, 0, 0), width, (1, 0, 0, 0), times, times) if kind == "dc_ae" else HunyuanVAEConfig(width, layers_per_block=1, latent_channels=4, norm_num_groups=8)
    tiled, long_tiled, whole, long_whole = (r["peak_mb"] for r in memory_curve(cfg, [((T, 96, 96), tiling) for tiling in (Tiling(64, 16), None) for T in (17, 65)]))
    assert long_tiled < tiled + 25 and long_whole > 2 * whole and long_tiled < long_whole / 2, (tiled, long_tiled, whole, long_whole)
