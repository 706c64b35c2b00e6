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
    results = dict(run_tasks(mutant, items, workers=2, time_limit=120, memory_limit=3 * 2**30))
    words = Counter(r.kind if isinstance(r, Failure) else r[0] for r in results.values())
    print(dict(words.most_common()))
    for item, r in results.items():
        if isinstance(r, Failure): print(item[1], r)
    bugs = [(item[1], r[1]) for item, r in results.items() if not isinstance(r, Failure) and r[0] == "bug"]
    assert not bugs, f"{len(bugs)} bugs, the first of file {bugs[0][0]}:\n{bugs[0][1]}"
    assert len(results) == 1000 and words["timeout"] == 0 and words["read"] > 100 and words["broken"] > 100      # the mutations do harm, and not only harm

# ---- names and kinds of files

@pytest.mark.parametrize("name", [b"a b.mp4", b"it's \"quoted\".mp4", b"two\nlines.mp4", b"-i.mp4", b"--.mp4", b"http:x.mp4", b"https:||x", b"concat:a|b", b"file:x.mp4", b"pipe:0", b"fd:", b"data:,x", b"subfile,,start,0,end,9,,:x",
                                  b"%d.png", b"take%03d.mp4", b"*.png", b"x.m3u8", b"x.ffconcat", b"x.sdp", b"x.txt", b"$(touch x).mp4", b";.mp4", b"\xff\xfe\x80.mp4", "é 中 \u202e.mp4".encode(), b"x" * 250])
def test_any_name_is_a_name(seeds, tmp_path, name, monkeypatch):
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file: file.write((seeds / "h264.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    for way in (os.fsdecode(path), os.fsdecode(name), Path(os.fsdecode(name))):
        info = probe(way)
        assert info.num_frames == 12 and info.path == str(way) and decode(way).shape == (12, 48, 64, 3)
    with open(path, "wb") as file: file.write((seeds / "h264.mp4").read_bytes()[:-9])
    with pytest.raises(VideoError, match="9 bytes are missing") as error: probe(os.fsdecode(path))
    assert "\n" not in str(error.value) and str(error.value).encode()                              # can be printed anywhere
    assert [os.fsencode(p.name) for p in tmp_path.iterdir()] == [name]                             # and nothing was touched

@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "socket", "device", "link to nothing", "link to itself", "NUL in the name", "forbidden"])
def test_what_is_no_ordinary_file_is_unreadable_at_once(tmp_path, kind):
    path = tmp_path / "x.mp4"
    if kind == "folder": path.mkdir()
    if kind == "pipe": os.mkfifo(path)
    if kind == "device": path = Path("/dev/zero")
    if kind == "link to nothing": path.symlink_to(tmp_path / "nowhere")
    if kind == "link to itself": path.symlink_to(path)
    if kind == "NUL in the name": path = Path("a\0b.mp4")
    if kind == "forbidden":
        path.write_bytes(b"x"); path.chmod(0)
        if os.access(path, os.R_OK): pytest.skip("this user may read anything")
    listener = socket.socket(socket.AF_UNIX)
    if kind == "socket": listener.bind(os.path.relpath(path) if len(str(path)) > 100 else str(path))
    with pytest.raises(VideoError) as error: probe(path)
    listener.close()
    assert error.value.reason == "unreadable" and error.value.status == "failed"

def test_a_link_is_read_as_what_it_leads_to(seeds, tmp_path):
    (tmp_path / "link.mp4").symlink_to(seeds / "h264.mp4")
    assert probe(tmp_path / "link.mp4").num_frames == 12

# ---- lists of other files

class Outside:
    "A web server that counts who asks."
    def __enter__(self):
        self.asked = asked = []
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self): asked.append(self.path); self.send_error(404)
            do_HEAD = do_POST = do_GET
            def log_message(self, *_): pass
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        return self
    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()

def hls(target): return f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n"
PLAYLISTS = {"hls": hls, "concat": lambda t: f"ffconcat version 1.0\nfile '{t}'\n", "pls": lambda t: f"[playlist]\nFile1={t}\nNumberOfEntries=1\n", "asx": lambda t: f'<asx version="3.0"><entry><ref href="{t}"/></entry></asx>',
             "xspf": lambda t: f'<?xml version="1.0"?>\n<playlist version="1" xmlns="http://xspf.org/ns/0/"><trackList><track><location>{t}</location></track></trackList></playlist>', "smil": lambda t: f'<smil><body><video src="{t}"/></body></smil>',
             "dash": lambda t: f'<?xml version="1.0"?>\n<!-- a list -->\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="9"><BaseURL>{t}</BaseURL></Representation></AdaptationSet></Period></MPD>',
             "sdp": lambda t: "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n", "bom": lambda t: "\ufeff" + hls(t), "master": lambda t: f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\n{t}\n"}

@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ts", "mpd", "txt"])
def test_playlists_are_refused_whatever_their_suffix_and_nobody_is_asked(seeds, tmp_path, kind, suffix):
    with Outside() as outside:
        for target in (f"{outside.address}/x.ts", str(seeds / "h264.ts"), "h264.ts", f"file:{seeds}/h264.ts"):
            (tmp_path / f"list.{suffix}").write_text(PLAYLISTS[kind](target))
            with pytest.raises(VideoError) as error: probe(tmp_path / f"list.{suffix}")
            assert error.value.reason == "playlist"
        assert outside.asked == []

def test_the_playlists_of_these_tests_would_work(seeds):
    "Else the test above proved nothing: FFmpeg without our limits asks the server, and reads the other file."
    with Outside() as outside:
        (seeds.parent / "list.m3u8").write_text(hls(f"{outside.address}/x.ts"))
        with pytest.raises(av.error.FFmpegError): av.open(str(seeds.parent / "list.m3u8"), options={"protocol_whitelist": "file,http,tcp", "allowed_extensions": "ALL"})
        assert set(outside.asked) == {"/x.ts"}
    (seeds / "list.mp4").write_text(PLAYLISTS["concat"]("h264.ts"))
    with av.open(str(seeds / "list.mp4")) as container: assert sum(1 for _ in container.decode(video=0)) == 12
    (seeds / "list.mp4").unlink()

def test_a_playlist_that_looks_like_none_still_has_no_way_out(seeds, tmp_path):
    "Bytes that our own look does not take for a list reach FFmpeg, which knows no reader for them and no protocol."
    (tmp_path / "h264.ts").write_bytes((seeds / "h264.ts").read_bytes())
    for k, start in enumerate((b"\0", b"\x01\n", b"\xff\xfe")):
        for kind in ("hls", "concat", "dash"):
            (tmp_path / "x.m3u8").write_bytes(start + PLAYLISTS[kind]("h264.ts").encode() + b"\0\xff")
            with pytest.raises(VideoError) as error: probe(tmp_path / "x.m3u8")
            assert error.value.reason in ("foreign", "broken")
    with pytest.raises(av.error.FFmpegError): av.open(str(tmp_path / "h264.ts"), options={"protocol_whitelist": "fd"})

def test_a_movie_that_points_to_another_file_does_not_read_it(tmp_path):
    "A QuickTime reference movie: the index here, the data over there."
    write(tmp_path / "whole.mov", codec="mpeg4")
    data = bytearray((tmp_path / "whole.mov").read_bytes())
    at = data.index(b"dref") + 4                                                            # flags of the entry: 1 means "in this file"
    entry = data.index(b"url ", at) if b"url " in data[at : at + 40] else data.index(b"alis", at)
    data[entry + 4 : entry + 8] = bytes(4)
    mdat = data.index(b"mdat"); size = int.from_bytes(data[mdat - 4 : mdat], "big")
    data[mdat + 4 : mdat - 4 + size] = bytes(size - 8)
    (tmp_path / "points.mov").write_bytes(data)
    assert read_all(tmp_path / "points.mov")[0] in ("broken", "read")                           # what is here is zeros

# ---- sizes

@pytest.mark.parametrize("name, codec, pixels", [("x.mov", "png", "gray"), ("x.mkv", "ffv1", "yuv420p"), ("x.avi", "mjpeg", "yuvj420p")])
def test_a_picture_32k_wide_is_refused_by_its_header(tmp_path, name, codec, pixels):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=24); stream.width, stream.height, stream.pix_fmt = 32768, 1040, pixels
        frame = av.VideoFrame(32768, 1040, pixels)
        for plane in frame.planes: plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame)); container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="32768 x 1040") as error: probe(tmp_path / name)
    assert error.value.reason == "size" and error.value.status == "rejected"
    if name == "x.mov":                                                                      # and one whose header says 64 x 48
        data = bytearray((tmp_path / name).read_bytes()); at = data.index(b"png ", data.index(b"stsd")); data[at + 28 : at + 32] = struct.pack(">HH", 64, 48)
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError) as error: probe(tmp_path / name)
        assert error.value.reason in ("size", "broken")

@pytest.mark.parametrize("size, word", [((1, 1), "size"), ((15, 400), "size"), ((400, 15), "size"), ((16, 16), None)])
def test_the_smallest_picture(tmp_path, size, word):
    path = write(tmp_path / "x.mkv", codec="ffv1", pixels="gray", frames=np.zeros((3, *size, 3), np.uint8))
    if word is None: assert probe(path).height == 16
    else:
        with pytest.raises(VideoError) as error: probe(path)
        assert error.value.reason == word

# ---- streams

def with_cover(path, film=None, cover_first=True):
    "Sound and a cover picture, and a film if there is one."
    with av.open(str(path), "w") as container:
        streams = {}
        def cover():
            streams["cover"] = s = container.add_stream("mjpeg", rate=1); s.width, s.height, s.pix_fmt = 320, 240, "yuvj420p"; s.disposition = av.stream.Disposition.attached_pic
        if cover_first: cover()
        if film is not None: streams["film"] = s = container.add_stream("libx264", rate=24); s.width, s.height, s.pix_fmt = 64, 48, "yuv420p"
        if not cover_first: cover()
        streams["sound"] = sound = container.add_stream("libmp3lame" if str(path).endswith("mp3") else "aac", rate=44100, layout="mono")
        picture = av.VideoFrame.from_ndarray(np.full((240, 320, 3), 200, np.uint8), format="rgb24"); picture.pts = 0
        packets = streams["cover"].encode(picture) + streams["cover"].encode(None)
        container.mux(packets)
        for k, f in enumerate(() if film is None else film): container.mux(streams["film"].encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        if film is not None: container.mux(streams["film"].encode(None))
        for k in range(20):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono"); tone.sample_rate, tone.pts = 44100, 1024 * k
            container.mux(sound.encode(tone))
        container.mux(sound.encode(None))
    return path

@pytest.mark.parametrize("name", ["song.mp3", "song.mp4"])
def test_a_cover_is_no_film(tmp_path, name):
    try: with_cover(tmp_path / name)
    except (av.error.FFmpegError, av.codec.codec.UnknownCodecError) as error: pytest.skip(f"cannot be written here: {error}")
    with av.open(str(tmp_path / name)) as container: assert container.streams.video                # there is a "video" stream, and it is a trap
    with pytest.raises(VideoError) as error: probe(tmp_path / name)
    assert error.value.reason == "streamless"

@pytest.mark.parametrize("cover_first", [True, False])
def test_the_film_is_read_and_not_its_cover(tmp_path, cover_first):
    path = with_cover(tmp_path / "film.mp4", moving(24), cover_first)
    assert (probe(path).height, probe(path).width, len(decode(path))) == (48, 64, 24)

def test_a_film_whose_picture_changes_size_is_refused_with_a_word(tmp_path):
    (tmp_path / "x.ts").write_bytes(b"".join(write(tmp_path / f"{k}.ts", codec="mpeg2video", frames=moving(12, 48 + 16 * k, 64)).read_bytes() for k in range(2)))
    with pytest.raises(VideoError, match="changes|goes back|decoded") as error: decode(tmp_path / "x.ts")
    assert error.value.reason == "broken"

def test_a_recording_may_begin_in_the_middle(tmp_path):
    data = write(tmp_path / "x.ts", frames=moving(200), options={"g": "48", "bf": "2", "tune": "zerolatency"}).read_bytes()
    cut = len(data) // 188 // 8 * 188                                                          # whole packets, before the second key frame
    (tmp_path / "x.ts").write_bytes(data[:376] + data[cut:])
    word, detail = read_all(tmp_path / "x.ts")
    assert word == "read" and 150 <= int(detail.split()[0]) < 200

def test_sound_longer_than_the_film_is_no_damage(tmp_path):
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        film = container.add_stream("libx264", rate=24); film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=44100, layout="mono")
        for f in moving(24): container.mux(film.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        container.mux(film.encode(None))
        for k in range(430):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono"); tone.sample_rate, tone.pts = 44100, 1024 * k
            container.mux(sound.encode(tone))
        container.mux(sound.encode(None))
    info = probe(tmp_path / "x.mkv")
    assert (info.num_frames, info.fps) == (24, 24) and info.duration_s == pytest.approx(1)

# ---- times

@pytest.mark.parametrize("name, field, value", [("h264.mp4", b"mvhd", 12), ("h264.mp4", b"mdhd", 12), ("h264.mp4", b"tkhd", 20), ("h264.mp4", b"mdhd", 16)])
@pytest.mark.parametrize("number", [0, 1, 10**9, 2**32 - 1])
def test_durations_and_clocks_of_a_header_are_not_believed(seeds, tmp_path, name, field, value, number):
    data = bytearray((seeds / name).read_bytes()); at = data.index(field) + 4 + value
    data[at : at + 4] = struct.pack(">I", number)
    (tmp_path / name).write_bytes(data)
    word, detail = read_all(tmp_path / name)
    assert word in ("read", "broken")
    if word == "read" and (field, value) != (b"mdhd", 12):                                    # with a slow clock, frames may really be minutes apart
        assert probe(tmp_path / name).num_frames == 12 and detail == "12 frames"
        assert probe(tmp_path / name).duration_s == pytest.approx(0.5) and probe(tmp_path / name).fps == pytest.approx(24)

def test_a_header_with_a_billion_frames(seeds, tmp_path):
    for field, offset in ((b"stsz", 8), (b"stts", 8), (b"stsz", 4)):
        data = bytearray((seeds / "h264.mp4").read_bytes()); at = data.index(field) + 4 + offset
        data[at : at + 4] = struct.pack(">I", 10**9)
        (tmp_path / "x.mp4").write_bytes(data)
        assert read_all(tmp_path / "x.mp4")[0] in ("read", "broken", "truncated", "crashed")

@pytest.mark.parametrize("name", ["uneven.mkv", "bare.h264", "h264.ts", "mpeg2.mpg", "mpeg4.avi", "h264.flv", "vp9.webm", "raw.y4m", "wmv.wmv"])
def test_a_range_is_the_same_frames_as_in_the_whole_film(seeds, name):
    times, frames = zip(*((t, f.to_ndarray(format="rgb24")) for t, f in iter_frames(seeds / name)))
    for first, last in ((0, 3), (1, len(times)), (2, 4)):
        part = decode(seeds / name, times[first], times[last] if last < len(times) else None)
        assert np.array_equal(part, frames[first:last])
