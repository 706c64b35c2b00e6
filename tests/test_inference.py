"From prompt and image to a clip: what decides it, what must not, and which model passes are run."
from dataclasses import replace

import pytest
import torch

from opensora_nb.autoencoder import dc_ae
from opensora_nb.autoencoder.dc_ae import VideoDCAE
from opensora_nb.cluster.files import UserError
from opensora_nb.flow.guidance import Guidance, guidance_plan, image_strength, text_strength
from opensora_nb.flow.schedule import shift_alpha, timesteps, tokens_per_frame
from opensora_nb.inference.image_to_video import ImageToVideo, SampleConfig
from opensora_nb.mmdit import model as mmdit
from opensora_nb.mmdit.conditioning import image_condition, model_inputs, pack, unpack
from opensora_nb.mmdit.model import MMDiT
from opensora_nb.mmdit.text import TextEncoder, decorate

TINY_AE = replace(dc_ae.pocket(), enc_width=(8, 16, 32, 32), dec_width=(8, 16, 32, 32), enc_depth=(0, 1, 1, 1), dec_depth=(0, 1, 1, 1), scaling_factor=0.7)
TINY_MMDIT = replace(mmdit.pocket(), hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=1)
CFG = SampleConfig(num_frames=12, height=24, width=32, steps=6, guidance=Guidance(steady_steps=2))      # T' = 3, H' = 3, W' = 4
PROMPTS = ["a red circle", "two blue squares rolling", "snow"]


def grown(model, seed=0):
    "A model in the middle of its life: no zeros left, so that text, image and time all matter."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * (0.7 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1 and not seed and 0.2))
    return model.eval()

@pytest.fixture(scope="module")
def text(): return TextEncoder()

@pytest.fixture(scope="module")
def pipe(text): return ImageToVideo(grown(VideoDCAE(TINY_AE)), grown(MMDiT(TINY_MMDIT), 1), text)

def pictures(n=3, h=24, w=32): return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(9)) * 2 - 1

def close(a, b, rel=1e-4): return a.shape == b.shape and (a - b).abs().max() <= rel * b.abs().max()      # float32 sums in another order

def error(work, *words):
    "The one line of the UserError that `work` raises."
    with pytest.raises(UserError) as e: work()
    line = str(e.value)
    assert "\n" not in line and all(w in line for w in words), line

class Counted:
    "The model, and how many rows it was shown in each call."
    def __init__(self, model): self.model, self.rows = model, []
    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(lambda m, args, kwargs: self.rows.append(len(kwargs["img"])), with_kwargs=True)
        return self
    def __exit__(self, *error): self.hook.remove()

@torch.no_grad()
def by_hand(pipe, prompts, reference, cfg, seeds):
    "All three passes at every step, one at a time, and the report's formula written out."
    C, T, H, W = pipe.autoencoder.latent_shape(cfg.num_frames, cfg.height, cfg.width)
    x = torch.stack([torch.randn(C, T, H, W, generator=torch.Generator().manual_seed(s)) for s in seeds])
    tokens, pooled = pipe.text([decorate(p, cfg.fps, cfg.motion_score) for p in prompts])
    no_tokens, no_pooled = (v.expand(len(prompts), *v.shape[1:]) for v in pipe.text([cfg.negative_prompt]))
    nothing = torch.zeros(len(prompts), 1 + C, T, H, W)
    given = nothing if reference is None else image_condition(x.shape, {0: reference}, "i2v_head")
    ts = timesteps(cfg.steps, shift_alpha(tokens_per_frame(H, W, 1), T)).tolist()
    g_texts, g_images = text_strength(cfg.guidance, cfg.steps), image_strength(cfg.guidance, cfg.steps, T)
    for i in range(cfg.steps):
        v = lambda tok, vec, cond: unpack(pipe.model(**model_inputs(x, torch.full((len(prompts),), ts[i]), tok, vec, cond)), T, H, W)
        both, image, none = v(tokens, pooled, given), v(no_tokens, no_pooled, given), v(no_tokens, no_pooled, nothing)
        g_image = g_images[i].view(1, 1, T, 1, 1)
        x = x + (ts[i + 1] - ts[i]) * (none + g_image * (image - none) + g_texts[i] * (both - image))
    return x


# ---- what decides a clip ----
@pytest.mark.parametrize("images", [None, pictures()], ids=["text", "image"])
def test_the_same_seed_gives_the_same_clip_and_another_seed_another(pipe, images):
    a, b = pipe(PROMPTS, images, CFG, [5, 6, 7]), pipe(PROMPTS, images, CFG, [5, 6, 7])
    assert a.shape == (3, 3, 12, 24, 32) and torch.isfinite(a).all() and torch.equal(a, b) and a.min() >= -1 and a.max() <= 1
    c = pipe(PROMPTS[:1] * 2, None if images is None else images[:1].expand(2, -1, -1, -1), CFG, [5, 6])
    assert close(c[:1], a[:1]) and not close(c[1:], a[:1], 0.05)

def test_the_global_random_state_is_neither_read_nor_moved(pipe):
    torch.manual_seed(0); a = pipe(PROMPTS[:1], None, CFG, [5]); after = torch.rand(1)
    torch.manual_seed(0); assert torch.equal(torch.rand(1), after)
    torch.manual_seed(1); assert torch.equal(pipe(PROMPTS[:1], None, CFG, [5]), a)

@pytest.mark.parametrize("images", [None, pictures()], ids=["text", "image"])
def test_neighbours_in_the_batch_do_not_matter(pipe, images):
    all_three = pipe(PROMPTS, images, CFG, [5, 6, 7])
    for i in range(3): assert close(pipe(PROMPTS[i : i + 1], None if images is None else images[i : i + 1], CFG, [5 + i]), all_three[i : i + 1])

def test_prompt_image_motion_score_and_negative_prompt_all_matter(pipe):
    x = pictures(1)
    run = lambda prompt="a red circle", image=x, **changes: pipe([prompt], image, replace(CFG, write_back=False, **changes), [5])
    clips = [run(), run("a blue circle"), run(image=-x), run(image=None), run(motion_score=7), run(negative_prompt="blurry"), run(fps=12), run(motion_score=None), run(steps=7)]
    for i, a in enumerate(clips):
        for b in clips[:i]: assert not torch.allclose(a, b, atol=1e-3)

def test_seeds_count_from_zero_by_default(pipe):
    assert torch.equal(pipe(PROMPTS, None, CFG), pipe(PROMPTS, None, CFG, [0, 1, 2]))


# ---- guidance ----
GUIDANCES = {"report": Guidance(), "oscillating early": Guidance(steady_steps=1), "steady": Guidance(text_oscillation=False, image_oscillation=False), "not dynamic": Guidance(dynamic_image=False, steady_steps=0),
             "plain": Guidance(text=1, image=1), "text only": Guidance(text=4, image=1), "image only": Guidance(text=0, image=2), "nothing": Guidance(text=0, image=0)}

@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_passes_that_are_left_out_change_nothing(pipe, guidance, image):
    cfg = replace(CFG, guidance=guidance, write_back=False, steps=12 if guidance == Guidance() else 5, negative_prompt="grey")
    reference = pipe.autoencoder.encode(pictures(2).unsqueeze(2)).detach() if image else None
    assert close(pipe.sample_latent(PROMPTS[:2], reference, cfg, [1, 2]), by_hand(pipe, PROMPTS[:2], reference, cfg, [1, 2]))

@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_as_many_rows_are_computed_as_the_plan_says(pipe, image):
    cfg = replace(CFG, steps=14, guidance=Guidance())
    with Counted(pipe.model) as counted: pipe(PROMPTS[:2], pictures(2) if image else None, cfg, [1, 2])
    plan = [2 * len(s.passes) for s in guidance_plan(cfg.guidance, 14, 3, has_image=image)]
    assert counted.rows == plan == ([6] * 10 + [6, 2, 6, 2] if image else [4] * 10 + [4, 2, 4, 2])

def test_progress_is_told_after_each_step(pipe):
    told = []
    pipe(PROMPTS[:1], None, CFG, [1], callback=lambda done, steps: told.append((done, steps)))
    assert told == [(i, 6) for i in range(1, 7)]

def test_what_the_callback_raises_stops_the_sampling(pipe):
    def stop(done, steps):
        if done == 2: raise KeyboardInterrupt
    with Counted(pipe.model) as counted, pytest.raises(KeyboardInterrupt): pipe(PROMPTS[:1], None, CFG, [1], callback=stop)
    assert len(counted.rows) == 2


# ---- the image ----
@torch.no_grad()
def test_the_reference_is_written_back_in_all_rows_and_nowhere_else(pipe):
    reference = pipe.autoencoder.encode(pictures().unsqueeze(2))
    free, written = (pipe.sample_latent(PROMPTS, reference, replace(CFG, write_back=w), [1, 2, 3]) for w in (False, True))
    assert torch.equal(written[:, :, :1], reference) and torch.equal(written[:, :, 1:], free[:, :, 1:])
    assert all(not close(free[i, :, :1], reference[i], 0.05) for i in range(3))

def test_each_row_gets_its_own_image(pipe):
    x = pictures(2)
    a, b = pipe(PROMPTS[:1] * 2, x, CFG, [1, 1]), pipe(PROMPTS[:1] * 2, x.flip(0), CFG, [1, 1])
    assert close(a, b.flip(0)) and not close(a[:1], a[1:], 1e-3)

def test_text_to_video_needs_no_input_for_an_image(pipe, text):
    t2v = ImageToVideo(pipe.autoencoder, grown(MMDiT(replace(TINY_MMDIT, cond_embed=False)), 2), text)
    assert t2v(PROMPTS[:1], None, CFG, [1]).shape == (1, 3, 12, 24, 32)
    error(lambda: t2v(PROMPTS[:1], pictures(1), CFG, [1]), "takes no image")


# ---- shapes ----
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 8, 11, 13])
def test_every_length_is_possible_with_and_without_an_image(pipe, num_frames):
    cfg = replace(CFG, num_frames=num_frames, height=16, width=16, steps=2)
    assert pipe(PROMPTS[:1], None, cfg, [1]).shape == (1, 3, num_frames, 16, 16)
    if num_frames > 4: assert pipe(PROMPTS[:1], pictures(1, 16, 16), cfg, [1]).shape == (1, 3, num_frames, 16, 16)
    else: error(lambda: pipe(PROMPTS[:1], pictures(1, 16, 16), cfg, [1]), f"a clip of {num_frames} frames", "ask for more than 4 frames")     # not left out without a word

def test_patches_of_two_work_as_well(text):
    pipe = ImageToVideo(grown(VideoDCAE(TINY_AE)), grown(MMDiT(replace(TINY_MMDIT, in_channels=64, patch_size=2)), 1), text)
    assert pipe(PROMPTS[:1], pictures(1, 32, 48), replace(CFG, height=32, width=48, steps=2), [1]).shape == (1, 3, 12, 32, 48)
    error(lambda: pipe(PROMPTS[:1], None, replace(CFG, height=24, width=32), [1]), "multiples of 16", "24 x 32")


# ---- faults ----
def test_models_that_do_not_belong_together_are_one_line(pipe, text):
    error(lambda: ImageToVideo(VideoDCAE(replace(TINY_AE, latent_channels=8)), pipe.model, text), "8 latent channels", "16", "do not belong together")
    error(lambda: ImageToVideo(pipe.autoencoder, MMDiT(replace(TINY_MMDIT, context_in_dim=100)), text), "100 and 384", "384 and 384", "do not belong together")

@pytest.mark.parametrize("bad", [dict(num_frames=0), dict(height=0), dict(width=-8), dict(steps=0)], ids=str)
def test_settings_that_make_no_sense_are_one_line(bad): error(lambda: replace(CFG, **bad), next(iter(bad)), "at least 1")

def test_a_size_that_does_not_divide_is_one_line(pipe): error(lambda: pipe(PROMPTS[:1], None, replace(CFG, height=60), [1]), "multiples of 8", "60 x 32")

def test_an_image_of_another_size_is_refused(pipe):
    with pytest.raises(ValueError, match="24 x 32"): pipe(PROMPTS[:1], pictures(1, 32, 32), CFG, [1])

@pytest.mark.parametrize("images, seeds", [(None, [1]), (None, [1, 2, 3]), (pictures(1), [1, 2]), (pictures(3), [1, 2])])
def test_seeds_and_images_must_be_as_many_as_prompts(pipe, images, seeds):
    with pytest.raises(ValueError, match="2 prompts need as many"): pipe(PROMPTS[:2], images, CFG, seeds)

@pytest.mark.parametrize("bad", [dict(motion_score=-1), dict(motion_score=float("nan")), dict(fps=-24)], ids=str)
def test_numbers_that_no_text_can_say_are_one_line(bad): error(lambda: replace(CFG, **bad), next(iter(bad)))
