"Video files as they are found: read right, or refused with the right word."
import gc, tempfile, tracemalloc
from fractions import Fraction
import av, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from opensora_nb.cluster.files import UserError
from opensora_nb.data.manifest import REASONS
from opensora_nb.data.shots import ShotConfig, cut_clip, output_fps, output_size, split_shots
from opensora_nb.data.scores import MotionMeter
from opensora_nb.data.survey import survey
from opensora_nb.data.video import VideoError, decode, iter_frames, luma_exact, luma_plane, probe, read_luma, resize_crop, to_rgb, write_video

def moving(frames=48, height=64, width=96, seed=0):
    "A bright square that crosses a textured ground, one pixel a frame."
    ground = np.random.default_rng(seed).integers(60, 160, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    clip = np.repeat(ground[None], frames, 0)
    for k in range(frames): clip[k, 20:36, k % (width - 16) : k % (width - 16) + 16] = 250
    return clip

@pytest.fixture(scope="module")
def film(tmp_path_factory): return write_video(tmp_path_factory.mktemp("film") / "film.mp4", moving())

def remux(source, target, **options):
    with av.open(str(source)) as i, av.open(str(target), "w", **options) as o:
        stream = o.add_stream_from_template(i.streams.video[0])
        for packet in i.demux(video=0):
            if packet.dts is not None: packet.stream = stream; o.mux(packet)
    return target

def reason(path):
    with pytest.raises(VideoError) as error: probe(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and isinstance(error.value, UserError)
    assert error.value.reason in REASONS
    return error.value.reason

def test_what_is_written_is_read_again(film):
    info = probe(film)
    assert (info.codec, info.num_frames, info.height, info.width, info.fps, info.duration_s) == ("h264", 48, 64, 96, 24, 2)
    assert np.abs(decode(film).astype(int) - moving()).mean() < 5            # crf 18, and colours of half the resolution
    assert np.isclose(info.bpp, info.bit_rate * 2 / (48 * 64 * 96))

def test_bits_per_pixel_counts_the_streams_bytes(film):
    with av.open(str(film)) as container: size = sum(p.size for p in container.demux(video=0))
    assert probe(film).bpp == 8 * size / (48 * 64 * 96)

@pytest.mark.parametrize("suffix", ["mkv", "mov", "ts"])
def test_containers_without_a_full_index_are_measured_alike(film, tmp_path, suffix):
    other, info = probe(remux(film, tmp_path / f"film.{suffix}")), probe(film)
    assert (other.num_frames, other.height, other.fps) == (48, 64, 24) and abs(other.duration_s - 2) < 0.1
    assert other.bpp == pytest.approx(info.bpp, rel=0.06)                      # packaging differs by a few bytes a frame

@pytest.mark.parametrize("content, word", [(b"", "empty"), (b"# notes\n- milk\n", "foreign"), ("für später\n".encode() * 500, "foreign"), (bytes(range(256)) * 20, "broken"),
                                           (b"\x00\x00\x00\x20ftypisom" + b"\x00" * 500, "truncated")])
def test_what_is_no_video_has_a_word(tmp_path, content, word):
    (tmp_path / "clip.mp4").write_bytes(content)
    assert reason(tmp_path / "clip.mp4") == word

@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("front", [True, False])
def test_truncated_files_are_found_wherever_the_index_is(film, tmp_path, share, front):
    data = remux(film, tmp_path / "whole.mp4", options={"movflags": "+faststart"} if front else {}).read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: int(len(data) * share)])
    assert reason(tmp_path / "half.mp4") == "truncated"

def test_a_truncated_mkv_is_found_by_its_missing_seconds(film, tmp_path):
    data = remux(write_video(tmp_path / "long.mp4", moving(240)), tmp_path / "long.mkv").read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    assert reason(tmp_path / "half.mkv") == "truncated"

def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    assert reason(tmp_path / "missing.mp4") == "unreadable" == reason(tmp_path / "folder.mp4")

def test_damage_in_the_middle_is_an_error_or_a_picture_but_never_a_hang(film, tmp_path):
    data, rng = film.read_bytes(), np.random.default_rng(0)
    for _ in range(20):
        start = int(rng.integers(0, len(data) - 300))
        (tmp_path / "damaged.mp4").write_bytes(data[:start] + rng.bytes(300) + data[start + 300 :])
        try: probe(tmp_path / "damaged.mp4"); frames = decode(tmp_path / "damaged.mp4")
        except VideoError as error: assert error.reason in REASONS
        else: assert frames.shape[1:] == (64, 96, 3)

def test_a_long_film_costs_the_memory_of_small_frames(film):
    assert decode(film, size=16).shape == (48, 16, 16, 3)

@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 46), count=st.integers(1, 48))
def test_a_range_holds_exactly_its_frames(film, first, count):
    part = decode(film, first / 24, (first + count) / 24)
    assert np.array_equal(part, decode(film)[first : first + count])

@settings(max_examples=40, deadline=None)
@given(h=st.integers(8, 90), w=st.integers(8, 90), size=st.tuples(st.integers(4, 64), st.integers(4, 64)))
def test_resize_crop_gives_the_size_and_keeps_flat_colours(h, w, size):
    out = resize_crop(np.full((1, h, w, 3), 77, np.uint8), size)
    assert out.shape == (1, *size, 3) and (out == 77).all()

def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    path = write_video(tmp_path / "clip.mp4", moving(8)); before = path.read_bytes()
    def frames():
        yield from moving(4)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_video(path, frames())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]

def test_luma_is_the_stored_plane_and_ten_bits_become_eight(tmp_path):
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    eight = read_luma(write_video(tmp_path / "eight.mp4", grey))
    with av.open(str(tmp_path / "ten.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=24); stream.height = stream.width = 32; stream.pix_fmt = "yuv420p10le"
        for f in grey: container.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        container.mux(stream.encode(None))
    ten = read_luma(tmp_path / "ten.mkv")
    assert ten.dtype == np.uint8 and abs(int(eight.mean()) - 126) <= 1 and abs(float(ten.mean()) - float(eight.mean())) <= 1    # 16 + 128 * 219 / 255

def store(path, codec, pixels, frames=None, options={}):
    "A file in a codec and pixel format of choice, of noisy moving frames of odd size unless given."
    frames = moving(8, 48, 64) + np.random.default_rng(0).integers(-20, 6, (8, 1, 64, 1)).astype(np.uint8) if frames is None else frames
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24); (stream.height, stream.width), stream.pix_fmt, stream.options = frames.shape[1:3], pixels, options
        for f in frames: container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format="rgb24")))
        container.mux(stream.encode(None))
    return path

def ffmpeg_motion(path):
    "The vmafmotion filter's value of each frame."
    with av.open(str(path)) as container, tempfile.NamedTemporaryFile() as stats:
        graph = av.filter.Graph(); source = graph.add_buffer(template=container.streams.video[0])
        node = graph.add("vmafmotion", f"stats_file={stats.name}"); sink = graph.add("buffersink")
        source.link_to(node); node.link_to(sink); graph.configure()
        for frame in container.decode(video=0): graph.push(frame); graph.pull()
        graph.push(None)
        del graph, source, node, sink; gc.collect()                                          # closes the file of numbers
        return [float(line.split("motion:")[1]) for line in open(stats.name)]

@pytest.mark.parametrize("codec, pixels", [("libx264", "yuv420p"), ("libx264", "yuv420p10le"), ("libx264", "yuv444p10le"), ("prores_ks", "yuv422p10le"), ("libx264", "yuv422p"), ("png", "rgba"), ("qtrle", "argb"), ("mjpeg", "yuvj420p")])
def test_motion_of_the_exact_luma_is_ffmpegs(tmp_path, codec, pixels):
    path, meter = store(tmp_path / "x.mov", codec, pixels), MotionMeter()
    ours = [meter(*luma_exact(frame)) for _, frame in iter_frames(path)]
    assert len(ours) == 8 and max(ours) > 1 and np.abs(np.array(ours) - ffmpeg_motion(path)).max() < 0.03 and abs(np.mean(ours) - np.mean(ffmpeg_motion(path))) < 0.01      # it prints two decimals

@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj444p", "nv12", "nv21", "nv24", "gray", "ya8", "yuva420p", "yuyv422", "uyvy422", "pal8", "rgb24", "bgra", "gbrp", "rgb565le", "yuv420p10le", "yuv420p10be", "yuv422p12le", "yuv444p16le",
                                    "yuva444p10le", "p010le", "p010be", "p016le", "p210le", "p412le", "nv20le", "y210le", "xv30le", "x2rgb10le", "gbrp10le", "gbrap12le", "rgb48le", "rgba64be", "gray9le", "gray10le", "gray16be", "ya16le", "grayf32le"])
def test_any_pixel_format_has_a_luma(pixels):
    smooth = np.asarray(resize_crop(np.random.default_rng(3).integers(40, 220, (1, 6, 8, 1), dtype=np.uint8).repeat(3, 3), (46, 66))[0])      # grey, so that no chroma matters
    frame = av.VideoFrame.from_ndarray(smooth, format="rgb24")
    try: frame = frame.reformat(format=pixels)
    except (ValueError, av.error.FFmpegError): pytest.skip("FFmpeg cannot write this format")
    exact, bits = luma_exact(frame); plane = luma_plane(frame)
    full = smooth[..., 0].astype(float); limited = 16 + full * 219 / 255
    assert exact.shape == plane.shape == (46, 66) and plane.dtype == np.uint8 and exact.dtype == (np.uint8 if bits == 8 else np.uint16) and exact.max() < 2**bits
    for seen in (exact / 2 ** (bits - 8), plane): assert min(np.abs(seen - limited).mean(), np.abs(seen - full).mean()) < (3 if pixels == "rgb565le" else 1.2)
    assert to_rgb(frame).shape == (46, 66, 3) and np.abs(to_rgb(frame).astype(int) - smooth).mean() < 6

def test_colours_that_make_no_sense_cost_a_tint_and_no_picture(film):
    _, frame = next(iter_frames(film))
    frame.colorspace = 12
    assert np.abs(to_rgb(frame).astype(int) - decode(film)[0]).mean() < 5

def test_probing_needs_the_memory_of_a_few_frames_however_long_the_film(tmp_path):
    "A film of twenty minutes, 28 800 frames, in a container without a list of frames: two pictures and then the second again and again."
    short = store(tmp_path / "short.mp4", "libx264", "yuv420p", np.full((2, 32, 32, 3), 90, np.uint8), {"g": "1", "bf": "0"})
    with av.open(str(short)) as source, av.open(str(tmp_path / "long.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        first, second = [bytes(p) for p in source.demux(video=0) if p.size]
        for k in range(28_800):
            packet = av.Packet(second if k else first)
            packet.stream, packet.pts, packet.dts, packet.time_base, packet.duration, packet.is_keyframe = stream, k, k, Fraction(1, 24), 1, True
            target.mux(packet)
    tracemalloc.start()
    info = probe(tmp_path / "long.mkv")
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert info.num_frames == 28_800 and info.duration_s == pytest.approx(1200) and info.fps == 24
    assert peak < 1e6                                                                          # bytes; a list of all packets would be some millions

def test_pixels_that_are_not_square_become_square(tmp_path):
    with av.open(str(tmp_path / "tv.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24); stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for f in moving(): container.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        container.mux(stream.encode(None))
    info = probe(tmp_path / "tv.mp4")
    clip = probe(cut_clip(info, tmp_path / "clip.mp4", 0, 2))
    assert info.aspect_ratio == 0.5 and (clip.height, clip.width, clip.pixel_aspect) == (64, 128, 1)

@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_clips_of_turned_phones_are_upright(tmp_path, degrees):
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24); stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_rotation(degrees)
        for f in moving(): container.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        container.mux(stream.encode(None))
    info = probe(tmp_path / "phone.mp4")
    upright, clip = decode(info.path), decode(cut_clip(info, tmp_path / "clip.mp4", 0, 2))
    assert clip.shape == upright.shape == ((48, 64, 96, 3) if degrees == 180 else (48, 96, 64, 3))
    assert np.abs(clip.astype(int) - upright).mean() < 6 and probe(tmp_path / "clip.mp4").rotation == 0

@pytest.mark.parametrize("fps", [24, 24000 / 1001, 25, 30, 30000 / 1001, 48, 50, 60, 60000 / 1001])
def test_a_clip_has_every_frame_once_or_every_nth(tmp_path, fps):
    ramp = np.broadcast_to((20 + 3 * np.arange(72, dtype=np.uint8))[:, None, None, None], (72, 32, 32, 3))
    info = probe(write_video(tmp_path / "ramp.mp4", ramp, fps=fps, crf=5))
    clip = decode(cut_clip(info, tmp_path / "clip.mp4", 12 / fps, 60 / fps)).mean((1, 2, 3))
    step = round(info.fps / float(output_fps(info.fps)))
    assert len(clip) == 48 // step and np.abs(clip - ramp[12:60:step, 0, 0, 0]).max() < 3 * step      # neighbours are 3 grey levels apart

def test_cuts_are_found_to_the_frame_and_a_pan_is_none(tmp_path):
    rng = np.random.default_rng(2)
    wide = rng.integers(0, 255, (16, 200, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    pan = np.stack([wide[:, k : k + 96] for k in range(60)])
    info = probe(write_video(tmp_path / "film.mp4", np.concatenate([moving(30), pan, moving(30)]), crf=10))
    assert [take.span.first for take in survey(info)] == [0, 30, 90]

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.sampled_from([16.0, 24000 / 1001, 25.0, 30.0, 60.0]))
def test_spans_cover_the_film_and_keep_their_lengths(lengths, fps):
    total, cuts = sum(lengths), [int(c) for c in np.cumsum(lengths)[:-1]]
    spans = split_shots(np.arange(total) / fps, cuts, fps)
    assert spans[0].first == 0 and spans[-1].last == total and all(a.last == b.first for a, b in zip(spans, spans[1:]))
    assert set(cuts) <= {s.first for s in spans}
    for s in spans:
        seconds = (s.last - s.first) / fps
        assert seconds <= 8 + 1 / fps and s.keep == (seconds > 2 - 0.6 / fps) and s.end_s - s.start_s == pytest.approx(seconds, abs=1e-6)

@given(st.integers(2, 8000), st.integers(2, 8000), st.floats(0.3, 3))
def test_output_sizes_are_even_and_inside_the_limit(h, w, pixel_aspect):
    height, width = output_size(h, w, ShotConfig().max_side, pixel_aspect)
    assert height % 2 == width % 2 == 0 and max(height, width) <= 1080 and min(height, width) >= 2
