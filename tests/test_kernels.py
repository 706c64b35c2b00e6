"The Triton kernels against their plain twins, forward and backward, in Triton's interpreter; that they compile for a Hopper card; and what is said where they cannot run."
import json, os, subprocess, sys
from importlib.util import find_spec
import pytest, torch
from opensora_nb.cluster.files import UserError
from opensora_nb.mmdit.kernels import PLAIN, Linear, choose_kernels
from opensora_nb.mmdit.model import MMDiT, MMDiTConfig

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")

CHILD = '''
import json, sys, torch
from dataclasses import replace
from opensora_nb.mmdit.kernels import PLAIN, choose_kernels
from opensora_nb.mmdit.model import MMDiT, pocket
from opensora_nb.mmdit.rope import rope_table
TRITON, found, g = choose_kernels("triton"), {}, torch.Generator().manual_seed(0)
def made(*shape, dtype=torch.float32): return torch.randn(*shape, generator=g).to(dtype).requires_grad_()
def results(step, tensors, dtype):
    y = step(*tensors)
    return [y, *torch.autograd.grad(y, tensors, torch.cos(torch.arange(y.numel())).view(y.shape).to(dtype).to(y.dtype))]      # the same incoming gradient, rounded alike
def compare(name, step, tensors):
    "Largest difference from the plain step; and of each number from the exact one, in units of what rounding it may cost."
    low = tensors[0].dtype
    ours, plain, exact = results(lambda *t: step(TRITON, *t), tensors, low), results(lambda *t: step(PLAIN, *t), tensors, low), results(lambda *t: step(PLAIN, *t), [t.detach().float().requires_grad_() for t in tensors], low)
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(ours, plain)), name
    found[name] = [((a - b).float().abs().max() / b.float().abs().max()).item() for a, b in zip(ours, plain)], max((((a.float() - e).abs() - 1e-5 * e.abs().max()) / (e.abs() + 1e-9)).max().item() for a, e in zip(ours, exact))

wide = made(2, 71, 24 * 3)
for dtype in (torch.float32, torch.bfloat16):
    cut = wide.detach().to(dtype)[:, 3:, 24:48].requires_grad_()                                # rows that are not dense
    compare(f"modulate {dtype}", lambda k, x, s, t: k.modulate(x, s, t), [cut, *(t.detach().requires_grad_() for t in made(2, 1, 48, dtype=dtype).chunk(2, -1))])
    compare(f"gated_add {dtype}", lambda k, x, gate, y: k.gated_add(x, gate, y), [cut, made(2, 1, 24, dtype=dtype), made(2, 68, 24, dtype=dtype)])
    for layout in ("half", "interleaved"):
        for d, axes in ((12, (4, 4, 4)), (32, (8, 12, 12))):
            rope = rope_table(torch.randint(0, 60, (2, 40, 3), generator=g).float(), axes, layout="interleaved")         # each row of the batch its own
            if layout == "half": rope = [t[0] for t in rope]
            xs = [made(2, n, 3 * 3 * d, dtype=dtype).detach()[..., 3 * d : 6 * d].unflatten(-1, (3, d)).requires_grad_() for n in (5, 35)]
            compare(f"norm_rotate {dtype} {layout} {d}", lambda k, a, b, s, t: k.norm_rotate((a, b), (s, t), rope, layout), [*xs, made(d, dtype=dtype), made(d, dtype=dtype)])

def grown(cfg):
    torch.manual_seed(0)
    model = MMDiT(cfg)
    with torch.no_grad():
        for n, p in model.named_parameters(): p.normal_(float(n.endswith("scale")), p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1)
    return model
small = replace(pocket(), hidden_size=32, num_heads=2, axes_dim=(4, 6, 6), depth=1, depth_single_blocks=1, context_in_dim=24, vec_in_dim=20)
for name, cfg in {"video": small, "image": replace(small, fused_qkv=True, rope_layout="interleaved")}.items():
    model, B, L = grown(cfg), 2, 6
    given = dict(img=made(B, L, 16), img_ids=torch.randint(0, 9, (B, L, 3), generator=g).float(), txt=made(B, 5, 24), txt_ids=torch.zeros(B, 5, 3), timesteps=torch.rand(B, generator=g), y_vec=made(B, 20), cond=made(B, L, 17))
    def step(kernels, **how):
        model.use(kernels=kernels); model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(how)): out = model(**given)
        out.float().square().mean().backward()
        return [out, *(p.grad.clone() for p in model.parameters())]
    ours, plain, low, exact = step("triton"), step("torch"), step("triton", low=True), step("torch", low=True)
    assert low[0].dtype == exact[0].dtype
    found["model " + name] = [((a - b).abs().max() / max(x.abs().max() for x in plain[1:])).item() for a, b in zip(ours[1:], plain[1:])] + [((ours[0] - plain[0]).abs().max() / plain[0].abs().max()).item()], 0.0
    found["autocast " + name] = [((low[0].float() - plain[0]).norm() / plain[0].norm()).item()], 0.0
print(json.dumps(found))
'''

@pytest.fixture(scope="module")
def found():
    "Everything in one fresh process: the interpreter must be chosen before Triton is imported, and must not be left on for other tests."
    r = subprocess.run([sys.executable, "-c", CHILD], env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout.splitlines()[-1])

@needs_triton
@pytest.mark.slow
def test_kernels_equal_their_plain_twins(found):
    steps = {name: v for name, v in found.items() if "torch." in name}
    assert len(steps) == 12
    for name, (differences, beyond) in steps.items():
        if "float32" in name: assert max(differences) < 1e-5, name
        else: assert max(differences) < 2e-2 and beyond < 2 ** -7, name        # computed in float32 and stored once: the interpreter cuts digits off where a card rounds

@needs_triton
@pytest.mark.slow
def test_a_model_with_kernels_has_the_same_output_and_gradients(found):
    for name in ("model video", "model image"): assert max(found[name][0]) < 1e-5, name
    for name in ("autocast video", "autocast image"): assert max(found[name][0]) < 0.03, name

COMPILE = '''
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import opensora_nb.mmdit.kernels as K
found = {}
def go(kernel, pointers, sizes):
    fn = K._compiled(kernel)
    kind = lambda name: "constexpr" if name in sizes else pointers.get(name, "*bf16" if name.isupper() else "i32")
    made = compile(ASTSource(fn, {name: kind(name) for name in fn.arg_names}, {(fn.arg_names.index(name),): value for name, value in sizes.items()}), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8))
    found[f"{kernel.__name__} {sizes}"] = len(made.asm["cubin"])
full = dict(EPS=1e-6, WIDTH=4096)
go(K._modulate, {}, full)
go(K._modulate_back, dict(DSHIFT="*fp32", DSCALE="*fp32"), full | dict(ROWS=K.ROWS))
for layout in (dict(STEP=1, GAP=64), dict(STEP=2, GAP=1)):
    heads = dict(EPS=1e-6, HEADS=32, HALF=64) | layout
    go(K._norm_rotate, dict(COS="*fp32", SIN="*fp32"), heads)
    go(K._norm_rotate_back, dict(COS="*fp32", SIN="*fp32", DSCALE="*fp32"), heads | dict(ROWS=K.ROWS))
go(K._gated_add, {}, dict(WIDTH=4096))
go(K._gated_add_back, dict(DGATE="*fp32"), dict(WIDTH=4096, ROWS=K.ROWS))
print(json.dumps(found))
'''

@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_hopper_card_at_the_full_size():
    "The interpreter takes more than the compiler does; the compiler needs no card to say so."
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    r = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert len(made := json.loads(r.stdout.splitlines()[-1])) == 8 and all(size > 1000 for size in made.values())

def test_kernels_that_cannot_run_are_refused_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="'torch' or 'triton', not 'cuda'"): choose_kernels("cuda")
    assert choose_kernels("torch") is PLAIN
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if find_spec("triton"):
        with pytest.raises(UserError, match="need a GPU"): choose_kernels("triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="pip install triton"): choose_kernels("triton")

def test_the_library_is_imported_without_triton():
    r = subprocess.run([sys.executable, "-c", "import sys; sys.modules['triton'] = None; import opensora_nb.mmdit.model as m; print(m.MMDiT(m.pocket()).use().cfg == m.pocket())"], capture_output=True, text=True)
    assert r.stdout.strip() == "True", r.stderr

@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_by_onednn_is_the_same_layer(bias):
    layer, g = Linear(20, 36, bias=bias), torch.Generator().manual_seed(0)
    fast = Linear(20, 36, bias=bias); fast.load_state_dict(layer.state_dict()); fast.onednn = True
    for x in (torch.randn(2, 7, 20, generator=g), torch.randn(3, 20, generator=g), torch.randn(2, 7, 40, generator=g)[..., ::2]):
        x.requires_grad_()
        for a, b in zip(*((y := m(x), *torch.autograd.grad(y.cos().sum(), (x, *m.parameters()))) for m in (fast, layer))): assert torch.allclose(a, b, atol=1e-4)
    fast.weight.requires_grad_(False)
    fast(torch.randn(2, 20)).sum()                                                               # a frozen layer, an input without gradient
    with torch.autocast("cpu", torch.bfloat16): assert fast(x).dtype == torch.bfloat16
    assert fast.double()(x.double()).dtype == torch.float64
    torch.library.opcheck(torch.ops.opensora_nb.linear.default, (torch.randn(2, 3, 20), torch.randn(36, 20), torch.randn(36)))
