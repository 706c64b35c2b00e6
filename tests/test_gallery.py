"What is kept of clips, what is found again, and the maker that fills the gallery: with the pocket models, a few steps each."
import json, math, shlex, threading
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np
import pytest, tyro
from PIL import Image
from opensora_nb.cluster.files import UserError
from opensora_nb.commands.generate import Config
from opensora_nb.inference.gallery import Gallery, Kept, Wish, clip_maker, distance, xray
from opensora_nb.inference.pipelines import AnyToVideo, settings_of
from opensora_nb.inference.workshop import Desk, Turns

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)

@pytest.mark.parametrize("wish", [Wish(), Wish("it's \"hot\"; rm -rf $HOME", "p 1.png", 0.5, 1.0, 0.0, False, False, False, 7, 2**31, "heun", 0.05, 16), Wish("ein Würfel 方块")])
def test_a_command_says_what_the_wish_says(wish):
    said = tyro.cli(Config, args=shlex.split(wish.command("pictures"))[2:])
    assert said.prompt == (wish.prompt,) and said.image == (None if wish.picture is None else Path("pictures") / wish.picture) and said.guidance == wish.guidance
    assert (said.motion_score, said.seed, said.steps or 30, said.num_frames or 32, said.solver, said.cache) == (wish.motion_score, wish.seed, wish.steps, wish.num_frames, wish.solver, wish.cache)

def test_a_wish_survives_its_way_through_json_and_nothing_else_comes_in():
    wish = Wish("a", "b.png", text=1.0)
    assert Wish.of(json.loads(json.dumps(asdict(wish)))) == wish
    for said in (dict(wish="x"), dict(steps="3"), dict(steps=True), dict(text=[1]), dict(text=math.inf), dict(prompt=""), dict(prompt=None), dict(picture=1), dict(dynamic_image=1)):
        with pytest.raises(UserError) as e: Wish.of(said)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="negative"): Wish(text=-1.0).guidance

def test_distance_counts_notches_and_knows_no_other_prompt():
    a = Wish()
    assert distance(a, a) == 0 and distance(a, replace(a, motion_score=5.0)) == 2 and distance(a, replace(a, text=8.0, motion_score=4.5)) == pytest.approx(2 ** 0.5)
    for other in (replace(a, prompt="b"), replace(a, seed=1), replace(a, steps=31), replace(a, dynamic_image=False)): assert distance(a, other) == math.inf

def test_a_gallery_is_read_by_the_next_process_as_it_was_left(tmp_path):
    gallery, wishes = Gallery(tmp_path), [Wish(motion_score=float(k)) for k in range(4)]
    made = [gallery.keep(FRAMES, w, dict(prompt=w.prompt), 0.5) for w in wishes]
    again = Gallery(tmp_path)
    assert [k.wish for k in again.list()] == wishes[::-1] and again.list() == gallery.list() and again.find(wishes[2]) == made[2]
    assert settings_of(made[1].path)["wish"] == asdict(wishes[1]), "the file itself says it"
    assert again.nearest(Wish(motion_score=2.2))[0] == made[2] and again.nearest(Wish(motion_score=2.2), most=0.1) is None
    made[2].path.unlink()
    assert again.find(wishes[2]) is None and len(again.list()) == 3

def test_many_writers_lose_nothing(tmp_path):
    threads = [threading.Thread(target=lambda k=k: Gallery(tmp_path).keep(FRAMES, Wish(seed=k), {}, 0.1)) for k in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert {k.wish.seed for k in Gallery(tmp_path).list()} == set(range(8))

def test_pictures_are_kept_once_and_asked_for_by_plain_names(tmp_path):
    gallery = Gallery(tmp_path)
    cmyk = tmp_path / "in.tif"; Image.fromarray(FRAMES[0]).convert("CMYK").save(cmyk)
    names = {gallery.add_picture(FRAMES[0]), gallery.add_picture(Image.fromarray(FRAMES[0])), gallery.add_picture(cmyk)}
    assert len(names) <= 2 and all(gallery.picture(n).is_file() for n in names)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="not a picture"): gallery.add_picture(tmp_path / "text.png")
    for name in ("../in.tif", "/etc/passwd", "..", "", "a\0b"):
        with pytest.raises((UserError, ValueError)): gallery.picture(name)
    with pytest.raises(UserError, match="is a file"): Gallery(cmyk)

@pytest.fixture(scope="module")
def pipeline(): return AnyToVideo.from_pretrained()

@pytest.mark.slow
def test_the_maker_makes_what_the_pipeline_makes_shows_steps_and_answers_again_at_once(pipeline, tmp_path):
    gallery, heard = Gallery(tmp_path), []
    wish = Wish("a green ball falling", gallery.add_picture(np.full((64, 64, 3), 90, np.uint8)), steps=4, num_frames=8, text=2.0)
    desk = Desk(clip_maker(pipeline, gallery), Turns(), heard.append)
    desk.ask(dict(wish=asdict(wish))); assert desk.idle.wait(120)
    assert heard[-1]["event"] == "done", heard[-1]
    assert [e["done"] for e in heard if e["event"] == "step"] == [1, 2, 3, 4] and sum(e["event"] == "preview" for e in heard) == 2
    kept = gallery.find(wish)
    clips = pipeline(wish.prompt, [gallery.picture(wish.picture)], seed=wish.seed, motion_score=wish.motion_score, steps=4, num_frames=8, guidance=wish.guidance)
    clips.save(tmp_path / "same.mp4")
    from opensora_nb.data.video import decode
    assert np.array_equal(decode(kept.path), decode(tmp_path / "same.mp4"))
    desk.ask(dict(wish=asdict(wish))); assert desk.idle.wait(120) and heard[-1] == dict(event="done", number=2, seconds=heard[-1]["seconds"], clip=kept.path.name, cached=True)
    desk.ask(dict(xray=kept.path.name, step=1, frame=1)); assert desk.idle.wait(120) and set(heard[-1]["xray"]) >= {"nothing", "the image", "guided", "text term"}
    for request, why in ((dict(wish=dict(steps=0)), "steps"), (dict(wish=dict(num_frames=3)), "frames"), (dict(wish=dict(picture="no.png")), "no picture"), (dict(xray="no.mp4"), "no such clip"), (dict(xray=kept.path.name, step=9), "steps 0 to 3")):
        desk.ask(request); assert desk.idle.wait(120) and heard[-1]["event"] == "failed" and why in heard[-1]["why"], heard[-1]
    assert len(gallery.list()) == 1 and not [p for p in (tmp_path / "clips").iterdir() if p.name.startswith(".")]

@pytest.mark.slow
def test_guided_is_the_walks_own_velocity_in_every_frame_and_step(pipeline, tmp_path):
    import torch
    gallery, wish = Gallery(tmp_path), None
    wish = Wish("two cubes", gallery.add_picture(FRAMES[0].repeat(2, 0).repeat(2, 1)), steps=12, num_frames=12)
    seen, cfg = [], wish.sample(pipeline)
    from opensora_nb.inference.given import given_pixels
    from opensora_nb.inference.image_to_video import SOLVERS
    from opensora_nb.flow.guidance import guidance_plan
    given = {e: pipeline.sampler.encode(x[None]) for e, x in given_pixels("i2v_head", [gallery.picture(wish.picture)], (cfg.height, cfg.width), False, 4, cfg.fps).items()}
    walk = lambda velocity, noise, ts: SOLVERS["euler"](velocity, noise, ts, callback=lambda step, t, x, v: seen.append((x[0], v[0])))
    pipeline.sampler.sample_latent([wish.prompt], given, cfg, [wish.seed], kind="i2v_head", solver=walk)
    kept = gallery.keep(FRAMES, wish, {}, 1.0, states=[x for x, _ in seen])
    for step, frame in ((0, 0), (3, 2), (11, 1)):                       # full, dynamic, one that oscillation has set to 1
        found = xray(pipeline, gallery, kept, step, frame)
        from opensora_nb.inference.gallery import decoded_frames
        from opensora_nb.flow.matching import estimate_data
        exact = decoded_frames(pipeline, estimate_data(seen[step][0], seen[step][1], found["t"])[None], [frame])[0]
        assert np.abs(found["pictures"]["guided"].astype(int) - exact).mean() < 1.5, (step, frame)      # half precision of the kept state
