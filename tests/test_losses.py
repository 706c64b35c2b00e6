"What the autoencoder is charged: LPIPS and how its weights are read, the release's sums, the discriminator, its adaptive weight and its watch."
import os, re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn

from opensora_nb.autoencoder.discriminator import (LOSSES, AdversarialConfig, Adversary, CollapseWatch, PatchDiscriminator3D, adaptive_weight, generator_loss,
                                                   gradient_norm, hinge_loss, vanilla_loss, wgan_loss)
from opensora_nb.autoencoder.losses import LPIPS, PerceptualLoss, ReconstructionLossConfig, load_lpips, make_perceptual, reconstruction_loss, release_loss
from opensora_nb.cluster.files import UserError


@pytest.fixture(scope="module")
def net():
    "LPIPS with random weights, linear layers positive as the published ones."
    torch.manual_seed(0)
    net = LPIPS().eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if name.startswith("lin"): p.abs_()
    return net

@pytest.fixture(scope="module")
def weights(net, tmp_path_factory):
    "The same weights in one file, and in two as torchvision and LPIPS have them."
    folder, state = tmp_path_factory.mktemp("lpips"), net.state_dict()
    save_file(state, folder / "whole.safetensors")
    (folder / "parts").mkdir()
    save_file({re.sub(r"net\.slice\d", "features", k): v for k, v in state.items() if k.startswith("net")} | {"classifier.6.bias": torch.zeros(1000)}, folder / "parts/vgg16.safetensors")
    lins = {k: v for k, v in state.items() if k.startswith("lin")}
    torch.save(dict(state_dict=lins | {k.replace("lin", "lins."): v for k, v in lins.items()}), folder / "parts/vgg.pth")       # nested, and listed twice, as a saved module has them
    return folder

@pytest.fixture(scope="module")
def frames():
    g = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 32, 48, generator=g) * 2 - 1, torch.rand(2, 3, 32, 48, generator=g) * 2 - 1

def error(work, *words):
    "The one line of the UserError that `work` raises."
    with pytest.raises(UserError) as e: work()
    line = str(e.value)
    assert "\n" not in line and len(line) < 500 and all(w in line for w in words), line
    return line


# ---- LPIPS ----
@torch.no_grad()
def test_lpips_is_a_distance_of_frames_by_themselves(net, frames):
    a, b = frames
    d = net(a, b)
    assert d.shape == (2, 1, 1, 1) and (d > 0).all() and (net(a, a) == 0).all() and torch.allclose(d, net(b, a)) and torch.allclose(d[1:], net(a[1:], b[1:]), rtol=1e-5)
    assert net(a, a + 0.02 * b)[0] < net(a, a + 0.2 * b)[0]

def test_lpips_in_half_precision_is_about_the_same(net, frames):
    with torch.autocast("cpu", torch.bfloat16): d = net(*frames)
    assert d.dtype == torch.float32 and torch.allclose(d, net(*frames), rtol=0.05)

def test_where_nothing_is_seen_the_gradient_is_a_number(net):
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    dead = LPIPS()
    for p in dead.parameters(): nn.init.zeros_(p)                          # every feature vector is zero
    for k in range(5): nn.init.ones_(getattr(dead, f"lin{k}").model["1"].weight)
    dead(x, torch.ones(1, 3, 32, 32)).sum().backward()
    assert (x.grad == 0).all()

def test_frames_too_small_for_five_poolings_are_told(net):
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 8 x 32"): net(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))

@torch.no_grad()
def test_both_forms_of_the_weights_are_the_same_network(net, weights, frames):
    for path in (weights / "whole.safetensors", weights / "parts"):
        again = load_lpips(path)
        assert torch.equal(again(*frames), net(*frames)) and not again.training and not any(p.requires_grad for p in again.parameters())
        assert torch.equal(again.scaling_layer.scale, net.scaling_layer.scale)

def test_what_is_not_lpips_is_one_line(weights, tmp_path):
    error(lambda: load_lpips(tmp_path / "nowhere"), "no such LPIPS weights")
    error(lambda: load_lpips(tmp_path), "is not LPIPS on VGG16", "31 of 31 tensors", "net.slice1.0.weight")
    error(lambda: load_lpips(weights / "parts/vgg.pth"), "26 of 31 tensors are missing")
    error(lambda: load_lpips(weights / "parts/vgg16.safetensors"), "5 of 31 tensors are missing", "first lin0.model.1.weight")
    (tmp_path / "text.pth").write_text("hello"); (tmp_path / "cut.safetensors").write_bytes((weights / "parts/vgg16.safetensors").read_bytes()[:5000])
    for name in ("text.pth", "cut.safetensors"): error(lambda: load_lpips(tmp_path / name), "cannot read the weights", name)
    alex = {f"lin{k}.model.1.weight": torch.zeros(1, c, 1, 1) for k, c in enumerate((64, 192, 384, 256, 256))}
    torch.save(alex, tmp_path / "alex.pth")
    error(lambda: load_lpips(tmp_path / "alex.pth"), "missing or of another shape")

def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"lin0.model.1.weight": torch.zeros(1), "it": Bomb()}, tmp_path / "vgg.pth")
    error(lambda: load_lpips(tmp_path / "vgg.pth"), "cannot read the weights", "only tensors")
    assert not (tmp_path / "ran").exists()

def test_the_config_names_the_network(weights):
    cfg = ReconstructionLossConfig(perceptual_network="lpips-vgg", lpips_weights=weights / "parts")
    assert type(make_perceptual(cfg)) is LPIPS and type(make_perceptual(ReconstructionLossConfig())) is PerceptualLoss and make_perceptual(replace(cfg, perceptual_weight=0.0)) is None
    error(lambda: make_perceptual(replace(cfg, lpips_weights=None)), "lpips-vgg needs its weights", "efficientnet")

@pytest.mark.parametrize("bad", [dict(perceptual_weight=-1.0), dict(perceptual_weight=float("nan")), dict(perceptual_frames=0), dict(perceptual_network="vgg"), dict(kl_weight=-1.0)], ids=str)
def test_weights_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): ReconstructionLossConfig(**bad)


# ---- the losses of a step ----
@torch.no_grad()
def test_ours_is_a_mean_and_the_releases_a_sum_of_the_same(net):
    g = torch.Generator().manual_seed(2)
    x, y = (torch.rand(2, 3, 4, 32, 32, generator=g) * 2 - 1 for _ in range(2))
    for pixels, clip in ((3 * 32 * 32, slice(None)), (3 * 16 * 32, slice(0, 16))):
        a, b = x[:, :, :, clip], y[:, :, :, clip]
        ours, theirs = reconstruction_loss(a, b, ReconstructionLossConfig(), net), release_loss(a, b, net)
        for k, v in (("l1", ours["l1"]), ("perceptual", ours["perceptual"]), ("nll", ours["loss"])): assert torch.isclose(theirs[k], pixels * v, rtol=1e-4)
    plain = release_loss(x, y, net)
    assert torch.isclose(release_loss(x, y, net, logvar=0.7)["nll"], plain["nll"] / torch.tensor(0.7).exp() + 0.7 * 3 * 32 * 32, rtol=1e-5)

def test_the_frames_that_the_network_sees_are_the_generators(net):
    x, y = torch.zeros(1, 3, 6, 16, 16), torch.linspace(0, 1, 6).view(1, 1, 6, 1, 1).expand(1, 3, 6, 16, 16)
    cfg = ReconstructionLossConfig(perceptual_frames=2)
    draw = lambda seed: reconstruction_loss(x, y, cfg, net, torch.Generator().manual_seed(seed))["perceptual"].item()
    assert draw(1) == draw(1) and len({draw(seed) for seed in range(6)}) > 1


# ---- the discriminator ----
@pytest.mark.parametrize("layers, T, shape", [(1, 4, (2, 16, 24)), (2, 8, (2, 8, 12)), (3, 8, (2, 4, 6)), (5, 32, (8, 1, 2)), (3, 1, (1, 4, 6))])
def test_time_is_halved_twice_and_space_by_every_layer(layers, T, shape):
    net = PatchDiscriminator3D(width=2, layers=layers)
    assert net(torch.zeros(2, 3, T, 32, 48)).shape[2:] == shape and sum("running_mean" in k for k in net.state_dict()) == layers
    with pytest.raises(ValueError, match=f"at least {2 ** layers} x"): net(torch.zeros(2, 3, T, 2 ** layers - 1, 48))

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(-5, 5))
def test_the_losses_are_what_they_say(logits, shift):
    x = torch.tensor(logits); y = x + shift
    real, fake = (0.5 * sum(max(0.0, 1 + sign * v) for v in z.tolist()) / len(x) for z, sign in ((x, -1), (y, 1)))
    assert hinge_loss(x, y).item() == pytest.approx(real + fake, abs=1e-5) and wgan_loss(x, y).item() == pytest.approx(shift / 2, abs=1e-5)
    bce = nn.functional.binary_cross_entropy_with_logits
    assert torch.isclose(vanilla_loss(x, y), 0.5 * (bce(x, torch.ones_like(x)) + bce(y, torch.zeros_like(y))), atol=1e-5) and torch.isclose(generator_loss(x), -x.mean())

@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0.1, 1e3))
def test_the_adaptive_weight_makes_two_gradients_equal_in_any_unit(scale, strength):
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nll, g = scale * w.square().sum(), strength * w.sum()
    d = adaptive_weight(nll, g, w)
    assert not d.requires_grad and torch.isclose(gradient_norm(d * g, w), gradient_norm(nll, w).clamp(max=1e4 * gradient_norm(g, w).item()), rtol=1e-3)
    assert adaptive_weight(1e12 * nll, g, w) == 1e4 and adaptive_weight(1e12 * nll, g, w, cap=7.0) == 7 and adaptive_weight(0 * nll, g, w) == 0

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Conv3d(3, 4, 1), nn.Conv3d(4, 3, 3, padding=1)
    def forward(self, x): return self.last(torch.relu(self.body(x)))

@pytest.fixture
def table():
    torch.manual_seed(0)
    toy, video = Toy(), torch.rand(2, 3, 4, 16, 16) * 2 - 1
    return toy, video, Adversary(AdversarialConfig(width=4, layers=2))

def test_the_charge_is_a_twentieth_of_the_reconstruction_at_the_last_layer(table):
    toy, video, adversary = table
    output = toy(video)
    nll = (output - video).abs().mean()
    said = adversary.charge(video, output, nll, toy.last.weight)
    assert torch.isclose(gradient_norm(said["charge"], toy.last.weight), 0.05 * gradient_norm(nll, toy.last.weight), rtol=1e-2)
    (nll + said["charge"]).backward()
    assert all(p.grad.abs().sum() > 0 for p in toy.parameters())
    assert not any(said[k].requires_grad for k in said if k != "charge")

def test_each_player_learns_in_its_own_turn_only(table):
    toy, video, adversary = table
    output = toy(video)
    adversary.net.requires_grad_(False)
    adversary.charge(video, output, (output - video).abs().mean(), toy.last.weight)["charge"].backward()
    assert all(p.grad is None for p in adversary.net.parameters())
    adversary.net.requires_grad_(True); toy.zero_grad()
    adversary.loss()["loss"].backward()
    assert all(p.grad is not None for p in adversary.net.parameters()) and all(p.grad is None for p in toy.parameters())

def test_half_precision_keeps_the_losses_in_single(table):
    toy, video, adversary = table
    with torch.autocast("cpu", torch.bfloat16):
        output = toy(video)
        said = adversary.charge(video, output, (output.float() - video).abs().mean(), toy.last.weight)
        own = adversary.loss()
    assert all(v.dtype == torch.float32 and v.isfinite() for v in (said | own).values())

def test_an_image_is_judged_as_well(table):
    toy, video, adversary = table
    output = toy(video[:, :, :1])
    said = adversary.charge(video[:, :, :1], output, (output - video[:, :, :1]).abs().mean(), toy.last.weight)
    assert all(v.isfinite() for v in (said | adversary.loss()).values())

@pytest.mark.parametrize("bad", [dict(loss="wgan-gp"), dict(lr=0.0), dict(weight=-1.0), dict(start=-1), dict(layers=0), dict(patience=0), dict(cap=float("nan"))], ids=str)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): AdversarialConfig(**bad)


# ---- the watch ----
HEALTHY = dict(discriminator_loss=0.8, discriminator_logits_spread=0.5, adversarial_gradient=1e-3)

@pytest.mark.parametrize("sign, word", [("discriminator_loss", "won"), ("discriminator_logits_spread", "same of every patch"), ("adversarial_gradient", "vanished")])
@pytest.mark.parametrize("patience", [1, 10, 200])
def test_a_row_of_lost_steps_is_said_once_and_then_ends_it(sign, word, patience):
    watch, bad = CollapseWatch(AdversarialConfig(patience=patience)), HEALTHY | {sign: 0.0}
    assert [watch(HEALTHY) for _ in range(3)] == [None] * 3
    said = [watch(bad) for _ in range(patience)]
    spoken = [i + 1 for i, s in enumerate(said) if s]
    assert spoken == sorted({max(1, patience // 10), patience}) and watch.over and watch.doubtful and all(word in s and "\n" not in s for s in said if s)

@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=60))
def test_the_watch_counts_steps_in_a_row(good):
    watch, row = CollapseWatch(AdversarialConfig(patience=20)), 0
    for ok in good:
        watch(HEALTHY if ok else HEALTHY | dict(discriminator_loss=0.0))
        row = 0 if ok else row + 1
        assert watch.over == (row >= 20) and watch.doubtful == (row >= 2)

def test_a_loss_without_a_lower_end_cannot_be_stuck_at_it():
    watch = CollapseWatch(AdversarialConfig(loss="wgan", patience=3))
    assert [watch(HEALTHY | dict(discriminator_loss=-50.0)) for _ in range(9)] == [None] * 9 and set(LOSSES) == {"hinge", "vanilla", "wgan"}
