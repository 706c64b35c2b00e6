"Split convolutions compute what whole ones do, on real processes; what cannot be split is left alone and named; weights come home; sizes on the meta device."
import copy
import pytest, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F

from opensora_nb.autoencoder import dc_ae
from opensora_nb.autoencoder.dc_ae import VideoDCAE, VideoDCAEConfig
from opensora_nb.autoencoder.hunyuan import HunyuanVAE, HunyuanVAEConfig
from opensora_nb.cluster.conv_parallel import (INT32, ColumnParallelConv3d, LayerSize, Mend, RowParallelConv3d, clip_grad_norm, compare_split, full_state_dict, layer_sizes, load_full_state_dict,
                                               overflows_int32, parallelize_convs, plan_split, run_processes, saved_bytes, splits_cleanly, ways_to_mend)

SMALL = VideoDCAEConfig(4, ("ResBlock", "ResBlock", "EViTS5_GLU"), (8, 16, 32), (1, 1, 1), (8, 16, 32), (1, 1, 1), (True, True, False), (True, True, False))
PAIRS, ALSO = (("main.conv1.conv", "main.conv2.conv"),), (dc_ae.Conv3d,)


class Causal(nn.Conv3d):
    "Pads in front in time, by repetition."
    def forward(self, x): return super().forward(F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate"))

class Centred(nn.Conv3d):
    "Takes the mean over channels away first: cannot be cut."
    def forward(self, x): return super().forward(x - x.mean(1, keepdim=True))

def autoencoder():
    torch.manual_seed(0)
    model = VideoDCAE(SMALL)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1: p.add_(torch.randn_like(p) * 0.3)                # norms that start at zero would hide whole branches
    return model

def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- on two processes: one launch, everything in it ----
SINGLE = {    # name: (convolution, input)
    "plain": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 3, 5, 4)), "no bias": (nn.Conv3d(4, 6, 3, bias=False), (1, 4, 3, 5, 4)), "strided": (nn.Conv3d(4, 8, 3, (1, 2, 2), 1), (1, 4, 3, 6, 6)),
    "dilated": (nn.Conv3d(4, 4, 3, dilation=2, padding=2), (1, 4, 5, 5, 5)), "replicate": (nn.Conv3d(4, 2, (3, 1, 1), padding=(1, 0, 0), padding_mode="replicate"), (1, 4, 3, 4, 4)),
    "same": (nn.Conv3d(2, 2, 3, padding="same"), (1, 2, 3, 4, 4)), "causal": (Causal(4, 6, 3, padding=(0, 1, 1)), (1, 4, 3, 5, 4)), "channels last": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 3, 5, 4)),
}

def deviation(a, b): return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))

def gradients(module, x, weight):
    x = x.clone().requires_grad_()
    y = module(x)
    (y * weight).sum().backward()
    return y.detach(), x.grad

def single_layers():
    "Every kind of convolution, both ways: deviations of output, input gradient, weight and bias gradients; and the layers' shapes."
    found = {}
    for name, (conv, shape) in SINGLE.items():
        torch.manual_seed(1); nn.init.normal_(conv.weight)
        if conv.bias is not None: nn.init.normal_(conv.bias)
        x = noise(*shape)
        if name == "channels last": x = x.contiguous(memory_format=torch.channels_last_3d); conv = conv.to(memory_format=torch.channels_last_3d)
        whole = copy.deepcopy(conv)
        weight = noise(*whole(x).shape, seed=2)
        y, dx = gradients(whole, x, weight)
        for how, part in dict(column=ColumnParallelConv3d.from_conv(conv), row=RowParallelConv3d.from_conv(conv), pieces=RowParallelConv3d.from_conv(conv, pieces=2)).items():
            y2, dx2 = gradients(part, x, weight)
            grads = part.full(lambda p: p.grad)
            found[f"{name}, {how}"] = max(deviation(y, y2), deviation(dx, dx2), *(deviation(p.grad, grads[k]) for k, p in whole.named_parameters()), *(deviation(p, part.full()[k]) for k, p in whole.named_parameters()))
            with torch.no_grad(): assert torch.equal(part(x), y2)
        own = ColumnParallelConv3d.from_conv(conv, gather=False)(x).shape[1]
        assert own * 2 == conv.out_channels
        with pytest.raises(ValueError, match="input channels do not divide"): RowParallelConv3d.from_conv(nn.Conv3d(3, 4, 1))
        with pytest.raises(ValueError, match="output channels do not divide"): ColumnParallelConv3d.from_conv(nn.Conv3d(4, 3, 1))
        with pytest.raises(ValueError, match="in 2 groups"): ColumnParallelConv3d.from_conv(nn.Conv3d(4, 4, 1, groups=2))
    return found

def whole_models():
    "A small Video DC-AE in several ways; two steps of training with clipping; loading; bf16 under autocast; a convolution in two places."
    model, x = autoencoder(), noise(1, 3, 8, 16, 16)
    ways = {name: dict(min_channels=8, also=ALSO) | more for name, more in dict(auto={}, column=dict(prefer="column"), row=dict(prefer="row"), pairs=dict(pairs=PAIRS), pieces=dict(pairs=PAIRS, pieces=2)).items()}
    found = dict(ways={name: compare_split(copy.deepcopy(model), x, options, clip=0.01) for name, options in ways.items()})
    causal = HunyuanVAE(HunyuanVAEConfig((8, 8, 16), layers_per_block=1, norm_num_groups=4)).double()
    found["causal"] = compare_split(causal, noise(1, 3, 5, 16, 16).double(), dict(min_channels=8, also=ALSO))

    one, two = copy.deepcopy(model), copy.deepcopy(model)
    parallelize_convs(two, min_channels=8, also=ALSO, pairs=PAIRS)
    two.checkpoint_blocks(True)                                               # collectives inside recomputation
    steps = []
    for m, clip in ((one, lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05)), (two, lambda m: clip_grad_norm(m, 0.05))):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
        for k in range(2):
            optimizer.zero_grad()
            ((m(x) - x) ** 2).mean().backward()
            steps.append(float(clip(m)))
            optimizer.step()
    trained = full_state_dict(two)
    found["training"] = max(deviation(v, trained[k]) for k, v in one.state_dict().items())
    found["moved"] = max(deviation(v, trained[k]) for k, v in model.state_dict().items())
    found["norms"] = steps
    found["replicated"] = [float(p.detach().double().sum()) for n, p in two.named_parameters() if "local" not in n and "parts" not in n]

    load_full_state_dict(two, model.state_dict())
    found["loaded"] = max(deviation(v, full_state_dict(two)[k]) for k, v in model.state_dict().items()) if list(full_state_dict(two)) == list(model.state_dict()) else 1.0
    found["same as before"] = deviation(model(x), two(x))
    for wrong in ({k: v for k, v in model.state_dict().items() if "project_in" not in k}, model.state_dict() | dict(extra=torch.zeros(1))):
        with pytest.raises((RuntimeError, KeyError)): load_full_state_dict(two, wrong)

    with torch.autocast("cpu", torch.bfloat16): found["bf16"] = deviation(model(x).float(), two(x).float())
    conv = nn.Conv3d(4, 4, 1)
    shared = nn.Sequential(conv, nn.SiLU(), conv)
    want = shared(z := noise(1, 4, 2, 2, 2)).detach()
    parallelize_convs(shared, min_channels=1)
    found["shared"] = deviation(want, shared(z)) if shared[0] is shared[2] and isinstance(shared[0], RowParallelConv3d) else 1.0
    lone = ColumnParallelConv3d.from_conv(conv)
    found["root"] = deviation(conv.weight, full_state_dict(lone)["weight"]) if set(full_state_dict(lone)) == {"weight", "bias"} else 1.0
    return found

def everything(): return dict(rank=dist.get_rank(), single=single_layers(), models=whole_models())

@pytest.fixture(scope="module")
def said(): return run_processes(everything, 2)

@pytest.mark.slow
def test_each_kind_of_convolution_split_both_ways_is_the_whole_one(said):
    assert [r["rank"] for r in said] == [0, 1] and len(said[0]["single"]) == 3 * len(SINGLE)
    for r in said: assert max(r["single"].values()) < 2e-6, {k: v for k, v in r["single"].items() if v >= 2e-6}

@pytest.mark.slow
def test_a_whole_autoencoder_gives_the_same_forward_and_backward(said):
    for r in said:
        for name, found in r["models"]["ways"].items():
            assert max(found[k] for k in ("output", "input gradient", "gradient", "norm")) < 1e-5 and found["weights"] == 0, (name, found)
            assert found["parameters"] < 0.65 and sum(how != "left" for how in found["split"].values()) >= 20
        assert max(r["models"]["causal"][k] for k in ("output", "input gradient", "gradient")) < 1e-11 and r["models"]["causal"]["parameters"] < 0.6, "the causal autoencoder, in float64"
    ways = said[0]["models"]["ways"]
    assert ways["row"]["saved"] < ways["column"]["saved"] and {how for how in ways["column"]["split"].values()} == {"column", "left", "row"}     # three output channels go by inputs
    assert [r["models"]["ways"]["auto"]["split"] for r in said] == [ways["auto"]["split"]] * 2

@pytest.mark.slow
def test_two_steps_of_training_with_clipping_and_recomputation_are_the_same(said):
    for r in said:
        m = r["models"]
        assert m["training"] < 1e-5 < 1e-3 < m["moved"]
        assert all(n > 0.05 for n in m["norms"]) and max(abs(a / b - 1) for a, b in zip(m["norms"][:2], m["norms"][2:])) < 1e-5, "both were clipped, by the same norm"
    assert said[0]["models"]["replicated"] == said[1]["models"]["replicated"], "what is not split stays the same in all processes, to the bit"

@pytest.mark.slow
def test_weights_come_home_and_go_out_again(said):
    for r in said: assert r["models"]["loaded"] == r["models"]["root"] == 0 and r["models"]["same as before"] < 1e-5

@pytest.mark.slow
def test_half_precision_and_shared_convolutions(said):
    for r in said: assert r["models"]["bf16"] < 0.05 and r["models"]["shared"] < 1e-6

def failing(): raise ZeroDivisionError("in a process")

def written(x: torch.Tensor) -> torch.Tensor:
    x += 1 + dist.get_rank(); dist.barrier()
    return x

@pytest.mark.slow
def test_what_one_process_writes_into_its_arguments_no_other_sees():
    given = torch.zeros(3)
    assert [x.tolist() for x in run_processes(written, 2, given)] == [[1] * 3, [2] * 3] and not given.any()

@pytest.mark.slow
def test_an_error_in_a_process_is_raised_here():
    with pytest.raises(Exception, match="ZeroDivisionError: in a process"): run_processes(failing, 1)


# ---- plans ----
def test_what_cannot_be_split_is_left_and_named():
    model = nn.ModuleDict(dict(grouped=nn.Conv3d(8, 8, 3, groups=8), odd=nn.Conv3d(9, 9, 1), small=nn.Conv3d(2, 2, 1), own=Causal(8, 8, 3), plane=nn.Conv2d(8, 8, 3), good=nn.Conv3d(8, 8, 1)))
    plan = {s.name: (s.how, s.why) for s in plan_split(model, 2, min_channels=4)}
    assert plan == dict(grouped=("left", "in 8 groups"), odd=("left", "9 and 9 channels do not divide by 2"), small=("left", "fewer than 4 channels"), own=("left", "Causal computes its own forward"), good=("row", "input not smaller than output"))
    assert {s.name: s.how for s in plan_split(model, 2, min_channels=4, also=(Causal,))}["own"] == "row"
    assert plan_split(nn.ModuleDict(dict(a=nn.ModuleDict(dict(last=nn.Conv3d(8, 8, 1))))), 2, min_channels=4, leave=("last",))[0].how == "left"

def test_weight_normed_convolutions_are_left_alone():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv3d(8, 8, 1))
    assert [s.how for s in plan_split(nn.Sequential(conv), 2, min_channels=4)] == ["left"]

def test_a_class_that_mixes_channels_is_not_vouched_for():
    assert splits_cleanly(nn.Conv3d(5, 3, 3)) and splits_cleanly(Causal(4, 4, 3)) and splits_cleanly(dc_ae.Conv3d(1, 2, 3, padding=1)) and not splits_cleanly(Centred(4, 4, 3))
    with pytest.raises(ValueError, match="Centred does more than convolve"): plan_split(nn.Sequential(Centred(4, 4, 3)), 2, also=(Centred,))

def test_the_side_that_sends_less_is_chosen():
    how = lambda conv: plan_split(nn.Sequential(conv), 2, min_channels=1)[0].how
    assert [how(nn.Conv3d(*c)) for c in ((8, 8, 1), (8, 16, 1), (16, 8, 1), (8, 16, 3, 2), (8, 16, 3, (1, 1, 2)), (3, 8, 1), (8, 3, 1))] == ["row", "column", "row", "row", "row", "column", "row"]

def test_a_pair_must_fit_together():
    pair = lambda a, b: [(s.how, s.paired) for s in plan_split(nn.ModuleDict(dict(a=a, b=b)), 2, min_channels=4, pairs=(("a", "b"),))]
    assert pair(nn.Conv3d(8, 8, 1), nn.Conv3d(8, 8, 1)) == [("column", True), ("row", True)]
    assert pair(nn.Conv3d(8, 8, 1), nn.Conv3d(16, 8, 1))[0][1] is False and pair(nn.Conv3d(8, 8, 1), nn.Conv3d(8, 8, 1, groups=8)) == [("row", False), ("left", False)]
    with pytest.raises(ValueError, match="no partner"): plan_split(nn.ModuleDict(dict(a=nn.Conv3d(8, 8, 1))), 2, pairs=(("a", "b"),))

def test_every_convolution_of_the_published_model_is_planned():
    with torch.device("meta"): model = VideoDCAE()
    plan = plan_split(model, 2, pairs=PAIRS, also=ALSO)
    assert {s.name for s in plan} == {n for n, m in model.named_modules() if isinstance(m, nn.Conv3d)} and {s.why.split(" ", 1)[0] for s in plan if s.how == "left"} == {"in"}
    assert sum(s.parameters for s in plan if s.how != "left") > 0.95 * sum(p.numel() for p in model.parameters()) and sum(s.paired for s in plan) == 2 * (6 + 9)


# ---- sizes ----
def test_sizes_are_those_of_the_tensors():
    with torch.device("meta"): model = nn.Sequential(nn.Conv3d(3, 8, (1, 3, 5), (1, 2, 2), (0, 1, 2)), nn.SiLU(), nn.Conv3d(8, 8, 3, padding=1, groups=8))
    sizes = layer_sizes(model, lambda m: m(torch.empty(2, 3, 4, 10, 12, device="meta")))
    assert [(s.name, s.kind, s.inputs, s.outputs, s.columns) for s in sizes] == [("0", "Conv3d", 2 * 3 * 480, 2 * 8 * 4 * 5 * 6, 2 * 4 * 5 * 6 * 3 * 15), ("1", "SiLU", 1920, 1920, 0), ("2", "Conv3d", 1920, 1920, 240 * 27)]
    assert [s.name for s in overflows_int32(model, lambda m: m(torch.empty(2, 3, 4, 10, 12, device="meta")), limit=2000)] == ["0"]
    assert [s.name for s in overflows_int32(model, lambda m: m(torch.empty(2, 3, 4, 10, 12, device="meta")), columns=True, limit=2880)] == ["0", "2"]
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="meta device"): layer_sizes(nn.Conv3d(3, 3, 1), lambda m: m)

def test_the_limit_itself_fits():
    fits = LayerSize("a", "Conv3d", INT32, INT32, INT32, (8, 8))
    assert ways_to_mend(fits) == Mend(1, 1, (1, 1)) and ways_to_mend(LayerSize("a", "Conv3d", INT32 + 1, 5, 5, (8, 8))) == Mend(None, 2, (2, 1))

def test_ways_to_mend():
    layer = lambda inputs, outputs, columns=1, channels=(12, 12): LayerSize("a", "Conv3d", inputs, outputs, columns, channels)
    assert ways_to_mend(layer(10, 45), limit=10) == Mend(6, None, (1, 6)) and ways_to_mend(layer(45, 10), limit=10) == Mend(None, 6, (6, 1)) and ways_to_mend(layer(45, 31), limit=10) == Mend(None, None, (6, 4))
    assert ways_to_mend(layer(10, 10, 1000), limit=10) == Mend(1, 1, (1, 1)) and ways_to_mend(layer(10, 10, 1000), columns=True, limit=10) == Mend(None, None, None)
    for wrong in (LayerSize("a", "SiLU", 1, 1), LayerSize("a", "Conv3d", 1, 1, 1, (4, 4), groups=4)):
        with pytest.raises(ValueError, match="no convolution that can be split"): ways_to_mend(wrong)

def test_what_autograd_keeps_is_counted_once():
    linear, x = nn.Linear(4, 4), noise(8, 4).requires_grad_()
    _, bytes_ = saved_bytes(lambda: linear(x).exp().sum(), linear)
    assert bytes_ == 2 * 8 * 4 * 4                                              # the input and the exponential, not the weight
