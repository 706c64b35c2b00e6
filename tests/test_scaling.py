"Search among candidates on the way from noise to data: what is kept, what it finds, what it costs."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from opensora_nb.autoencoder import dc_ae
from opensora_nb.autoencoder.dc_ae import VideoDCAE
from opensora_nb.cluster.files import UserError
from opensora_nb.flow.guidance import Guidance
from opensora_nb.flow.matching import interpolate, target_velocity
from opensora_nb.flow.schedule import timesteps
from opensora_nb.flow.solver import euler
from opensora_nb.inference.image_to_video import ImageToVideo, SampleConfig
from opensora_nb.inference.scaling import PRESETS, Cost, ScalingConfig, for_steps, predict, scaled, scaling_study, search, vary, weighted
from opensora_nb.mmdit import model as mmdit
from opensora_nb.mmdit.model import MMDiT
from opensora_nb.mmdit.text import TextEncoder

TS = timesteps(12)


def two_modes(x, t, step):
    "Exact velocity where data is -2 or +2, both as likely."
    likely = torch.sigmoid(4 * (1 - t) * x / max(t, 1e-5) ** 2)
    data = 4 * likely - 2
    return (x - (1 - t) * data) / max(t, 1e-5) - data

def positive(x): return dict(positive=float(x.mean()))

def walk(cfg, seed, verify=positive, rounds=None, velocity=two_modes):
    start = torch.randn(1, 1, generator=torch.Generator().manual_seed(seed))
    return search(velocity, start, TS, verify, cfg, torch.Generator().manual_seed(seed + 10_000), rounds.append if rounds is not None else None)


def test_a_search_finds_the_mode_that_the_verifier_likes():
    share = lambda cfg: np.mean([walk(cfg, seed).item() > 0 for seed in range(80)])
    plain, some, more = share(ScalingConfig((), 0)), share(ScalingConfig((0, 2), 2, strength=0.7)), share(ScalingConfig((0, 1, 2, 3), 5, 3, strength=0.7))
    assert 0.38 < plain < 0.62 and some > plain + 0.15 and more > 0.95

def test_it_finds_the_other_one_where_that_is_liked():
    assert np.mean([walk(ScalingConfig((0, 1, 2), 4, strength=0.7), seed, lambda x: dict(a=-float(x))).item() < 0 for seed in range(30)]) > 0.9

@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_variations_stay_on_the_marginal_and_turn_the_noise_by_as_much_as_asked(t, strength):
    g = torch.Generator().manual_seed(3)
    data, noise = 1 + 0.5 * torch.randn(40_000, generator=g), torch.randn(40_000, generator=g)
    x, v = interpolate(data, noise, torch.full((40_000,), t)), target_velocity(data, noise)
    other = vary(x, v, t, strength, g)
    assert abs(other.mean() - x.mean()) < 0.015 and abs(other.std() / x.std() - 1) < 0.015
    turned = (other - (1 - t) * data) / (1e-5 + (1 - 1e-5) * t)                        # the noise that is in it now
    assert abs(turned.std() - 1) < 0.015 and abs(np.corrcoef(turned, noise)[0, 1] - math.sqrt(1 - strength**2)) < 0.02

def test_no_candidates_or_candidates_all_alike_are_the_plain_walk():
    start = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    plain = euler(two_modes, start, TS)
    for cfg in (ScalingConfig((), 0), ScalingConfig((0, 1, 5), 4), ScalingConfig((2, 3), 3, keep=2), ScalingConfig((1,), 3, strength=0.0)):
        assert torch.allclose(search(two_modes, start, TS, lambda x: dict(a=1.0), cfg, torch.Generator().manual_seed(0)), plain, atol=1e-6)

@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_the_chosen_candidate_is_never_worse_than_going_on_unchanged(seed, lookahead, noises, keep):
    rounds = []
    walk(ScalingConfig((0, 1, 4, 10), 3, noises, lookahead, keep=keep), seed, rounds=rounds)
    assert len(rounds) == 4 + (noises > 1)
    for made in rounds:
        chosen, rest = [c.score for c in made if c.chosen], [c.score for c in made if not c.chosen]
        assert len(chosen) == min(keep, len(made)) and min(chosen) >= max(rest, default=-math.inf)
        assert max(chosen) >= max((c.score for c in made if c.kind == "unchanged"), default=-math.inf)

@given(st.lists(st.integers(0, 9), unique=True, max_size=5), st.integers(0, 4), st.integers(1, 4), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_what_a_search_costs_is_known_before(steps, variations, noises, lookahead, keep):
    cfg, asked, judged, passes = ScalingConfig(tuple(sorted(steps)), variations, noises, lookahead, keep=keep), [0] * 10, [], [3, 3, 3, 1, 2, 1, 3, 1, 3, 1]
    def velocity(x, t, step): asked[step] += 1; return -x
    search(velocity, torch.ones(1, 2), timesteps(10), lambda x: judged.append(1) or dict(a=float(torch.sum(x)), b=0.0), cfg, torch.Generator().manual_seed(0))
    assert predict(cfg, passes, 2) == Cost(sum(asked), sum(n * p for n, p in zip(asked, passes)), len(judged), 2 * len(judged))

def test_presets_are_the_reports_and_shrink_with_the_walk():
    light, thorough = PRESETS["light"], PRESETS["thorough"]
    assert (len(light.steps), light.variations, light.noises) == (8, 3, 1) and (len(thorough.steps), thorough.variations, thorough.noises) == (15, 7, 3)
    assert for_steps(thorough, 10).steps == (0, 1, 2) and for_steps(light, 4).steps == (0,) and for_steps(light, 50) == light

def test_seeds_decide_and_nothing_else():
    cfg = ScalingConfig((0, 1), 3, 2)
    soft = lambda seed: walk(cfg, seed, velocity=lambda x, t, step: 0.5 * x)
    assert torch.equal(soft(5), soft(5)) and not torch.equal(soft(5), soft(6))

def test_weights_and_scales_decide_what_counts():
    scores = dict(smooth=0.95, moves=0.2)
    assert weighted(scores, ScalingConfig(weights=dict(moves=3.0))) == pytest.approx(0.2)
    assert weighted(scores, ScalingConfig(weights=dict(moves=1.0, smooth=3.0))) == pytest.approx((0.2 + 3 * 0.95) / 4)
    assert weighted(scores, ScalingConfig(weights=dict(smooth=1.0), scales=dict(smooth=(0.9, 1.0)))) == pytest.approx(0.5)

@pytest.mark.parametrize("wrong, words", [(dict(steps=(3, 1)), "rising"), (dict(steps=(-1,)), "rising"), (dict(variations=-1), "at least 0"), (dict(noises=0), "at least 1"), (dict(lookahead=0), "at least 1"), (dict(strength=1.5), "between 0 and 1"),
    (dict(weights=dict(a=-1.0)), "not below 0"), (dict(weights=dict(a=0.0)), "not all 0"), (dict(weights=dict(a=float("nan"))), "not below 0"), (dict(scales=dict(a=(1.0, 1.0))), "must rise"), (dict(keep=0), "at least 1")])
def test_settings_that_mean_nothing_are_one_line(wrong, words):
    with pytest.raises(UserError, match=words) as e: ScalingConfig(**wrong)
    assert "\n" not in str(e.value)

def test_bad_input_of_a_search_is_one_line():
    with pytest.raises(UserError, match="more than 12 sampling steps"): walk(ScalingConfig((12,), 1), 0)
    with pytest.raises(ValueError, match="one clip at a time"): search(two_modes, torch.zeros(2, 1), TS, positive, ScalingConfig(), torch.Generator())
    with pytest.raises(ValueError, match="gives nan"): walk(ScalingConfig((1,), 1), 0, lambda x: dict(a=float("nan")))
    with pytest.raises(UserError, match="no verifier measures beauty"): walk(ScalingConfig((1,), 1, weights=dict(beauty=1.0)), 0)


@pytest.fixture(scope="module")
def pipe():
    ae = VideoDCAE(replace(dc_ae.pocket(), enc_width=(8, 16, 32, 32), dec_width=(8, 16, 32, 32), enc_depth=(0, 1, 1, 1), dec_depth=(0, 1, 1, 1), scaling_factor=0.7))
    model = MMDiT(replace(mmdit.pocket(), hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=1))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (*ae.parameters(), *model.parameters()): p.copy_(torch.randn(p.shape, generator=g) * (0.7 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1))
    return ImageToVideo(ae.eval(), model.eval(), TextEncoder())

CFG = SampleConfig(num_frames=12, height=24, width=32, steps=6, guidance=Guidance(steady_steps=2))
def bright(frames): return float(frames.mean()) / 255
def dark(frames): return 1 - bright(frames)
def red(frames): return float(frames[..., 0].mean()) / 255
IMAGE = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(9)) * 2 - 1

@pytest.mark.parametrize("image", [IMAGE, None])
def test_without_candidates_it_is_the_pipelines_own_clip_and_with_some_the_model_is_asked_as_often_as_predicted(pipe, image):
    clip, record = scaled(pipe, "a red circle", image, CFG, ScalingConfig((), 0), dict(bright=bright), seed=3)
    assert torch.allclose(clip, pipe(["a red circle"], image, CFG, [3]), atol=1e-5) and record.rounds == [] and record.counted == record.predicted
    rows = []
    hook = pipe.model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["img"])), with_kwargs=True)
    try: other, record = scaled(pipe, "a red circle", image, CFG, ScalingConfig((0, 2), 2, 2, weights=dict(dark=1.0)), dict(dark=dark, red=red), seed=3)
    finally: hook.remove()
    assert sum(rows) == record.counted.passes == record.predicted.passes and record.counted == record.predicted
    assert len(record.rounds) == 3 and len(record.strips) == record.counted.decodes and record.strips[0].shape == (6, 24, 32, 3)
    assert not torch.equal(other, clip) and set(record.rounds[0][0].scores) == {"dark", "red"}
    for made in record.rounds:
        assert sum(c.chosen for c in made) == 1 and next(c for c in made if c.chosen).scores["dark"] == max(c.scores["dark"] for c in made)
        for c in made: assert 0 <= c.verdict < len(record.strips) and (c.kind != "unchanged" or c.score is not None)
    assert record.counted.seconds(record.unit()) == pytest.approx(sum(record.seconds[k] for k in ("velocity", "decode", "verify")))

def test_candidates_are_judged_with_the_given_image_put_back(pipe):
    seen = []
    first = pipe(["snow"], IMAGE, CFG, [0])[:, :, 0]
    scaled(pipe, "snow", IMAGE, CFG, ScalingConfig((1,), 1), dict(look=lambda frames: seen.append(frames) or 0.0), seed=0)
    reference = pipe.held(IMAGE.unsqueeze(2))[:, :, :1]
    assert len(seen) == 2 and seen[0].shape == (12, 24, 32, 3) and seen[0].dtype == np.uint8
    got = []
    whole = pipe.decode
    pipe.decode = lambda latent, cfg: got.append(latent) or whole(latent, cfg)
    try: scaled(pipe, "snow", IMAGE, CFG, ScalingConfig((1,), 1), dict(bright=bright), seed=0)
    finally: del pipe.decode
    assert all(torch.equal(z[:, :, :1], reference) for z in got) and first.shape == (1, 3, 24, 32)

def test_both_ends_given_stand_in_the_finished_clip_and_in_what_is_judged(pipe):
    ends, got, whole = {0: IMAGE.unsqueeze(2), -1: -IMAGE.unsqueeze(2)}, [], pipe.decode
    pipe.decode = lambda latent, cfg: got.append(latent) or whole(latent, cfg)
    try: clip, record = scaled(pipe, "snow", ends, CFG, ScalingConfig((1,), 1), dict(bright=bright), seed=0)
    finally: del pipe.decode
    assert record.counted == record.predicted and len(got) == 3 and all(torch.equal(z[:, :, e], pipe.held(x)[:, :, e]) for z in got for e, x in ends.items())
    plain, _ = scaled(pipe, "snow", ends, CFG, ScalingConfig((), 0), dict(bright=bright), seed=0)
    assert torch.allclose(plain, pipe(["snow"], IMAGE, CFG, [0], last=-IMAGE), atol=1e-5)

def test_what_cannot_be_searched_is_said_before_any_work(pipe):
    with pytest.raises(UserError, match="at least one verifier"): scaled(pipe, "snow", None, CFG, ScalingConfig(), {})
    with pytest.raises(UserError, match="no verifier measures beauty"): scaled(pipe, "snow", None, CFG, ScalingConfig(weights=dict(beauty=1.0)), dict(bright=bright))
    with pytest.raises(UserError, match="multiples of"): scaled(pipe, "snow", None, replace(CFG, width=30), ScalingConfig(), dict(bright=bright))

def test_a_study_measures_everything_and_chooses_by_what_has_a_weight(pipe):
    kept = []
    budgets = {"none": ScalingConfig((), 0, weights=dict(bright=1.0)), "some": ScalingConfig((0,), 2, weights=dict(bright=1.0))}
    result = scaling_study(pipe, ["snow", "rain"], None, CFG, budgets, dict(bright=bright, red=red), dict(words=lambda frames, prompt: float(len(prompt))), say=lambda line: None, save=lambda r: kept.append(len(r["rows"])))
    assert kept == [2, 4] and [(r["prompt"], r["budget"]) for r in result["rows"]] == [(0, "none"), (0, "some"), (1, "none"), (1, "some")]
    assert all(set(r["scores"]) == {"bright", "red", "words"} and r["scores"]["words"] == 4 and r["counted"] == r["predicted"] for r in result["rows"])
    assert result["rows"][1]["counted"]["verdicts"] == 3
