"The 2-D autoencoder: its interface, what it must not mix, its files. Its numbers are in test_golden."
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_nb.autoencoder.image_autoencoder import ImageAutoencoder, ImageAutoencoderConfig, pocket
from opensora_nb.autoencoder.tiling import Tiling
from opensora_nb.cluster.files import UserError

TINY = replace(pocket(), ch=8, norm_num_groups=4, scale_factor=0.5, shift_factor=0.25)

def model(cfg=TINY, seed=0):
    torch.manual_seed(seed)
    return ImageAutoencoder(cfg).eval()

def video(*shape, seed=1): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_frames_and_rows_do_not_see_each_other():
    net, x = model(), video(2, 3, 3, 16, 24)
    latent = net.encode(x)
    for row in range(2):
        for t in range(3):
            one = net.encode(x[row : row + 1, :, t : t + 1])
            assert torch.allclose(one, latent[row : row + 1, :, t : t + 1], atol=1e-5)
            assert torch.allclose(net.decode(one), net.decode(latent)[row : row + 1, :, t : t + 1], atol=1e-5)

@torch.no_grad()
def test_shapes_are_those_that_latent_shape_promises():
    for cfg in (TINY, replace(TINY, ch_mult=(1, 1, 2, 2), num_res_blocks=2, z_channels=3)):
        net = model(cfg)
        for T, H, W in ((1, 16, 16), (2, 24, 8)):
            latent = net.encode(video(1, 3, T, H, W))
            assert latent.shape == (1, *net.latent_shape(T, H, W)) and net.decode(latent).shape == (1, 3, T, H, W)
            assert net.decode(latent, 1).shape[2] == 1

@torch.no_grad()
def test_scale_and_shift_are_inside():
    net, x = model(), video(1, 3, 1, 16, 16)
    assert torch.allclose(net.encode(x), (net.posterior(x).mean - 0.25) * 0.5, atol=1e-6)
    bare = ImageAutoencoder(replace(TINY, scale_factor=1.0, shift_factor=0.0)).eval(); bare.load_state_dict(net.state_dict())
    assert torch.allclose(bare(x), net(x), atol=1e-5)

@torch.no_grad()
def test_a_sample_wants_a_generator_and_spreads_as_the_posterior_says():
    net, x = model(), video(1, 3, 1, 32, 32)
    with pytest.raises(ValueError, match="Generator"): net.encode(x, sample=True)
    found, g = net.posterior(x), torch.Generator().manual_seed(0)
    draws = torch.stack([net.encode(x, sample=True, generator=g) for _ in range(200)])
    away = (draws / 0.5 + 0.25 - found.mean) / (found.logvar / 2).exp()
    assert abs(away.mean()) < 0.01 and abs(away.std() - 1) < 0.01

@torch.no_grad()
def test_tiles_cover_a_picture_and_one_tile_changes_nothing():
    net, x = model(), video(1, 3, 2, 32, 48)
    whole, tiled = net.encode(x), net.encode(x, Tiling(16, None, 0.25))
    assert torch.equal(net.encode(x, Tiling(64, 8, 0.25)), whole)
    assert tiled.shape == whole.shape and tiled.isfinite().all() and not torch.equal(tiled, whole)
    assert net.decode(whole, tiling=Tiling(16, None, 0.25)).shape == x.shape

def test_every_parameter_has_a_gradient():
    net = model().train()
    (net(video(1, 3, 1, 16, 16), sample=True, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

@torch.no_grad()
def test_weights_decide_the_precision():
    net = model().bfloat16()
    assert net.encode(video(1, 3, 1, 16, 16)).dtype == torch.bfloat16 and net.decode(torch.zeros(1, 4, 1, 4, 4)).dtype == torch.bfloat16

@pytest.mark.parametrize("call, words", [(lambda n: n.encode(video(1, 3, 16, 16)), "B, 3, T, H, W"), (lambda n: n.encode(video(1, 3, 1, 18, 16)), "multiples of 4"), (lambda n: n.latent_shape(0, 16, 16), "at least 1 frame"),
                                         (lambda n: n.encode(torch.full((1, 3, 1, 16, 16), torch.nan)), "finite"), (lambda n: n.decode(torch.zeros(1, 16, 1, 4, 4)), "1|4"), (lambda n: n.decode(torch.zeros(1, 4, 2, 4, 4), 3), "1 to 2 frames")])
def test_what_does_not_fit_is_said_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as e: call(model())
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("changes", (dict(ch=0), dict(ch_mult=()), dict(ch_mult=(1, 2.5)), dict(norm_num_groups=3), dict(scale_factor=0.0), dict(shift_factor=float("nan")), dict(z_channels=True)))
def test_configs_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))): replace(TINY, **changes)


# ---- files ----
@torch.no_grad()
def test_saved_and_found_again_in_every_way(tmp_path):
    net, x = model(), video(1, 3, 1, 16, 16)
    file = net.save_pretrained(tmp_path)
    assert ImageAutoencoderConfig.from_dict(json.loads(file.with_name("config.json").read_text())) == TINY
    for where in (tmp_path, file):
        again = ImageAutoencoder.from_pretrained(where)
        assert not again.training and torch.equal(again.encode(x), net.encode(x))
    (bare := tmp_path / "bare").mkdir(); save_file(net.state_dict(), bare / "ae.safetensors")
    assert torch.equal(ImageAutoencoder.from_pretrained(bare, TINY)(x), net(x))

def test_other_weights_are_refused_by_their_first_name(tmp_path):
    model().save_pretrained(tmp_path)
    for load in (lambda: ImageAutoencoder.from_pretrained(tmp_path, replace(TINY, num_res_blocks=2)), lambda: ImageAutoencoder.from_pretrained(tmp_path / "nowhere")):
        with pytest.raises(UserError) as e: load()
        assert "\n" not in str(e.value)
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY) | dict(attention=True)))
    with pytest.raises(UserError, match="attention"): ImageAutoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="does not fit this image autoencoder"): ImageAutoencoder.from_pretrained(tmp_path)      # taken for the published one

def test_the_config_of_another_autoencoder_is_not_taken_for_ours(tmp_path):
    "A causal autoencoder's config.json has no ch_mult; weights of the two have no names in common."
    from opensora_nb.autoencoder.hunyuan import HunyuanVAE, pocket as causal, load_autoencoder
    HunyuanVAE(causal()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit"): ImageAutoencoder.from_pretrained(tmp_path)
    model().save_pretrained(tmp_path / "image")
    with pytest.raises(UserError, match="neither"): load_autoencoder(tmp_path / "image")
