"One decode says what one tool a pass says, whatever the rate, the clock and the length of the film."
import subprocess, sys
from dataclasses import replace
from fractions import Fraction
import av, numpy as np, pytest
from opensora_nb.cluster.files import UserError
from opensora_nb.data.footage import sample_clips
from opensora_nb.data.scores import file_motion, motion_score
from opensora_nb.data.shots import ShotConfig, cut_clip, find_cuts
from opensora_nb.data.survey import measure, survey
from opensora_nb.data.video import decode, probe, read_luma, write_video
from opensora_nb.data.world import Truth, render

FILM = [render(Truth(seed, action=action, background=ground, camera=camera, pace=0.5), 128, n)
        for seed, action, ground, camera, n in ((1, "bounce", "clouds", "static", 60), (2, "roll", "sand", "pan left", 75), (3, "orbit", "waves", "zoom in", 66))]
CUTS = [60, 135]

def write_uneven(path, frames, times):
    "A file whose frames stand at the given seconds, as a phone writes it."
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt, stream.time_base, stream.options = *frames.shape[1:3], "yuv420p", Fraction(1, 90000), {"crf": "15", "bf": "0"}
        stream.codec_context.time_base = Fraction(1, 90000)
        for frame, t in zip(frames, times):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(t * 90000), Fraction(1, 90000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path

@pytest.mark.parametrize("fps", [16, 24, Fraction(24000, 1001), 25, Fraction(30000, 1001)])
def test_takes_are_the_shots_at_any_rate(tmp_path, fps):
    path = write_video(tmp_path / "film.mp4", np.concatenate(FILM), fps=fps)
    takes = list(survey(probe(path)))
    assert [t.span.first for t in takes] == [0, *CUTS] and takes[-1].span.last == 201
    luma = read_luma(path)
    for t in takes: assert t.motion == pytest.approx(motion_score(luma[t.span.first : t.span.last]), rel=1e-6)

def test_of_fast_films_the_frames_that_a_clip_holds_are_scored(tmp_path):
    path = write_video(tmp_path / "film.mp4", np.repeat(np.concatenate(FILM), 2, 0), fps=48)
    takes = list(survey(probe(path)))
    assert [t.span.first for t in takes] == [0, 120, 270]
    for t, shot in zip(takes, FILM):
        clip = probe(cut_clip(probe(path), tmp_path / "clip.mp4", t.span.start_s, t.span.end_s, exact=True))
        assert (clip.fps, clip.num_frames) == (24, len(shot)) and file_motion(clip.path).mean() == pytest.approx(t.motion, rel=0.05)

def test_no_frame_of_the_neighbour_is_in_a_clip_of_an_uneven_film(tmp_path):
    rng = np.random.default_rng(4)
    times = np.cumsum(rng.choice([0.008, 0.033, 0.07], 201, p=[0.2, 0.6, 0.2]))
    path = write_uneven(tmp_path / "phone.mp4", np.concatenate(FILM), times - times[0])
    info = probe(path)
    takes = list(survey(info, replace(ShotConfig(), min_clip_s=0.5)))
    assert [t.span.first for t in takes] == [0, *CUTS]
    for t, shot in zip(takes, FILM):
        clip = decode(cut_clip(info, tmp_path / "clip.mp4", t.span.start_s, t.span.end_s, exact=True)).astype(int)
        for frame in (clip[0], clip[-1]): assert np.abs(shot.astype(int) - frame).mean((1, 2, 3)).min() < 6, "each frame is one of its own shot"
        assert np.abs(clip[0] - shot[0]).mean() < 6

def test_scores_do_not_depend_on_threads(tmp_path):
    path = write_video(tmp_path / "film.mp4", np.concatenate(FILM))
    assert list(survey(probe(path))) == list(survey(probe(path), threads=3))

def test_cuts_found_as_the_film_runs_are_those_of_the_whole_film():
    path = sample_or_skip("bikes")
    seen = list(measure(path))
    cuts = find_cuts([m.change for m in seen], [m.score for m in seen], [m.small for m in seen])
    assert cuts == [30, 76, 137, 187, 242] == [t.span.first for t in survey(probe(path)) if t.span.first]

def sample_or_skip(name):
    try: return sample_clips()[name]
    except UserError as error: pytest.skip(str(error))

PEAK = """
import resource, sys
from opensora_nb.data.survey import survey
from opensora_nb.data.video import probe
n = sum(1 for _ in survey(probe(sys.argv[1])))
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""

@pytest.mark.slow
def test_a_long_film_takes_no_more_memory_than_a_clip(tmp_path):
    "Nearly three minutes against ten seconds, each in a process of its own."
    source = sample_or_skip("carphone_pristine")
    def looped(times):
        path = tmp_path / f"{times}.mp4"
        with av.open(str(source)) as one, av.open(str(path), "w") as many:
            stream = many.add_stream_from_template(one.streams.video[0])
            packets = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe) for p in one.demux(video=0) if p.dts is not None]
            length = max(pts + duration for _, pts, _, duration, _ in packets)
            for k in range(times):
                for data, pts, dts, duration, key in packets:
                    packet = av.Packet(data)
                    packet.pts, packet.dts, packet.duration, packet.is_keyframe, packet.stream, packet.time_base = pts + k * length, dts + k * length, duration, key, stream, one.streams.video[0].time_base
                    many.mux(packet)
        return path
    said = {times: [int(x) for x in subprocess.run([sys.executable, "-c", PEAK, looped(times)], capture_output=True, text=True, check=True).stdout.split()] for times in (3, 45)}
    assert said[45][0] > 12 * said[3][0] and said[45][1] - said[3][1] < 50, f"takes and megabytes: {said}"
