"FLUX checkpoints become our model: the same velocities, every number accounted for, and one line for what does not fit."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_nb.cluster.files import UserError
from opensora_nb.mmdit.conditioning import model_inputs
from opensora_nb.mmdit.flux import WHAT, adapt, from_flux, plan_conversion
from opensora_nb.mmdit.model import MMDiT, flux_image, high_compression, open_sora_v2, open_sora_v2_t2v

GOLDEN = Path(__file__).with_name("golden")
TINY = dict(in_channels=16, context_in_dim=24, vec_in_dim=20, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12))
FLUX, VIDEO = replace(flux_image(), **TINY), replace(open_sora_v2(), **TINY)
TARGETS = {"video": VIDEO, "text to video": replace(VIDEO, cond_embed=False), "interleaved": replace(VIDEO, rope_layout="interleaved"), "fused": replace(VIDEO, fused_qkv=True),
           "fused, interleaved": replace(VIDEO, fused_qkv=True, rope_layout="interleaved")}

def grown(cfg, seed=0):
    "A model without zeros, whose norms of queries and keys have scales all different."
    model, g = MMDiT(cfg).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters(): p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + 1.5 * name.endswith("scale"))
    return model

def inputs(T=1, seed=1, channels=4, patch=2, cond=False):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(2, channels, T, 6, 8, generator=g)
    return model_inputs(latent, torch.tensor([0.9, 0.3]), torch.randn(2, 5, 24, generator=g), torch.randn(2, 20, generator=g), torch.randn(2, channels + 1, T, 6, 8, generator=g) if cond else None, patch)

def close(a, b, rel=1e-5): return (a - b).abs().max() <= rel * b.abs().max()
def strength(s): return torch.full((2,), s)
def shapes(model): return {name: tuple(x.shape) for name, x in model.state_dict().items()}

@pytest.fixture(scope="module")
def original(tmp_path_factory):
    "A small FLUX and its file of the original names."
    model = grown(FLUX)
    save_file(model.state_dict(), path := tmp_path_factory.mktemp("original") / "flux1-dev.safetensors")
    return model, path

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A small FLUX of the diffusers library, saved in several files; its velocities for our inputs."
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24,
                                             pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(8, 12, 12)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.3 * torch.randn(p.shape)) if p.ndim == 1 else None
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder / "transformer", max_shard_size="200KB")
    @torch.no_grad()
    def velocities(given, guidance):
        return model(hidden_states=given["img"], encoder_hidden_states=given["txt"], pooled_projections=given["y_vec"], timestep=given["timesteps"], img_ids=given["img_ids"], txt_ids=given["txt_ids"],
                     guidance=guidance, return_dict=False)[0]
    return model, folder, velocities


# ---- the same velocities ----
@pytest.mark.parametrize("cfg", TARGETS.values(), ids=TARGETS)
@torch.no_grad()
def test_a_converted_flux_gives_the_velocities_of_flux(original, cfg):
    flux, path = original
    model, table = from_flux(path, cfg, guidance=3.5)
    for T in (1, 3):                                                        # a picture; and a clip, in the positions of ours
        assert close(model(**inputs(T)), flux(**inputs(T), guidance=strength(3.5)))
    assert table.count("folded") == sum(p.numel() for p in flux.guidance_in.parameters())
    if cfg.rope_layout == "half":                                           # the check can fail: without the order of channels it does
        unordered = MMDiT(cfg)
        unordered.load_state_dict(from_flux(path, replace(cfg, rope_layout="interleaved"), guidance=3.5)[0].state_dict())
        assert not close(unordered(**inputs()), model(**inputs()), 0.05)
        scales = {n: x for n, x in unordered.state_dict().items() if n.endswith("norm.scale")}
        mixed = MMDiT(cfg); mixed.load_state_dict(model.state_dict() | scales)    # matrices in order, the norms' scales not
        assert scales and not close(mixed(**inputs()), model(**inputs()), 0.01)

@pytest.mark.parametrize("cfg", [FLUX, replace(FLUX, fused_qkv=False, rope_layout="half", cond_embed=True)], ids=["image model", "video layout"])
@torch.no_grad()
def test_the_diffusers_layout_gives_what_diffusers_gives(published, cfg):
    theirs, folder, velocities = published
    model, table = from_flux(folder, cfg)                                   # a downloaded repository: its folder transformer/, several files
    for s in (1.0, 4.0): assert close(model(**inputs(), guidance=strength(s)), velocities(inputs(), strength(s)))
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    assert table.count("copied") + table.count("re-laid out") == sum(p.numel() for p in theirs.parameters())
    video, _ = from_flux(folder / "transformer", VIDEO, guidance=4.0)
    assert close(video(**inputs()), velocities(inputs(), strength(4.0)))

@torch.no_grad()
def test_a_model_of_the_library_without_guidance_is_taken_too(published, tmp_path):
    "FLUX.1-schnell has no guidance input."
    theirs = load_file_all(published[1] / "transformer")
    save_file({n: x for n, x in theirs.items() if "guidance" not in n}, tmp_path / "flux1-schnell.safetensors")
    model, table = from_flux(tmp_path, VIDEO)
    assert table.count("left out") == 0 and close(model(**inputs()), from_flux(published[1], VIDEO)[0](**inputs()), 1e-7)
    with pytest.raises(UserError, match="no guidance input to fold in"): from_flux(tmp_path, VIDEO, guidance=3.5)
    with pytest.raises(UserError, match="guidance"): from_flux(tmp_path, FLUX)

def load_file_all(folder):
    out = {}
    for file in folder.glob("*.safetensors"): out |= load_file(file)
    return out

@torch.no_grad()
def test_an_image_is_not_heard_at_first_and_can_be_learned(original):
    model, table = from_flux(original[1], VIDEO)
    given = inputs(3, cond=True)
    assert torch.equal(model(**given), model(**inputs(3))) and table.count("new") == sum(p.numel() for p in model.cond_in.parameters())
    with torch.enable_grad(): model(**given).square().mean().backward()
    assert model.cond_in.weight.grad.abs().max() > 0 and all(p.grad is not None for p in model.parameters())


# ---- every number is accounted for ----
def listed(name):
    rows = (line.split("\t") for line in (GOLDEN / name).read_text().splitlines())
    return {n: tuple(int(x) for x in s.split(",")) if s else () for n, s in rows}

@pytest.mark.parametrize("cfg, file", [(open_sora_v2(), "shapes_mmdit_256px.tsv"), (high_compression(), "shapes_mmdit_high_compression.tsv"), (open_sora_v2_t2v(), "shapes_mmdit_train_image_stage1.tsv"), (flux_image(), "shapes_flux_image.tsv")])
def test_the_full_size_plan_fills_the_published_names_and_shapes(cfg, file):
    source, target = listed("shapes_flux_image.tsv"), listed(file)
    table = plan_conversion(source, cfg)
    assert {f.name: f.shape for f in table.fates if f.what != "left out"} == target
    rows = {}
    for fate in table.fates:                                                # each row of each tensor is used at most once, and all but guidance and foreign latents are used
        assert fate.what in WHAT and (not fate.pieces or fate.what == "re-initialised" or sum(b - a for a, b in (p.rows for p in fate.pieces)) == fate.shape[0])
        for piece in fate.pieces: rows.setdefault(piece.source, []).extend(range(*piece.rows))
    assert all(sorted(used) == list(range(source[n][0])) for n, used in rows.items())
    unused = {n.split(".")[0] for n in source if n not in rows}
    assert unused == ({"guidance_in", "final_layer"} if cfg.in_channels == 128 else set() if cfg.guidance_embed else {"guidance_in"})

def test_diffusers_names_at_full_size(published):
    import diffusers
    with torch.device("meta"): theirs = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    table = plan_conversion(shapes(theirs), open_sora_v2())
    assert {f.name: f.shape for f in table.fates if f.what != "left out"} == listed("shapes_mmdit_256px.tsv")
    assert table.count("copied") + table.count("re-laid out") + table.count("left out") == sum(p.numel() for p in theirs.parameters())

def test_the_table_says_what_became_of_each_layer(original):
    table = from_flux(original[1], VIDEO)[1]
    text = str(table)
    for words in ("double_blocks.*.img_attn.q_proj", "even channels of each head first", "cond_in", "left out", "guidance_in.in_layer"): assert words in text, text
    assert sum(size for _, size, *_ in table.lines()) == sum(f.size for f in table.fates) and len(text.splitlines()) < 60

@torch.no_grad()
def test_a_repacked_file_with_other_models_in_it(original, tmp_path):
    flux, _ = original
    save_file({f"model.diffusion_model.{n}": x for n, x in flux.state_dict().items()} | {"vae.decoder.conv_in.weight": torch.zeros(2)}, tmp_path / "all.safetensors")
    model, table = from_flux(tmp_path, VIDEO, guidance=2.0)
    assert close(model(**inputs()), flux(**inputs(), guidance=strength(2.0)))
    assert [f.name for f in table.fates if f.what == "left out"] == ["vae.decoder.conv_in.weight"]

@torch.no_grad()
def test_bfloat16_is_kept_or_made(original, tmp_path):
    save_file({n: x.bfloat16() for n, x in original[0].state_dict().items()}, tmp_path / "flux1-dev.safetensors")
    for where, dtype, expected in ((tmp_path, None, torch.bfloat16), (tmp_path, torch.float32, torch.float32), (original[1], torch.bfloat16, torch.bfloat16)):
        model, _ = from_flux(where, VIDEO, dtype, guidance=3.5)
        assert {p.dtype for p in model.parameters()} == {expected}
    want = original[0](**inputs(), guidance=strength(3.5))
    assert (model(**inputs()).float() - want).norm() < 0.1 * want.norm()

def test_what_was_made_can_be_trained_saved_and_found(original, tmp_path):
    model, _ = from_flux(original[1], VIDEO)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = MMDiT.from_pretrained(tmp_path)
    assert again.cfg == VIDEO and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


# ---- another autoencoder, another text encoder ----
@torch.no_grad()
def test_adapting_to_other_latents_renews_what_knows_them_and_nothing_else():
    model = grown(VIDEO)
    fast, table = adapt(model, replace(VIDEO, in_channels=32, patch_size=1), seed=3)
    assert {f.name for f in table.fates if f.what == "re-initialised"} == {"img_in.weight", "cond_in.weight", "cond_in.bias", "final_layer.linear.weight", "final_layer.linear.bias"}
    changed = {f.name for f in table.fates if f.what != "copied"}
    assert all(x is not None and torch.equal(x, model.state_dict()[n]) for n, x in fast.state_dict().items() if n not in changed)
    assert fast(**inputs(2, channels=32, patch=1, cond=True)).eq(0).all()
    spread = [m.img_in(torch.randn(500, n, generator=torch.Generator().manual_seed(0))).std(0).square().mean().sqrt() for m, n in ((model, 16), (fast, 32))]
    assert spread[1] == pytest.approx(spread[0].item(), rel=0.1)
    same, other = adapt(model, fast.cfg, seed=3)[0], adapt(model, fast.cfg, seed=4)[0]
    assert torch.equal(same.img_in.weight, fast.img_in.weight) and not torch.equal(other.img_in.weight, fast.img_in.weight)

def test_equal_shapes_do_not_make_equal_latents():
    "64 values are 16 channels in squares of 2 x 2, or 64 channels of single latent pixels; and two autoencoders may be of one shape."
    model, edges = grown(VIDEO), {"img_in.weight", "final_layer.linear.weight", "final_layer.linear.bias", "cond_in.weight", "cond_in.bias"}
    renewed = lambda cfg, told=None: {f.name for f in adapt(model, cfg, told)[1].fates if f.what == "re-initialised"}
    assert renewed(VIDEO) == set() and renewed(VIDEO, True) == edges == renewed(replace(VIDEO, patch_size=1)) and renewed(replace(VIDEO, in_channels=32)) == edges

@torch.no_grad()
def test_another_text_encoder_renews_only_what_reads_it():
    fates = {f.name: f for f in adapt(grown(VIDEO), replace(VIDEO, context_in_dim=12, vec_in_dim=30))[1].fates}
    assert {n for n, f in fates.items() if f.what != "copied"} == {"txt_in.weight", "vector_in.in_layer.weight"}

@torch.no_grad()
def test_layouts_can_be_changed_there_and_back():
    model = grown(VIDEO)
    for cfg in TARGETS.values():
        there, _ = adapt(model, cfg)
        if cfg.cond_embed: assert close(there(**inputs(3, cond=True)), model(**inputs(3, cond=True)))
        back, _ = adapt(there, VIDEO)
        kept = [n for n in model.state_dict() if cfg.cond_embed or not n.startswith("cond_in")]
        assert all(torch.equal(back.state_dict()[n], model.state_dict()[n]) for n in kept)


# ---- what does not fit ----
def refused(words, call):
    with pytest.raises(UserError, match=words) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)

def rewritten(original, path, change):
    save_file(change({n: x.clone() for n, x in original[0].state_dict().items()}), path)
    return path

@pytest.mark.parametrize("words, change", [
    ("double_blocks.1.txt_attn.qkv.weight is missing", lambda w: {n: x for n, x in w.items() if n != "double_blocks.1.txt_attn.qkv.weight"}),
    ("double_blocks.2.img_attn.*no place.*3 double and 2 single", lambda w: w | {n.replace("double_blocks.1", "double_blocks.2"): x.clone() for n, x in w.items() if n.startswith("double_blocks.1")}),
    ("lora", lambda w: w | {"img_in.lora_A.weight": torch.zeros(2, 2)}),
    ("Fill", lambda w: w | {"img_in.weight": torch.zeros(64, 96)}),
    ("quantised", lambda w: w | {"single_blocks.0.linear1.weight": torch.zeros(w["single_blocks.0.linear1.weight"].shape, dtype=torch.int8)}),
    ("single_blocks.1.q_proj.weight would be", lambda w: w | {"single_blocks.1.linear1.weight": torch.zeros(448, 32)}),
    ("no FLUX transformer", lambda w: {"conv.weight": torch.zeros(2)})], ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_another_checkpoint_is_refused_in_one_line(original, tmp_path, words, change):
    refused(words, lambda: from_flux(rewritten(original, tmp_path / "flux.safetensors", change), VIDEO))

def test_a_config_of_another_size_is_refused_with_both_sizes(original):
    assert "of width 64" in refused("19 and 38 of 3072", lambda: from_flux(original[1]))
    for change in (dict(depth=1), dict(depth_single_blocks=3), dict(mlp_ratio=2.0), dict(qkv_bias=False)): refused("2 double and 2 single blocks", lambda: from_flux(original[1], replace(VIDEO, **change)))
    refused("2 heads", lambda: adapt(grown(VIDEO), replace(VIDEO, num_heads=4, axes_dim=(4, 6, 6))))

def test_broken_downloads_are_refused_in_one_line(original, published, tmp_path):
    (cut := tmp_path / "cut.safetensors").write_bytes(original[1].read_bytes()[:-100])
    refused("cut off", lambda: from_flux(cut, VIDEO))
    refused("no weights at", lambda: from_flux(tmp_path / "nowhere", VIDEO))
    index = next((published[1] / "transformer").glob("*.index.json"))
    (tmp_path / index.name).write_text(index.read_text())
    refused("a part of the weights is missing", lambda: from_flux(tmp_path / index.name, VIDEO))
    (tmp_path / index.name).write_text(json.dumps({"map": {}}))
    refused("index", lambda: from_flux(tmp_path / index.name, VIDEO))

def test_guidance_cannot_be_both_kept_and_folded(original): refused("the config keeps it", lambda: from_flux(original[1], FLUX, guidance=3.5))
