"Solvers of second order, guidance that oscillates, passes together and one by one, what a walk can be asked to do."
import itertools, math

import pytest
import torch

from opensora_nb.cluster.files import UserError
from opensora_nb.flow.cache import StepCache
from opensora_nb.flow.guidance import PASSES, Guidance, Passes, guidance_plan, guide, image_strength, interval_of_times, per_token, single_scale, text_strength
from opensora_nb.flow.presets import PRESETS, preset
from opensora_nb.flow.schedule import timesteps
from opensora_nb.flow.solver import SOLVERS, Cancelled, adams_bashforth, euler, heun, taking_turns, watch

def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def gaussian(m, c): return lambda x, t, step=None: (t - (1 - t) * c ** 2) / ((1 - t) ** 2 * c ** 2 + t ** 2) * (x - (1 - t) * m) - m
def rms(x): return x.square().mean().sqrt().item()


# ---- order ----
@pytest.mark.parametrize("name, m, c, alpha", [(n, *rest) for n in ("heun", "adams_bashforth") for rest in itertools.product((-2.0, 1.0), (0.3, 2.0), (0.5, 1.0, 3.0))])
def test_error_of_second_order_whatever_the_data_and_the_steps(name, m, c, alpha):
    x = noise(64).double()
    error = [rms(SOLVERS[name](gaussian(m, c), x, timesteps(n, alpha).double()) - (m + c * x)) for n in (128, 256)]
    assert 3.4 < error[0] / error[1] < 4.6, error

@pytest.mark.parametrize("alpha, steady", list(itertools.product((1.0, 3.0), (0, 1, 3, 4))))
def test_two_fields_in_turns_reach_their_mean_with_second_order(alpha, steady):
    "A steady part first, as long as it likes, then turns; the truth is the strong field alone and then the mean, in as many small steps."
    strong, plain, x, shares = gaussian(2.0, 0.5), gaussian(-1.0, 1.5), noise(32).double(), steady / 8
    mean = lambda x, t, step: strong(x, t) if step < 1024 * shares else (strong(x, t) + plain(x, t)) / 2
    truth = heun(mean, x, timesteps(1024, alpha).double())
    def error(n, known):
        ts, cut = timesteps(n, alpha).double(), round(n * shares)
        kinds = ["strong" if i < cut or (i - cut) % 2 == 0 else "plain" for i in range(n)]
        made = adams_bashforth(lambda x, t, step: (strong if kinds[step] == "strong" else plain)(x, t), x, ts, kinds=kinds if known else None)
        return rms(made - truth)
    knowing, blind = [error(n, True) for n in (64, 128)], [error(n, False) for n in (64, 128)]
    assert knowing[0] / knowing[1] > 3 and blind[0] / blind[1] < 2.8 and knowing[1] < 0.4 * blind[1], (knowing, blind)

def test_steps_of_one_kind_are_the_textbook_method():
    x, ts, v = noise(16).double(), timesteps(20, 3.0).double(), gaussian(1.0, 0.5)
    plain = adams_bashforth(v, x, ts)
    assert torch.equal(plain, adams_bashforth(v, x, ts, kinds=["a"] * 20))
    by_hand, before, times = x, None, ts.tolist()
    for t, to in zip(times, times[1:]):
        now = v(by_hand, t)
        by_hand, before = by_hand + (to - t) * (now if before is None else now + (now - before[1]) * (to - t) / 2 / (t - before[0])), (t, now)
    assert torch.allclose(plain, by_hand, atol=1e-12)

def test_a_kind_that_returns_after_a_long_time_is_not_extrapolated_over_the_gap():
    x, ts = torch.zeros(1).double(), timesteps(12).double()
    kinds = ["a", "a"] + ["b"] * 8 + ["a", "a"]
    fields = {0: 0.0, 1: 5.0}                                                    # the first two say that "a" is rising steeply
    v = lambda x, t, step: torch.full_like(x, fields.get(step, 1.0))
    def spoiled(step): return adams_bashforth(v, x, ts, kinds=kinds, stop=step + 1) - adams_bashforth(v, x, ts, kinds=kinds, stop=step)
    assert spoiled(10).item() == pytest.approx(-1 / 12) and spoiled(2).item() == pytest.approx(-1 / 12)

def test_turns_are_seen_wherever_they_begin():
    kinds = [s.passes for s in guidance_plan(Guidance(), 30, 5)]
    assert [bool(taking_turns(kinds, i)) for i in range(30)] == [False] * 10 + [True] * 20
    assert taking_turns(kinds, 29) == (PASSES, ("text_image",)) or taking_turns(kinds, 29) == (("text_image",), PASSES)
    assert not any(taking_turns([s.passes for s in guidance_plan(Guidance(interval=(0.3, 0.7), text_oscillation=False, image_oscillation=False), 30, 5)], i) for i in range(30))
    assert not any(taking_turns("ab", i) for i in range(2))


# ---- what all solvers share ----
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_share_their_manners(name):
    solve, x = SOLVERS[name], noise(3, 2)
    before = x.clone()
    assert torch.allclose(solve(lambda x, t, step: torch.full_like(x, 2.0), x, timesteps(7, 3.0)), x - 2, atol=1e-5) and torch.equal(x, before)
    assert solve(lambda x, t, step: x.bfloat16(), x, timesteps(3)).dtype == torch.float32
    assert torch.equal(solve(gaussian(0.0, 1.0), x, timesteps(5), stop=0), x)
    with pytest.raises(ValueError, match="not within"): solve(gaussian(0.0, 1.0), x, timesteps(5), start=6)
    with pytest.raises(ValueError, match="shape"): solve(lambda x, t, step: x[:1], x, timesteps(5))
    seen = []
    solve(gaussian(0.0, 1.0), x, timesteps(6), lambda step, t, x, v: seen.append(step), start=2, kinds=["a", "b"] * 3)
    assert seen == [2, 3, 4, 5]

def test_heun_in_pieces_is_heun_in_one():
    x, ts, v = noise(16), timesteps(12, 3.0), gaussian(1.0, 0.5)
    for cut in range(13): assert torch.equal(heun(v, heun(v, x, ts, stop=cut), ts, start=cut), heun(v, x, ts))

def test_calls_of_the_velocity():
    for name, wanted in (("euler", 9), ("adams_bashforth", 9), ("heun", 17)):
        asked = []
        SOLVERS[name](lambda x, t, step: asked.append((step, t)) or torch.zeros_like(x), torch.zeros(2), timesteps(9, 2.0))
        assert len(asked) == wanted and [s for s, _ in asked] == sorted(s for s, _ in asked) and all(t > 0 for _, t in asked)

def test_wrong_number_of_kinds_is_refused():
    with pytest.raises(ValueError, match="3 kinds for 5 steps"): adams_bashforth(gaussian(0.0, 1.0), noise(4), timesteps(5), kinds="abc")


# ---- progress, preview, cancel ----
@pytest.mark.parametrize("name", SOLVERS)
def test_a_walk_is_cancelled_before_the_step_moves_and_asks_nothing_more(name):
    asked, done = [], []
    def velocity(x, t, step): asked.append(step); return gaussian(0.0, 1.0)(x, t)
    with pytest.raises(Cancelled, match="step 5 of 10"): SOLVERS[name](velocity, noise(4), timesteps(10), watch(10, lambda i, n: done.append(i), cancel=lambda: len(done) >= 4))
    assert done == [0, 1, 2, 3] and max(asked) == 4

def test_watching_changes_nothing_and_previews_come_closer():
    x, guesses = noise(64), {}
    ts = timesteps(30, 3.0)
    end = euler(gaussian(1.0, 0.3), x, ts)
    assert torch.equal(end, euler(gaussian(1.0, 0.3), x, ts, watch(30, preview=guesses.__setitem__, every=10)))
    assert list(guesses) == [0, 10, 20, 29]
    distance = [rms(g - end) for g in guesses.values()]
    assert distance == sorted(distance, reverse=True) and distance[-1] < 0.05
    with pytest.raises(ValueError, match="at least 1"): watch(30, every=0)

def test_an_unwatched_walk_is_not_cancelled(): watch(3)(0, 1.0, noise(2), noise(2))


# ---- guidance ----
def test_squares_lie_below_lines_and_meet_them_at_the_ends():
    line = image_strength(Guidance(image_oscillation=False), 20, 9)
    for kw in (dict(frame_scaling="quadratic"), dict(step_scaling="quadratic")):
        square = image_strength(Guidance(image_oscillation=False, **kw), 20, 9)
        assert (square <= line + 1e-6).all() and torch.allclose(square[0, -1], line[0, -1]) and square[:, 0].eq(1).all() and (square < line - 0.01).any()
    k, i = torch.linspace(0, 1, 9), torch.arange(20) / 20
    both = image_strength(Guidance(image_oscillation=False, frame_scaling="quadratic", step_scaling="quadratic"), 20, 9)
    assert torch.allclose(both, 1 + 2 * (1 - i[:, None]) ** 2 * k ** 2, atol=1e-6)

@pytest.mark.parametrize("interval, steps", list(itertools.product(((0.0, 1.0), (0.2, 0.8), (0.5, 1.0), (0.0, 0.1), (0.3, 0.3)), (1, 2, 7, 50))))
def test_outside_the_interval_one_pass_is_enough(interval, steps):
    whole, part = (guidance_plan(Guidance(interval=i), steps, 5) for i in ((0.0, 1.0), interval))
    for i, (a, b) in enumerate(zip(whole, part)):
        inside = interval[0] <= (i + 0.5) / steps <= interval[1]
        assert b.passes == (a.passes if inside else ("text_image",)) and (b.text, b.image.tolist()) == ((a.text, a.image.tolist()) if inside else (1.0, [1.0] * 5))

@pytest.mark.parametrize("steps, alpha", list(itertools.product((3, 10, 50), (0.5, 1.0, 6.0))))
def test_an_interval_of_times_acts_at_these_times(steps, alpha):
    ts = timesteps(steps, alpha)
    for high, low in ((1.0, 0.0), (0.9, 0.2), (0.8, 0.1)):
        acts = text_strength(Guidance(interval=interval_of_times(ts, high, low), text_oscillation=False), steps) > 1
        assert acts.tolist() == [low <= t <= high for t in ts.tolist()[:-1]]

def test_single_scale_is_the_reports_first_formula_in_two_passes():
    v = dict(zip(PASSES, noise(3, 2, 20, 6)))
    for step in guidance_plan(single_scale(5.0), 7, 5):
        assert step.passes == ("text_image", "none")
        assert torch.allclose(step.velocity({n: v[n] for n in step.passes}, per_token(step.image, 20)), v["none"] + 5 * (v["text_image"] - v["none"]), atol=1e-5)

@pytest.mark.parametrize("wrong", (dict(text=math.inf), dict(image=math.nan), dict(text=-1), dict(frame_scaling="cubic"), dict(interval=(0.8, 0.2)), dict(interval=(-0.1, 1)), dict(interval=(0, 1.5))))
def test_bad_guidance_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as e: Guidance(**wrong)
    assert "\n" not in str(e.value)


# ---- passes ----
def tiny_model():
    from opensora_nb.mmdit.model import MMDiT, MMDiTConfig
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(in_channels=8, patch_size=1, context_in_dim=12, vec_in_dim=12, hidden_size=48, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 10, 10))).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.1)
    return model

@torch.no_grad()
def sampled(model, how="batch", steps=14, all_three=False, cache=None, solver="euler"):
    "A latent from a real, tiny transformer under the default guidance; with `all_three` no pass is left out."
    from opensora_nb.mmdit.conditioning import image_condition, model_inputs, unpack
    B, T, H, W = 2, 3, 4, 4
    x1, text, pooled, ref = noise(B, 8, T, H, W), noise(B + 1, 5, 12, seed=1), noise(B + 1, 12, seed=2), noise(B, 8, 1, H, W, seed=3)
    cond = image_condition(x1.shape, {0: ref}, "i2v_head")
    shown = dict(text_image=(text[:B], pooled[:B], cond), image=(text[B:].expand(B, -1, -1), pooled[B:].expand(B, -1), cond), none=(text[B:].expand(B, -1, -1), pooled[B:].expand(B, -1), torch.zeros_like(cond)))
    def run(names, x, t): return model(**model_inputs(torch.cat([x] * len(names)), torch.full((B * len(names),), t), *(torch.cat([shown[n][i] for n in names]) for i in range(3))))
    passes, plan = Passes(run, how, cache), guidance_plan(Guidance(), steps, T)
    def velocity(x, t, step): return unpack(plan[step].velocity(passes(PASSES if all_three else plan[step].passes, x, t), per_token(plan[step].image, T * H * W)), T, H, W)
    return SOLVERS[solver](velocity, x1, timesteps(steps, 2.0), kinds=[s.passes for s in plan]), passes

def test_leaving_passes_out_and_running_them_one_by_one_is_the_same_clip():
    model = tiny_model()
    whole, count = sampled(model, all_three=True)
    for how in ("batch", "single", "auto"):
        clip, passes = sampled(model, how)
        assert (clip - whole).abs().max() < 1e-5 * whole.abs().max() and passes.count == 14 * 3 - 2 * 2 and count.count == 42     # steps 11 and 13 need one pass
    assert passes.how in ("batch", "single") and set(passes.seconds) == {("batch", 3), ("single", 3)}

def test_in_a_release_clip_110_passes_run_instead_of_150_and_nothing_changes_bit_for_bit():
    v = noise(3, 2, 33, 6)
    passes, plan = Passes(lambda names, x, t: torch.cat([v[PASSES.index(n)] for n in names])), guidance_plan(Guidance(), 50, 33)
    for step in plan:
        scale = per_token(step.image, 33)
        assert torch.equal(step.velocity(passes(step.passes, v[0], 1.0), scale), guide(*v, step.text, scale))
    assert passes.count == 110

def test_a_batch_that_does_not_fit_is_run_one_by_one_and_other_errors_are_not_hidden():
    def small(names, x, t):
        if len(names) > 1: raise torch.OutOfMemoryError("CUDA out of memory")
        return x
    passes = Passes(small, "auto")
    assert set(passes(PASSES, noise(2, 3), 1.0)) == set(PASSES) and passes.how == "single"
    with pytest.raises(torch.OutOfMemoryError): Passes(small, "batch")(PASSES, noise(2, 3), 1.0)
    def broken(names, x, t): raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"): Passes(broken, "auto")(PASSES, noise(2, 3), 1.0)
    with pytest.raises(ValueError, match="not 'both'"): Passes(small, "both")


# ---- presets ----
def test_presets_fit_the_pipelines_config():
    from opensora_nb.inference.image_to_video import SampleConfig
    for name in PRESETS:
        p = preset(name)
        cfg = SampleConfig(**p.sampling())
        assert (cfg.height, cfg.width, cfg.num_frames, cfg.steps, cfg.guidance) == (*p.size, p.num_frames, 50, Guidance())
        assert p.tokens == math.prod(p.latent_size) // p.model.patch_size ** 2
    with pytest.raises(UserError, match="high_compression"): preset("4k")


# ---- the step cache ----
class Told:
    "A cache that never answers and notes what it is told."
    def __init__(self): self.asked, self.kept = [], []
    def recall(self, name, x, t): self.asked.append((name, t))
    def keep(self, name, x, t, velocity): self.kept.append((name, t, tuple(velocity.shape)))

def test_passes_ask_the_cache_for_each_and_tell_it_of_each():
    clip, passes = sampled(tiny_model(), cache=(told := Told()))
    assert len(told.asked) == len(told.kept) == passes.count == 38 and [k[:2] for k in told.kept] == told.asked and {s for *_, s in told.kept} == {(2, 48, 8)}
    assert torch.equal(clip, sampled(tiny_model())[0])

def test_a_threshold_of_nought_is_off_and_larger_ones_run_fewer_passes_farther_from_the_exact_clip():
    model = tiny_model()
    exact, passes = sampled(model, steps=40)
    off, same = sampled(model, steps=40, cache=StepCache(0.0))
    assert torch.equal(off, exact) and same.count == passes.count
    found = [(sampled(model, steps=40, cache=(cache := StepCache(t))), cache) for t in (1e-4, 0.01, 1.0)]
    counts, errors = [p.count for (_, p), _ in found], [rms(x - exact) / rms(exact) for (x, _), _ in found]
    assert passes.count >= counts[0] > counts[2] and errors[0] <= errors[2] < 0.5 and counts == sorted(counts, reverse=True)
    assert all(p.count + cache.skipped == passes.count for (_, p), cache in found)

@pytest.mark.parametrize("together, most", [(True, 1), (True, 3), (False, 2)])
def test_no_row_of_guesses_is_longer_than_allowed(together, most):
    seen = []
    line = lambda names, x, t: (seen.append((t, names)), torch.full((len(names), 1, 1), 3 * t - 1).double())[1]
    passes = Passes(line, cache=(cache := StepCache(10.0, most, together=together)))
    euler(lambda x, t, i: (seen.append((t, "step")), passes(("text_image",), x, t)["text_image"])[1], torch.zeros(1, 1, 1).double(), timesteps(60).double())
    row = longest = 0
    for _, what in seen:
        row = row + 1 if what == "step" else 0
        longest = max(longest, row - 1)                                   # a step that is followed by its pass is not a guess
    assert cache.skipped > 20 and longest <= most

def test_all_passes_of_a_step_are_left_out_or_none():
    class Watched(Passes):
        def __call__(self, names, x, t):
            before = self.count
            out = super().__call__(names, x, t)
            assert self.count - before in (0, len(names)) or not self.cache.known.keys() >= set(names) or len(self.cache.known["none"]) < 2
            return out
    g = torch.Generator().manual_seed(0)
    smooth, rough = (lambda t: torch.full((1, 4, 1), 1 + t)), (lambda t: 1 + torch.rand(1, 4, 1, generator=g))
    passes = Watched(lambda names, x, t: torch.cat([(rough if n == "none" else smooth)(t) for n in names]), cache=StepCache(0.05))
    for t in torch.linspace(1, 0, 40).tolist(): passes(PASSES, torch.zeros(1, 4, 1), t)
    alone = Passes(lambda names, x, t: torch.cat([(rough if n == "none" else smooth)(t) for n in names]), cache=StepCache(0.05, together=False))
    for t in torch.linspace(1, 0, 40).tolist(): alone(PASSES, torch.zeros(1, 4, 1), t)
    assert passes.cache.skipped < alone.cache.skipped                     # one that nobody can foretell holds the others

def test_a_straight_continuation_is_exact_on_a_line_and_repetition_on_a_constant():
    for straight, v in ((True, lambda t: 5 * t - 2), (False, lambda t: 1.5)):
        cache = StepCache(0.1, straight=straight)
        for t in (1.0, 0.9, 0.7): cache.keep("text_image", noise(1), t, torch.full((1, 2, 2), float(v(t))).double())
        assert torch.allclose(cache.foretell("text_image", 0.2), torch.full((1, 2, 2), float(v(0.2))).double()) and cache.expected("text_image", 0.2) < 1e-9
    assert StepCache(0.1).foretell("image", 0.5) is None and StepCache(0.1).expected("image", 0.5) == math.inf

def test_a_velocity_of_nought_is_no_division_by_nought():
    cache = StepCache(0.1)
    for t in (1.0, 0.9, 0.8, 0.7): cache.keep("none", noise(1), t, torch.zeros(1, 2, 2))
    assert cache.expected("none", 0.6) == 0 and cache.recall("none", noise(1), 0.6).eq(0).all()
