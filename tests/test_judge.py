"The pocket judge: right on seeds of its own, on spoiled and mirrored clips, unsure where there is nothing to see, one line for what is no clip."
from dataclasses import replace
import cv2, numpy as np, pytest, torch
from opensora_nb.cluster.files import UserError
from opensora_nb.data import world
from opensora_nb.data.world import Truth, render
from opensora_nb.evaluation.judge import ATTRIBUTES, Judge, Verdict, accuracy, agreement, body_places, draw_scenes, find_bodies, find_horizon, judge, judged, load_finder, prompt_adherence, save_judge, slide, train_reader, truth_of

COLORS, CAMERAS = tuple(ATTRIBUTES["color"]), ATTRIBUTES["camera"]
OTHER = {"pan left": "pan right", "pan right": "pan left"}

def a_truth(i: int) -> Truth:
    "Truths of seeds that nobody else uses, every word equally often; no search for a motion score, which is most of a clip's price."
    action = ATTRIBUTES["action"][i % 5]
    count = 1 + i // 2 % 3
    return Truth(770_000 + i, world.SHAPES[i % 3], COLORS[i % 7], max(2, count) if action == "push" else count, action, tuple(world.BACKGROUNDS)[i * 3 % 5], tuple(world.LIGHTINGS)[i * 5 % 4], world.STYLES[i // 3 % 3], CAMERAS[(2 * i + i // 5) % 5], 0.5 + 0.02 * i)

@pytest.fixture(scope="module")
def held_out():
    torch.set_num_threads(1); cv2.setNumThreads(1)
    truths = [a_truth(i) for i in range(15)]
    return truths, [render(t) for t in truths]

def shares(clips, truths): return {k: np.mean([agreement(judge(c), t)[k] for c, t in zip(clips, truths)]) for k in ATTRIBUTES}

@pytest.mark.slow
def test_held_out_clips_are_read_right(held_out):
    truths, clips = held_out
    right = shares(clips, truths)
    assert all(v >= 0.8 for v in right.values()) and np.mean(list(right.values())) >= 0.92, right
    assert np.median([abs(judge(c).pace / t.pace - 1) for c, t in zip(clips[:4], truths)]) < 0.2, "and the clock is right"

@pytest.mark.slow
@pytest.mark.parametrize("how", ["blurred", "compressed", "of another hue", "at 128 px"])
def test_spoiled_clips_are_still_read(held_out, how):
    truths, clips = held_out[0][:5], held_out[1][:5]
    spoil = {"blurred": lambda f: cv2.GaussianBlur(f, (0, 0), 0.9), "compressed": lambda f: cv2.imdecode(cv2.imencode(".jpg", f, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR),
             "of another hue": lambda f: np.clip(f * np.array([1.05, 0.97, 1.0]) + 3, 0, 255).astype(np.uint8), "at 128 px": lambda f: cv2.resize(f, (128, 128), interpolation=cv2.INTER_CUBIC)}[how]
    right = shares([np.stack([spoil(f) for f in c]) for c in clips], truths)
    assert np.mean(list(right.values())) >= 0.8 and right["color"] >= 0.9, right

def test_a_mirror_swaps_left_and_right_and_nothing_else(held_out):
    pans = [(t, c) for t, c in zip(*held_out) if t.camera in OTHER][:4]
    mirrored = shares([np.ascontiguousarray(c[:, :, ::-1]) for _, c in pans], [replace(t, camera=OTHER[t.camera]) for t, _ in pans])
    assert len(pans) >= 3 and mirrored["camera"] >= 0.7 and mirrored["color"] == 1, mirrored

def test_a_still_clip_has_no_action_to_be_sure_of(held_out):
    truths, clips = held_out
    for truth, clip in zip(truths[:2], clips):
        still = judge(np.repeat(clip[:1], 32, 0))
        assert still.confidence["action"] < 0.1 and still.color == truth.color and still.pace < 0.1

def test_noise_and_emptiness_leave_the_judge_unsure(held_out):
    sure = np.mean([min(judge(c).confidence[k] for k in ("shape", "color", "count")) for c in held_out[1][:2]])
    for clip in (np.random.default_rng(1).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8), np.full((16, 64, 64, 3), 128, np.uint8), np.zeros((16, 64, 64, 3), np.uint8)):
        v = judge(clip)
        assert max(v.confidence[k] for k in ("shape", "color", "count", "action")) < sure, v
    assert judge(np.full((16, 64, 64, 3), 128, np.uint8)).count == 0 and judge(np.zeros((16, 64, 64, 3), np.uint8)).shape == ""

def test_frames_and_the_order_of_them_matter(held_out):
    zooms = [(t, c) for t, c in zip(*held_out) if t.camera.startswith("zoom")][:3]
    swap = {"zoom in": "zoom out", "zoom out": "zoom in"}
    assert np.mean([judge(np.ascontiguousarray(c[::-1])).camera == swap[t.camera] for t, c in zooms]) > 0.6, "a zoom played backwards is the other zoom"
    assert np.mean([judge(c[:16]).color == t.color for t, c in zooms]) > 0.6, "half a clip has the same colours"

@pytest.mark.parametrize("clip, says", [(np.zeros((1, 64, 64, 3), np.uint8), "at least 8 frames"), (np.zeros((32, 64, 64, 3), np.float32), "uint8"), (np.zeros((64, 64, 3), np.uint8), "(T, H, W, 3)"),
                                        (np.zeros((32, 3, 64, 64), np.uint8), "(T, H, W, 3)"), (np.zeros((32, 64, 48, 3), np.uint8), "square"), (np.zeros((32, 16, 16, 3), np.uint8), "32 pixels"), ([1, 2], "list"), (torch.zeros(32, 64, 64, 3), "torch.Size")])
def test_what_is_no_clip_gets_one_line(clip, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")) as error: judge(clip)
    assert "\n" not in str(error.value)

def test_weights_that_are_not_there_or_of_another_kind_get_one_line(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    from safetensors.torch import save_file
    save_file({"finder.stem.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("nowhere", "broken", "other"):
        with pytest.raises(UserError) as error: Judge(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value) and name in str(error.value)

def test_saved_weights_are_small_and_judge_alike(tmp_path, held_out):
    a = Judge(); save_judge(tmp_path / "judge.safetensors", a.finder, a.reader); b = Judge(tmp_path / "judge.safetensors")
    assert (tmp_path / "judge.safetensors").stat().st_size < 50_000 and a(held_out[1][0]) == b(held_out[1][0])

def test_captions_read_back_are_the_truth():
    for i in range(60):
        truth = a_truth(i)
        assert truth_of(world.caption(truth)) == replace(truth, seed=0, pace=1.0)
        assert (lambda t: (t.shape, t.color, t.count, t.action))(truth_of(world.caption(truth, short=True))) == (truth.shape, truth.color, truth.count, truth.action)
    with pytest.raises(ValueError, match="no caption"): truth_of("a cat")

def test_adherence_is_the_share_of_attributes(held_out):
    truths, clips = held_out[0][:3], held_out[1][:3]
    share = prompt_adherence(clips, truths)
    assert share == pytest.approx(np.mean([list(agreement(judge(c), t).values()) for c, t in zip(clips, truths)]))
    wrong = [replace(t, color=COLORS[(COLORS.index(t.color) + 1) % 7]) for t in truths]
    assert prompt_adherence(clips, wrong) == pytest.approx(share - 0.2), "one attribute of five"
    with pytest.raises(ValueError, match="as many truths"): prompt_adherence(clips, truths[:2])
    rows = judged(clips, truths)
    assert np.mean(list(accuracy(rows).values())) == pytest.approx(share) and accuracy(rows, motion=99) == {}

def test_drawn_scenes_have_their_bodies_where_the_finder_sees_them():
    scenes, finder = draw_scenes(6, seed=909, frames=2), load_finder()
    assert scenes.frames.shape == (12, 64, 64, 3) and scenes.frames.dtype == torch.uint8
    far = []
    for frame, bodies in zip(scenes.frames.numpy(), scenes.bodies.numpy()):
        (found,) = find_bodies(finder, frame[None])
        far += [min(np.hypot(*(found.place - b[:2]).T), default=64) for b in bodies if (abs(b[:2] - 31.5) < 28).all()]
    assert len(far) >= 8 and np.median(far) < 1.5, far

def test_the_floor_is_found_and_its_slide_measured():
    clip = np.full((8, 64, 64, 3), 90, np.uint8)
    for t in range(8): clip[t, 50 + t // 4 :] = 160
    assert (find_horizon(clip) == [50] * 4 + [51] * 4).all()
    wave = cv2.GaussianBlur(np.random.default_rng(2).normal(size=(5, 90)), (0, 0), 2.0)
    for shift in (-3, 0, 2, 5): assert abs(slide(wave[:, 20:80], wave[:, 20 - shift : 80 - shift]) - shift) < 0.1
