"The LAION score is CLIP, a unit vector and a linear head; whatever does not fit is said in one line."
import subprocess, sys
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from opensora_nb.cluster.files import UserError
from opensora_nb.data.aesthetic import AestheticConfig, clip_pixels, load_aesthetic, read_head, standin_parts, standin_score
from opensora_nb.data.world import Truth, render

SHAPES = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}       # sac+logos+ava1-l14-linearMSE.pth

def published_head(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"layers.{n}.{kind}": torch.randn(shape if kind == "weight" else shape[:1], generator=g) / shape[1] ** 0.5 for n, shape in SHAPES.items() for kind in ("weight", "bias")}

@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    torch.manual_seed(3)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=32, projection_dim=768)).eval()
    model.save_pretrained(folder := tmp_path_factory.mktemp("clip"))
    return folder, model

@pytest.fixture(scope="module")
def frames():
    return [f for f in render(Truth(5, background="grass", camera="zoom in"), 160, 9)[::4]]

@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_folded_head_is_the_five_layers(tmp_path, suffix):
    tensors, path = published_head(), tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    w, b = read_head(path)
    x = torch.nn.functional.normalize(torch.randn(50, 768), dim=1)
    y = x
    for n in SHAPES: y = y @ tensors[f"layers.{n}.weight"].T + tensors[f"layers.{n}.bias"]
    assert w.shape == (768,) and np.abs(x.numpy() @ w + b - y[:, 0].numpy()).max() < 1e-5      # float32 rounding of the layers

def test_the_linear_head_is_read_as_it_is(tmp_path):
    torch.save({"weight": torch.arange(768.0)[None], "bias": torch.tensor([4.5])}, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    w, b = read_head(tmp_path / "sa_0_4_vit_l_14_linear.pth")
    assert (w == np.arange(768)).all() and b == 4.5

def test_half_precision_is_read(tmp_path):
    save_file({name: value.half() for name, value in published_head().items()}, tmp_path / "half.safetensors")
    save_file(published_head(), tmp_path / "full.safetensors")
    assert np.allclose(read_head(tmp_path / "half.safetensors")[0], read_head(tmp_path / "full.safetensors")[0], atol=1e-3)

class Code:
    def __reduce__(self): return exec, ("raise SystemExit('code of a pickle was run')",)

FAULTS = {"code": lambda p: torch.save({"weight": Code()}, p), "cut": lambda p: (torch.save(published_head(), p), p.write_bytes(p.read_bytes()[:9999])), "page": lambda p: p.write_bytes(b"<html>404</html>"),
          "nothing": lambda p: p.write_bytes(b""), "folder": lambda p: p.mkdir(), "missing": lambda p: None, "list": lambda p: torch.save([1, 2], p), "empty": lambda p: torch.save({}, p),
          "names": lambda p: torch.save({"visual.proj": torch.zeros(2, 2)}, p), "numbers": lambda p: torch.save({"weight": 3}, p), "no bias": lambda p: torch.save({"weight": torch.zeros(1, 768)}, p),
          "gap": lambda p: torch.save({k: v for k, v in published_head().items() if "layers.4" not in k}, p), "two scores": lambda p: torch.save({"weight": torch.zeros(2, 768), "bias": torch.zeros(2)}, p),
          "nan": lambda p: torch.save({"weight": torch.full((1, 768), float("nan")), "bias": torch.zeros(1)}, p), "flat": lambda p: torch.save({"weight": torch.zeros(768), "bias": torch.zeros(1)}, p)}

@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_head_is_one_line_that_names_the_file(tmp_path, fault):
    FAULTS[fault](path := tmp_path / "head.pth")
    with pytest.raises(UserError) as error: read_head(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)

def test_a_broken_safetensors_head_is_one_line(tmp_path):
    (path := tmp_path / "head.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="head.safetensors"): read_head(path)

def test_layers_that_do_not_fit_are_named_with_both_numbers(tmp_path):
    torch.save({k: v for k, v in published_head().items() if "layers.4" not in k}, path := tmp_path / "head.pth")
    with pytest.raises(UserError, match="layer 6 takes 64 numbers, the layer before it gives 128"): read_head(path)

@pytest.mark.parametrize("height, width", [(224, 224), (300, 225), (91, 333), (1080, 1920), (16, 48), (481, 233)])
def test_pixels_are_those_of_the_processor_of_transformers(height, width):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    frame = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    theirs, ours = CLIPImageProcessorPil()(frame, return_tensors="np")["pixel_values"], clip_pixels([frame])
    assert ours.shape == (1, 3, 224, 224) and ours.dtype == np.float32 and np.abs(theirs - ours).max() < 1e-5

def test_the_score_is_the_mean_of_the_head_on_unit_vectors(tmp_path, tiny_clip, frames):
    folder, model = tiny_clip
    save_file(head := published_head(1), path := tmp_path / "head.safetensors")
    score = load_aesthetic(AestheticConfig("laion", folder, path, device="cpu"))
    by_hand = []
    for frame in frames:                                                     # one by one, in torch, layer by layer
        with torch.no_grad(): y = model(pixel_values=torch.from_numpy(clip_pixels([frame]))).image_embeds
        y = y / y.norm()
        for n in SHAPES: y = y @ head[f"layers.{n}.weight"].T + head[f"layers.{n}.bias"]
        by_hand.append(float(y))
    assert len(set(by_hand)) == 3 and score(frames) == pytest.approx(np.mean(by_hand), abs=1e-5)
    assert score(frames[:1]) == pytest.approx(by_hand[0], abs=1e-5)

def test_two_heads_share_one_encoder_in_memory(tmp_path, tiny_clip):
    from opensora_nb.data import aesthetic
    aesthetic._clip.cache_clear()
    for seed in (1, 2):
        save_file(published_head(seed), path := tmp_path / f"{seed}.safetensors")
        load_aesthetic(AestheticConfig("laion", tiny_clip[0], path, device="cpu"))
    assert aesthetic._clip.cache_info().misses == 1 and aesthetic._clip.cache_info().hits == 1

def test_head_and_clip_of_different_width_are_refused_with_both_numbers(tmp_path, tiny_clip):
    torch.save({"weight": torch.zeros(1, 512), "bias": torch.zeros(1)}, path := tmp_path / "b32.pth")
    with pytest.raises(UserError, match="512 numbers.*768"): load_aesthetic(AestheticConfig("laion", tiny_clip[0], path, device="cpu"))

def test_an_encoder_that_lacks_weights_is_refused_not_filled_with_noise(tmp_path, tiny_clip):
    torch.save(published_head(), tmp_path / "head.pth")
    tiny_clip[1].save_pretrained(tmp_path / "clip")
    tensors = load_file(tmp_path / "clip/model.safetensors")
    save_file({k: v for k, v in tensors.items() if "visual_projection" not in k}, tmp_path / "clip/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights.*visual_projection"): load_aesthetic(AestheticConfig("laion", tmp_path / "clip", tmp_path / "head.pth", device="cpu"))

@pytest.mark.parametrize("damage", ["no folder", "empty folder", "broken weights", "broken config"])
def test_no_encoder_is_one_line(tmp_path, tiny_clip, damage):
    torch.save(published_head(), tmp_path / "head.pth")
    clip = tmp_path / "clip"
    if damage != "no folder": clip.mkdir()
    if damage.startswith("broken"):
        tiny_clip[1].save_pretrained(clip)
        (clip / ("model.safetensors" if damage == "broken weights" else "config.json")).write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="clip") as error: load_aesthetic(AestheticConfig("laion", clip, tmp_path / "head.pth", device="cpu"))
    assert "\n" not in str(error.value)

def test_laion_never_falls_back_to_the_stand_in():
    with pytest.raises(UserError, match="head"): load_aesthetic(AestheticConfig("laion"))
    assert load_aesthetic(AestheticConfig()) is None and load_aesthetic(AestheticConfig("standin")) is standin_score
    with pytest.raises(ValueError, match="method"): AestheticConfig("pretty")

def test_the_stand_in_stays_on_its_scale_and_each_part_in_its_range():
    rng = np.random.default_rng(0)
    stills = [np.zeros((40, 60, 3)), np.full((1, 1, 3), 255), rng.integers(0, 256, (90, 50, 3)), np.tile(rng.choice([0, 255], (64, 1, 1)), (1, 64, 3)), np.tile([255, 0, 0], (32, 32, 1))]
    for still in stills:
        parts = standin_parts(still.astype(np.uint8))
        assert all(0 <= v <= 1 for v in parts.values()) and 1 <= standin_score([still.astype(np.uint8)]) <= 10

def test_the_stand_in_does_not_depend_on_the_size_of_the_picture():
    large = render(Truth(7, background="marble"), 1024, 2)[1]
    small = large.reshape(512, 2, 512, 2, 3).mean((1, 3)).round().astype(np.uint8)
    assert standin_score([large]) == pytest.approx(standin_score([small]), abs=0.05)

@pytest.mark.parametrize("background", ["clouds", "grass", "waves"])
def test_every_kind_of_damage_lowers_the_stand_in(background):
    import cv2
    clip = list(render(Truth(11, background=background, color="orange"), 192, 6))
    damages = [lambda f: cv2.GaussianBlur(f, (0, 0), 4), lambda f: (f * 0.3).astype(np.uint8), lambda f: np.repeat(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY)[..., None], 3, 2), lambda f: (180 + f * 0.3).clip(0, 255).astype(np.uint8)]
    assert all(standin_score([damage(f) for f in clip]) < standin_score(clip) - 0.1 for damage in damages)

@pytest.mark.parametrize("wrong", [[], [np.zeros((4, 4), np.uint8)], [np.zeros((4, 4, 3), np.float32)], [np.zeros((4, 4, 4), np.uint8)], [np.zeros((0, 4, 3), np.uint8)], [None]])
def test_frames_that_are_no_rgb_pictures_are_refused(wrong):
    with pytest.raises(ValueError): standin_score(wrong)
    with pytest.raises(ValueError): clip_pixels(wrong) if wrong else standin_score(wrong)

def test_importing_it_loads_neither_torch_nor_transformers():
    code = "import sys, opensora_nb.data.aesthetic as a; a.load_aesthetic(a.AestheticConfig('standin')); print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
