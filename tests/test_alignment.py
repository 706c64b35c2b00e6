"Latent distillation: identical features cost nothing, the gradient reaches encoder and projection and never the network, and what is wrong is one line."
import json
from dataclasses import asdict
import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from opensora_nb.autoencoder.alignment import Alignment, AlignmentConfig, Dinov2Features, covered_frames, linear_similarity, pca_colours, relation
from opensora_nb.autoencoder.dc_ae import VideoDCAE, VideoDCAEConfig
from opensora_nb.cluster.files import UserError
TINY = VideoDCAEConfig(8, ("ResBlock", "ResBlock", "ResBlock", "EViTS5_GLU"), (8, 8, 16, 32), (1, 1, 1, 1), (8, 8, 16, 32), (1, 1, 1, 1), (False, True, True, False), (False, True, True, False))

@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    "A tiny DINOv2 with random weights, as `save_pretrained` writes it."
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dinov2-tiny")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)).save_pretrained(folder)
    return folder

@pytest.fixture(scope="module")
def video(): return torch.rand(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

def copied(folder, to, **changes):
    for name in ("config.json", "model.safetensors"): (to / name).write_bytes((folder / name).read_bytes())
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    return to

@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("latent_frames", [1, 2, 5, 32])
def test_every_frame_belongs_to_one_latent_frame_and_they_are_in_order(factor, latent_frames):
    T = factor * latent_frames
    assert covered_frames(T, latent_frames).flatten().tolist() == list(range(T))
    causal = covered_frames(T - factor + 1, latent_frames, causal=True)
    assert causal[0].unique().tolist() == [0] and causal[1:].flatten().tolist() == list(range(1, T - factor + 1))

@pytest.mark.parametrize("T", range(1, 34))
def test_groups_are_those_of_the_encoder_for_every_length(T):
    "Compression 4 fills the clip up to a multiple of 4 (from 3 frames on), so group k is frames 4k to 4k + 3 of the filled clip."
    latent_frames, filled = -(-T // 4), [min(t, T - 1) for t in range(4 * -(-T // 4))]
    expected = torch.tensor(filled).view(-1, 4)
    if T <= 2: expected = expected[:, :T]                                              # 1 and 2 frames pass as they are
    assert covered_frames(T, latent_frames).tolist() == expected.tolist()

def test_more_latent_frames_than_a_filled_up_clip_has_are_refused():
    with pytest.raises(ValueError, match="9 latent frames cannot stand for 4 frames"): covered_frames(4, 9)

@pytest.mark.parametrize("network", ["efficientnet", "dinov2"])
def test_the_networks_own_features_cost_nothing_and_their_opposites_most(network, dinov2, video):
    alignment = Alignment(AlignmentConfig(network=network, weights=dinov2), channels := dict(efficientnet=112, dinov2=32)[network])
    own = alignment.target(video, covered_frames(8, 2), (4, 4))
    with torch.no_grad(): alignment.projection.weight.copy_(torch.eye(channels).view(channels, channels, 1, 1, 1)); alignment.projection.bias.zero_()
    assert own.shape == (2, channels, 2, 4, 4) and torch.allclose(own.norm(dim=1), torch.ones(2, 2, 4, 4), atol=1e-5)
    same, opposite = alignment(3 * own, video), alignment(-own, video)
    assert same["alignment"] < 1e-5 and same["similarity"] > 1 - 1e-5
    assert opposite["alignment"].item() == pytest.approx(2, abs=1e-5) and opposite["similarity"].item() == pytest.approx(-1, abs=1e-5)

def test_the_gradient_reaches_the_aligned_stages_and_the_projection_and_not_the_network(dinov2, video):
    torch.manual_seed(0)
    model = VideoDCAE(TINY)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"): torch.nn.init.ones_(p)                        # else untrained blocks are the identity
    alignment = Alignment(AlignmentConfig(network="dinov2", weights=dinov2, stage=2, relation_weight=1.0, relation_margin=0.0), model.feature_channels(2))
    alignment(model.encode_features(video, 2)[1], video)["alignment"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in alignment.parameters())
    for k, stage in enumerate(model.encoder.stages): assert all((p.grad is not None and p.grad.abs().sum() > 0) == (k < 2) for p in stage.parameters())
    assert all(p.grad is None for p in model.decoder.parameters()) and not any(p.requires_grad or p.grad is not None for p in alignment._aside[0].parameters())

def test_what_is_trained_and_saved_is_the_projection_alone(video):
    alignment = Alignment(AlignmentConfig(), 16)
    assert alignment.state_dict().keys() == {"projection.weight", "projection.bias"} and sum(p.numel() for p in alignment.parameters()) == 17 * 112
    features = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    before, alignment = alignment(features, video)["alignment"], alignment.train()
    assert torch.equal(alignment(features, video)["alignment"], before) and not alignment._aside[0].training, "batch statistics of the network stay as they are"
    assert all(p.dtype == torch.float64 for p in alignment.double()._aside[0].parameters()), "and the network goes where the module goes"

def test_a_few_steps_bring_features_and_network_together(video):
    torch.manual_seed(0)
    alignment, features = Alignment(AlignmentConfig(), 32), torch.randn(2, 32, 2, 4, 4, requires_grad=True)
    optimizer, seen = torch.optim.Adam([features, *alignment.parameters()], 0.05), []
    for _ in range(40):
        parts = alignment(features, video)
        parts["alignment"].backward(); optimizer.step(); optimizer.zero_grad(); seen.append(parts["similarity"].item())
    assert abs(seen[0]) < 0.3 and seen[-1] > 0.9

def test_margins_forgive():
    target = F.normalize(torch.randn(1, 8, 1, 4, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    near = target + 0.1 * torch.randn(1, 8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert relation(near, target, 0.0) > relation(near, target, 0.05) > relation(near, target, 0.9) == 0
    assert relation(torch.cat([near, near], 1), target) == pytest.approx(relation(near, target).item(), abs=1e-6), "any width"

def test_the_middle_frame_or_the_mean_of_all(video):
    covered, still = covered_frames(8, 2), video[:, :, :1].expand(-1, -1, 8, -1, -1)
    middle, mean = (Alignment(AlignmentConfig(frames=f), 8) for f in ("middle", "mean"))
    assert torch.allclose(middle.target(still, covered, (4, 4)), mean.target(still, covered, (4, 4)), atol=1e-5)
    assert not torch.allclose(middle.target(video, covered, (4, 4)), mean.target(video, covered, (4, 4)), atol=1e-2)
    moved = video.clone(); moved[:, :, [0, 1, 3, 4, 5, 7]] = 0                          # all but the middle ones
    assert torch.equal(middle.target(moved, covered, (4, 4)), middle.target(video, covered, (4, 4)))

@pytest.mark.parametrize("resolution", [None, 32, 96])
def test_the_target_has_the_grid_of_the_features_whatever_the_network_sees(dinov2, resolution):
    alignment = Alignment(AlignmentConfig(network="dinov2", weights=dinov2, resolution=resolution), 8)
    wide = torch.zeros(1, 3, 4, 32, 64)
    assert alignment.target(wide, covered_frames(4, 1), (4, 8)).shape == (1, 32, 1, 4, 8)

def test_only_some_latent_frames_are_looked_at_where_asked(video):
    features = torch.randn(2, 16, 8, 4, 4, requires_grad=True)
    alignment = Alignment(AlignmentConfig(max_frames=2), 16)
    alignment(features, video, torch.Generator().manual_seed(0))["alignment"].backward()
    touched = features.grad.abs().sum((0, 1, 3, 4)) > 0
    assert touched.sum() == 2
    again = Alignment(AlignmentConfig(max_frames=2), 16); again.load_state_dict(alignment.state_dict())
    assert torch.equal(again(features, video, torch.Generator().manual_seed(0))["alignment"], alignment(features, video, torch.Generator().manual_seed(0))["alignment"])

def test_an_image_is_a_clip_of_one_frame(): assert Alignment(AlignmentConfig(), 4)(torch.randn(1, 4, 1, 2, 2), torch.zeros(1, 3, 1, 16, 16))["alignment"].isfinite()

def test_dinov2_features_are_those_of_transformers(dinov2):
    import transformers
    frames = torch.rand(2, 3, 42, 28, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad(): theirs = transformers.Dinov2Model.from_pretrained(dinov2).eval()((frames / 2 + 0.5 - mean) / std).last_hidden_state[:, 1:]
    ours = Dinov2Features(dinov2)(frames)
    assert ours.shape == (2, 32, 3, 2) and torch.allclose(ours.flatten(2).transpose(1, 2), theirs, atol=1e-5)

def test_register_tokens_are_no_patches(tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg = transformers.Dinov2WithRegistersConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=4)
    (net := transformers.Dinov2WithRegistersModel(cfg).eval()).save_pretrained(tmp_path)
    frames = torch.zeros(1, 3, 28, 28)
    features = Dinov2Features(tmp_path)
    with torch.no_grad(): theirs = net((frames / 2 + 0.5 - features.mean) / features.std).last_hidden_state
    assert theirs.shape[1] == 1 + 4 + 4 and torch.allclose(features(frames).flatten(2).transpose(1, 2), theirs[:, 5:], atol=1e-5)

def one_line(why, weights):
    with pytest.raises(UserError, match=why) as error: Dinov2Features(weights)
    assert "\n" not in str(error.value)

def test_weights_that_are_missing_or_another_models_are_one_line(dinov2, tmp_path):
    one_line("no weights at", tmp_path / "nothing")
    one_line("no .safetensors file", tmp_path)
    VideoDCAE(TINY).save_pretrained(tmp_path / "ae")
    one_line("is not a DINOv2", tmp_path / "ae")
    (other := tmp_path / "clip").mkdir(); one_line("says clip", copied(dinov2, other, model_type="clip"))
    (wide := tmp_path / "wide").mkdir(); one_line("cannot load", copied(dinov2, wide, hidden_size=64))
    (cut := copied(dinov2, tmp_path) / "model.safetensors").write_bytes(cut.read_bytes()[:-100]); one_line("cut off", tmp_path)

def test_weights_with_a_missing_tensor_are_not_filled_with_noise(dinov2, tmp_path, capfd):
    copied(dinov2, tmp_path)
    weights = load_file(tmp_path / "model.safetensors"); del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    one_line("1 tensors are missing, first layernorm.weight", tmp_path)
    assert capfd.readouterr() == ("", "")

@pytest.mark.parametrize("wrong", [dict(weight=-1), dict(weight=float("nan")), dict(margin=1.0), dict(relation_weight=-0.1), dict(stage=0), dict(max_frames=0), dict(resolution=0), dict(network="vgg"), dict(frames="first"), dict(network="dinov2")])
def test_a_wrong_setting_is_refused_at_once(wrong):
    with pytest.raises(ValueError) as error: AlignmentConfig(**wrong)
    assert "\n" not in str(error.value)

def test_features_of_another_width_are_named(video):
    with pytest.raises(ValueError, match=r"features must be \(B, 16, T', H', W'\), got \(2, 8, 2, 4, 4\)"): Alignment(AlignmentConfig(), 16)(torch.zeros(2, 8, 2, 4, 4), video)

def test_the_settings_can_be_written_down(): assert json.loads(json.dumps(asdict(AlignmentConfig()))) == asdict(AlignmentConfig())

def test_colours_are_components():
    a, b = torch.zeros(50, 8), torch.zeros(50, 8)
    a[:, 3], b[:, 3] = 5, -5
    noise = 0.01 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    colours = pca_colours(torch.cat([a, b]) + noise)
    assert colours.shape == (100, 3) and colours.min() >= 0 and colours.max() <= 1
    assert (colours[:50, 0] - colours[50:, 0]).abs().min() > 0.9, "what differs most is the first colour"

def test_what_a_linear_map_reads_is_measured_on_clips_that_it_was_not_fitted_on():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(8, 30, 40, generator=g)
    linear, noise = a @ torch.randn(40, 6, generator=g) + torch.randn(6, generator=g), torch.randn(8, 30, 6, generator=g)
    assert linear_similarity(a, linear, 4) > 0.99 and abs(linear_similarity(a, noise, 4)) < 0.2
    assert linear_similarity(1e3 * a - 7, linear, 4) == pytest.approx(linear_similarity(a, linear, 4), abs=1e-4), "scale and origin do not matter"
