"The motion score is FFmpeg's."
import av, numpy as np, pytest
from opensora_nb.cluster.files import UserError
from opensora_nb.data.footage import sample_clips
from opensora_nb.data.scores import file_motion, frame_motion, motion_score
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

@pytest.mark.parametrize("name, printed", [("bikes", 6.128), ("carphone_pristine", 2.097), ("carphone_distorted", 0.944), ("bigbuckbunny", 2.090)])
def test_real_clips_agree_with_ffmpeg(name, printed):
    try: path = sample_clips()[name]
    except UserError as error: pytest.skip(str(error))
    theirs, ours = ffmpeg_motion(path), file_motion(path)
    assert len(theirs) == len(ours) and np.abs(ours - theirs).max() < 0.0065
    assert round(float(ours.mean()), 2) == round(float(theirs.mean()), 2) == round(printed, 2)

def test_the_grey_of_rgb_frames_is_another_number(tmp_path):
    path = write_video(tmp_path / "clip.mp4", render(Truth(3, action="roll", camera="pan left", pace=0.5), 96, 16))
    with av.open(str(path)) as container: grey = np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)])
    assert motion_score(grey) / motion_score(read_luma(path)) == pytest.approx(255 / 219, rel=0.02)

def test_a_film_backwards_moves_as_much():
    clip = np.random.default_rng(0).integers(0, 255, (9, 40, 50), dtype=np.uint8)
    assert motion_score(clip) == pytest.approx(motion_score(clip[::-1]))
    assert np.allclose(frame_motion(clip // 2 + 60), frame_motion(clip // 2)), "brightness alone is no motion"
