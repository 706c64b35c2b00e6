"Files that were damaged, that lie, or that want something else than to be read: each is read or refused with a word, and the run goes on."
import os, socket, struct, threading, traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
import av, numpy as np, pytest
from opensora_nb.cluster.pool import Failure, run_tasks
from opensora_nb.data.manifest import REASONS
from opensora_nb.data.video import MAX_PIXELS, VideoError, decode, iter_frames, luma_plane, one_line, open_video, probe, read_luma, write_video

def moving(frames=12, height=48, width=64, seed=0):
    ground = np.random.default_rng(seed).integers(60, 160, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)[:height, :width]
    clip = np.repeat(ground[None], frames, 0)
    for k in range(frames): clip[k, 10:22, 2 * k : 2 * k + 12] = 250
    return clip

def write(path, codec="libx264", pixels="yuv420p", frames=None, rate=24, stamps=None, rotation=0, format=None, options={}):
    "A video in any container; `stamps`: time of each frame in units of 1 / rate."
    clip = moving() if frames is None else frames
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        (stream.height, stream.width), stream.pix_fmt, stream.options = clip.shape[1:3], pixels, options
        if rotation: stream.set_display_rotation(rotation)
        for k, picture in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if stamps is not None: frame.pts, frame.time_base = stamps[k], 1 / stream.codec_context.framerate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path

# ---- the mutations

SEEDS = {"h264.mp4": dict(), "ten-bit.mp4": dict(pixels="yuv420p10le"), "turned.mp4": dict(rotation=90), "odd.mkv": dict(codec="ffv1", pixels="yuv444p", frames=moving(12, 47, 63)),
         "vp9.webm": dict(codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}), "alpha.mov": dict(codec="png", pixels="rgba"), "prores.mov": dict(codec="prores_ks", pixels="yuva444p10le"),
         "mpeg4.avi": dict(codec="mpeg4"), "mjpeg.avi": dict(codec="mjpeg", pixels="yuvj420p"), "h264.ts": dict(), "mpeg2.mpg": dict(codec="mpeg2video"), "h264.flv": dict(codec="libx264"), "wmv.wmv": dict(codec="wmv2", format="asf"),
         "uneven.mkv": dict(stamps=[0, 1, 2, 5, 6, 20, 21, 22, 40, 41, 43, 44]), "grey.mkv": dict(codec="ffv1", pixels="gray"), "rgb.mkv": dict(codec="ffv1", pixels="bgr0"), "bare.h264": dict(),
         "raw.y4m": dict(codec="rawvideo", frames=moving(4)), "raw.avi": dict(codec="rawvideo", pixels="bgr24", frames=moving(4)), "hevc.mp4": dict(codec="libx265", options={"x265-params": "log-level=none:pools=1"}), "av1.mp4": dict(codec="libsvtav1", frames=moving(6, 64, 64), options={"preset": "12"})}
FIELDS = [b"mvhd", b"tkhd", b"mdhd", b"stts", b"ctts", b"stsz", b"stsc", b"stco", b"stss", b"stsd", b"avc1", b"elst", b"hdlr", b"avcC", b"pasp", b"ftyp",            # mp4
          b"\x44\x89", b"\x23\xe3\x83", b"\xb0", b"\xba", b"\x2a\xd7\xb1", b"\x1f\x43\xb6\x75", b"\x1a\x45\xdf\xa3",                                         # mkv: duration, frame duration, width, height, clock, cluster
          b"avih", b"strh", b"strf", b"idx1", b"onMetaData", b"duration", b"framerate", b"width", b"YUV4MPEG2", b"\x00\x00\x01\xb3", b"\x00\x00\x00\x01"]
EXTREMES = [struct.pack(f, v) for f in (">I", "<I") for v in (0, 1, 32768, 10**9, 2**31 - 1, 2**31, 2**32 - 1)] + [struct.pack(">d", v) for v in (0.0, -1.0, 1e9, 1e300, float("nan"), float("inf"))] + [b"\x80\x00\x80\x00", b"\0" * 8, b"\xff" * 8]

def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    "One kind of damage, now and then two."
    x, n = bytearray(data), len(data)
    def at(length=1): return int(rng.integers(0, max(1, n - length)))
    match kind := int(rng.integers(0, 9)):
        case 0:                                                                          # bit flips
            for _ in range(int(rng.integers(1, 60))): x[at()] ^= 1 << int(rng.integers(8))
        case 1: x = x[: at()]                                                            # the end is missing
        case 2: x = x[at() :]                                                            # the beginning is missing
        case 3: k = at(); x = bytearray(other[: int(rng.integers(1, 400))]) + x[k:] if rng.random() < 0.5 else x[:k] + bytearray(other)      # head of one, body of another
        case 4 | 5:                                                                      # a header field with an absurd value
            for _ in range(int(rng.integers(1, 4))):
                found = [i for f in FIELDS for i in [data.find(f)] if i >= 0]
                k = found[int(rng.integers(len(found)))] if found else at(); k = min(n - 8, k + int(rng.integers(1, 100)))
                value = EXTREMES[int(rng.integers(len(EXTREMES)))]; x[k : k + len(value)] = value
        case 6: k, m = at(512), int(rng.integers(16, 512)); x[k : k + m] = bytes(m)         # a hole
        case 7: k, m = at(512), int(rng.integers(16, 2000)); x[k:k] = x[k : k + m]          # a piece twice
        case 8: a, b, m = at(600), at(600), int(rng.integers(16, 512)); x[a : a + m], x[b : b + m] = x[b : b + m], x[a : a + m]      # two pieces exchanged
    return bytes(x) if rng.random() < 0.85 else mutate(bytes(x) or b"\0", other, rng)

def read_all(path) -> tuple[str, str]:
    "What becomes of a file: (\"read\", number of frames), (reason, detail), or (\"bug\", traceback)."
    try:
        info, before, count = probe(path), -1.0, 0
        assert info.num_frames > 0 and 0 < info.duration_s < 1e9 and 0 < info.fps <= 1000 and info.height * info.width <= MAX_PIXELS and np.isfinite([info.bpp, info.aspect_ratio]).all()
        for t, frame in iter_frames(path):
            assert t > before and luma_plane(frame).shape == (frame.height, frame.width)
            before, count = t, count + 1
        try: decode(path, before / 3, 2 * before / 3 + 0.1, size=32)
        except ValueError as error: assert "has no frames between" in str(error)
        return "read", f"{count} frames"
    except VideoError as error:
        return error.reason if error.reason in REASONS and "\n" not in str(error) else "bug", str(error)
    except BaseException: return "bug", traceback.format_exc()

def mutant(item) -> tuple[str, str]:
    folder, k = item
    rng, seeds = np.random.default_rng((11, k)), sorted((Path(folder) / "seeds").iterdir())
    seed, other = seeds[k % len(seeds)], seeds[int(rng.integers(len(seeds)))]
    path = Path(folder) / f"{k:04d}-{seed.stem}{(seed if rng.random() < 0.8 else other).suffix}"
    path.write_bytes(mutate(seed.read_bytes(), other.read_bytes(), rng))
    result = read_all(path)
    if result[0] != "bug": path.unlink()
    return result

@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "seeds"; folder.mkdir()
    for name, how in SEEDS.items(): write(folder / name, **how)
    return folder

@pytest.mark.parametrize("name", SEEDS)
def test_every_seed_is_read_whole(seeds, name):
    frames = len(SEEDS[name].get("frames", moving()))
    assert read_all(seeds / name) == ("read", f"{frames} frames")
    info = probe(seeds / name)
    assert info.num_frames == frames and (info.height, info.width) == decode(seeds / name).shape[1:3]
    if name != "uneven.mkv": assert info.fps == pytest.approx(24, rel=0.05) and info.duration_s == pytest.approx(frames / 24, rel=0.1)

@pytest.mark.slow
def test_a_thousand_damaged_files_are_read_or_refused_and_never_stop_the_run(seeds):
    items = [(str(seeds.parent), k) for k in range(1000)]
    results = dict(run_tasks(mutant, items, workers=2, time_limit=20, memory_limit=3 * 2**30))
    words = Counter(r.kind if isinstance(r, Failure) else r[0] for r in results.values())
    print(dict(words.most_common()))
    for item, r in results.items():
        if isinstance(r, Failure): print(item[1], r)
    bugs = [(item[1], r[1]) for item, r in results.items() if not isinstance(r, Failure) and r[0] == "bug"]
    assert not bugs, f"{len(bugs)} bugs, the first of file {bugs[0][0]}:\n{bugs[0][1]}"
    assert len(results) == 1000 and words["timeout"] == 0 and words["read"] > 100 and words["broken"] > 100      # the mutations do harm, and not only harm
