"The motion score is FFmpeg's, the content change PySceneDetect's, the sharpness OpenCV's."
import re, shutil, subprocess
import av, cv2, numpy as np, pytest
from opensora_nb.cluster.files import UserError
from opensora_nb.data.footage import sample_clips
from opensora_nb.data.scores import ContentMeter, MotionMeter, file_motion, frame_motion, motion_score, sharpness
from opensora_nb.data.video import read_luma, write_video
from opensora_nb.data.world import Truth, render

def ffmpeg_motion(path):
    "What FFmpeg's vmafmotion filter writes to each frame, two decimals."
    scores = []
    with av.open(str(path)) as container:
        stream, graph = container.streams.video[0], av.filter.Graph()
        source, score, sink = graph.add_buffer(template=stream), graph.add("vmafmotion"), graph.add("buffersink")
        source.link_to(score); score.link_to(sink); graph.configure()
        for frame in container.decode(stream):
            graph.push(frame); scores.append(float(graph.pull().metadata["lavfi.vmafmotion.score"]))
    return np.array(scores)

@pytest.mark.parametrize("height, width", [(64, 64), (90, 160), (192, 192), (66, 34)])
def test_every_frame_agrees_with_ffmpeg_on_pocket_clips(tmp_path, height, width):
    clip = render(Truth(3, action="bounce", count=3, camera="zoom in", pace=0.7), 192, 24)[:, :height, :width]
    path = write_video(tmp_path / "clip.mp4", clip)
    theirs, ours = ffmpeg_motion(path), frame_motion(read_luma(path))
    assert theirs.mean() > 1 and np.abs(ours - theirs).max() < 0.0065         # half of the last printed decimal, and FFmpeg's integers
    assert abs(motion_score(read_luma(path)) - theirs.mean()) < 0.002

def clip_named(name):
    try: return sample_clips()[name]
    except UserError as error: pytest.skip(str(error))

NAMES = ("bikes", "carphone_pristine", "carphone_distorted", "bigbuckbunny")

@pytest.mark.parametrize("program", ["the wheel's", "the system's"])
@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_what_the_ffmpeg_program_prints(name, program):
    if program == "the wheel's": program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    elif not (program := shutil.which("ffmpeg")): pytest.skip("no ffmpeg on the path")
    said = subprocess.run([program, "-i", clip_named(name), "-an", "-vf", "vmafmotion", "-f", "null", "-"], capture_output=True, text=True).stderr
    assert abs(float(file_motion(clip_named(name)).mean()) - float(re.search(r"VMAF Motion avg: ([\d.]+)", said)[1])) <= 1e-3

@pytest.mark.parametrize("name", NAMES)
def test_each_frame_of_real_clips_agrees_with_the_filter(name):
    theirs, ours = ffmpeg_motion(clip_named(name)), file_motion(clip_named(name))
    assert len(theirs) == len(ours) and np.abs(ours - theirs).max() < 0.0065

@pytest.mark.parametrize("pixels, ending", [("yuv420p10le", ".mkv"), ("yuv422p", ".mkv"), ("gray", ".mkv"), ("yuv444p", ".mkv")])
def test_other_pixel_formats_agree_with_ffmpeg(tmp_path, pixels, ending):
    path, clip = tmp_path / f"clip{ending}", render(Truth(3, action="roll", camera="zoom in", pace=0.8), 96, 16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width = stream.height = 96; stream.pix_fmt = pixels
        for k, frame in enumerate(clip):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels); picture.pts = k
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert abs(file_motion(path).mean() - ffmpeg_motion(path).mean()) < 0.004         # the filter writes two decimals

@pytest.mark.parametrize("name", NAMES)
def test_the_content_change_is_pyscenedetects(name):
    scenedetect = pytest.importorskip("scenedetect")
    manager = scenedetect.SceneManager(stats := scenedetect.StatsManager())
    manager.add_detector(scenedetect.ContentDetector())
    with av.open(str(clip_named(name))) as container:
        meter = ContentMeter()
        ours = [meter(f.to_ndarray(format="bgr24")) for f in container.decode(video=0)][1:]
    manager.detect_scenes(video := scenedetect.open_video(str(clip_named(name)), backend="pyav"))
    stamps = [scenedetect.FrameTimecode(k, video.frame_rate) for k in range(len(ours) + 2)]
    theirs = [v[0] for k in stamps if stats.metrics_exist(k, ["content_val"]) for v in [stats.get_metrics(k, ["content_val"])]]
    assert np.allclose(ours, theirs[-len(ours):], atol=1e-9) and len(theirs) >= len(ours)

@pytest.mark.parametrize("height, width", [(16, 16), (33, 47), (240, 320)])
def test_sharpness_is_the_variance_of_opencvs_laplacian(height, width):
    x = np.random.default_rng(1).integers(0, 255, (height, width), dtype=np.uint8)
    assert sharpness(x) == pytest.approx(cv2.Laplacian(x, cv2.CV_64F).var(), rel=1e-9)

def test_a_meter_gives_what_the_whole_clip_gives_and_keeps_no_frame():
    clip = np.random.default_rng(2).integers(0, 255, (6, 31, 37), dtype=np.uint8)
    meter, frame, said = MotionMeter(), np.empty((31, 37), np.uint8), []
    for x in clip: frame[:] = x; said.append(meter(frame))           # the same memory again and again, as a decoder may do
    assert np.allclose(said, frame_motion(clip))

def test_the_grey_of_rgb_frames_is_another_number(tmp_path):
    path = write_video(tmp_path / "clip.mp4", render(Truth(3, action="roll", camera="pan left", pace=0.5), 96, 16))
    with av.open(str(path)) as container: grey = np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)])
    assert motion_score(grey) / motion_score(read_luma(path)) == pytest.approx(255 / 219, rel=0.02)

def test_a_film_backwards_moves_as_much():
    clip = np.random.default_rng(0).integers(0, 255, (9, 40, 50), dtype=np.uint8)
    assert motion_score(clip) == pytest.approx(motion_score(clip[::-1]))
    assert np.allclose(frame_motion(clip // 2 + 60), frame_motion(clip // 2)), "brightness alone is no motion"
