"PSNR and SSIM are scikit-image's, the perceptual distance is a mean over frames, the ratios are the report's, and seams are found where tiles meet."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from opensora_nb.autoencoder.dc_ae import VideoDCAE, VideoDCAEConfig, pocket
from opensora_nb.autoencoder.metrics import TABLE_1, compression_of, information_ratio, lpips_distance, psnr, seam_error, ssim, to_uint8, token_ratio
from opensora_nb.autoencoder.tiling import Tiling, plan
from opensora_nb.cluster.files import UserError

STANDARD = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1)

def as_clip(frames): return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]
def their_ssim(x, y): return np.mean([structural_similarity(a, b, **STANDARD) for a, b in zip(x, y)])
def agree(x, y):
    assert abs(ssim(as_clip(x), as_clip(y)).item() - their_ssim(x, y)) < 1e-5
    if (x != y).any(): assert abs(psnr(as_clip(x), as_clip(y)).item() - peak_signal_noise_ratio(x, y, data_range=255)) < 1e-4

def noise(seed, shape, low=0, high=256): return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)


# ---- against scikit-image ----
@pytest.mark.parametrize("name", ["bikes", "carphone_pristine", "bigbuckbunny"])
def test_real_frames_against_blurred_noisy_and_later_ones(name):
    import cv2
    from opensora_nb.data.footage import sample_clips
    from opensora_nb.data.video import decode
    try: film = decode(sample_clips()[name], 1.0, 1.2)[:2, :144, :176]
    except UserError as error: pytest.skip(str(error))
    agree(film, np.stack([cv2.GaussianBlur(f, (0, 0), 1.5) for f in film]))
    agree(film, np.clip(film + np.random.default_rng(0).normal(0, 12, film.shape), 0, 255).astype(np.uint8))
    agree(film, film[::-1]); agree(film, film)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(11, 40), st.integers(11, 40), st.integers(0, 255), st.integers(1, 256), st.integers(0, 40))
def test_random_arrays_of_any_level_and_contrast(seed, T, H, W, low, width, change):
    x = noise(seed, (T, H, W, 3), low, min(256, low + width))
    agree(x, np.clip(x.astype(int) + noise(seed + 1, x.shape, 0, change + 1) - change // 2, 0, 255).astype(np.uint8))

@pytest.mark.parametrize("x, y", [(0, 255), (255, 254), (3, 3)])
def test_flat_pictures(x, y): agree(np.full((2, 16, 20, 3), x, np.uint8), np.full((2, 16, 20, 3), y, np.uint8))

def test_the_smallest_differences_at_the_brightest_level_are_not_lost_in_float32():
    x = np.full((1, 64, 64, 3), 250, np.uint8)
    agree(x, x + noise(0, x.shape, 0, 2))                                        # variance 0.25 beside squares of 62500


# ---- what they have in common ----
@pytest.mark.parametrize("measure", [psnr, ssim])
def test_each_clip_is_measured_by_itself_and_floats_are_rounded_to_8_bits(measure):
    x, y = (torch.from_numpy(noise(s, (3, 3, 2, 24, 18))) for s in (0, 1))
    assert torch.allclose(measure(x, y), torch.cat([measure(x[i : i + 1], y[i : i + 1]) for i in range(3)]))
    floats = lambda v: v.float() / 127.5 - 1 + 0.003                             # less than half a grey level off
    assert torch.equal(measure(floats(x), y), measure(x, y)) and torch.equal(measure(x, y), measure(y, x))
    assert torch.allclose(measure(x.bfloat16() / 127.5 - 1, x), measure(to_uint8(x.bfloat16() / 127.5 - 1), x))
    with pytest.raises(ValueError, match="differ in shape"): measure(x, y[:, :, :1])

def test_values_beyond_the_range_are_clipped():
    assert psnr(torch.full((1, 3, 1, 16, 16), 7.0), torch.ones(1, 3, 1, 16, 16)).isinf()

def test_large_clips_are_measured_in_pieces_and_come_out_the_same():
    x = noise(5, (2, 600, 700, 1)).repeat(3, -1); y = np.roll(x, 1, 1)             # 6 pictures of 0.4 million pixels, 2 at a time
    assert abs(ssim(as_clip(x), as_clip(y)).item() - ssim(as_clip(x[:, :, :, :1]), as_clip(y[:, :, :, :1])).item()) < 1e-6

def test_a_window_must_fit():
    with pytest.raises(ValueError, match="11 x 11 pixels, the clips have 8 x 32"): ssim(torch.zeros(1, 3, 1, 8, 32), torch.zeros(1, 3, 1, 8, 32))


# ---- the perceptual distance ----
class Mean(torch.nn.Module):
    "One number for a stack, as `PerceptualLoss` has; per_frame: one for each frame, `(N, 1, 1, 1)`, as other LPIPS have."
    def __init__(self, per_frame): super().__init__(); self.per_frame, self.seen = per_frame, []
    def forward(self, a, b):
        self.seen.append(len(a))
        d = (a - b).abs().mean((1, 2, 3), keepdim=True)
        return d if self.per_frame else d.mean()

@pytest.mark.parametrize("per_frame", [True, False])
def test_a_distance_is_the_mean_over_frames_however_they_are_stacked(per_frame):
    x, y = (torch.from_numpy(noise(s, (2, 3, 7, 16, 16))) for s in (0, 1))
    net = Mean(per_frame)
    want = ((x.float() - y.float()).abs() / 127.5).flatten(1).mean(1)
    assert torch.allclose(lpips_distance(x, y, net, batch=3), want, atol=1e-6) and net.seen == [3, 3, 1] * 2
    assert torch.allclose(lpips_distance(x.float() / 127.5 - 1 + 0.003, y, net), want, atol=1e-6)
    with pytest.raises(ValueError, match="must be"): lpips_distance(x[:, :1], y[:, :1], net)

def test_it_leaves_no_graph(): assert not lpips_distance(torch.zeros(1, 3, 1, 4, 4, requires_grad=True), torch.ones(1, 3, 1, 4, 4), Mean(False)).requires_grad


# ---- ratios ----
def test_ratios_of_the_report():
    assert (token_ratio((4, 8, 8), 2), token_ratio((4, 8, 8), (1, 2, 2)), token_ratio((4, 32, 32), 1)) == (1024, 1024, 4096)
    assert [information_ratio(r.compression, r.channels) for r in TABLE_1] == [192, 96, 48, 96, 48]
    assert information_ratio((4, 8, 8), 16, channels_in=4) == 64

def test_an_autoencoder_knows_its_ratios():
    model = VideoDCAE(pocket())
    assert compression_of(model) == (4, 8, 8) and token_ratio(model, 2) == 1024 and information_ratio(model) == 48
    with torch.device("meta"): assert information_ratio(VideoDCAE(VideoDCAEConfig())) == 96

@pytest.mark.parametrize("wrong", [(4, 8), (0, 8, 8), (4, -8, 8)])
def test_a_compression_that_is_none(wrong):
    with pytest.raises(ValueError, match="three factors"): token_ratio(wrong)


# ---- seams ----
def brute_seams(a, b, tiling, spatial, temporal, causal):
    "The same four numbers of one clip `(3, T, H, W)`, position by position."
    error = (b.astype(float) - a.astype(float)).mean(0)
    marks = []
    for axis, (n, cell, tile, lead) in enumerate(zip(error.shape, (temporal, spatial, spatial), (tiling.frames, tiling.size, tiling.size), (causal, False, False))):
        first = lambda at: max(0, (at - 1) * cell + 1) if lead else at * cell
        zone, jumps, at = set(), set(), 0
        for s in plan(1 + -(-(n - 1) // cell) if lead else -(-n // cell), tile and tile // cell, tiling.overlap, lead):
            if at: zone |= set(range(first(at) - 1, min(first(at + s.blend) + 1, n))); jumps |= {p for p in (first(at), first(at + s.blend)) if p < n}
            at += s.keep
        marks.append((zone, jumps))
    inside = np.array([[[t in marks[0][0] or h in marks[1][0] or w in marks[2][0] for w in range(error.shape[2])] for h in range(error.shape[1])] for t in range(error.shape[0])])
    on, off = [], []
    for axis, (_, jumps) in enumerate(marks):
        lines = [(p, np.abs(np.take(error, p, axis) - np.take(error, p - 1, axis))) for p in range(1, error.shape[axis])]
        for p, jump in lines: (on if p in jumps else off).extend([jump.mean()] if axis == 0 else jump.mean(1))
    return dict(border=np.abs(error)[inside].mean(), elsewhere=np.abs(error)[~inside].mean(), border_jump=np.mean(on), elsewhere_jump=np.mean(off))

@pytest.mark.parametrize("tiling, spatial, temporal, causal, T", [
    (Tiling(16, None, 0.25), 4, 4, False, 4), (Tiling(16, 8, 0.25), 8, 4, False, 18), (Tiling(None, 8, 0.5), 8, 4, True, 17), (Tiling(16, 8, 0.0), 4, 4, True, 13)])
def test_seams_are_where_the_plan_says(tiling, spatial, temporal, causal, T):
    a, b = noise(0, (2, 3, T, 40, 24)), noise(1, (2, 3, T, 40, 24))
    ours = seam_error(torch.from_numpy(a), torch.from_numpy(b), tiling, spatial, temporal, causal)
    for i in range(2):
        for key, want in brute_seams(a[i], b[i], tiling, spatial, temporal, causal).items(): assert abs(ours[key][i].item() - want) < 1e-3, (key, ours[key][i], want)

def test_a_clip_of_one_tile_has_no_border():
    found = seam_error(torch.zeros(1, 3, 4, 16, 16), torch.ones(1, 3, 4, 16, 16), Tiling(16, 4), 8, 4)
    assert found["border"].isnan() and found["border_jump"].isnan() and found["elsewhere"] == 127 and found["elsewhere_jump"] == 0
