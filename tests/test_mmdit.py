"What a transformer must keep to whatever its weights are, and how its weights are found."
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_nb.cluster.files import UserError
from opensora_nb.mmdit.model import MMDiT, MMDiTConfig, flux_image, fuse_qkv, high_compression, open_sora_v2, open_sora_v2_t2v, pocket, split_qkv
from opensora_nb.mmdit.rope import rope_table, rotate, to_half

GOLDEN = Path(__file__).with_name("golden")
SMALL = replace(pocket(), hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=2, depth_single_blocks=2, context_in_dim=24, vec_in_dim=20)
VARIANTS = {"video": SMALL, "fused, interleaved": replace(SMALL, fused_qkv=True, rope_layout="interleaved"), "image": replace(SMALL, fused_qkv=True, guidance_embed=True, cond_embed=False),
            "patch 2": replace(SMALL, in_channels=64, patch_size=2), "no bias": replace(SMALL, qkv_bias=False)}
variants = pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)


def grown(cfg, seed=0):
    "A model in the middle of its life: no zeros left, so that nothing is hidden by a closed gate."
    model, g = MMDiT(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1 and len(p) == cfg.hidden_size // cfg.num_heads))
    return model

def inputs(cfg, B=2, T=3, H=2, W=3, words=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    def normal(*shape): return torch.randn(*shape, generator=g)
    given = dict(img=normal(B, T * H * W, cfg.in_channels), img_ids=torch.cartesian_prod(torch.arange(T), torch.arange(H), torch.arange(W)).float(), txt=normal(B, words, cfg.context_in_dim),
                 txt_ids=torch.zeros(words, 3), timesteps=torch.rand(B, generator=g), y_vec=normal(B, cfg.vec_in_dim))
    if cfg.cond_embed: given["cond"] = normal(B, T * H * W, cfg.cond_channels)
    if cfg.guidance_embed: given["guidance"] = 1 + torch.rand(B, generator=g)
    return given

def close(a, b, rel=1e-5): return (a - b).abs().max() <= rel * b.abs().max()


# ---- what it computes ----
@variants
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(cfg):
    model, given = grown(cfg), inputs(cfg, B=3)
    one = {k: v if k.endswith("ids") else v[1:2] for k, v in given.items()}
    assert close(model(**one), model(**given)[1:2])

@variants
@torch.no_grad()
def test_text_is_a_set_and_video_follows_its_positions(cfg):
    model, given = grown(cfg), inputs(cfg)
    out = model(**given)
    assert close(model(**given | dict(txt=given["txt"].flip(1))), out)
    order = torch.randperm(out.shape[1], generator=torch.Generator().manual_seed(2))
    moved = {k: given[k][:, order] for k in ("img", "cond") if k in given} | dict(img_ids=given["img_ids"][order])
    assert close(model(**given | moved), out[:, order])                               # tokens in another order, each with its position: the same clip
    assert not close(model(**given | dict(img_ids=given["img_ids"][order])), out, 1e-2)   # positions alone: another clip

@torch.no_grad()
def test_text_comes_before_video():
    "With positions for the words as well, swapping the two kinds of ids must matter: the joined order is text, then video."
    model, given = grown(SMALL), inputs(SMALL, words=4)
    given["txt_ids"] = torch.tensor([[7.0, 0, 0], [0, 9, 0], [0, 0, 11], [3, 3, 3]])
    out = model(**given)
    assert close(model(**given | dict(txt=given["txt"].flip(1), txt_ids=given["txt_ids"].flip(0))), out)
    assert not close(model(**given | dict(txt=given["txt"].flip(1))), out, 1e-3)

@pytest.mark.parametrize("layout", ["half", "interleaved"])
@torch.no_grad()
def test_only_distances_count(layout):
    cfg = replace(SMALL, rope_layout=layout)
    model, given = grown(cfg), inputs(cfg)
    by = torch.tensor([4.0, 30.0, 17.0])
    shifted = given | dict(img_ids=given["img_ids"] + by, txt_ids=given["txt_ids"] + by)
    assert close(model(**shifted), model(**given), 2e-5)
    assert not close(model(**given | dict(img_ids=given["img_ids"] + by)), model(**given), 1e-3)     # video moves away from the text

@torch.no_grad()
def test_interleaved_and_half_are_a_reordering_of_weights():
    other = grown(replace(SMALL, rope_layout="interleaved"))
    half, given = MMDiT(SMALL), inputs(SMALL)
    weights = other.state_dict()
    for name, w in weights.items():
        if "_norm.scale" in name: weights[name] = to_half(w)
        elif "q_proj" in name or "k_proj" in name: weights[name] = to_half(w.unflatten(0, (SMALL.num_heads, -1)), 1).flatten(0, 1)
    half.load_state_dict(weights)
    assert close(half(**given), other(**given), 2e-5)

@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_fused_and_split_are_two_names_of_the_same_weights(bias):
    cfg = replace(SMALL, fused_qkv=True, qkv_bias=bias)
    fused, split, given = grown(cfg), MMDiT(replace(cfg, fused_qkv=False)), inputs(cfg)
    weights = fused.state_dict()
    split.load_state_dict(split_qkv(weights, cfg))
    assert close(split(**given), fused(**given))
    assert same(fuse_qkv(split.state_dict()), weights) and same(fuse_qkv(weights), weights) and same(split_qkv(split.state_dict(), cfg), split.state_dict())
    with pytest.raises(ValueError, match="double_blocks.0.img_attn.k_proj.weight is missing"): fuse_qkv({n: w for n, w in split.state_dict().items() if "k_proj" not in n})

@torch.no_grad()
def test_a_zero_condition_is_no_image():
    model, given = grown(SMALL), inputs(SMALL)
    cond = given.pop("cond")
    assert close(model(**given), model(**given, cond=torch.zeros_like(cond)), 1e-6)
    assert not close(model(**given), model(**given, cond=cond), 1e-2)

@torch.no_grad()
def test_condition_is_silent_before_training():
    model, given = MMDiT(SMALL), inputs(SMALL)
    model.final_layer.linear.reset_parameters()                                       # let it say something
    assert torch.equal(model(**given), model(**given | dict(cond=None)))
    assert MMDiT(SMALL)(**given).abs().max() == 0

@variants
def test_every_parameter_has_a_gradient(cfg):
    model = grown(cfg)
    model(**inputs(cfg)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []

def test_training_from_scratch_reaches_every_parameter():
    "Zeros at the start must not lock each other: after a few steps everything has moved."
    torch.manual_seed(0)
    model, given = MMDiT(SMALL), inputs(SMALL)
    optimizer, before = torch.optim.Adam(model.parameters(), 1e-3), {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(5):
        optimizer.zero_grad(); (model(**given) - given["img"]).square().mean().backward(); optimizer.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []

@torch.no_grad()
def test_bfloat16_and_autocast_stay_near_float32():
    model, given = grown(SMALL), inputs(SMALL)
    out = model(**given)
    with torch.autocast("cpu", torch.bfloat16): auto = model(**given)
    low = grown(SMALL).to(torch.bfloat16)(**given)
    for other in (auto, low): assert (other.float() - out).norm() < 0.03 * out.norm()
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16): assert model(**given | dict(cond=None)).dtype == torch.bfloat16     # the stream stays narrow without an image, too

@torch.no_grad()
def test_ids_may_have_a_batch_dimension():
    for cfg in VARIANTS.values():
        model, given = grown(cfg), inputs(cfg)
        batched = {k: given[k].expand(2, -1, -1) for k in ("img_ids", "txt_ids")}
        assert close(model(**given | batched), model(**given), 1e-6)

def test_wrong_use_says_so():
    given = inputs(SMALL)
    with pytest.raises(ValueError, match="guidance_embed is off"): MMDiT(SMALL)(**given, guidance=torch.ones(2))
    with pytest.raises(ValueError, match="needs guidance"): MMDiT(replace(SMALL, guidance_embed=True))(**given)
    with pytest.raises(ValueError, match="cond_embed is off"): MMDiT(replace(SMALL, cond_embed=False))(**given)

def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = torch.randn(2, 7, 3, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 500, (7, 3), generator=torch.Generator().manual_seed(1)).float(); ids[0] = 0
    for layout in ("half", "interleaved"):
        y = rotate(x, *rope_table(ids, (8, 12, 12), layout=layout), layout)
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5) and torch.allclose(y[:, 0], x[:, 0])


# ---- full sizes ----
@pytest.mark.parametrize("cfg, listing, count", [
    (open_sora_v2(), "shapes_mmdit_256px.tsv", 11_891_390_528), (open_sora_v2_t2v(), "shapes_mmdit_train_image_stage1.tsv", 11_891_178_560),
    (high_compression(), "shapes_mmdit_high_compression.tsv", 11_891_971_200), (flux_image(), "shapes_flux_image.tsv", 11_901_408_320)], ids=["video", "t2v", "high_compression", "image"])
def test_names_and_shapes_are_the_published_ones(cfg, listing, count):
    with torch.device("meta"): model = MMDiT(cfg)
    assert sum(p.numel() for p in model.parameters()) == count
    listed = dict(line.split("\t") for line in (GOLDEN / listing).read_text().splitlines())
    assert {n: ",".join(map(str, v.shape)) for n, v in model.state_dict().items()} == listed


# ---- weights on disk ----
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_saved_and_found_again(tmp_path):
    model = grown(SMALL)
    file = model.save_pretrained(tmp_path)
    for where in (tmp_path, file, str(tmp_path)):
        back = MMDiT.from_pretrained(where)
        assert back.cfg == SMALL and same(back.state_dict(), model.state_dict()) and all(p.requires_grad for p in back.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

def test_bfloat16_file_comes_back_as_asked(tmp_path):
    grown(SMALL).save_pretrained(tmp_path, torch.bfloat16)
    assert MMDiT.from_pretrained(tmp_path).txt_in.weight.dtype == torch.float32
    assert MMDiT.from_pretrained(tmp_path, dtype=None).txt_in.weight.dtype == torch.bfloat16

def test_published_file_with_published_config_loads(tmp_path):
    "The release's file name and the release's spelling of the config."
    model = grown(SMALL)
    save_file(model.state_dict(), tmp_path / "Open_Sora_v2.safetensors")
    save_file({"decoder.weight": torch.zeros(2)}, tmp_path / "hunyuan_vae.safetensors")      # its neighbour in the release's folder
    theirs = {k: v for k, v in asdict(SMALL).items() if k != "rope_layout"} | dict(type="flux", from_pretrained="somewhere", strict_load=True, use_liger_rope=True, axes_dim=list(SMALL.axes_dim))
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert same(MMDiT.from_pretrained(tmp_path).state_dict(), model.state_dict())

def test_weights_in_several_files(tmp_path):
    model = grown(SMALL)
    weights, parts = model.state_dict(), {}
    for i, (name, value) in enumerate(weights.items()): parts.setdefault(f"model-0000{i % 2 + 1}-of-00002.safetensors", {})[name] = value
    for file, part in parts.items(): save_file(part, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f for f, part in parts.items() for n in part}}))
    assert same(MMDiT.from_pretrained(tmp_path, SMALL).state_dict(), weights)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="a part of the weights is missing"): MMDiT.from_pretrained(tmp_path, SMALL)

def one_line(error): return "\n" not in str(error.value) and len(str(error.value)) < 400

def test_missing_or_wrong_weights_give_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1"); monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = grown(SMALL)
    file = model.save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir(); (tmp_path / "old.pt").write_bytes(b"pickle")
    (tmp_path / "zero.safetensors").write_bytes(b""); (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1000])
    (tmp_path / "alone").mkdir(); save_file(model.state_dict(), tmp_path / "alone/x.safetensors")
    (tmp_path / "bad").mkdir(); save_file(model.state_dict(), tmp_path / "bad/x.safetensors"); (tmp_path / "bad/config.json").write_text("{hidden_size")
    (tmp_path / "other").mkdir(); save_file(model.state_dict(), tmp_path / "other/x.safetensors"); (tmp_path / "other/config.json").write_text('{"enc_width": [16]}')
    for where, words in {tmp_path / "none": "no weights at", tmp_path / "empty": "no .safetensors file", tmp_path / "old.pt": "must be a .safetensors", tmp_path / "zero.safetensors": "cannot read",
                         tmp_path / "cut.safetensors": "cannot read", tmp_path / "alone": "no config.json", tmp_path / "bad": "is not JSON", tmp_path / "other": "beside it is another's", "nobody-here/nothing": "the hub did not give"}.items():
        with pytest.raises(UserError, match=words) as error: MMDiT.from_pretrained(where)
        assert one_line(error)

def test_weights_of_another_model_are_refused(tmp_path):
    file = grown(SMALL).save_pretrained(tmp_path)
    for other in (replace(SMALL, depth=3), replace(SMALL, fused_qkv=True), replace(SMALL, context_in_dim=25), replace(SMALL, cond_embed=False)):
        with pytest.raises(UserError, match="does not fit") as error: MMDiT.from_pretrained(file, other)
        assert one_line(error)

def test_configs_are_checked_and_translated():
    assert MMDiTConfig.from_dict(json.loads(json.dumps(asdict(SMALL)))) == SMALL
    with pytest.raises(UserError, match="unknown keys"): MMDiTConfig.from_dict(asdict(SMALL) | dict(widht=3))
    for bad in (dict(num_heads=5), dict(axes_dim=(9, 11, 12)), dict(in_channels=15, patch_size=2), dict(rope_layout="whole")):
        with pytest.raises(ValueError): replace(SMALL, **bad)
