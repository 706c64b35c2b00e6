"""Reference values of the official release: every case is built by the rule it was made by, and compared.

`pytest tests/test_golden.py --golden DIR` checks another folder in the same format. Nothing here knows a case by its name: weights
are filled from the names of tensors, inputs from their `seed_name`, models from `config`, and what is asked from the names of the outputs.
"""
import hashlib, json, math, re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

RELATIVE = 1e-4          # of the array's absmax; other kernels and thread counts moved values by 5e-6

# ---- Parts not yet built. The one place where something is left out, and it only shrinks. ----
NOT_YET = {}


# ---- The rules of the format ----
def gen(name):
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")))

def weight(name, shape):
    n = gen(name).standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) >= 2: return n * np.float32(1 / math.sqrt(int(np.prod(shape[1:]))))
    one = name.endswith(("weight", "scale", "gamma", "running_var"))
    return np.float32(one) + np.float32(0.02) * n

def tensor(entry):
    if "values" in entry: return torch.from_numpy(np.asarray(entry["values"], np.float32))
    n = gen(entry["seed_name"]).standard_normal(tuple(entry["shape"]), dtype=np.float32)
    if entry["kind"] == "normal": n = n * np.float32(entry["scale"])
    elif entry["kind"] == "video": n = np.clip(n * np.float32(0.5), np.float32(-1), np.float32(1))
    elif entry["kind"] == "uint8": n = np.clip(np.rint(n * np.float32(50) + np.float32(128)), 0, 255).astype(np.uint8)
    else: cannot_build(f"an input of kind {entry['kind']!r}")
    return torch.from_numpy(n)

def fill(model):
    "Every floating-point entry of the state dict from its own name; zero-dimensional and integer entries stay, and the constants of LPIPS."
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim and not name.startswith("scaling_layer."): value.copy_(torch.from_numpy(weight(name, value.shape)))
    return model.eval()

def cannot_build(what): pytest.fail(f"cannot build {what}", pytrace=False)


class Family:
    "One JSON with its arrays."
    def __init__(self, path):
        self.name, self.data = path.stem, json.loads(path.read_text())
        self.cases = {c["case"]: c for c in self.data.get("cases", [])}
        self.arrays = {}
        for file in self.data.get("npz", []):
            with np.load(path.with_name(file)) as npz: self.arrays |= {k: npz[k] for k in npz.files}

    def state_dict(self, case):
        "Names and shapes listed for a case, its own or those of the case that it points to (same family)."
        seen = case
        while "state_dict" not in seen:
            if seen.get("state_dict_of") not in self.cases: cannot_build(f"{self.name} case {case['case']!r}: no list of names and shapes")
            seen = self.cases[seen["state_dict_of"]]
        return {n: list(s) for n, s in (seen["state_dict"].items() if isinstance(seen["state_dict"], dict) else seen["state_dict"])}, seen

@cache
def family(folder, name): return Family(Path(folder) / f"{name}.json")

def check_listing(model, names, case, tally):
    "The state dict has the published names and shapes, and the fill is the reference's."
    mine = {n: list(v.shape) for n, v in model.state_dict().items()}
    assert mine == names, _first_difference(mine, names)
    tally["lists of names and shapes"] += 1
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    for name, head in case.get("fill_check", {}).items():
        assert model.state_dict()[name].flatten()[:4].tolist() == pytest.approx(head, rel=1e-6)

def _first_difference(mine, theirs):
    return f"missing {sorted(theirs.keys() - mine.keys())[:3]}, too many {sorted(mine.keys() - theirs.keys())[:3]}, other shapes {[(n, mine[n], theirs[n]) for n in mine if n in theirs and list(mine[n]) != list(theirs[n])][:3]}"

def compare(fam, case, made, tally):
    "All outputs of a case against what we made: `made` maps an output's name to a function without arguments."
    for name, entry in case["outputs"].items():
        if not (make := made(name)): cannot_build(f"output {name!r} of {fam.name} case {case['case']!r}")
        ours = make().detach().double()
        if "value" in entry:
            assert ours.item() == pytest.approx(entry["value"], rel=RELATIVE), name
            tally["values"] += 1; continue
        assert list(ours.shape) == entry["shape"], f"{name}: shape"
        stored = torch.from_numpy(fam.arrays[f"{case['case']}|{name}"]).double()
        part = ours[tuple(slice(None, None, s) for s in entry["stored_stride"])] if "stored_stride" in entry else ours
        worst, limit = (part - stored).abs().max().item(), RELATIVE * entry["absmax"]
        assert worst <= limit, f"{name}: off by {worst:.3g}, {worst / max(entry['absmax'], 1e-30):.2g} of its absmax"
        for statistic, value in (("mean", ours.mean()), ("std", ours.std(correction=0)), ("absmax", ours.abs().max())):      # of the whole, not only of what is stored
            assert abs(value.item() - entry[statistic]) <= limit, f"{name}: {statistic}"
        tally["arrays"] += 1


# ---- mmdit ----
def mmdit(fam, case, tally):
    from opensora_nb.mmdit.conditioning import pack, position_ids
    from opensora_nb.mmdit.model import MMDiT, MMDiTConfig, timestep_embedding
    from opensora_nb.mmdit.rope import rope_table
    inputs = {k: tensor(v) for k, v in case["inputs"].items()}
    if "hidden_size" not in case["config"]:                    # no model: the embedding of a number
        return compare(fam, case, {"embedding": lambda: timestep_embedding(inputs["t"], **case["config"])}.get, tally)
    cfg = MMDiTConfig.from_dict(case["config"])
    model = fill(MMDiT(cfg))
    names, owner = fam.state_dict(case)
    check_listing(model, names, owner, tally)

    B, C, T, H, W = inputs["latent"].shape
    made = {"packed_img": pack(inputs["latent"], cfg.patch_size), "img_ids": position_ids(T, H, W, cfg.patch_size),
            "txt_ids": torch.zeros(inputs["txt"].shape[1], 3)}
    if "ref_latent" in inputs:                                 # the case's cond_rule
        mask = torch.zeros(B, 1, T, H, W)
        mask[:, :, 0] = 1; mask[1:, :, -1] = 1
        made["packed_cond"] = pack(torch.cat([mask, mask * inputs["ref_latent"]], 1), cfg.patch_size)
    made["rope_cos"], made["rope_sin"] = rope_table(torch.cat([made["txt_ids"], made["img_ids"]]), cfg.axes_dim, cfg.theta, cfg.rope_layout)

    def keep(name, module):
        def hook(_, __, out):
            if isinstance(out, tuple): made[f"{name}_img"], made[f"{name}_txt"] = out
            else: made[name] = out
        module.register_forward_hook(hook)
    for child in ("time_in", "vector_in", "guidance_in", "img_in", "txt_in", "cond_in"):
        if hasattr(model, child): keep(child, getattr(model, child))
    for i, block in enumerate(model.double_blocks): keep(f"double{i}", block)
    for i, block in enumerate(model.single_blocks): keep(f"single{i}", block)
    made["output"] = model(made["packed_img"], made["img_ids"], inputs["txt"], made["txt_ids"], inputs["timesteps"], inputs["y_vec"],
                           made.get("packed_cond"), inputs.get("guidance"))
    compare(fam, case, lambda name: (lambda: made[name]) if name in made else None, tally)


# ---- dcae ----
def dcae_config(config):
    "Our config from a case's (or, for full sizes, from the nested one of the release), every key accounted for."
    from opensora_nb.autoencoder.dc_ae import VideoDCAEConfig
    config = dict(config)
    if "encoder" in config:
        enc, dec = config.pop("encoder"), config.pop("decoder")
        assert enc["block_type"] == dec["block_type"] and enc["latent_channels"] == dec["latent_channels"] == config["latent_channels"]
        fixed = dict(norm="rms3d", act="silu", is_video=True)                                # what ours always is
        for part, own in ((enc, dict(downsample_block_type="Conv", downsample_shortcut="averaging", out_shortcut="averaging", out_norm=None, out_act=None, double_latent=False)),
                          (dec, dict(upsample_block_type="InterpolateConv", upsample_shortcut="duplicating", in_shortcut="duplicating", out_norm="rms3d", out_act="relu"))):
            assert {k: part[k] for k in fixed | own} == fixed | own
        config |= dict(block_type=enc["block_type"], enc_width=enc["width_list"], enc_depth=enc["depth_list"], dec_width=dec["width_list"], dec_depth=dec["depth_list"],
                       temporal_downsample=enc["temporal_downsample"], temporal_upsample=dec["temporal_upsample"])
        for key in ("in_channels", "use_quant_conv", "pretrained_path", "pretrained_source", "is_image_model", "is_training"): config.pop(key, None)
    ratios = config.pop("time_compression_ratio"), config.pop("spatial_compression_ratio")
    tiles = ("spatial_tile_size", "temporal_tile_size", "tile_overlap_factor", "use_spatial_tiling", "use_temporal_tiling")
    known = {f.name for f in fields(VideoDCAEConfig)}
    if left := config.keys() - known - set(tiles): cannot_build(f"a dcae config with {sorted(left)}")
    cfg = VideoDCAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known})
    assert (cfg.temporal_compression, cfg.spatial_compression) == ratios
    return cfg

def dcae_tiling(config):
    "The tiling of a case; None where it asks for none."
    from opensora_nb.autoencoder.tiling import Tiling
    size, frames = (config[f"{axis}_tile_size"] if config.get(f"use_{axis}_tiling") else None for axis in ("spatial", "temporal"))
    return Tiling(size, frames, config["tile_overlap_factor"]) if size or frames else None

def dcae_as_released(model, latent, decoded, tiling):
    """Our decoded video turned into the release's: where the last tile in time is one latent frame, the release decodes it to one frame, over which
    it fades, with weight one, the last frame of the tile before; so its last three frames are missing and the one before them is out of place."""
    from opensora_nb.autoencoder.tiling import plan
    if not (tiling and tiling.frames): return decoded
    *_, before, last = (None, *plan(latent.shape[2], tiling.frames // model.temporal_compression, tiling.overlap))
    if before is None or last.stop - last.start > 1: return decoded
    from dataclasses import replace
    end = model.decode(latent[:, :, before.start : before.stop], tiling=replace(tiling, frames=None))[:, :, -1:]
    return torch.cat([decoded[:, :, : last.start * model.temporal_compression], end], 2)

def dcae(fam, case, tally):
    from opensora_nb.autoencoder.dc_ae import VideoDCAE
    if "config" not in case: return dcae_shortcuts(fam, case, tally)
    model = fill(VideoDCAE(dcae_config(case["config"])))
    names, owner = fam.state_dict(case)
    check_listing(model, names, owner, tally)
    inputs = {k: tensor(v) for k, v in case["inputs"].items()}

    made = {}
    def keep(name):
        def hook(_, __, out): made.setdefault(name, out)                                     # a hook that returned it would replace later outputs
        return hook
    model.encoder.project_in.register_forward_hook(keep("project_in"))
    model.encoder.register_forward_hook(keep("project_out"))                                 # the encoder ends with it
    for i, stage in enumerate(model.encoder.stages): stage.register_forward_hook(keep(f"enc_stage{i}"))
    for i, stage in enumerate(model.decoder.stages): stage.register_forward_hook(keep(f"dec_stage{i}"))
    def keep_input(_, args): made.setdefault("dec_project_in", args[0])
    model.decoder.stages[-1].register_forward_pre_hook(keep_input)                           # its first stage counts from the pixels: the last

    tiling = dcae_tiling(case["config"])
    latent = model.encode(inputs["video"], tiling)
    if "latent_size" in case: assert list(latent.shape[2:]) == case["latent_size"] == list(model.latent_shape(*inputs["video"].shape[2:])[1:])
    # intermediates of the decoder are of what the case decodes: the video's latent, unless a latent is given and no decoded video is asked
    stages_of_given = "latent_in" in inputs and "decoded" not in case["outputs"]
    def decode(z):
        ours = model.decode(z, tiling=tiling)
        released = dcae_as_released(model, z, ours, tiling)
        if len(z[0, 0]) > 1: assert ours.shape[2] == model.temporal_compression * z.shape[2]                       # ours is never short
        tally["known differences"] += released.shape != ours.shape
        return released
    decoded = decode(inputs["latent_in"] if stages_of_given else latent)
    made |= {"latent": latent, "decoded": decoded}
    if "latent_in" in inputs: made["decoded_of_latent_in"] = decoded if stages_of_given else decode(inputs["latent_in"])
    compare(fam, case, lambda name: (lambda: made[name]) if name in made else None, tally)

    frames, theirs = inputs["video"].shape[2], case["outputs"].get("decoded", {}).get("shape")
    if theirs and theirs[2] != frames:                        # the release loses frames of a clip of one latent frame; ours gives what is asked
        assert model.decode(latent, frames).shape[2] == frames
        tally["known differences"] += 1

def dcae_frame_counts(fam, section, tally):
    "Frames in, latent frames, frames out of the release's temporal tiling; ours gives back what went in."
    from opensora_nb.autoencoder.dc_ae import VideoDCAE, VideoDCAEConfig
    from opensora_nb.autoencoder.tiling import Tiling
    entry, times = fam.data[section], (True, True, False)
    model = fill(VideoDCAE(VideoDCAEConfig(2, ("ResBlock",) * 3, (2,) * 3, (0,) * 3, (2,) * 3, (0,) * 3, times, times)))      # 4 x 4 x 4; lengths depend on nothing else
    tiling = Tiling(None, entry["temporal_tile_size"], entry["tile_overlap_factor"])
    for frames, latent_frames, decoded_frames in entry["rows"]:
        latent = model.encode(torch.zeros(1, 3, frames, 4, 4), tiling)
        assert latent.shape[2] == latent_frames and model.decode(latent, frames, tiling).shape[2] == frames
        assert dcae_as_released(model, latent, model.decode(latent, tiling=tiling), tiling).shape[2] == decoded_frames, frames
        tally["known differences" if decoded_frames != frames else "values"] += 1

def dcae_shortcuts(fam, case, tally):
    "Outputs named (down|up)_(t|s|factor1)[_single_frame]_<channels in>to<channels out>; t halves or doubles time, height and width, s only the last two."
    from opensora_nb.autoencoder.dc_ae import shortcut_down, shortcut_up
    made = re.search(r"arange\((\d+)\)\.reshape\(([\d, ]+)\)", case.get("input", "")) or cannot_build(f"the input of dcae case {case['case']!r}")
    x = torch.arange(int(made[1]), dtype=torch.float32).reshape([int(n) for n in made[2].split(",")])

    def make(name):
        if not (found := re.fullmatch(r"(down|up)_(t|s|factor1)(_single_frame)?_(\d+)to(\d+)", name)): return None
        way, kind, single, c_in, c_out = found.groups()
        y = x[:, :, :1] if single else x
        assert y.shape[1] == int(c_in)
        factors = (1, 1, 1) if kind == "factor1" else (2 if kind == "t" and not single else 1, 2, 2)
        return lambda: (shortcut_down if way == "down" else shortcut_up)(y, int(c_out), factors)
    compare(fam, case, make, tally)


# ---- sampling: guidance tables, packing, what a kind of task is given ----
def sampling(fam, case, tally):
    from opensora_nb.flow.guidance import Guidance, image_strength, text_strength
    from opensora_nb.mmdit.conditioning import given_frames, image_condition, pack
    config, outputs = dict(case["config"]), set(case["outputs"])
    if outputs == {"image_gs", "text_gs"}:
        steps, frames = config.pop("num_steps"), config.pop("latent_frames")
        cfg = Guidance(text=config.pop("guidance"), image=config.pop("guidance_img"), text_oscillation=config.pop("text_osci"), image_oscillation=config.pop("image_osci"),
                       dynamic_image=config.pop("scale_temporal_osci"))
        made = dict(image_gs=image_strength(cfg, steps, frames), text_gs=text_strength(cfg, steps)[:, None].expand(-1, frames))
    elif outputs == {"packed"}:
        shape = config.pop("shape")
        made = dict(packed=pack(torch.arange(math.prod(shape), dtype=torch.float32).view(shape), config.pop("patch_size")))
    elif outputs == {"mask_t", "masked_ref"}:
        kind, causal, shape = config.pop("cond_type"), config.pop("causal"), config.pop("z_shape")
        refs = {}
        for row in range(shape[0]):                                # ref{row}_{number}: in the order head, tail
            for number, end in enumerate(given_frames(kind, causal)):
                refs.setdefault(end, []).append(tensor(case["inputs"][f"ref{row}_{number}"]))
        assert len(case["inputs"]) == sum(map(len, refs.values()))
        cond = image_condition(shape, {end: torch.stack(x) for end, x in refs.items()}, kind, causal)
        assert torch.equal(cond[:, :1].amax((3, 4), keepdim=True).expand_as(cond[:, :1]), cond[:, :1])     # constant over space
        made = dict(mask_t=cond[:, 0, :, 0, 0], masked_ref=cond[:, 1:])
    else: cannot_build(f"a case of sampling with the outputs {sorted(outputs)}")
    if config: cannot_build(f"a case of sampling with {sorted(config)}")
    compare(fam, case, lambda name: lambda: made[name], tally)


# ---- denoise: whole sampling loops ----
def denoise(fam, case, tally):
    """States on the way and at the end, from our schedule, guidance and solver. The release runs all three passes at each step, ours those that count.
    Where the config names no image guidance (`distill`), one pass a step with the guidance inside the model."""
    from opensora_nb.flow.guidance import Guidance, Passes, guidance_plan, per_token
    from opensora_nb.flow.schedule import shift_alpha, timesteps, tokens_per_frame
    from opensora_nb.flow.solver import euler
    from opensora_nb.mmdit.conditioning import given_frames, image_condition, pack, position_ids, unpack
    from opensora_nb.mmdit.model import MMDiT, MMDiTConfig
    config, inputs = dict(case["config"]), {k: tensor(v) for k, v in case["inputs"].items()}
    config.pop("model")                                        # the name of the case in mmdit that has the same config
    cfg, steps, text, method = MMDiTConfig.from_dict(config.pop("mmdit")), config.pop("num_steps"), config.pop("guidance"), config.pop("method", "i2v")
    model, noise = fill(MMDiT(cfg)), inputs.pop("noise")
    (B, _, T, H, W), patch = noise.shape, cfg.patch_size
    ids, shown, plan = position_ids(T, H, W, patch), {"text_image": (inputs.pop("txt"), inputs.pop("y_vec"), None)}, None
    if method == "i2v":
        kind, negative = config.pop("cond_type"), (inputs.pop("neg_txt"), inputs.pop("neg_y_vec"))
        guidance = Guidance(text, config.pop("guidance_img"), config.pop("text_osci"), config.pop("image_osci"), config.pop("scale_temporal_osci"))
        refs = {end: inputs.pop(f"ref{i}")[None] for i, end in enumerate(given_frames(kind, causal=True))}
        cond = image_condition(noise.shape, refs, kind, causal=True)
        if cfg.cond_embed: shown = dict(text_image=(*shown["text_image"][:2], pack(cond, patch)), image=(*negative, pack(cond, patch)), none=(*negative, pack(torch.zeros_like(cond), patch)))
        plan = guidance_plan(guidance, steps, T, has_image=bool(refs))
    elif method != "distill": cannot_build(f"a sampling loop of method {method!r}")
    if config or inputs: cannot_build(f"a case of denoise with {sorted(config | inputs)}")

    def run(names, x, t):
        texts, vectors, conds = ([shown[name][i] for name in names] for i in range(3))
        n = len(names) * B
        return model(x.repeat(len(names), 1, 1), ids, torch.cat(texts), torch.zeros(texts[0].shape[1], 3), torch.full((n,), t), torch.cat(vectors), None if conds[0] is None else torch.cat(conds),
                     torch.full((n,), float(text)) if cfg.guidance_embed else None)
    passes = Passes(run)
    def velocity(x, t, step):
        if plan is None: return passes(("text_image",), x, t)["text_image"]
        return plan[step].velocity(passes(plan[step].passes, x, t), per_token(plan[step].image, x.shape[1]) if refs else None)

    ts = timesteps(steps, shift_alpha(tokens_per_frame(H, W, patch), T))
    near(ts, case["timesteps"], tally)
    states = []
    made = {"final_packed": euler(velocity, pack(noise, patch), ts, callback=lambda step, t, x, v: states.append(x))}
    made |= dict(after_step1=states[1], final_latent=unpack(made["final_packed"], T, H, W, patch))
    if "mid" in case["outputs"]: made["mid"] = states[case["mid_is_state_before_step_index"]]
    if plan: assert passes.count == sum(len(step.passes) for step in plan) <= 3 * steps
    compare(fam, case, lambda name: (lambda: made[name]) if name in made else None, tally)


# ---- train_condition: with the toy encoder that the reference defines ----
def train_condition(fam, case, tally):
    from opensora_nb.mmdit.conditioning import given_frames, hold_ends, training_condition
    config = dict(case["config"])
    kind, causal, hold = config.pop("cond_type"), config.pop("causal"), config.pop("pad", False)
    if left := config.keys() - {"T", "H", "W"}: cannot_build(f"a case of train_condition with {sorted(left)}")

    def encode(video):
        small = torch.nn.functional.avg_pool3d(video, (1, 8, 8))
        if video.shape[2] == 1: return small
        groups = small[:, :, causal:].unflatten(2, (-1, 4)).mean(3)
        return torch.cat([small[:, :, :causal], groups], 2)

    video = tensor(case["inputs"]["video"])
    kind = "i2v_head" if video.shape[2] == 1 and kind == "image" else kind                     # an image: whatever the kind, nothing is given
    held = hold_ends(video, kind) if hold else video
    latent = encode(held)
    cond = training_condition(held, latent, [kind] * len(video), encode, causal)
    made = {"x_0": latent, "cond": cond}
    if hold and given_frames(kind).get(-1) == 1:   # the release takes the tail's image 7 frames before the end of the clip it was given, ours is the held clip's last frame
        theirs = cond.clone(); theirs[:, 1:, -1] = encode(video[:, :, -7:-6])[:, :, 0]
        assert torch.equal(cond[:, 1:, -1], encode(held[:, :, -1:])[:, :, 0])
        if not torch.equal(theirs, cond): made["cond"] = theirs; tally["known differences"] += 1
    compare(fam, case, lambda name: (lambda: made[name]) if name in made else None, tally)


# ---- losses: flow matching, discriminator, LPIPS, the release's autoencoder losses ----
def losses(fam, case, tally):
    config, inputs = dict(case.get("config", {})), {k: tensor(v) for k, v in case["inputs"].items()}
    if "mmdit" in config: make = losses_flow
    elif "gen_start" in config: make = losses_generator
    elif "input_nc" in config: make = losses_discriminator
    elif "perceptual_loss_weight" in config: make = losses_autoencoder
    elif case["outputs"].keys() == {"distance"}: make = losses_lpips
    else: cannot_build(f"a case of losses with the config {sorted(config)}")
    with torch.enable_grad(): made = make(fam, case, config, inputs, tally)
    if config: cannot_build(f"a case of losses with {sorted(config)}")
    compare(fam, case, lambda name: (lambda: made[name]) if name in made else None, tally)

def filled_lpips():
    from opensora_nb.autoencoder.losses import LPIPS
    return fill(LPIPS())

def losses_lpips(fam, case, config, inputs, tally):
    net = filled_lpips()
    check_listing(net, fam.state_dict(case)[0], case, tally)
    return dict(distance=net(inputs["a"], inputs["b"]))

def losses_autoencoder(fam, case, config, inputs, tally):
    from opensora_nb.autoencoder.losses import release_loss
    if config.pop("kl_loss_weight"): cannot_build("the release's KL loss")
    parts = release_loss(inputs["video"], inputs["recon"], filled_lpips(), config.pop("perceptual_loss_weight"), config.pop("logvar_init"))
    return dict(nll_loss=parts["nll"], recon_loss=parts["l1"], perceptual_loss=parts["perceptual"], kl_loss=torch.zeros(()))

def filled_discriminator(config):
    from opensora_nb.autoencoder.discriminator import PatchDiscriminator3D
    return fill(PatchDiscriminator3D(config.pop("input_nc"), config.pop("ndf"), config.pop("n_layers")))

def losses_discriminator(fam, case, config, inputs, tally):
    "Outputs named disc_loss_(kind)_start(first step)_step(step) are 0 before the first step; `train_nodropout` are logits by the statistics of the batch."
    from opensora_nb.autoencoder.discriminator import LOSSES, AdversarialConfig
    net = filled_discriminator(config)
    check_listing(net, fam.state_dict(case)[0], case, tally)
    made = {f"logits_{name}_eval": net(x) for name, x in inputs.items()}
    kinds = {name.replace("wgan", "wgan-gp"): charge(made["logits_real_eval"], made["logits_fake_eval"]) for name, charge in LOSSES.items()}
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout): module.p = 0.0
    made |= kinds | {f"logits_{name}_train_nodropout": net(x) for name, x in inputs.items()}
    for name in case["outputs"]:
        if found := re.fullmatch(r"disc_loss_(.+)_start(\d+)_step(\d+)", name):
            made[name] = kinds[found[1]] * AdversarialConfig(start=int(found[2])).plays(int(found[3]))
    return made

def losses_generator(fam, case, config, inputs, tally):
    from opensora_nb.autoencoder.discriminator import AdversarialConfig, adaptive_weight, generator_loss, gradient_norm
    from opensora_nb.autoencoder.losses import release_loss
    cfg = AdversarialConfig(weight=config.pop("disc_weight") * config.pop("disc_factor"), start=config.pop("gen_start"))
    config.pop("last_layer"), (disc := filled_discriminator(config.pop("discriminator")))
    video, last = inputs["video"], inputs["last_layer_weight"].requires_grad_()
    output = torch.nn.functional.conv3d(inputs["h"], last, padding=1)
    settings = next(c["config"] for c in fam.cases.values() if "perceptual_loss_weight" in c.get("config", {}))
    nll, g = release_loss(video, output, filled_lpips(), settings["perceptual_loss_weight"], settings["logvar_init"])["nll"], generator_loss(disc(output))
    made = dict(nll_loss=nll, g_loss=g, nll_grad_norm_last_layer=gradient_norm(nll, last), g_grad_norm_last_layer=gradient_norm(g, last))
    for name, scale in (("", 1.0), ("_nll_scaled", fam.data.get("nll_scale_for_unclamped") or case["nll_scale_for_unclamped"])):
        d = cfg.weight * adaptive_weight(scale * nll, g, last, cfg.cap)
        made |= {f"adaptive_weight_times_disc_weight{name}": d, f"weighted_gen_loss{name}": d * g * cfg.plays(cfg.start)}
    return made | dict(weighted_gen_loss_before_start=made["weighted_gen_loss"] * cfg.plays(cfg.start - 1))

def losses_flow(fam, case, config, inputs, tally):
    "Gradient norms of every parameter beside the outputs; `masked` outputs leave out the first and/or last latent frame of the rows that their names list."
    from opensora_nb.flow.matching import flow_loss, interpolate, target_velocity
    from opensora_nb.mmdit.conditioning import image_condition, pack, position_ids
    from opensora_nb.mmdit.model import MMDiT, MMDiTConfig
    cfg, sigma_min = MMDiTConfig.from_dict(config.pop("mmdit")), config.pop("sigma_min")
    config.pop("model")                                       # the name of the case in mmdit that has the same config
    model = fill(MMDiT(cfg)).train()
    latent, x1, t = inputs["x0_latent"], inputs["x1_noise_packed"], inputs["t"]
    B, _, T, H, W = latent.shape
    x0 = pack(latent, cfg.patch_size)
    cond = image_condition(latent.shape, {0: latent[:, :, :1]}, ["i2v_head"] + ["t2v"] * (B - 1))
    if T == 1: cond[:1, 0], cond[:1, 1:] = 1, latent[:1]      # the case's rule gives a lone frame itself; ours gives an image nothing
    x_t, target = interpolate(x0, x1, t, sigma_min), target_velocity(x0, x1, sigma_min)
    prediction = model(x_t, position_ids(T, H, W, cfg.patch_size), inputs["txt"], torch.zeros(inputs["txt"].shape[1], 3), t, inputs["y_vec"], pack(cond, cfg.patch_size))
    loss = flow_loss(prediction, target)
    loss.backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters()}
    assert norms.keys() == case["grad_norms"].keys()
    for name, norm in norms.items(): assert norm.item() == pytest.approx(case["grad_norms"][name], rel=RELATIVE), name
    tally["values"] += len(norms)
    made = dict(x_t=x_t, v_target=target, pred=prediction, loss=loss, global_grad_norm=torch.stack([*norms.values()]).norm())
    for name in case["outputs"]:
        if not (found := re.fullmatch(r"get_batch_loss_masked((?:_row(?:\d+|last)_(?:head|tail|loop))+)", name)): continue
        keep = torch.ones(B, 1, T, H // cfg.patch_size, W // cfg.patch_size)
        for row, kind in re.findall(r"_row(\d+|last)_(head|tail|loop)", found[1]):
            for end, kinds in ((0, ("head", "loop")), (-1, ("tail", "loop"))):
                if kind in kinds: keep[-1 if row == "last" else int(row), :, end] = 0
        made[name] = flow_loss(prediction, target, pack(keep))
    return made


# ---- hunyuan_vae ----
def hunyuan_vae(fam, case, tally):
    from opensora_nb.autoencoder.hunyuan import HunyuanVAE, HunyuanVAEConfig
    from opensora_nb.autoencoder.tiling import Tiling
    config = case["config"]
    model = fill(HunyuanVAE(HunyuanVAEConfig.from_dict(config)))
    names, owner = fam.state_dict(case)
    check_listing(model, names, owner, tally)
    inputs = {k: tensor(v) for k, v in case["inputs"].items()}
    size, frames = (config[key] if config.get(f"use_{axis}_tiling") else None for axis, key in (("spatial", "sample_size"), ("temporal", "sample_tsize")))
    tiling = Tiling(size, frames, config["tile_overlap_factor"]) if size or frames else None

    found = model.posterior(inputs["video"], tiling)
    latent = model.encode(inputs["video"], tiling)
    assert list(latent.shape[1:]) == list(model.latent_shape(*inputs["video"].shape[2:]))
    if "latent_size" in case: assert list(latent.shape[2:]) == case["latent_size"]
    made = {"mean": lambda: found.mean, "logvar": lambda: found.logvar, "kl": found.kl, "latent_mode_scaled": lambda: latent,
            "decoded": lambda: model.decode(latent, tiling=tiling), "decoded_of_latent_in": lambda: model.decode(inputs["latent_in"], tiling=tiling)}
    compare(fam, case, made.get, tally)


# ---- autoencoder_2d ----
def autoencoder_2d(fam, case, tally):
    from opensora_nb.autoencoder.image_autoencoder import ImageAutoencoder, ImageAutoencoderConfig
    model = fill(ImageAutoencoder(ImageAutoencoderConfig.from_dict(case["config"])))
    names, owner = fam.state_dict(case)
    check_listing(model, names, owner, tally)
    inputs = {k: tensor(v) for k, v in case["inputs"].items()}
    found, latent = model.posterior(inputs["video"]), model.encode(inputs["video"])
    assert list(latent.shape[1:]) == list(model.latent_shape(*inputs["video"].shape[2:]))
    made = {"mean": lambda: found.mean, "logvar": lambda: found.logvar, "kl": found.kl, "latent_mode_scaled": lambda: latent,
            "decoded": lambda: model.decode(latent), "decoded_of_latent_in": lambda: model.decode(inputs["latent_in"])}
    compare(fam, case, made.get, tally)


# ---- sampling_tables: sections are recognised by what their entries hold ----
def sampling_tables(fam, section, tally):
    entries = fam.data[section]
    for entry in entries if isinstance(entries, list) else [entries]:
        keys = set(entry)
        table = next((t for needed, t in TABLES if needed <= keys), None) or cannot_build(f"an entry of sampling_tables {section!r} with {sorted(keys)}")
        table(entry, tally)
    tally["cases"] += len(entries) - 1 if isinstance(entries, list) else 0

def near(ours, theirs, tally, rel=1e-6, abs=2e-7):
    ours = [float(x) for x in ours]
    assert ours == pytest.approx(theirs, rel=rel, abs=abs)
    tally["values"] += len(ours)

def line_table(e, tally):
    from opensora_nb.flow.schedule import linear_scale
    a = e["args"]
    near([linear_scale(x, a["y1"], a["y2"], a["x1"], a["x2"]) for x in e["x"]], e["y"], tally)

def shift_table(e, tally):
    from opensora_nb.flow.schedule import shift
    near(shift(torch.tensor(e["t"]), e["alpha"]), e["out"], tally)

def schedule_table(e, tally):
    from opensora_nb.flow.schedule import shift_alpha, timesteps
    a = dict(e["args"])
    steps, tokens, frames = a.pop("num_steps"), a.pop("image_seq_len"), a.pop("num_frames")
    line = dict(low=a.pop("base_shift", 1.0), high=a.pop("max_shift", 3.0))
    alpha = a.pop("shift_alpha", None)
    if alpha is None: alpha = shift_alpha(tokens, frames, **line)
    if not a.pop("shift", True): alpha = 1.0
    if a: cannot_build(f"a schedule with {sorted(a)}")
    near(timesteps(steps, alpha), e["timesteps"], tally)

def training_table(e, tally):
    from opensora_nb.flow.schedule import shift_alpha, tokens_per_frame, training_t
    T, H, W = e["latent_THW"]
    if "seed_name" in e: assert np.array_equal(gen(e["seed_name"]).standard_normal(len(e["n"]), dtype=np.float32), np.float32(e["n"]))
    alpha = shift_alpha(tokens_per_frame(H, W, like_release=True), T)       # the release divides by 4 whatever the patch
    near([alpha], [e["alpha"]], tally)
    near(training_t(torch.tensor(e["n"]), alpha), e["t"], tally)

def oscillation_table(e, tally):
    from opensora_nb.flow.guidance import oscillate
    near([oscillate(e["guidance"], i, e["force_num"]) for i in range(e["steps"])], e["values"], tally)

def in_our_punctuation(text):
    "The release's suffix: a whole rate without decimals, a comma between the two numbers, a full stop before them unless the caption ends a sentence by itself."
    text = re.sub(r"(\d[\d.]*) FPS", lambda rate: f"{float(rate[1]):g} FPS", text)
    text = re.sub(r"(\d FPS)\. (\d+ motion score)", r"\1, \2", text)
    text = re.sub(r"([!?])\.( [\d.]+ (?:FPS|motion score))", r"\1\2", text)
    return re.sub(r"([^.!?,]) ([\d.]+ (?:FPS|motion score))", r"\1. \2", text)

def text_table(e, tally):
    from opensora_nb.mmdit.text import decorate
    motion = float(e["motion_score"])
    for caption, with_fps, with_both in zip(e["in"], e["after_fps"], e["after_motion"], strict=True):
        for made, theirs in ((decorate(caption, e["fps"], None), with_fps), (decorate(caption, e["fps"], motion), with_both)):
            assert made == in_our_punctuation(theirs)
            tally["known differences" if made != theirs else "values"] += 1

def size_table(e, tally):
    from opensora_nb.mmdit.conditioning import image_size, round_size
    asked = e["in"]
    made = round_size(asked["height"], asked["width"]) if "height" in asked else image_size(asked["resolution"], asked["aspect_ratio"])
    assert made == (e["height"], e["width"]), asked
    tally["values"] += 2

def noise_table(e, tally):
    from opensora_nb.mmdit.conditioning import noise_shape
    assert list(noise_shape(e["height"], e["width"], e["num_frames"], e["channel"], e["patch_size"], e["D"])) == e["shape"]
    tally["values"] += len(e["shape"])

TABLES = [({"x", "y"}, line_table), ({"alpha", "t", "out"}, shift_table), ({"args", "timesteps"}, schedule_table), ({"latent_THW", "n", "t"}, training_table),
          ({"guidance", "force_num", "values"}, oscillation_table), ({"in", "after_fps", "after_motion"}, text_table), ({"in", "height", "width"}, size_table),
          ({"D", "patch_size", "shape"}, noise_table)]


# ---- shapes: full-size models, on the meta device ----
def kind_of(config):
    for key, kind in (("depth_single_blocks", "mmdit"), ("encoder", "dcae"), ("block_out_channels", "hunyuan_vae"), ("ch_mult", "autoencoder_2d"), ("input_nc", "discriminator")):
        if key in config: return kind
    cannot_build(f"a model with the config {sorted(config)}")

def shapes(fam, name, tally, folder):
    entry = fam.data[name]
    with torch.device("meta"):
        if kind_of(entry["config"]) == "mmdit":
            from opensora_nb.mmdit.model import MMDiT, MMDiTConfig
            model = MMDiT(MMDiTConfig.from_dict(entry["config"]))
        elif kind_of(entry["config"]) == "discriminator":
            from opensora_nb.autoencoder.discriminator import PatchDiscriminator3D
            model = PatchDiscriminator3D(entry["config"]["input_nc"], layers=entry["config"]["n_layers"])
        elif kind_of(entry["config"]) == "hunyuan_vae":
            from opensora_nb.autoencoder.hunyuan import HunyuanVAE, HunyuanVAEConfig
            model = HunyuanVAE(HunyuanVAEConfig.from_dict(entry["config"]))
        elif kind_of(entry["config"]) == "autoencoder_2d":
            from opensora_nb.autoencoder.image_autoencoder import ImageAutoencoder, ImageAutoencoderConfig
            model = ImageAutoencoder(ImageAutoencoderConfig.from_dict(entry["config"]))
        else:
            from opensora_nb.autoencoder.dc_ae import VideoDCAE
            model = VideoDCAE(dcae_config(entry["config"]))
    rows = [line.split("\t") for line in (folder / entry["file"]).read_text().splitlines()]
    listed = {n: [int(x) for x in shape.split(",")] if shape else [] for n, shape in rows}
    assert len(listed) == entry["entries"]
    assert sum(p.numel() for p in model.parameters()) == entry["num_params"]
    mine = {n: list(v.shape) for n, v in model.state_dict().items()}
    assert mine == listed, _first_difference(mine, listed)
    tally["lists of names and shapes"] += 1


# ---- buckets ----
def bucket_table(config, **about):
    "A table of the reference: resolution -> frames -> [chance or pair of chances, batch size]."
    from opensora_nb.data.buckets import BucketTable
    return BucketTable({resolution: {int(t): (tuple(c) if isinstance(c, list) else c, batch) for t, (c, batch) in lengths.items()} for resolution, lengths in config.items()}, **about)

def buckets(fam, section, tally):
    from opensora_nb.data.buckets import closest_shape, num_pixels, release_tables, sampled_fps, sizes
    said = fam.data[section]
    if section == "fps_max": assert said == bucket_table({"256px": {"1": [1.0, 1]}}).max_fps; tally["values"] += 1
    elif section == "bucket_config":
        ours = release_tables()
        for stage, config in said.items(): assert ours[stage].lengths == bucket_table(config).lengths, stage; tally["values"] += sum(map(len, config.values()))
    elif section == "aspect":
        for kind, tables in said.items():
            multiple, way = kind.removeprefix("D").split("_")
            for resolution, entry in tables.items():
                made = sizes(entry["num_pixels"], int(multiple), {"train": True, "infer": False}[way])
                assert num_pixels(resolution) == entry["num_pixels"] and list(made.items()) == [(k, tuple(v)) for k, v in entry["table"].items()], (kind, resolution)
                tally["values"] += len(made)
    elif section == "settings":
        for name, (pixels, table) in said.items():
            (_, ours, made, _), = bucket_table({name: {"1": [1.0, 1]}}).levels
            assert ours == pixels and made == {k: tuple(v) for k, v in table.items()}, name; tally["values"] += 1
    elif section == "map_target_fps":
        for e in said: assert sampled_fps(e["fps"], e["max"]) == tuple(e["out"]), e; tally["values"] += 1
    elif section == "map_target_fps_nan": assert sampled_fps(math.nan) == tuple(said); tally["values"] += 1
    elif section == "closest_ratio":
        for e in said: assert closest_shape(e["h"], e["w"], sizes(num_pixels("256px"))) == e["ratio"], e; tally["values"] += 1
    elif section == "custom_tuple_config": bucket_table(said)
    elif section == "assign":
        for stage, entry in said.items():
            config = fam.data["bucket_config"].get(stage) or fam.data[f"{stage}_tuple_config"]
            table = bucket_table(config, multiple=entry["spatial_multiple"], max_fps=fam.data["fps_max"])
            assert len(table.buckets) == entry["num_bucket"], stage
            for T, H, W, fps, seed, result in entry["rows"]:
                found = table.assign(T, H, W, math.nan if fps is None else fps, np.random.default_rng(seed).random)
                assert (found and [found.resolution, found.frames, found.shape, found.frames, found.height, found.width, found.batch_size]) == result, (stage, T, H, W, fps, seed)
                tally["values"] += 1
    else: cannot_build(f"section {section!r} of buckets")


# ---- preprocess ----
def preprocess(fam, section, tally):
    from opensora_nb.data.buckets import sampled_fps
    from opensora_nb.data.loader import frame_indices, resize_image, resize_video, to_unit
    from opensora_nb.mmdit.text import decorate
    if section in fam.cases:
        case = fam.cases[section]
        if case["config"].get("transform") != "resize_crop": cannot_build(f"the transform of preprocess case {section!r}")
        (pixels,), size = (tensor(entry) for entry in case["inputs"].values()), case["config"]["target_hw"]
        made = lambda: to_unit(resize_video(pixels.float(), *size)) if pixels.ndim == 4 else to_unit(torch.from_numpy(resize_image(pixels.numpy(), *size).copy()).permute(2, 0, 1))
        return compare(fam, case, {"out": made}.get, tally)
    for e in fam.data[section]:
        if "indices" in e:
            assert frame_indices(e["total"], e["num_frames"], e["interval"]).tolist() == e["indices"]; tally["values"] += len(e["indices"])
        elif "sampling_interval" in e:
            fps, step = sampled_fps(math.nan if e["fps"] is None else e["fps"], e["fps_max"])
            made = decorate(e["text"], fps or None, e["motion"] if e["use_motion"] else None)
            assert (made, step) == (in_our_punctuation(e["out"]), e["sampling_interval"]), e
            tally["known differences" if made != e["out"] else "values"] += 1
        else: cannot_build(f"an entry of preprocess {section!r} with {sorted(e)}")


STAGES = dict(image="image", stage1="stage1_256px_t2v", stage1_i2v="stage2_256px_ti2v", stage2_i2v="stage3_768px_ti2v", high_compression="hcae_adapt_long")
ELSEWHERE = {"update_warmup_steps", "plugin", "grad_checkpoint", "ae_spatial_compression", "epochs", "buckets", "sigma_min", "optim"}      # machinery, the family `buckets`, or said twice

def train_config(name, said, tally):
    "A training config of the release against our recipe: equal, or as the report says otherwise."
    from opensora_nb.mmdit.model import MMDiTConfig
    from opensora_nb.training.recipes import RECIPES
    if name == "stage2":                 # text to video at 768 px: the report trains that stage with images only, so it differs from ours just there
        from opensora_nb.mmdit.model import open_sora_v2_t2v
        recipe = replace(RECIPES["stage3_768px_ti2v"](), model=open_sora_v2_t2v(), condition_weights=dict(t2v=1), offload=False)
    elif name in STAGES: recipe = RECIPES[STAGES[name]]()
    else: cannot_build(f"training config {name!r}")
    loop, depth = recipe.loop, (recipe.model.depth, recipe.model.depth_single_blocks)
    by_report = dict(stage1_i2v=5e-5, stage2=1e-5, stage2_i2v=1e-5)
    ours = dict(lr=loop.lr, eps=loop.eps, warmup_steps=loop.warmup, grad_clip=loop.clip, accumulation_steps=1 if loop.batches_per_step == 0 else None, ema_decay=loop.ema or None, dtype=loop.precision,
                dropout_ratio={k: pytest.approx(recipe.drop_text) for k in ("t5", "clip")}, condition_config=recipe.condition_weights if recipe.model.cond_embed else None, is_causal_vae=recipe.autoencoder == "hunyuan", seed=loop.seed, keep_n_latest=loop.keep, ckpt_every=loop.save_every,
                patch_size=None if recipe.model.patch_size == 2 else recipe.model.patch_size, model=recipe.model, grad_ckpt_settings=recipe.checkpointing, grad_ckpt_buffer_size=recipe.offload, plugin_config=recipe.context_parallel, t5=512, clip=77,
                ae=dict(hunyuan="hunyuan_vae", dcae="dc_ae")[recipe.autoencoder], dataset=recipe.table.max_fps)
    for key, value in said.items():
        if key in ELSEWHERE: continue
        if key not in ours: cannot_build(f"{key!r} of training config {name!r}")
        value = {"model": lambda: MMDiTConfig.from_dict(value), "grad_ckpt_settings": lambda: tuple(min(a, b) for a, b in zip(value, depth)), "grad_ckpt_buffer_size": lambda: value is not None, "plugin_config": lambda: value.get("sp_size", 1),
                 "t5": lambda: value["max_length"], "clip": lambda: value["max_length"], "ae": lambda: value["type"], "dataset": lambda: value["fps_max"]}.get(key, lambda: value)()
        if key == "lr" and value != ours[key]: assert ours[key] == by_report[name]; tally["known differences"] += 1; continue
        if key == "ckpt_every" and name == "stage2": continue
        assert value == ours[key], (name, key, value, ours[key])
        tally["values"] += 1
    optim = said["optim"]
    assert (optim["lr"], optim["eps"], optim["weight_decay"], optim["adamw_mode"]) == (said["lr"], loop.eps, loop.weight_decay, True), (name, "optim")
    tally["values"] += 4

def vae_config(name, said, tally):
    "A training config of the Video DC-AE: equal, but for AdamW's betas and eps, which the report gives otherwise."
    from opensora_nb.training.autoencoder import RECIPES
    recipe, disc = RECIPES["dcae_128_gan" if "discriminator" in said else "dcae_128"](), said.get("discriminator")
    ((resolution, lengths),), loop = said["bucket_config"].items(), recipe.loop
    (frames, (chance, batch)), = lengths.items()
    expected = dict(lr=loop.lr, weight_decay=loop.weight_decay, warmup=loop.warmup, image_share=recipe.image_share, precision=loop.precision, clip=loop.clip, checkpointing=recipe.checkpointing, seed=loop.seed, ema=loop.ema, perceptual=recipe.loss.perceptual_weight, kl=recipe.loss.kl_weight,
                    where=(recipe.size, recipe.num_frames, loop.batch_size // 8))
    found = dict(lr=said["optim"]["lr"], weight_decay=said["optim"]["weight_decay"], warmup=said["lr_scheduler"]["warmup_steps"], image_share=said["mixed_image_ratio"], precision=said["dtype"], clip=said["grad_clip"], checkpointing=said["grad_checkpoint"], seed=said["seed"], ema=said["ema_decay"],
                 perceptual=said["vae_loss_config"]["perceptual_loss_weight"], kl=said["vae_loss_config"]["kl_loss_weight"], where=(int(resolution.partition("px")[0]), int(frames), batch))
    if disc:
        cfg = recipe.adversarial
        expected |= dict(disc=(cfg.lr, cfg.weight, cfg.start, cfg.layers))
        found |= dict(disc=(said["optim_discriminator"]["lr"], said["gen_loss_config"]["disc_weight"], said["gen_loss_config"]["gen_start"], disc["n_layers"]))
    assert found == expected, name
    tally["values"] += len(found)
    if (loop.betas, loop.eps) != (tuple(said["optim"]["betas"]), said["optim"]["eps"]): assert (loop.betas, loop.eps) == ((0.9, 0.999), 1e-15); tally["known differences"] += 1

def inference_config(name, said, tally):
    "A preset of sampling, every key of it: equal, but that ours asks the autoencoder whether it is causal."
    from opensora_nb.autoencoder.hunyuan import HunyuanVAEConfig
    from opensora_nb.autoencoder.image_autoencoder import ImageAutoencoderConfig
    from opensora_nb.autoencoder.tiling import Tiling
    from opensora_nb.flow.presets import PRESETS
    from opensora_nb.mmdit.conditioning import latent_frames
    from opensora_nb.mmdit.model import MMDiTConfig, flux_image
    if name not in PRESETS: cannot_build(f"sampling preset {name!r}")
    ours, said = PRESETS[name](), json.loads(json.dumps(said))
    g, option, ae, t5, clip, model = ours.guidance, said.pop("sampling_option"), said.pop("ae"), said.pop("t5"), said.pop("clip"), said.pop("model")
    kind = ae.pop("type")
    if (causal := option.pop("is_causal_vae")) != ours.causal:
        assert kind == "dc_ae" and latent_frames(ours.num_frames, True) == latent_frames(ours.num_frames, False)
        tally["known differences"] += 1
    if kind == "hunyuan_vae":
        published = HunyuanVAEConfig()
        assert (ae.pop("layers_per_block"), ae.pop("latent_channels"), ae.pop("in_channels"), ae.pop("out_channels")) == (published.layers_per_block, published.latent_channels, 3, 3)
        tiling, compression = Tiling(256, None), published.temporal_compression
        assert (ae.pop("use_spatial_tiling"), ae.pop("use_temporal_tiling")) == (True, False)
    else:
        from opensora_nb.autoencoder.dc_ae import VideoDCAEConfig
        compression, _ = VideoDCAEConfig().temporal_compression, ae.pop("from_scratch")
        assert ae.pop("model_name") == f"dc-ae-f{VideoDCAEConfig().spatial_compression}t{compression}c{VideoDCAEConfig().latent_channels}"
        assert said.pop("ae_spatial_compression") == VideoDCAEConfig().spatial_compression and said.pop("patch_size") == ours.model.patch_size
        tiling = Tiling(ae.pop("spatial_tile_size") if ae.pop("use_spatial_tiling") else None, ae.pop("temporal_tile_size") if ae.pop("use_temporal_tiling") else None, ae.pop("tile_overlap_factor"))
    image = dict(first_image=said.pop("img_resolution")) if said.pop("use_t2i2v", False) else dict(first_image=None)
    if image["first_image"]: image |= dict(image_model=MMDiTConfig.from_dict(said.pop("img_flux")), image_autoencoder=ImageAutoencoderConfig.from_dict(said.pop("img_flux_ae")))
    found = image | dict(model=MMDiTConfig.from_dict(model), tiling=tiling, autoencoder=dict(hunyuan_vae="hunyuan", dc_ae="dcae")[kind], temporal=option.pop("temporal_reduction"),
                         context_parallel=said.pop("plugin_config", {}).get("sp_size", 1), decoder_parallel=said.pop("plugin_config_ae", {}).get("tp_size", 1),
                         text_tokens=t5.pop("max_length"), pooled_tokens=clip.pop("max_length"), precision=said.pop("dtype"), batch_size=said.pop("batch_size"), seed=said.pop("seed"), fps=said.pop("fps_save"), motion_score=float(said.pop("motion_score")))
    for theirs, name_of in dict(resolution="resolution", aspect_ratio="aspect_ratio", num_frames="num_frames", num_steps="steps", shift="shift").items(): found[name_of] = option.pop(theirs)
    scales = dict(guidance="text", guidance_img="image", text_osci="text_oscillation", image_osci="image_oscillation", scale_temporal_osci="dynamic_image")
    for theirs, name_of in scales.items(): assert option.pop(theirs) == getattr(g, name_of), (name, theirs)
    expected = {key: getattr(ours, key) for key in found if hasattr(ours, key)} | dict(temporal=compression)
    if ours.first_image: expected |= dict(image_model=flux_image(), image_autoencoder=ImageAutoencoderConfig())
    assert found == expected, name
    tally["values"] += len(found) + len(scales)
    # what is left says how the release runs it: t2v is what a command line without an image means, the loop is the video model's, its seed is the config's
    assert (said.pop("cond_type"), option.pop("method"), option.pop("seed")) == ("t2v", "i2v", None)
    for parallel in ("plugin", "plugin_ae"): assert said.pop(parallel, "hybrid") == "hybrid"
    assert t5.pop("type") == clip.pop("type") == "text_embedder" and t5.pop("shardformer", True)
    if left := [*said, *option, *ae, *t5, *clip]: cannot_build(f"{sorted(left)} of sampling preset {name!r}")

def configs(fam, section, tally):
    from opensora_nb.autoencoder.hunyuan import HunyuanVAEConfig
    if section == "source": return
    for name, said in fam.data[section].items():
        if section == "train": train_config(name, said, tally)
        elif section == "vae_train": vae_config(name, said, tally)
        elif section == "inference": inference_config(name, said, tally)
        elif section == "vae_inference":
            model, cfg = said["model"], HunyuanVAEConfig()
            if model["type"] == "hunyuan_vae": assert (cfg.latent_channels, cfg.layers_per_block, cfg.scaling_factor, cfg.shift_factor, cfg.temporal_compression) == tuple(model[k] for k in ("latent_channels", "layers_per_block", "scale_factor", "shift_factor", "time_compression_ratio")), name
            elif model["type"] == "dc_ae":
                from opensora_nb.autoencoder.tiling import Tiling
                assert Tiling() == Tiling(model["spatial_tile_size"], model["temporal_tile_size"], model["tile_overlap_factor"]), name
            else: cannot_build(f"autoencoder {model['type']!r}")
            tally["values"] += 5
        else: cannot_build(f"section {section!r} of configs")


# ---- Running them ----
def not_yet(fam, case):
    "Why this case is left out, by NOT_YET; None if it is not. What a case is follows from its config, not from its name."
    listed = NOT_YET.get(fam.name, {})
    names = ["*", case]
    if fam.name == "shapes": names.append(kind_of(fam.data[case]["config"]))
    return next((listed[n] for n in names if n in listed), None)

def pytest_generate_tests(metafunc):
    if "golden_case" not in metafunc.fixturenames: return
    folder = Path(metafunc.config.getoption("--golden") or Path(__file__).with_name("golden"))
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if path.stem == "shapes": names = [*data]
        elif "cases" in data: names = [c["case"] for c in data["cases"]] + [k for k in data if k not in ("family", "npz", "cases", "source")]
        else: names = [k for k in data if k not in ("family", "npz", "source")]
        found += [(str(folder), path.stem, name) for name in names]
    metafunc.parametrize("golden_case", found or [(str(folder), "", "")], ids=lambda c: f"{c[1]}-{c[2]}" if c[1] else "none")

BUILDERS = dict(autoencoder_2d=autoencoder_2d, losses=losses, mmdit=mmdit, dcae=dcae, hunyuan_vae=hunyuan_vae, sampling=sampling, denoise=denoise, train_condition=train_condition)      # family -> how a case of it is built

@torch.no_grad()
def test_golden(golden_case, golden_tally):
    folder, name, case = golden_case
    if not name: pytest.fail(f"no reference values (*.json) in {folder}", pytrace=False)
    tally = golden_tally[name]
    fam = family(folder, name)
    if why := not_yet(fam, case):
        tally.not_yet[why] += 1
        pytest.skip(f"not yet built: {why}")
    if name == "shapes": shapes(fam, case, tally, Path(folder))
    elif name == "sampling_tables": sampling_tables(fam, case, tally)
    elif name == "buckets": buckets(fam, case, tally)
    elif name == "preprocess": preprocess(fam, case, tally)
    elif name == "configs": configs(fam, case, tally)
    elif name == "dcae" and "temporal_tile_size" in fam.data.get(case, {}): dcae_frame_counts(fam, case, tally)
    elif case in fam.cases and name in BUILDERS: BUILDERS[name](fam, fam.cases[case], tally)
    else: cannot_build(f"{case!r} of family {name!r}: nobody has taught this test how, and NOT_YET does not list it")
    tally["cases"] += 1
