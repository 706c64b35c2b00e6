"`optimize` and what it exchanges: the same numbers, the same gradients, the same parameters, for every geometry that the autoencoders have."
import copy
import pytest, torch, torch.nn as nn
import torch.nn.functional as F
from opensora_nb.autoencoder import speed
from opensora_nb.autoencoder.dc_ae import Conv3d, Depthwise, Down, VideoDCAE, VideoDCAEConfig, shortcut_down, shortcut_up
from opensora_nb.autoencoder.hunyuan import HunyuanVAE, HunyuanVAEConfig
from opensora_nb.autoencoder.speed import FastConv3d, FastDepthwise, FoldedDown, FoldedUp, averaged_down, convolution, doubled_convolution, optimize, parity_weights, with_shortcut_down
WIDE = VideoDCAEConfig(8, ("ResBlock", "ResBlock", "EViTS5_GLU"), (64, 64, 64), (1, 1, 1), (64, 64, 64), (1, 1, 1), (True, False, False), (True, False, False))

def near(a, b, share=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= share * b.abs().max(), float((a - b).abs().max() / b.abs().max())

def gradients(y, weigh, wrt): return torch.autograd.grad((y * weigh).sum(), wrt)

@pytest.fixture
def everywhere(monkeypatch):
    "Exchanged ways are taken whatever they gain."
    monkeypatch.setattr(speed, "LEAST_MULTIPLICATIONS", 0); monkeypatch.setattr(speed, "LEAST_POSITIONS", 0); monkeypatch.setattr(FoldedUp, "least", 1)

def model(seed=0):
    torch.manual_seed(seed)
    m = VideoDCAE(WIDE)
    for name, p in m.named_parameters():
        if name.endswith("norm.weight"): nn.init.ones_(p)
    return m

@pytest.mark.parametrize("frames", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("kernel, stride, padding", [((3, 3, 3), (1, 1, 1), (1, 1, 1)), ((3, 3, 3), (1, 2, 2), (1, 1, 1)), ((3, 2, 2), (1, 1, 1), (1, 1, 1)), ((3, 3, 3), (1, 1, 1), (0, 0, 0)), ((3, 1, 1), (1, 1, 1), (1, 0, 0))])
@pytest.mark.parametrize("bias", [True, False])
def test_winograd_over_time_is_the_convolution_forward_and_backward(everywhere, frames, kernel, stride, padding, bias):
    if padding[0] == 0 and frames < 4: pytest.skip("a bare convolution of two or three frames has one frame or none")
    g = torch.Generator().manual_seed(frames)
    x, w = torch.randn(2, 5, frames, 6, 7, generator=g, requires_grad=True), (torch.randn(4, 5, *kernel, generator=g) / 10).requires_grad_()
    b = torch.randn(4, generator=g, requires_grad=True) if bias else None
    ours, plain = speed._TimeWinograd.apply(x.contiguous(memory_format=torch.channels_last_3d), w, b, stride, padding), F.conv3d(x, w, b, stride, padding)
    near(ours, plain)
    assert not ours._is_view() and ours.is_contiguous(memory_format=torch.channels_last_3d), "a layer behind it may add in place"
    weigh, wrt = torch.randn(plain.shape, generator=g), [t for t in (x, w, b) if t is not None]
    traced = speed._traced_winograd(x, w, b, padding, stride)
    near(traced, plain)
    for a, c, d in zip(gradients(ours, weigh, wrt), gradients(plain, weigh, wrt), gradients(traced, weigh, wrt)): near(a, c); near(d, c)

@pytest.mark.parametrize("size, chosen", [((1, 32, 6, 32, 32), False), ((2, 32, 6, 64, 64), True), ((1, 640, 2, 8, 8), False)])
def test_a_compiler_is_given_winograd_where_it_pays(size, chosen):
    torch.compiler.reset()
    x, w, seen = torch.zeros(size), torch.zeros(size[1], size[1], 3, 3, 3), []
    def look(graph, _): seen.extend(str(node.target) for node in graph.graph.nodes); return graph.forward
    assert torch.compile(lambda x, w: convolution(x, w, None, (1, 1, 1)), backend=look, fullgraph=True)(x, w).shape == x.shape
    assert any("conv2d" in s for s in seen) == chosen and any("conv3d" in s for s in seen) != chosen

@pytest.mark.parametrize("size, stride, chosen", [((1, 64, 6, 64, 64), (1, 1, 1), True), ((1, 64, 6, 64, 64), (1, 2, 2), False), ((1, 64, 2, 32, 32), (1, 1, 1), False), ((1, 640, 2, 12, 16), (1, 1, 1), False)])
def test_winograd_is_chosen_where_it_pays(monkeypatch, size, stride, chosen):
    called, original = [], speed._TimeWinograd.apply
    monkeypatch.setattr(speed._TimeWinograd, "apply", lambda *args: called.append(1) or original(*args))
    w = torch.zeros(size[1], size[1], 3, 3, 3)
    assert convolution(torch.zeros(size), w, None, (1, 1, 1), stride).shape[1] == size[1] and bool(called) == chosen

@pytest.mark.parametrize("frames", [5, 8, 13])
def test_a_large_clip_goes_through_in_stretches_and_nothing_changes(everywhere, monkeypatch, frames):
    x, w, b = torch.randn(2, 3, frames, 5, 4, requires_grad=True), torch.randn(4, 3, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    whole = convolution(x, w, b, (1, 1, 1))
    weigh = torch.randn_like(whole)
    wanted = gradients(whole, weigh, (x, w, b))
    original = speed._stretches
    monkeypatch.setattr(speed, "_stretches", lambda frame, frames: original(2**20, frames))
    pieces = convolution(x, w, b, (1, 1, 1))
    near(pieces, whole, 1e-6)
    for a, c in zip(gradients(pieces, weigh, (x, w, b)), wanted): near(a, c, 1e-5)

def test_only_what_needs_a_gradient_gets_one(everywhere):
    x, w = torch.randn(1, 4, 4, 5, 5), torch.randn(4, 4, 3, 3, 3, requires_grad=True)
    convolution(x, w, None, (1, 1, 1)).sum().backward()
    assert w.grad is not None and x.grad is None
    x.requires_grad_(); w = w.detach()
    convolution(x, w, None, (1, 1, 1)).sum().backward()
    assert x.grad is not None

@pytest.mark.parametrize("temporal", [True, False])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 4, 3), (3, 2, 5)])
def test_folded_upsampling_is_doubling_and_convolving_forward_and_backward(everywhere, temporal, size):
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(2, 6, *size, generator=g, requires_grad=True), (torch.randn(4, 6, 3, 3, 3, generator=g) / 10).requires_grad_(), torch.randn(4, generator=g, requires_grad=True)
    ours, plain = doubled_convolution(x, w, b, temporal), F.conv3d(F.interpolate(x, scale_factor=(2 if temporal else 1, 2, 2)), w, b, padding=1)
    near(ours, plain)
    assert not ours._is_view()
    weigh = torch.randn(plain.shape, generator=g)
    for a, c in zip(gradients(ours, weigh, (x, w, b)), gradients(plain, weigh, (x, w, b))): near(a, c)

@pytest.mark.parametrize("c_in, c_out", [(8, 4), (4, 4), (4, 8), (8, 2), (2, 8), (16, 4)])
@pytest.mark.parametrize("temporal", [True, False])
def test_the_shortcut_is_added_where_it_belongs(everywhere, c_in, c_out, temporal):
    g, factors = torch.Generator().manual_seed(0), (2 if temporal else 1, 2, 2)
    x, w, b = torch.randn(2, c_in, 3, 4, 2, generator=g, requires_grad=True), torch.randn(c_out, c_in, 3, 3, 3, generator=g, requires_grad=True), torch.zeros(c_out)
    ours, plain = doubled_convolution(x, w, b, temporal, shortcut=True), F.conv3d(F.interpolate(x, scale_factor=factors), w, b, padding=1) + shortcut_up(x, c_out, factors)
    near(ours, plain)
    weigh = torch.randn(plain.shape, generator=g)
    for a, c in zip(gradients(ours, weigh, (x, w)), gradients(plain, weigh, (x, w))): near(a, c)

@pytest.mark.parametrize("c_in, c_out, factors", [(4, 8, (1, 2, 2)), (4, 8, (2, 2, 2)), (4, 4, (2, 2, 2)), (4, 16, (1, 2, 2)), (8, 4, (1, 2, 2)), (6, 4, (2, 2, 2)), (8, 2, (1, 1, 1)), (1, 1, (2, 2, 2))])
def test_averaging_first_is_the_shortcut_down_forward_and_backward(c_in, c_out, factors):
    x = torch.randn(2, c_in, 4, 6, 8, requires_grad=True)
    ours, plain = averaged_down(x, c_out, factors), shortcut_down(x, c_out, factors)
    near(ours, plain, 1e-6)
    weigh = torch.randn_like(plain)
    near(gradients(ours, weigh, x)[0], gradients(plain, weigh, x)[0], 1e-6)

@pytest.mark.parametrize("c_in, c_out", [(8, 4), (4, 4), (4, 8), (2, 8), (16, 4)])
@pytest.mark.parametrize("temporal, frames", [(False, 4), (True, 4), (True, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_down_is_one_convolution_forward_and_backward(monkeypatch, c_in, c_out, temporal, frames, dtype):
    torch.manual_seed(0)
    plain, x = Down(c_in, c_out, temporal).to(dtype), torch.randn(2, c_in, frames, 8, 6, dtype=dtype, requires_grad=True)
    fast = optimize(nn.Sequential(copy.deepcopy(plain)))[0]
    used, original = [], speed.averaged_down
    monkeypatch.setattr(speed, "averaged_down", lambda *args: used.append(1) or original(*args))
    ours, wanted = fast(x), plain(x)
    assert bool(used) == (dtype == torch.bfloat16), "1/2 beside a weight of bfloat16 would cost it its bits"
    near(ours, wanted, share := 2e-2 if dtype == torch.bfloat16 else 2e-6)
    weigh = torch.randn_like(wanted)
    for a, b in zip(gradients(ours, weigh, (x, fast.main.conv.weight, fast.main.conv.bias)), gradients(wanted, weigh, (x, plain.main.conv.weight, plain.main.conv.bias))): near(a, b, share)

def test_the_shortcut_that_weights_carry_is_the_shortcut_alone():
    x = torch.randn(1, 6, 4, 4, 4)
    near(F.conv3d(x, with_shortcut_down(torch.zeros(4, 6, 3, 3, 3), (2, 2, 2)), stride=2, padding=1), shortcut_down(x, 4, (2, 2, 2)), 1e-6)

@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast"])
def test_a_filter_for_each_channel_has_the_same_gradients(kernel, bias, way):
    torch.manual_seed(0)
    plain = Depthwise(6, kernel, bias)
    if way == "bfloat16": plain.bfloat16()
    fast, x = FastDepthwise(copy.deepcopy(plain)), torch.randn(2, 6, 3, 5, 4, dtype=plain.weight.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"): ours, wanted = fast(x), plain(x)
    assert ours.dtype == wanted.dtype
    near(ours, wanted, share := 2e-6 if way == "float32" else 2e-2)
    weigh = torch.randn_like(wanted)
    for a, b in zip(gradients(ours, weigh, (x, *fast.parameters())), gradients(wanted, weigh, (x, *plain.parameters()))): assert a.dtype == b.dtype; near(a, b, share)
    fast.weight.requires_grad_(False)
    near(torch.autograd.grad(fast(x).square().sum(), x)[0], torch.autograd.grad(plain(x).square().sum(), x)[0], share)

def test_the_folded_weights_of_a_parity_add_up_to_all_weights():
    w = torch.randn(3, 2, 3, 3, 3)
    for temporal, shape in ((True, (2, 2, 2, 3, 2, 2, 2, 2)), (False, (1, 2, 2, 3, 3, 2, 2, 2))):
        k = parity_weights(w, temporal)
        assert k.shape == shape
        near(k.sum((4, 5, 6)), w.sum((2, 3, 4)).expand(*shape[:3], 3, 2), 1e-5)

@pytest.mark.parametrize("T", [1, 2, 8])
def test_an_optimized_autoencoder_gives_the_same_numbers_and_gradients(everywhere, T):
    plain, video = model(), torch.randn(1, 3, T, 16, 12, generator=torch.Generator().manual_seed(1))
    fast = optimize(copy.deepcopy(plain))
    assert sum(isinstance(m, FoldedUp) for m in fast.modules()) == sum(isinstance(m, FoldedDown) for m in fast.modules()) == 2 and any(isinstance(m, FastConv3d) for m in fast.modules())
    with torch.no_grad():
        near(fast.encode(video), latent := plain.encode(video), 1e-4)
        near(fast.decode(latent, T), plain.decode(latent, T), 1e-4)
    for m in (plain, fast): m(video).square().mean().backward()
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (name, p), (other, q) in zip(plain.named_parameters(), fast.named_parameters()):
        assert name == other and (p.grad is None) == (q.grad is None)
        if p.grad is not None: assert (p.grad - q.grad).abs().max() < 1e-3 * largest, name

def test_parameters_names_and_the_optimizer_that_holds_them_stay():
    m = model()
    before, names = {id(p) for p in m.parameters()}, list(m.state_dict())
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    assert optimize(m) is m and {id(p) for p in m.parameters()} == before and list(m.state_dict()) == names
    weight = m.decoder.stages[0].op_list[0].main["conv"].conv.weight
    was = weight.detach().clone()
    m(torch.randn(1, 3, 4, 8, 8)).square().mean().backward(); optimizer.step()
    assert not torch.equal(weight, was)

def test_optimizing_twice_or_after_loading_is_harmless():
    m = optimize(model(0))
    kinds = [type(x) for x in m.modules()]
    assert [type(x) for x in optimize(m).modules()] == kinds
    m.load_state_dict(model(1).state_dict())
    video = torch.randn(1, 3, 4, 8, 8)
    with torch.no_grad(): near(m(video), model(1)(video), 1e-4)

def test_grouped_strided_in_time_and_foreign_layers_are_left_alone():
    class Mine(nn.Conv3d): pass
    net = nn.Sequential(Depthwise(8, 3), nn.Conv3d(8, 8, 1), nn.Conv3d(8, 8, 3, padding=1, groups=2), Mine(8, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate"), nn.Conv3d(8, 8, 3, padding=1), Conv3d(8, 8, 3, 2, 1))
    kinds = [type(m) for m in optimize(copy.deepcopy(net))]
    assert kinds[2:5] == [type(m) for m in net][2:5] and kinds[:2] + kinds[5:] == [FastDepthwise, FastConv3d, FastConv3d, FastConv3d]
    x = torch.randn(1, 8, 4, 6, 6)
    with torch.no_grad(): near(optimize(copy.deepcopy(net))(x), net(x))

def test_recomputing_blocks_goes_on_working(everywhere):
    m, video = optimize(model()), torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    m(video).square().mean().backward()
    expected = [p.grad.clone() for p in m.parameters() if p.grad is not None]
    m.zero_grad(set_to_none=True); m.checkpoint_blocks(True)
    m(video).square().mean().backward()
    for a, p in zip(expected, (p for p in m.parameters() if p.grad is not None)): near(p.grad, a, 1e-4)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_the_ordinary_convolution_and_the_folded_upsampling(everywhere, dtype):
    m = model().to(dtype)
    fast, video = optimize(copy.deepcopy(m)), torch.randn(1, 3, 4, 8, 8, dtype=dtype)
    with torch.no_grad(): near(fast(video), m(video), 5e-2 if dtype == torch.bfloat16 else 1e-5)

def test_autocast_is_obeyed(everywhere):
    fast, video = optimize(model()), torch.randn(1, 3, 4, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): assert fast.decoder.stages[0].op_list[0].main["conv"](torch.randn(1, 64, 2, 4, 4)).dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): near(fast(video).float(), model()(video).float(), 5e-2)

@pytest.mark.parametrize("frames, kernel", [(2, (3, 3, 3)), (1, (2, 2, 2)), (1, (3, 3, 3)), (3, (3, 3, 3))])
def test_no_gradient_is_left_unwritten_in_bfloat16(frames, kernel):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 32, frames, 8, 8, generator=g), torch.randn(32, 32, *kernel, generator=g, requires_grad=True)
    plain = F.conv3d(x, w, padding=1)
    weigh = torch.randn(plain.shape, generator=g)
    expected, = gradients(plain, weigh, (w,))
    for _ in range(3):
        used = [torch.full((2**n,), torch.nan) for n in range(8, 20)]                 # memory as a long run leaves it
        del used
        with torch.autocast("cpu", torch.bfloat16): ours = convolution(x, w, None, (1, 1, 1))
        near(gradients(ours.float(), weigh, (w,))[0], expected, 0.05)

def test_each_length_is_compiled_for_itself(monkeypatch):
    torch.compiler.reset()
    compile, seen = nn.Module.compile, []
    def look(graph, _):
        given = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        seen.append([n for x in given for n in (x.shape if isinstance(x, torch.Tensor) else [x])])
        return graph.forward
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile(self, backend=look, **how))
    net, plain = (optimize(VideoDCAE(VideoDCAEConfig(4, ("ResBlock", "ResBlock"), (8, 8), (1, 1), (8, 8), (1, 1), (True, False), (True, False))), compile=c) for c in (True, False))
    plain.load_state_dict(net.state_dict())
    for frames in (4, 8, 12):
        video = torch.randn(1, 3, frames, 8, 8, generator=torch.Generator().manual_seed(0))
        near(net.encode(video), plain.encode(video))
    assert len(seen) == 3 and all(type(n) is int for sizes in seen for n in sizes), "numbers, not symbols: with gradients PyTorch 2.13 fails at code for all lengths at once"

@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["dc-ae", "causal"])
def test_encoder_and_decoder_compile_into_one_graph_each(kind, grad):
    net = optimize(copy.deepcopy(model()) if kind == "dc-ae" else HunyuanVAE(HunyuanVAEConfig((8, 16, 16, 16), layers_per_block=1, norm_num_groups=4)).eval())
    video = torch.randn(1, 3, 8 if kind == "dc-ae" else 9, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad):
        latent = net.encode(video)
        clip = net.decode(latent, video.shape[2])
        for part in (net.encoder, net.decoder): part.compile(backend="eager", fullgraph=True)          # fullgraph: raises where the graph breaks
        near(net.encode(video), latent); near(net.decode(latent, video.shape[2]), clip)
