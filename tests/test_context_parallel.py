"Processes that share a clip's tokens compute what one computes: velocity, gradients, a whole training; what cannot be shared is refused."
from dataclasses import replace
import numpy as np
import pytest, torch, torch.distributed as dist

from opensora_nb.cluster.activations import Offload, recompute
from opensora_nb.cluster.conv_parallel import run_processes
from opensora_nb.cluster.engine import Engine, make_engine
from opensora_nb.cluster.files import UserError
from opensora_nb.mmdit.context_parallel import SharedAttention, sample_inputs, shared_sequence, try_shared
from opensora_nb.mmdit.model import MMDiT, flux_image, pocket
from opensora_nb.training.diffusion import DiffusionRecipe, LatentCache, train_diffusion
from opensora_nb.training.loop import LoopConfig, read_log

TINY = replace(pocket(), hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=1)
IMAGE = replace(flux_image(), in_channels=16, patch_size=2, context_in_dim=24, vec_in_dim=24, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(8, 12, 12), guidance_embed=False)
RECIPE = DiffusionRecipe(TINY, LoopConfig(steps=4, batch_size=6, batches_per_step=2, lr=2e-3, precision="fp32", ema=0.9, save_every=2, sample_every=2, eps=1e-8), dict(t2v=1, i2v_head=2, i2v_loop=1), autoencoder="pocket")

def seeded(cfg):
    torch.manual_seed(0)
    return MMDiT(cfg)

def again(keep_attention):
    model = seeded(replace(TINY, depth_single_blocks=2))
    recompute([*model.double_blocks, *model.single_blocks], keep_attention, Offload(least_mb=0))
    return try_shared(model, 33, 5)

def latents():
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return LatentCache(draw(10, 16, 3, 3, 5), draw(10, 16, 1, 3, 5), draw(10, 16, 1, 3, 5), draw(10, 1, 7, 384), draw(10, 1, 384), draw(1, 7, 384), draw(1, 384), "drawn")

def trained(folder, kind, context, until=4):
    "A run of this process and those beside it; returns its weights. Samples on the way are computed together too. until: the step after which it is interrupted."
    engine = make_engine(kind, "cpu", context=context)
    def sample(model, path, step):
        assert model(**sample_inputs(model, 45, 7)).isfinite().all()
        if step == until < 4: raise KeyboardInterrupt
    try: model = train_diffusion(latents(), RECIPE, folder, engine=engine, sample=sample, quiet=True)
    except KeyboardInterrupt: return {}
    return dict(weights=engine.whole(model.state_dict()), velocity=model(**sample_inputs(model, 45, 7)).detach())

def everything(folder):
    found = dict(uneven=try_shared(seeded(TINY), 33, 5), one_word=try_shared(seeded(TINY), 8, 1), image=try_shared(seeded(IMAGE), 16, 4), again=again(False), again_but_attention=again(True))
    try:
        with shared_sequence(MMDiT(replace(TINY, hidden_size=96, num_heads=3)), dist.group.WORLD): pass
    except UserError as e: found["refused"] = str(e)
    with shared_sequence(model := seeded(TINY), dist.group.WORLD):
        found["backend"] = str(type(model.double_blocks[0].backend).__name__)
    found["after"] = [model.double_blocks[0].backend, len(model._forward_hooks) + len(model._forward_pre_hooks)]
    trained(folder / "mixed", "zero2", 2, until=2)
    return found | dict(ddp=trained(folder / "ddp", "ddp", 2))

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_processes(everything, 2, folder)

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(folder, "single", 1)

@pytest.mark.parametrize("kind", ["uneven", "one_word", "image", "again", "again_but_attention"])
def test_two_processes_compute_the_velocity_and_the_gradients_of_one(two, kind):
    for found in two[1]: assert found[kind]["velocity"] < 1e-5 and found[kind]["gradient"] < 1e-5 and found[kind]["saved"] < 0.75

def test_outside_the_block_the_model_is_as_it_was(two):
    for found in two[1]: assert found["backend"] == "SharedAttention" and found["after"] == ["sdpa", 0]

def test_heads_that_do_not_divide_are_refused_with_those_that_do(two):
    assert "3 heads do not divide among 2 processes" in two[1][0]["refused"] and "can be 1, 3" in two[1][0]["refused"]

def same(run, found, alone):
    "Curves to 1e-5, samples counted once, weights, and the velocity after the run."
    (folder, one), ours, theirs = alone, read_log(run), read_log(alone[0])
    assert ours["step"] == theirs["step"] == [1, 2, 3, 4] and ours["samples"] == theirs["samples"] == [6, 12, 18, 24]
    for name in ("loss", "loss_noisy", "grad_norm"): assert np.abs(np.subtract(ours[name], theirs[name])).max() <= 1e-5 * max(theirs[name]), name
    for state in found:
        assert all((state["weights"][k] - one["weights"][k]).abs().max() < 1e-5 for k in one["weights"]) and (state["velocity"] - one["velocity"]).abs().max() < 1e-4

def test_a_run_whose_clips_are_shared_by_two_gives_the_curve_of_one(two, alone):
    folder, found = two
    same(folder / "ddp", [each["ddp"] for each in found], alone)

def test_one_process_goes_on_where_two_that_shared_clips_stopped(two, alone):
    folder, _ = two
    assert read_log(folder / "mixed")["step"] == [1, 2]
    same(folder / "mixed", [trained(folder / "mixed", "single", 1)], alone)

@pytest.mark.soak
def test_two_replicas_of_two_in_shards_give_the_curve_of_one(alone, tmp_path):
    same(tmp_path, run_processes(trained, 4, tmp_path, "zero2", 2), alone)

def test_a_number_of_processes_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="context_parallel 4 wants a multiple of 4 processes, and 1 was started: torchrun --nproc-per-node 4"): make_engine("auto", "cpu", context=4)

def test_a_part_that_is_not_the_last_forward_passs_is_refused():
    attend = SharedAttention(None); attend.sizes = [4, 4]
    q = torch.zeros(1, 3, 2, 8)
    with pytest.MonkeyPatch.context() as m, pytest.raises(RuntimeError, match="a part of 3 tokens"):
        m.setattr(dist, "get_rank", lambda group: 0)
        attend(q, q, q)
