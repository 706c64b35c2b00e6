"Flow matching, schedule, guidance and solver: properties over many inputs."
import itertools, math, subprocess, sys

import pytest
import torch

from opensora_nb.flow.guidance import PASSES, Guidance, coefficients, guidance_plan, guide, image_strength, oscillate, passes_needed, per_token, text_strength
from opensora_nb.flow.matching import estimate_data, flow_loss, interpolate, target_velocity
from opensora_nb.flow.schedule import linear_scale, sample_training_t, shift, shift_alpha, timesteps, tokens_per_frame, training_t
from opensora_nb.flow.solver import euler

ALPHAS = (0.1, 0.5, 1.0, 3.0, 11.87, 40.0)

def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- matching ----
def test_velocity_is_the_derivative_of_the_road():
    x0, x1, t, h = noise(8, 4, 3, 2, 2).double(), noise(8, 4, 3, 2, 2, seed=1).double(), torch.linspace(0.01, 0.99, 8).double(), 1e-4
    slope = (interpolate(x0, x1, t + h) - interpolate(x0, x1, t - h)) / (2 * h)
    assert torch.allclose(slope, target_velocity(x0, x1), atol=1e-8)

def test_one_step_with_the_true_velocity_reaches_the_data():
    x0, x1, t = noise(64, 5), noise(64, 5, seed=1), torch.rand(64, generator=torch.Generator().manual_seed(2))
    reached = estimate_data(interpolate(x0, x1, t), target_velocity(x0, x1), t)
    assert (reached - x0).abs().max() < 1e-4                             # s = 1e-5 times noise, and rounding
    assert torch.allclose(euler(lambda x, t, step: target_velocity(x0, x1), x1, timesteps(9, 4.0)), x0, atol=1e-4)

def test_each_sample_has_its_own_time():
    with pytest.raises(ValueError): interpolate(noise(3, 2), noise(3, 2), torch.rand(2))

def test_loss_is_computed_in_float32():
    a, b = torch.full((2, 4096), 300.0, dtype=torch.bfloat16), torch.full((2, 4096), 299.0, dtype=torch.bfloat16)
    assert flow_loss(a, b) == (a[0, 0].float() - b[0, 0].float()) ** 2

def test_loss_without_given_frames_ignores_them_and_weighs_samples_alike():
    prediction, target = noise(2, 4, 3, 2, 2), noise(2, 4, 3, 2, 2, seed=1)
    keep = torch.ones(2, 1, 3, 1, 1); keep[0, :, 0] = 0                  # sample 0 is conditioned on its first frame
    expected = ((prediction[0, :, 1:] - target[0, :, 1:]).square().mean() + (prediction[1] - target[1]).square().mean()) / 2
    assert torch.allclose(flow_loss(prediction, target, keep), expected)
    prediction[0, :, 0] = 1e6
    assert torch.allclose(flow_loss(prediction, target, keep), expected)
    assert torch.isfinite(flow_loss(prediction, target, torch.zeros(2, 1, 3, 1, 1)))


# ---- schedule ----
@pytest.mark.parametrize("alpha", ALPHAS)
def test_shift_keeps_ends_and_order_and_is_undone_by_its_inverse(alpha):
    t = torch.linspace(0, 1, 501).double()
    moved = shift(t, alpha)
    assert moved[0] == 0 and moved[-1] == 1 and (moved.diff() > 0).all()
    assert torch.allclose(shift(moved, 1 / alpha), t, atol=1e-12)
    assert ((moved - t)[1:-1] * math.copysign(1, alpha - 1) >= 0).all()  # towards noise exactly where alpha > 1

@pytest.mark.parametrize("steps, alpha", list(itertools.product((1, 2, 7, 50, 1000), ALPHAS)))
def test_sampling_times_fall_from_noise_to_data(steps, alpha):
    ts = timesteps(steps, alpha)
    assert ts.shape == (steps + 1,) and ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()

@pytest.mark.parametrize("alpha", ALPHAS)
def test_training_times_are_a_logit_normal_moved_by_the_log_of_alpha(alpha):
    logit = sample_training_t(50_000, alpha, torch.Generator().manual_seed(0)).double().logit()
    assert logit.mean().item() == pytest.approx(math.log(alpha), abs=0.02) and logit.std().item() == pytest.approx(1, abs=0.02)

def test_training_and_sampling_share_one_map():
    "The q-quantile of training times is the shifted q-quantile of unshifted ones, as the sampler's steps are shifted even steps."
    n, alpha = noise(1001).sort().values, shift_alpha(576, 32)
    assert torch.allclose(training_t(n, alpha), shift(training_t(n), alpha)) and torch.allclose(timesteps(50, alpha), shift(timesteps(50), alpha))

def test_the_releases_training_differs_only_without_patches():
    for h, w in ((24, 42), (72, 128), (18, 32)):
        assert tokens_per_frame(h, w, 2) == tokens_per_frame(h, w, 2, like_release=True)
        assert tokens_per_frame(h, w, 1) == 4 * tokens_per_frame(h, w, 1, like_release=True)

def test_alpha_grows_with_every_dimension_and_is_not_clamped():
    assert shift_alpha(252, 33) < shift_alpha(576, 33) < shift_alpha(2304, 33) and shift_alpha(2304, 1) < shift_alpha(2304, 9)
    assert linear_scale(0) < 1 and linear_scale(8000) > 3 and linear_scale(256, 0.5, 1.15) == 0.5

@pytest.mark.parametrize("call", (lambda: shift(0.5, 0.0), lambda: shift(0.5, -1.0), lambda: timesteps(0)))
def test_bad_schedules_are_refused(call):
    with pytest.raises(ValueError): call()

def test_same_generator_state_same_times():
    a, b = (sample_training_t(5, 2.0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, sample_training_t(5, 2.0, torch.Generator().manual_seed(4)))


# ---- guidance ----
CONFIGS = [Guidance(text, image, *flags, steady) for text, image, flags, steady in itertools.product(
    (7.5, 1.0, 3.0, 0.0), (3.0, 1.0, 0.5), itertools.product((True, False), repeat=3), (10, 0))]

def formula(v1, v2, v3, g_text, g_image): return v3 + g_image * (v2 - v3) + g_text * (v1 - v2)

@pytest.mark.parametrize("frames", (1, 2, 5))
def test_leaving_passes_out_is_exact_at_every_step_of_every_setting(frames):
    v = dict(zip(PASSES, noise(3, 2, frames * 4, 6)))
    for cfg in CONFIGS:
        for step in guidance_plan(cfg, 16, frames):
            g_image = per_token(step.image, frames * 4)
            made = guide(*(v[name] if name in step.passes else None for name in PASSES), step.text, g_image)
            assert torch.allclose(made, formula(*v.values(), step.text, g_image), atol=2e-5), (cfg, step)

def test_no_pass_is_left_out_that_counts():
    v = dict(zip(PASSES, noise(3, 2, 20, 6)))
    for cfg in CONFIGS:
        for step in guidance_plan(cfg, 16, 5):
            for missing in step.passes:
                with pytest.raises(ValueError, match=missing):
                    guide(*(None if name == missing else v[name] for name in PASSES), step.text, per_token(step.image, 20))

def test_without_an_image_two_passes_give_what_three_would():
    v1, v3 = noise(2, 2, 20, 6)
    for cfg in CONFIGS:
        image = image_strength(cfg, 16, 5)
        for i, step in enumerate(guidance_plan(cfg, 16, 5, has_image=False)):
            assert "image" not in step.passes
            made = guide(v1 if "text_image" in step.passes else None, None, v3 if "none" in step.passes else None, step.text, per_token(step.image, 20))
            assert torch.allclose(made, formula(v1, v3, v3, step.text, per_token(image[i], 20)), atol=2e-5)

def test_fifty_steps_take_110_passes_with_an_image_and_80_without():
    count = lambda plan: sum(len(step.passes) for step in plan)
    assert count(guidance_plan(Guidance(), 50, 33)) == 110 and count(guidance_plan(Guidance(), 50, 33, has_image=False)) == 80
    assert count(guidance_plan(Guidance(text_oscillation=False, image_oscillation=False), 50, 33)) == 150

def test_dynamic_guidance_keeps_the_pass_that_its_first_frame_does_not_need():
    step = guidance_plan(Guidance(), 50, 33)[0]
    assert step.image[0] == 1 and passes_needed(step.text, step.image[0]) == ("text_image", "image") and step.passes == PASSES

def test_image_strength_lies_between_1_and_the_scale_and_falls_along_the_steps():
    for scale, frames, steps in itertools.product((1.0, 2.0, 3.0, 9.0), (1, 2, 8, 33), (1, 9, 50)):
        table = image_strength(Guidance(image=scale, image_oscillation=False), steps, frames)
        assert table.shape == (steps, frames) and table.min() >= 1 and table.max() <= scale and (table[:, 0] == 1).all()
        assert (table.diff(dim=0) <= 0).all() and (table.diff(dim=1) >= 0).all()

def test_a_scale_below_one_is_left_as_it_is(): assert image_strength(Guidance(image=0.5, image_oscillation=False), 6, 4).eq(0.5).all()

def test_both_scales_drop_at_the_same_steps():
    text, image = text_strength(Guidance(), 50), image_strength(Guidance(), 50, 4)
    assert torch.equal(text == 1, (image == 1).all(1)) and [oscillate(2.0, i, 0) for i in range(4)] == [2, 1, 2, 1]

def test_coefficients_add_up_to_one():
    for g_text, g_image in itertools.product((0.0, 1.0, 7.5), repeat=2): assert sum(coefficients(g_text, g_image)).item() == pytest.approx(1)

def test_bfloat16_passes_are_combined_in_float32():
    v = [x.bfloat16() for x in noise(3, 2, 12, 6)]
    assert torch.allclose(guide(*v, 7.5, 3.0), formula(*(x.float() for x in v), 7.5, 3.0), atol=2e-5)


# ---- solver ----
def gaussian(m, c): return lambda x, t, step: (t - (1 - t) * c ** 2) / ((1 - t) ** 2 * c ** 2 + t ** 2) * (x - (1 - t) * m) - m

@pytest.mark.parametrize("m, c, alpha", list(itertools.product((-3.0, 0.0, 2.0), (0.1, 1.0, 2.0), (0.5, 1.0, 3.0))))
def test_a_gaussian_is_reached_with_an_error_of_first_order(m, c, alpha):
    x1 = noise(64).double()
    error = [(euler(gaussian(m, c), x1, timesteps(n, alpha)) - (m + c * x1)).square().mean().sqrt().item() for n in (100, 200)]
    assert error[0] < 0.15 and 1.8 < error[0] / error[1] < 2.2

def test_solver_asks_at_each_time_once_and_in_order():
    asked, ts = [], timesteps(6, 3.0)
    euler(lambda x, t, step: asked.append((step, t)) or torch.zeros_like(x), torch.zeros(2), ts)
    assert asked == list(enumerate(ts[:-1].tolist()))

def test_a_walk_in_pieces_is_the_walk_in_one():
    x, ts, v = noise(16), timesteps(12, 3.0), gaussian(1.0, 0.5)
    for cut in range(13): assert torch.equal(euler(v, euler(v, x, ts, stop=cut), ts, start=cut), euler(v, x, ts))

def test_an_error_in_the_callback_stops_the_walk():
    steps = []
    def stop(step, t, x, v):
        steps.append(step)
        if step == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): euler(gaussian(0.0, 1.0), noise(4), timesteps(10), stop)
    assert steps == [0, 1, 2, 3]

def test_state_keeps_its_dtype_and_noise_is_not_written_to():
    x = noise(4); before = x.clone()
    assert euler(lambda x, t, step: x.bfloat16(), x, timesteps(3)).dtype == torch.float32 and torch.equal(x, before)


# ---- imports ----
def test_flow_and_conditioning_need_neither_decoders_nor_transformers():
    modules = "flow.matching flow.schedule flow.guidance flow.solver flow.cache flow.presets mmdit.conditioning mmdit.text".split()
    code = "import sys\n" + "\n".join(f"import opensora_nb.{m}" for m in modules) + "\nprint([m for m in ('transformers', 'av', 'cv2', 'polars', 'matplotlib', 'scipy', 'PIL', 'tyro') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
