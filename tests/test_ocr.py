"Text over footage is found, textures are none, and the share is an area."
import itertools, os, subprocess, sys
import cv2, numpy as np, pytest
from opensora_nb.cluster.files import UserError
from opensora_nb.data.footage import sample_clips
from opensora_nb.data.ocr import OCRConfig, candidates, clip_text_share, draw_boxes, find_text, is_word, text_share, union_share
from opensora_nb.data.video import decode
from opensora_nb.data.world import render, sample_truth

FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX)

def write(frame, text="Breaking news", rel=0.08, at=(0.06, 0.85), colour=(255, 255, 255), alpha=1.0, outline=True, font=0):
    "The frame with a line of text, letters `rel` of its short side high, and the rectangle of the line (x0, y0, x1, y1)."
    (h, w), ink = frame.shape[:2], np.zeros(frame.shape[:2], np.uint8)
    cap = cv2.getTextSize("H", FONTS[font], 1, 1)[0][1]
    scale = rel * min(h, w) / cap
    scale = min(scale, scale * 0.88 * w / cv2.getTextSize(text, FONTS[font], scale, 1)[0][0])
    thick, origin = max(1, round(scale * cap / 9)), (int(at[0] * w), int(at[1] * h))
    cv2.putText(ink, text, origin, FONTS[font], scale, 255, thick, cv2.LINE_AA)
    out = frame.astype(np.float32)
    if outline: out *= 1 - cv2.dilate(ink, np.ones((3, 3)))[..., None] / 255 * (sum(colour) > 300)
    a = alpha * ink[..., None] / 255
    y, x = np.nonzero(ink)
    return np.clip(out * (1 - a) + np.array(colour) * a, 0, 255).astype(np.uint8), (x.min(), y.min(), x.max() + 1, y.max() + 1)

def jpeg(frame, quality=80): return cv2.imdecode(cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)[..., ::-1].copy()

@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(77)
    return [render(sample_truth(rng, 3.0), size, 6)[4] for size in (192, 192, 256, 256, 384, 512)]

@pytest.fixture(scope="module")
def real():
    try: clips = sample_clips()
    except UserError as error: pytest.skip(str(error))
    return [decode(clips[name])[k] for name, k in (("bikes", 30), ("bikes", 200), ("bigbuckbunny", 40), ("carphone_pristine", 50))]

def test_the_share_is_the_area_of_the_union():
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask, boxes = np.zeros((60, 80), bool), []
        for _ in range(rng.integers(0, 5)):
            (x0, x1), (y0, y1) = sorted(rng.integers(0, 81, 2)), sorted(rng.integers(0, 61, 2))
            if x1 - x0 < 2 or y1 - y0 < 2: continue
            mask[y0:y1, x0:x1] = True; boxes.append([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
        assert union_share(boxes, 60, 80) == mask.mean()

def test_a_tilted_box_has_its_area():
    c, s = np.cos(0.4), np.sin(0.4)
    box = np.array([[-40, -10], [40, -10], [40, 10], [-40, 10]]) @ [[c, s], [-s, c]] + 100
    assert union_share([box], 200, 200) == pytest.approx(80 * 20 / 200**2, rel=0.05)

def test_a_word_is_more_than_shapes():
    assert all(map(is_word, ("NEW", "ok", "日本", "12:30", "Où")))
    assert not any(map(is_word, ("", " ", "I", "O", "口", "口口口", "品口", "△□", "11", "10", "...", "aaaa", "O0o")))

@pytest.mark.parametrize("wrong", [np.zeros((40, 40), np.uint8), np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3), np.float32), np.zeros((3, 40, 40), np.uint8), np.zeros((0, 40, 3), np.uint8), None, "frame.png"])
def test_what_is_no_rgb_frame_is_refused_before_a_model_is_loaded(wrong):
    for function in (candidates, find_text, text_share, lambda f: clip_text_share([f])):
        with pytest.raises(ValueError, match="RGB frame"): function(wrong)

def test_settings_that_make_no_sense_are_refused():
    for wrong in (dict(min_confidence=1.0), dict(min_confidence=-0.1), dict(max_side=10), dict(max_side=10**6), dict(max_zoom=0.5)):
        with pytest.raises(ValueError, match=next(iter(wrong))): OCRConfig(**wrong)
    with pytest.raises(ValueError): clip_text_share([])
    assert clip_text_share([np.zeros((8, 8, 3), np.uint8)], OCRConfig(enabled=False)) is None

def test_drawing_leaves_the_frame_alone():
    frame = np.full((80, 120, 3), 90, np.uint8)
    drawn = draw_boxes(frame, [(np.array([[20, 20], [60, 20], [60, 40], [20, 40]], np.float32), 0.9)])
    assert (frame == 90).all() and (drawn[20, 20:60] != 90).any() and (draw_boxes(frame, []) == frame).all()

def test_a_missing_package_is_one_line():
    code = ("import sys; sys.modules['rapidocr'] = None\nimport numpy as np\nfrom opensora_nb.cluster.files import UserError\nfrom opensora_nb.data.ocr import text_share\n"
            "try: text_share(np.zeros((64, 64, 3), np.uint8))\nexcept UserError as error: print(error)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "pip install 'opensora_nb[curation]'" in said and said.count("\n") == 1

@pytest.mark.slow
def test_overlays_are_found_and_textures_are_none(world, real):
    rng = np.random.default_rng(5)
    plain = world + real + [cv2.resize(real[2], (1920, 1080), interpolation=cv2.INTER_CUBIC)]
    looks = itertools.cycle([dict(), dict(rel=0.15, at=(0.05, 0.4)), dict(text="www.example.org", alpha=0.55, rel=0.07, at=(0.3, 0.12), outline=False), dict(text="2021-08-14 12:30", rel=0.06, font=1),
                             dict(text="Chapter one", colour=(255, 230, 40), font=2, rel=0.1), dict(text="SUBSCRIBE", colour=(20, 20, 20), rel=0.12, at=(0.1, 0.3), font=1)])
    wrong = [text_share(jpeg(f, int(rng.integers(60, 95)))) > 0.005 for f in plain]
    right = [text_share(jpeg(write(f, **next(looks))[0], int(rng.integers(60, 95)))) > 0.005 for f in plain for _ in range(2)]
    f1 = 2 * sum(right) / (2 * sum(right) + sum(wrong) + len(right) - sum(right))
    assert f1 >= 0.9 and sum(wrong) <= 1, (f1, wrong, right)

@pytest.mark.slow
def test_a_box_lies_on_its_text_at_every_size(real):
    for height, width in ((192, 192), (360, 640), (720, 1280), (1080, 1920), (1280, 720), (300, 900)):
        frame, (x0, y0, x1, y1) = write(cv2.resize(real[2], (width, height), interpolation=cv2.INTER_AREA), rel=0.09)
        found = find_text(frame)
        assert len(found) == 1, (height, width, found)
        (a, b), (c, d) = found[0][0].min(0), found[0][0].max(0)
        overlap = max(0, min(c, x1) - max(a, x0)) * max(0, min(d, y1) - max(b, y0))
        assert overlap > 0.85 * (x1 - x0) * (y1 - y0) and overlap > 0.35 * (c - a) * (d - b), (height, width)

@pytest.mark.slow
def test_colours_are_not_swapped_and_the_frame_not_changed(real):
    frame, _ = write(real[0], colour=(255, 60, 20))
    before = frame.copy()
    assert find_text(frame) and (frame == before).all()
    view = np.repeat(frame, 2, axis=1)[:, ::2]                       # not contiguous in memory
    assert text_share(view) == text_share(frame)

@pytest.mark.slow
def test_tiny_and_extreme_frames_are_no_error():
    for shape in ((1, 1, 3), (16, 16, 3), (16, 2000, 3), (2000, 16, 3)):
        assert text_share(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)) <= 1

@pytest.mark.slow
def test_a_clip_is_the_mean_of_its_frames(real):
    text, _ = write(real[2], rel=0.12)
    assert clip_text_share([real[2], text, real[2]]) == pytest.approx(text_share(text) / 3)

@pytest.mark.slow
def test_it_is_quiet_and_takes_one_thread():
    code = ("import os, numpy as np\nfrom opensora_nb.data.ocr import text_share\nimport cv2; cv2.setNumThreads(1)\n"
            "f = np.full((120, 300, 3), 60, np.uint8); cv2.putText(f, 'Hello there', (20, 70), 0, 1, (255,) * 3, 2)\n"
            "assert text_share(f) > 0.1\nprint(len(os.listdir('/proc/self/task')) if os.path.exists('/proc/self/task') else 1)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr and int(done.stdout) <= 3, (done.stdout, done.stderr)

def _child(frame, queue): queue.put(text_share(frame))

@pytest.mark.slow
def test_a_forked_process_makes_its_own_engine():
    import multiprocessing
    if "fork" not in multiprocessing.get_all_start_methods(): pytest.skip("no fork here")
    frame, _ = write(np.full((180, 320, 3), 70, np.uint8), rel=0.12)
    mine, context = text_share(frame), multiprocessing.get_context("fork")
    process = context.Process(target=_child, args=(frame, queue := context.Queue())); process.start()
    assert queue.get(timeout=300) == mine > 0.02
    process.join(60)
    assert process.exitcode == 0
