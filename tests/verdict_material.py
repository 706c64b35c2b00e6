"""Labelled footage for the verdicts of the curation, of other content than the pocket world: what a person would call plain, in many sizes, rates and codecs.

Every set is a function `(folder, seed, held_out, half) -> [Item]` that writes real files. One seed gives one set of files; thresholds are chosen on seed 0, and judged
on other seeds with `held_out=True`, which takes other pictures (PLATES below). `half` makes every second film only. Made pictures are drawn anew for each seed; real ones come from `sample_clips()`.
"""
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
import os

import av, cv2, numpy as np

os.environ.setdefault("SVT_LOG", "1")          # the AV1 encoder says what fails, and nothing else

# --- files -----------------------------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Item:
    "A file and what is known of it."
    path: Path
    kind: str                                  # what it shows, in a few words
    label: bool = False                        # of a yes/no set: has it the defect?
    truth: dict = field(default_factory=dict)  # cuts, box, speed, reason, ...

    def __str__(self): return f"{self.path.name} ({self.kind})"

CODECS = dict(h264=("libx264", ".mp4", dict(crf="19", preset="veryfast")), hevc=("libx265", ".mp4", {"crf": "20", "preset": "ultrafast", "x265-params": "log-level=none:pools=1"}),
              vp9=("libvpx-vp9", ".webm", {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "8"}), av1=("libsvtav1", ".mkv", {"crf": "26", "preset": "10"}),
              mpeg4=("mpeg4", ".avi", dict(flags="+qscale", global_quality=str(118 * 3))), mpeg2=("mpeg2video", ".mpg", dict(flags="+qscale", global_quality=str(118 * 3))),
              mjpeg=("mjpeg", ".mov", dict(flags="+qscale", global_quality=str(118 * 3))), ffv1=("ffv1", ".mkv", {}))
NTSC = Fraction(24000, 1001)

def encode(path: Path, frames, fps=24, codec: str = "h264", **options) -> Path:
    "Writes RGB frames with a codec of CODECS; the ending is the container's."
    encoder, ending, known = CODECS[codec]
    path, frames, fps = path.with_name(path.name + ending), iter(frames), Fraction(fps).limit_denominator(1001)
    first = next(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=fps)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {**known, **options}
        stream.codec_context.thread_count = 1
        for k, frame in enumerate((first, *frames)):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = k, 1 / fps
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path

class Films(list):
    "The items of a set. `half`: every second film is left out, and what is wider than 640 pixels, which is most of the work."
    def __init__(self, folder, stem: str, half: bool): self.folder, self.stem, self.half, self.count = Path(folder), stem, half, 0
    def film(self, kind: str, frames, fps=24, codec: str = "h264", label: bool = False, **truth) -> None:
        self.count += 1
        first = next(frames := iter(frames))
        if self.half and (self.count % 2 == 0 or first.shape[1] > 640): return
        self.append(Item(encode(self.folder / f"{self.stem}-{self.count - 1:02d}", chain([first], frames), fps, codec), kind, label, truth))

# --- pictures: `(H, W, 3)` RGB, sharp at the size they are asked for -----------------------------------------------------------------------------------------------
def leaves(rng, H, W):
    "Dead leaves: discs of all sizes over each other, which has the statistics of photographs."
    out, small, large = np.full((H, W, 3), 128, np.uint8), 0.012 * H, 0.35 * H
    radii = (large ** -2 + rng.random(int(2400 * max(1, W / H))) * (small ** -2 - large ** -2)) ** -0.5     # density r^-3: no size stands out
    for r in radii: cv2.circle(out, (int(rng.uniform(0, W)), int(rng.uniform(0, H))), int(np.ceil(r)), [int(c) for c in np.clip(rng.normal(120, 45) + rng.normal(0, 22, 3), 5, 250)], -1, cv2.LINE_AA)
    return np.clip(out + rng.normal(0, 5, (H, W, 1)), 0, 255).astype(np.uint8)

def cartoon(rng, H, W):
    "A few flat areas with hard edges: low in texture, and sharp."
    out = np.empty((H, W, 3), np.uint8); out[:] = rng.integers(140, 235, 3)
    cv2.rectangle(out, (0, int(0.7 * H)), (W, H), [int(c) for c in rng.integers(40, 160, 3)], -1)
    for _ in range(9):
        c, color = (int(rng.uniform(0, W)), int(rng.uniform(0, H))), [int(v) for v in rng.integers(20, 240, 3)]
        if rng.random() < 0.5: cv2.circle(out, c, int(rng.uniform(0.06, 0.2) * H), color, -1, cv2.LINE_AA)
        else: cv2.fillPoly(out, [np.int32(np.array(c) + rng.normal(0, 0.17 * H, (4, 2)))], color, cv2.LINE_AA)
    return out

def sky(rng, H, W):
    "Little but a gradient, with a tree line below and birds."
    y = np.linspace(0, 1, H)[:, None, None]
    out = ((1 - y) * rng.integers(60, 130, 3) + y * rng.integers(180, 250, 3) + np.zeros((H, W, 3)) + rng.normal(0, 1.5, (H, W, 1))).clip(0, 255).astype(np.uint8)
    crown = (H * 0.82 + np.cumsum(rng.normal(0, H / 180, W)) - rng.uniform(0, H * 0.05, W)).clip(H * 0.7, H * 0.95).astype(int)
    for x in range(W): out[crown[x] :, x] = (20, 35, 22)
    for _ in range(12):
        x, y = rng.uniform(0, W), rng.uniform(0, 0.65 * H); s = rng.uniform(0.015, 0.04) * H
        cv2.polylines(out, [np.int32([(x - s, y - s / 2), (x, y), (x + s, y - s / 2)])], False, (25, 25, 30), max(1, H // 150), cv2.LINE_AA)
    return out

def bricks(rng, H, W):
    h, w = max(6, H // rng.integers(9, 16)), max(12, H // rng.integers(4, 7))
    out = np.full((H, W, 3), 190, np.uint8)
    for row in range(H // h + 2):
        for col in range(-1, W // w + 2):
            color = np.array([150, 75, 55]) + rng.normal(0, 16) + rng.normal(0, 5, 3)
            y, x, gap = row * h, col * w + (row % 2) * w // 2, max(1, h // 9)
            cv2.rectangle(out, (x + gap, y + gap), (x + w - gap, y + h - gap), [int(c) for c in color.clip(0, 255)], -1)
    stain = cv2.resize(rng.normal(0, 1, (6, 9)).astype(np.float32), (W, H), interpolation=cv2.INTER_CUBIC)[..., None]
    return np.clip(out * (1 + 0.14 * stain) + rng.normal(0, 7, (H, W, 1)), 0, 255).astype(np.uint8)

def skyline(rng, H, W):
    out = np.empty((H, W, 3), np.uint8); out[:] = np.linspace([120, 160, 210], [225, 220, 205], H)[:, None].astype(np.uint8)
    x = 0
    while x < W:
        w, h, color = int(rng.uniform(0.12, 0.3) * H), int(rng.uniform(0.25, 0.85) * H), rng.integers(50, 150, 3)
        out[H - h :, x : x + w] = color
        step = max(5, H // 36)
        for y in range(H - h + step, H, step):
            for u in range(x + step // 2, min(x + w, W) - step // 2, step): out[y : y + step // 2, u : u + step // 2] = color // 2 if rng.random() < 0.7 else (250, 235, 170)
        x += w + int(rng.uniform(0, 0.06) * H)
    return np.clip(out + rng.normal(0, 3, (H, W, 1)), 0, 255).astype(np.uint8)

def fractal(rng, H, W):
    "A part of the Mandelbrot set's edge."
    x, y = [(-0.743643887037158704752, -0.131825904205311970493), (-1.25066, 0.02012), (0.27322626, 0.595153338)][rng.integers(3)]
    return next(filtered("mandelbrot", H + H % 2, W + W % 2, 1, start_x=x, start_y=y, start_scale=rng.uniform(0.01, 0.08), maxiter=1000))[:H, :W]

def night(rng, H, W):
    "A street at night: nearly all is dark, lights are crisp."
    out = np.clip(16 + 10 * cv2.resize(rng.normal(0, 1, (7, 10)).astype(np.float32), (W, H), interpolation=cv2.INTER_CUBIC)[..., None] + np.zeros(3), 4, 60)
    for _ in range(70):
        x, y, s = int(rng.uniform(0, W)), int(H * rng.beta(3, 3)), max(1, int(rng.uniform(0.004, 0.018) * H))
        cv2.rectangle(out, (x, y), (x + s * rng.integers(1, 4), y + s), [float(v) for v in rng.uniform(120, 255) * np.array([1, rng.uniform(0.6, 1), rng.uniform(0.3, 1)])], -1)
    for _ in range(14):
        x, w = int(rng.uniform(0, W)), int(rng.uniform(0.03, 0.12) * H)
        cv2.rectangle(out, (x, int(H * rng.uniform(0.3, 0.8))), (x + w, H), [float(v) for v in rng.uniform(5, 55, 3)], -1)
    return np.clip(out + rng.normal(0, 2.5, (H, W, 1)), 0, 255).astype(np.uint8)

@lru_cache(maxsize=None)
def real(name: str, index: int | None = None) -> np.ndarray:
    "A frame of a real clip, or all frames of it."
    from opensora_nb.data.footage import sample_clips
    if name == "hopper":
        import matplotlib.cbook as cbook
        with cbook.get_sample_data("grace_hopper.jpg") as file: return cv2.imdecode(np.frombuffer(file.read(), np.uint8), 1)[..., ::-1]
    with av.open(str(sample_clips()[name])) as container:
        frames = (f.to_ndarray(format="rgb24") for f in islice(container.decode(video=0), index or 0, None))
        return np.stack(list(frames)) if index is None else next(frames)

def _real(name, index=None): return lambda rng, H, W: cover(real(name, index), H, W)
def cover(picture, H, W):
    "Resized and cropped to H x W; never enlarged by more than a tenth, which would make it soft."
    scale = max(H / picture.shape[0], W / picture.shape[1])
    if scale > 1.1: raise ValueError(f"{picture.shape} is too small for {H} x {W}")
    small = cv2.resize(picture, (max(W, round(picture.shape[1] * scale)), max(H, round(picture.shape[0] * scale))), interpolation=cv2.INTER_AREA)
    return small[(small.shape[0] - H) // 2 :, (small.shape[1] - W) // 2 :][:H, :W]

ANY = (10**6, 10**6)
PLATES = {False: dict(leaves=(leaves, ANY), cartoon=(cartoon, ANY), sky=(sky, ANY), bunny=(_real("bigbuckbunny", 60), (720, 1280)), street=(_real("bikes", 160), (272, 640)), roof=(_real("bikes", 10), (272, 640))),
          True: dict(bricks=(bricks, ANY), skyline=(skyline, ANY), fractal=(fractal, ANY), night=(night, ANY), hopper=(_real("hopper"), (600, 512)), wall=(_real("bikes", 215), (272, 640)), man=(_real("carphone_pristine", 70), (144, 176)), bush=(_real("bigbuckbunny", 0), (720, 1280)))}

def plate(rng, H, W, held_out=False, without=()) -> tuple[np.ndarray, str]:
    "A random picture of the wanted size, and its name."
    fits = [n for n, (_, (h, w)) in PLATES[held_out].items() if H <= 1.1 * h and W <= 1.1 * w and n not in without]
    name = str(rng.choice(fits))
    return PLATES[held_out][name][0](rng, H, W), name

# --- movement --------------------------------------------------------------------------------------------------------------------------------------------------
def filtered(name, H, W, n, fps=24, **options):
    "Frames of one of FFmpeg's synthetic sources."
    graph, given = av.filter.Graph(), ":".join(f"{k}={v}" for k, v in dict(size=f"{W}x{H}", rate=Fraction(fps).limit_denominator(1001), **options).items())
    nodes = [graph.add(name, given), graph.add("format", "rgb24"), graph.add("buffersink")]
    for a, b in zip(nodes, nodes[1:]): a.link_to(b)
    graph.configure()
    for _ in range(n): yield graph.pull().to_ndarray(format="rgb24")

def camera(picture, H, W, dy=0.0, dx=0.0, zoom=1.0, angle=0.0, n=None):
    "Views of a picture that goes on, mirrored, beyond its edges: offsets in pixels, zoom factors and degrees, a number or one for each frame."
    n, (h, w) = n or max(np.size(v) for v in (dy, dx, zoom, angle)), picture.shape[:2]
    mirrored = lambda index, size: np.where(index % (2 * size) < size, index % (2 * size), 2 * size - 1 - index % (2 * size))
    for y, x, z, a in zip(*(np.broadcast_to(v, n) for v in (dy, dx, zoom, angle))):
        y, x, room = y + (h - H) / 2, x + (w - W) / 2, 4 + int(max(0, 1 / z - 1) * max(H, W) / 2) + (a != 0) * max(H, W) // 10
        y0, x0 = int(np.floor(y)), int(np.floor(x))
        window = picture[mirrored(np.arange(y0 - room, y0 + H + room), h)][:, mirrored(np.arange(x0 - room, x0 + W + room), w)]
        matrix = cv2.getRotationMatrix2D(((W - 1) / 2, (H - 1) / 2), float(a), float(z))
        matrix[:, 2] -= matrix[:, :2] @ (room + x - x0, room + y - y0)
        yield cv2.warpAffine(window, matrix, (W, H), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)

def ramp(n, speed, rng=None):
    "Offsets of a steady movement of `speed` a frame, in a random direction: dy, dx."
    angle = 0.0 if rng is None else rng.uniform(0, 2 * np.pi)
    return np.arange(n) * speed * np.sin(angle), np.arange(n) * speed * np.cos(angle)

def tremor(rng, n, H, fps, how="white", share=0.012):
    "Offsets dy, dx in pixels of a hand that trembles: new ones each frame, or waves of 4 to 9 a second."
    if how == "white": return rng.normal(0, share * H, (2, n))
    t = np.arange(n) / fps
    return sum(1.2 * share * H * np.sin(2 * np.pi * (rng.uniform(4, 9) * t + rng.random((2, 1)))) * rng.uniform(0.5, 1) for _ in range(3))

def actors(frames, rng, count=2, size=0.2, seconds=2.5, fps=24):
    "Textured balls that cross the whole picture."
    tracks, skin = [(rng.choice([-1, 1]), rng.uniform(0.25, 0.75), rng.uniform(0, 0.3), rng.uniform(0.7, 1.2) * size) for _ in range(count)], leaves(rng, 96, 96)
    for k, frame in enumerate(frames):
        out, (H, W) = frame.copy(), frame.shape[:2]
        for side, level, start, s in tracks:
            r = int(s * H / 2); d = 2 * r
            x, y = (k / fps / seconds * 1.6 - start) * W, int(level * H + 0.08 * H * np.sin(k / fps * 5)) - r
            x = int(x if side > 0 else W - x) - r
            x0, x1, y0, y1 = max(0, x), min(W, x + d), max(0, y), min(H, y + d)
            if x1 <= x0 or y1 <= y0: continue
            ball, mask = cv2.resize(skin, (d, d)), cv2.circle(np.zeros((d, d), np.uint8), (r, r), r, 1, -1).astype(bool)
            patch = out[y0:y1, x0:x1]; m = mask[y0 - y : y1 - y, x0 - x : x1 - x]
            patch[m] = ball[y0 - y : y1 - y, x0 - x : x1 - x][m]
        yield out

def gain(frames, factors, lift=0.0):
    "Brightness: one factor and one lift (grey levels) a frame."
    for frame, f, b in zip(frames, factors, np.broadcast_to(lift, len(factors))): yield cv2.convertScaleAbs(frame, alpha=float(f), beta=float(b)) if b >= 0 else np.clip(frame * f + b, 0, 255).astype(np.uint8)

def grainy(frames, rng, sigma):
    for frame in frames: yield np.clip(frame + rng.normal(0, sigma, (*frame.shape[:2], 1)), 0, 255).astype(np.uint8)

def scene(rng, H, W, n, fps, held_out=False, moves=("pan", "zoom", "static", "actors", "slow"), without=()):
    "A steady shot of a random picture with a random movement; and what it is, in words."
    picture, name = plate(rng, H, W, held_out, without)
    move, per_frame = str(rng.choice(moves)), 24 / float(fps)
    if move == "zoom": frames = camera(picture, H, W, zoom=np.exp(rng.choice([-1, 1]) * rng.uniform(0.002, 0.008) * per_frame * np.arange(n) + 0.05))
    elif move in ("static", "actors"): frames = actors(camera(picture, H, W, n=n), rng, 2 if move == "actors" else 1, 0.35 if move == "actors" else 0.2, n / float(fps), float(fps))
    else: frames = camera(picture, H, W, *ramp(n, {"pan": rng.uniform(0.006, 0.02), "slow": rng.uniform(0.002, 0.005), "fast": rng.uniform(0.03, 0.06)}[move] * H * per_frame, rng))
    return frames, f"{name}, {move}"

SIZES = [(144, 176), (240, 320), (180, 320), (270, 480), (272, 640), (360, 640), (480, 360), (240, 240)]
RATES = [16, NTSC, 24, 25, Fraction(30000, 1001), 30]
def shape(rng, small=True): return SIZES[rng.integers(len(SIZES) - 3 * small + 0)] if small else SIZES[rng.integers(len(SIZES))]
def rate(rng): return RATES[rng.integers(len(RATES))]
def codec(rng): return str(rng.choice(["h264", "h264", "hevc", "vp9", "mpeg4", "av1"]))

# --- (a) cuts --------------------------------------------------------------------------------------------------------------------------------------------------
def cuts(folder, seed=0, held_out=False, half=False) -> list[Item]:
    "Films with known cuts: truth has `cuts` (frames that begin a shot) and `free` (ranges of frames, such as fades, in which either answer is right)."
    rng, items = np.random.default_rng((seed, 1, held_out)), Films(folder, "cuts", half)
    def add(kind, parts, fps=24, codec="h264", free=(), cuts=None, process=lambda f: f):
        starts = np.cumsum([0] + [n for _, n in parts]).tolist()
        items.film(kind, process(f for frames, _ in parts for f in frames), fps, codec, cuts=starts[1:-1] if cuts is None else cuts, free=list(free))
    def shots(H, W, fps, lengths, **more):
        out, last = [], ""
        for n in lengths:                                               # never the same real picture twice in a row: that would be no cut
            frames, name = scene(rng, H, W, n, fps, held_out, without=(last,), **more); last = name.split(",")[0]; out.append((frames, n))
        return out
    def frames_of(*args, **kw): return scene(rng, *args, held_out=held_out, **kw)[0]
    for k, (H, W) in enumerate([(144, 176), (240, 320), (180, 320), (270, 480), (360, 640), (480, 360)]):
        fps = RATES[k]; add("montage", shots(H, W, fps, rng.integers(fps // 1 * 2, fps * 3, 4).tolist()), fps, ["h264", "vp9", "mpeg4", "hevc", "h264", "av1"][k])
    add("montage, 720p", shots(720, 1280, 24, [40, 36, 44]), 24)
    add("montage, 60 fps", shots(180, 320, 60, [90, 70, 110]), 60)
    add("montage, fast pans and action", shots(240, 320, 24, [50, 60, 40, 55], moves=("fast", "actors")))
    add("montage, quick cuts", shots(240, 320, 25, [12, 8, 15, 10, 20, 9]), 25)
    for H, W in ((240, 320), (180, 320)):                               # other parts of one picture: the palette stays
        big, _ = plate(rng, 272, 640, held_out) if H == 180 else (PLATES[held_out]["skyline" if held_out else "leaves"][0](rng, 600, 1200), "")
        h, w = big.shape[0] * 2 // 3, big.shape[1] // 2
        crops = [cover(c, H, W) if min(c.shape[0] / H, c.shape[1] / W) > 0.92 else cv2.resize(c, (W, H), interpolation=cv2.INTER_CUBIC) for c in (big[:h, :w], big[-h:, -w:], big[:h, -w:][:, ::-1])]
        add("cuts between parts of one picture", [(camera(c, H, W, *ramp(40, 1.5, rng)), 40) for c in crops])
    add("cuts between dark shots", shots(240, 320, 24, [50, 45, 60]), process=lambda f: grainy(gain(f, [0.22] * 155, 4), rng, 2))
    add("noisy film", shots(240, 320, 25, [50, 60]), 25, process=lambda f: grainy(f, rng, 9))
    trembling, last = [], ""
    for _ in range(3): picture, last = plate(rng, 180, 320, held_out, (last,)); trembling.append((camera(picture, 180, 320, *tremor(rng, 50, 180, 24, share=0.008)), 50))
    add("trembling hand, with cuts", trembling)
    flashes = np.ones(72); lift = np.zeros(72)
    for at in (17, 40, 58): flashes[at : at + 4], lift[at : at + 4] = (1.6, 1.4, 1.2, 1.1), (110, 60, 25, 8)
    for H, W in ((240, 320), (360, 640)): add("camera flashes, no cut", [(frames_of(H, W, 72, 24), 72)], process=lambda f: gain(f, flashes, lift))
    add("a flash of one frame, no cut", [(frames_of(180, 320, 60, 24), 60)], process=lambda f: gain(f, [1.0] * 60, [160 if k in (20, 45) else 0 for k in range(60)]))
    add("strobe, no cut", [(frames_of(240, 320, 72, 24), 72)], process=lambda f: gain(f, np.where(np.arange(72) // 2 % 2, 1.25, 0.8)))
    fade = np.concatenate([np.linspace(0, 1, 24), np.ones(48), np.linspace(1, 0, 24)])
    add("fades in and out, no cut", [(frames_of(240, 320, 96, 24), 96)], process=lambda f: gain(f, fade))
    add("fade through black", [(gain(frames_of(180, 320, 60, 24), np.concatenate([np.ones(40), np.linspace(1, 0, 20)])), 60), (gain(frames_of(180, 320, 60, 24), np.concatenate([np.linspace(0, 1, 20), np.ones(40)])), 60)], cuts=[], free=[(38, 82)])
    one, two = list(frames_of(240, 320, 70, 24)), list(frames_of(240, 320, 70, 24))
    mix = [cv2.addWeighted(a, 1 - w, b, w, 0) for a, b, w in zip(one, two, np.clip((np.arange(70) - 25) / 20, 0, 1))]
    add("dissolve", [(mix, 70)], cuts=[], free=[(24, 47)])
    add("something large crosses the picture, no cut", [(actors(camera(plate(rng, 240, 320, held_out)[0], 240, 320, n=60), rng, 1, 0.95, 2.5), 60)])
    add("fast pan, no cut", [(frames_of(240, 320, 60, 24, moves=("fast",)), 60)])
    swing = np.cumsum(0.002 + 0.10 * np.exp(-((np.arange(72) - 36) / 7.0) ** 2)) * 240
    add("whip pan, no cut", [(camera(plate(rng, 240, 320, held_out)[0], 240, 320, dx=swing), 72)])
    add("zoom, no cut", [(frames_of(240, 320, 60, 30, moves=("zoom",)), 60)], 30)
    add("life, no cut" if held_out else "mandelbrot, no cut", [(filtered("life", 240, 320, 60, seed=seed, mold=10, ratio=0.3, death_color="green", life_color="white") if held_out else filtered("mandelbrot", 240, 320, 60, end_scale=0.02), 60)])
    add("test picture, no cut" if held_out else "gradients, no cut", [(filtered("testsrc2", 240, 320, 60) if held_out else filtered("gradients", 240, 320, 60, seed=seed + 1, speed=0.05), 60)])
    from opensora_nb.data.footage import sample_clips
    clips = sample_clips()
    items.append(Item(clips["bikes"], "real montage", truth=dict(cuts=[30, 76, 137, 187, 242], free=[], fps=25)))
    for name in ("carphone_pristine",) if held_out else ("bigbuckbunny",): items.append(Item(clips[name], "real, no cut", truth=dict(cuts=[], free=[], fps=25)))
    return items

# --- (b) text --------------------------------------------------------------------------------------------------------------------------------------------------
LINES = {False: ["I never said that to her", "Where were you last night?", "The train leaves at seven", "Welcome to our channel", "Subscribe for more videos", "Based on a true story", "Meanwhile in the city", "Coffee is ready", "Chapter two: the river"],
         True: ["How to bake fresh bread", "Live from the harbour", "Nobody knows the answer", "Winter sale starts today", "Please do not feed birds", "Part three of twelve", "She opened the window", "Follow us for news", "Twenty years later"]}

def font(name, height):
    import matplotlib
    from PIL import ImageFont
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", max(8, round(height)))

def stamp(frames, draw):
    "Draws on each frame with PIL: draw(canvas, frame number, height, width)."
    from PIL import Image, ImageDraw
    for k, frame in enumerate(frames):
        image = Image.fromarray(np.ascontiguousarray(frame)); draw(ImageDraw.Draw(image, "RGBA"), k, *frame.shape[:2]); yield np.asarray(image)

def overlay(style, rng, held_out, fps=24):
    "A draw function for `stamp`, in one of the styles of TEXTS."
    face, lines = str(rng.choice(["DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSans"])), rng.permutation(LINES[held_out]).tolist()
    size = rng.uniform(0.068, 0.082)
    def fitted(canvas, text, height, W): f = font(face, height); return font(face, height * min(1, 0.92 * W / canvas.textlength(text, font=f)))
    def line(c, text, y, H, W, height, x=None, **ink):
        f = fitted(c, text, height * H, W)
        c.text((W / 2 if x is None else x, y * H), text, font=f, anchor="ms" if x is None else "ls", **ink)
    white = dict(fill="white", stroke_width=2, stroke_fill="black")
    def draw(c, k, H, W):
        i = int(k / fps) % 4
        if style == "subtitle": line(c, lines[i], 0.91, H, W, size, **white)
        elif style == "two lines": line(c, lines[i], 0.82, H, W, size, fill="yellow", stroke_width=2, stroke_fill="black"); line(c, lines[i + 1], 0.93, H, W, size, fill="yellow", stroke_width=2, stroke_fill="black")
        elif style == "boxed": c.rectangle((0.04 * W, 0.8 * H, 0.96 * W, 0.95 * H), fill=(0, 0, 0, 190)); line(c, lines[i], 0.9, H, W, size, fill="white")
        elif style == "news":
            c.rectangle((0, 0.74 * H, W, 0.86 * H), fill=(180, 20, 20, 255)); line(c, lines[0].upper(), 0.83, H, W, 0.08, fill="white")
            c.rectangle((0, 0.88 * H, W, 0.97 * H), fill=(250, 250, 250, 255)); f = font("DejaVuSans", 0.065 * H); t = "   ".join(lines)
            c.text((-k * W / 100, 0.945 * H), t, font=f, fill="black", anchor="ls")
        elif style == "title": line(c, lines[0], 0.45, H, W, 0.13, **white); line(c, lines[1], 0.62, H, W, 0.09, **white)
        elif style == "watermark":
            for y in (0.25, 0.5, 0.75): line(c, "SAMPLE FOOTAGE", y, H, W, 0.1, fill=(255, 255, 255, 170))
        elif style == "credits":
            for j, t in enumerate(lines): line(c, t, 1.1 - k * 0.004 + 0.12 * (j - 5), H, W, 0.065, **white)
        elif style == "page":
            c.rectangle((0.06 * W, 0.04 * H, 0.94 * W, 0.96 * H), fill=(245, 243, 238, 255))
            for j, t in enumerate(lines): line(c, t, 0.14 + 0.095 * j, H, W, 0.06, fill=(20, 20, 20))
        elif style == "social":
            for j, t in enumerate(lines[i].split()[:4]): line(c, t.upper(), 0.36 + 0.13 * j, H, W, 0.11, fill=["white", "yellow"][j % 2], stroke_width=3, stroke_fill="black")
    return draw

TEXTS = ["subtitle", "two lines", "boxed", "news", "title", "watermark", "credits", "page", "social"]

def texts(folder, seed=0, held_out=False, half=False) -> list[Item]:
    "Clips with burned-in text in many styles (label True), and clips of the same kind without."
    rng, items = np.random.default_rng((seed, 2, held_out)), Films(folder, "text", half)
    add = items.film
    sizes = [(240, 320), (270, 480), (360, 640), (480, 360), (240, 320), (360, 640), (272, 640), (480, 640), (640, 360)]
    for k, style in enumerate(TEXTS + ["subtitle", "two lines", "news"]):
        (H, W), fps = [(720, 1280), (1080, 1920), (720, 1280)][k - 9] if k >= 9 else sizes[k], rate(rng)
        n = round(2.2 * float(fps)); frames, name = scene(rng, H, W, n, fps, held_out)
        add(f"{style} on {name}", stamp(frames, overlay(style, rng, held_out, float(fps))), fps, "h264" if k >= 9 else codec(rng), True)
    for k in range(12):
        (H, W), fps = (720, 1280) if k == 11 else sizes[k % len(sizes)], rate(rng)
        frames, name = scene(rng, H, W, round(2.2 * float(fps)), fps, held_out); add(name, frames, fps, "h264" if k == 11 else codec(rng))
    for source, more in (("life", dict(mold=10, ratio=0.2)), ("cellauto", dict(rule=110)), ("smptehdbars", {})): add(source, filtered(source, 240, 320, 50, **more), 24)
    H, W = 240, 320                                                     # lines and lattices, which are not letters
    y, x = np.mgrid[:480, :640]
    for name, picture in (("lattice", 60 + 150 * ((y // 12 % 2) ^ (x // 12 % 2))), ("fence", 60 + 150 * (x // 9 % 2)), ("rings", 128 + 100 * np.sin(np.hypot(y - 240, x - 320) / 3))): add(name, camera(np.repeat(picture.astype(np.uint8)[..., None], 3, 2), H, W, *ramp(50, 1.3, rng)), 24)
    from opensora_nb.data.footage import sample_clips
    items.append(Item(sample_clips()["carphone_pristine" if held_out else "bigbuckbunny"], "real"))
    return items

# --- (c) blur --------------------------------------------------------------------------------------------------------------------------------------------------
def soften(frames, how, strength):
    "gauss: sigma, defocus: radius of the disc, smear: length, pixelate: factor; all but the factor as shares of the height."
    for frame in frames:
        H, W = frame.shape[:2]
        if how == "gauss": yield cv2.GaussianBlur(frame, (0, 0), strength * H)
        elif how == "defocus": r = max(2, round(strength * H)); disc = cv2.circle(np.zeros((2 * r + 1,) * 2, np.float32), (r, r), r, 1, -1); yield cv2.filter2D(frame, -1, disc / disc.sum())
        elif how == "smear": n = max(5, round(strength * H)); line = np.zeros((n, n), np.float32); cv2.line(line, (0, n // 3), (n - 1, n - 1 - n // 3), 1); yield cv2.filter2D(frame, -1, line / line.sum())
        else: yield cv2.resize(cv2.resize(frame, (max(2, round(W / strength)), max(2, round(H / strength))), interpolation=cv2.INTER_AREA), (W, H), interpolation=cv2.INTER_CUBIC)

def blurs(folder, seed=0, held_out=False, half=False) -> list[Item]:
    "Clips out of focus, smeared or blown up (label True), and sharp ones, some of which have little texture, little light or a blurred background."
    rng, items = np.random.default_rng((seed, 3, held_out)), Films(folder, "blur", half)
    add = items.film
    sizes = [(240, 320), (270, 480), (360, 640), (144, 176), (480, 360), (272, 640)]
    ways = [("gauss", 0.014), ("gauss", 0.022), ("defocus", 0.022), ("defocus", 0.035), ("smear", 0.11), ("pixelate", 9)]
    for k in range(15):
        how, strength = ways[k % 6]
        (H, W), fps = (720, 1280) if k == 12 else (1080, 1920) if k == 13 else sizes[(k + k // 6) % 6], rate(rng)
        frames, name = scene(rng, H, W, round(2.1 * float(fps)), fps, held_out, moves=("slow", "zoom", "pan"))
        frames = soften(frames, how, strength * (1.3 if (H, W) == (144, 176) else 1))
        if k in (7, 14): frames, name = grainy(frames, rng, 2.5), name + ", with grain"
        add(f"{how} {strength}: {name}", frames, fps, "h264" if k >= 9 else codec(rng), True)
    for k in range(14):
        (H, W), fps = (720, 1280) if k == 12 else (1080, 1920) if k == 13 else sizes[k % 6], rate(rng)
        frames, name = scene(rng, H, W, round(2.1 * float(fps)), fps, held_out, moves=("pan", "slow", "static", "actors")); add(f"sharp: {name}", frames, fps, "h264" if k >= 9 else codec(rng))
    for kind in ("skyline", "night") if held_out else ("cartoon", "sky"): add(f"sharp, plain: {kind}", camera(PLATES[held_out][kind][0](rng, 360, 640), 360, 640, *ramp(50, 1.0, rng)), 24)
    back, front = plate(rng, 270, 480, held_out)[0], (bricks if held_out else leaves)(rng, 270, 480)     # shallow focus: only what stands in front is sharp
    mask = cv2.ellipse(np.zeros((270, 480), np.uint8), (240, 190), (95, 150), 0, 0, 360, 1, -1)[..., None]
    add("sharp, blurred background", (np.where(mask, front, f) for f in soften(camera(back, 270, 480, *ramp(50, 1.0, rng)), "gauss", 0.02)), 24)
    add("sharp, dark", gain(scene(rng, 270, 480, 50, 24, held_out)[0], [0.3] * 50, 2), 24)
    add("sharp, fog", gain(scene(rng, 270, 480, 50, 24, held_out)[0], [0.4] * 50, 130), 24)
    add("sharp, fast pan", scene(rng, 270, 480, 50, 24, held_out, moves=("fast",))[0], 24)
    from opensora_nb.data.footage import sample_clips
    items.append(Item(sample_clips()["carphone_pristine" if held_out else "bigbuckbunny"], "sharp: real"))
    return items

# --- (d) jitter ------------------------------------------------------------------------------------------------------------------------------------------------
def jitters(folder, seed=0, held_out=False, half=False) -> list[Item]:
    "Trembling cameras (label True), and steady ones: still, pans of all speeds, zooms, sway, action, flashes."
    rng, items = np.random.default_rng((seed, 4, held_out)), Films(folder, "jitter", half)
    add = items.film
    sizes = [(240, 320), (270, 480), (272, 640), (180, 320), (480, 360), (144, 176)]
    for k in range(14):
        (H, W), fps = (720, 1280) if k == 12 else sizes[k % 6], (60 if k == 5 else rate(rng))
        n, (picture, name) = round(2.2 * float(fps)), plate(rng, H, W, held_out)
        how, share = ("white", "waves")[k % 2], rng.uniform(0.010, 0.022)
        drift = np.array(ramp(n, rng.choice([0, 0.004, 0.012]) * H, rng))
        frames = camera(picture, H, W, *(drift + tremor(rng, n, H, float(fps), how, share)), zoom=1.06, angle=rng.normal(0, 0.35, n) if k % 3 == 0 else 0.0)
        if k % 4 == 3: frames, name = actors(frames, rng, 1, 0.25, n / float(fps), float(fps)), name + " with actor"
        add(f"{how} {share:.3f}: {name}", frames, fps, "h264" if k >= 6 else codec(rng), True)
    from opensora_nb.data.footage import sample_clips
    clip = real("carphone_pristine") if held_out else real("bigbuckbunny")[:60, ::2, ::2]
    H, W = (120, 152) if held_out else (300, 540)
    shake = np.round(tremor(rng, 60, H, 25, "waves", 0.014)).astype(int)
    y, x = np.clip((clip.shape[1] - H) // 2 + shake[0], 0, clip.shape[1] - H), np.clip((clip.shape[2] - W) // 2 + shake[1], 0, clip.shape[2] - W)
    add("waves on a real clip", (f[a : a + H, b : b + W] for f, a, b in zip(clip, y, x)), 25, label=True)
    for k, speed in enumerate([0.001, 0.003, 0.006, 0.012, 0.02, 0.035, 0.05]):
        (H, W), fps = sizes[k % 6], rate(rng); n = round(2.2 * float(fps)); picture, name = plate(rng, H, W, held_out)
        add(f"pan {speed}: {name}", camera(picture, H, W, *ramp(n, speed * H, rng)), fps, codec(rng))
    for k, rate_ in enumerate([-0.008, -0.003, 0.004, 0.012]):
        (H, W) = sizes[k]; picture, name = plate(rng, H, W, held_out); add(f"zoom {rate_}: {name}", camera(picture, H, W, zoom=np.exp(0.1 + rate_ * np.arange(55))), 24, codec(rng))
    for k in range(3):
        H, W = sizes[k + 1]; picture, name = plate(rng, H, W, held_out)
        add(f"actors: {name}", actors(camera(picture, H, W, n=55), rng, 1 + k, 0.25 + 0.2 * k, 2.3), 24, codec(rng))
    t = np.arange(72) / 24                                              # a hand that sways slowly, as good ones do
    picture, name = plate(rng, 270, 480, held_out); add(f"sway: {name}", camera(picture, 270, 480, 4 * np.sin(2 * np.pi * 0.5 * t), 6 * np.sin(2 * np.pi * 0.3 * t + 1), zoom=1.05), 24)
    picture, name = plate(rng, 180, 320, held_out); add(f"flashes: {name}", gain(camera(picture, 180, 320, *ramp(60, 1.0, rng)), [1.5 if k in (20, 21, 40) else 1 for k in range(60)], [60 if k in (20, 21, 40) else 0 for k in range(60)]), 24)
    picture, name = plate(rng, 180, 320, held_out); add(f"strobe: {name}", gain(camera(picture, 180, 320, *ramp(60, 1.5, rng)), np.where(np.arange(60) // 2 % 2, 1.15, 0.9)), 24)
    picture, name = plate(rng, 180, 320, held_out); add(f"grain, pan: {name}", grainy(camera(picture, 180, 320, *ramp(60, 1.5, rng)), rng, 6), 24)
    picture, name = plate(rng, 180, 320, held_out); add(f"dark, pan: {name}", grainy(gain(camera(picture, 180, 320, *ramp(60, 1.5, rng)), [0.3] * 60, 3), rng, 1.5), 24)
    picture, name = plate(rng, 180, 320, held_out); add(f"starting pan: {name}", camera(picture, 180, 320, dx=np.cumsum(np.clip((np.arange(60) - 15) / 20, 0, 1) * 5)), 24)
    add("life" if held_out else "mandelbrot", filtered("life", 240, 320, 55, mold=10, ratio=0.3) if held_out else filtered("mandelbrot", 240, 320, 55, end_scale=0.02), 24)
    picture, name = plate(rng, 720, 1280, held_out); add(f"pan 720p: {name}", camera(picture, 720, 1280, *ramp(50, 8, rng)), 24)
    add("gradients", filtered("gradients", 240, 320, 55, seed=seed + 3, speed=0.03), 24)
    items.append(Item(sample_clips()["bikes" if held_out else "bigbuckbunny"], "real, steady"))
    return items

# --- (e) borders -----------------------------------------------------------------------------------------------------------------------------------------------
def borders(folder, seed=0, held_out=False, half=False) -> list[Item]:
    "Pictures inside black bars: truth has `box` (y, x, height, width) and `size`; among them pictures without bars, some of them dark."
    rng, items = np.random.default_rng((seed, 5, held_out)), Films(folder, "border", half)
    def add(kind, frames, H, W, top, bottom, left, right, codec="h264", black=0, noise=0.0, fps=24):
        def framed():
            for f in frames:
                out = np.full((H, W, 3), float(black)) + (rng.normal(0, noise, (H, W, 1)) if noise else 0)
                out[top : H - bottom, left : W - right] = f; yield np.clip(out, 0, 255).astype(np.uint8)
        items.film(kind, framed(), fps, codec, box=(top, left, H - top - bottom, W - left - right), size=(H, W))
    cases = [(240, 320, 0.12, 0), (360, 640, 0.25, 0), (272, 640, 0, 0.2), (240, 320, 0, 0.1), (360, 640, 0.1, 0.12), (480, 360, 0.22, 0), (270, 480, 0.05, 0), (360, 640, 0, 0.03), (240, 320, 0.02, 0.02), (720, 1280, 0.13, 0), (1080, 1920, 0, 0.13), (144, 176, 0.12, 0)]
    for k, (H, W, v, h) in enumerate(cases):
        v, h = (2 * round(max(s * side, 4 if s else 0) / 2) for s, side in ((v, H), (h, W)))
        fps, black, noise = (24 if H > 700 else rate(rng)), [0, 0, 2, 4][k % 4], [0, 0, 1.5, 2.5][k % 4]
        frames, name = scene(rng, H - 2 * v, W - 2 * h, 36 if H > 700 else round(2.1 * float(fps)), fps, held_out, without=("night",))
        add(f"bars {v}, {h}, black {black}, noise {noise}: {name}", frames, H, W, v, v, h, h, "h264" if H > 700 else codec(rng), black, noise, fps)
    add("bars of two widths", scene(rng, 180, 290, 50, 24, held_out, without=("night",))[0], 240, 320, 20, 40, 10, 20)
    add("bars, fade in", gain(scene(rng, 180, 320, 60, 24, held_out, without=("night",))[0], np.clip(np.arange(60) / 24, 0, 1)), 240, 320, 30, 30, 0, 0)
    add("bars, dark picture", gain(scene(rng, 180, 320, 50, 24, held_out, without=("night",))[0], [0.4] * 50, 14), 240, 320, 30, 30, 0, 0)
    for H, W in ((240, 320), (360, 640), (272, 640)): add("no bars", scene(rng, H, W, 50, 24, held_out, without=("night",))[0], H, W, 0, 0, 0, 0)
    add("no bars, dark", gain(scene(rng, 240, 320, 50, 24, held_out, without=("night",))[0], [0.25] * 50, 18), 240, 320, 0, 0, 0, 0)
    edge = np.clip(1.25 - np.hypot(*np.meshgrid(np.linspace(-1, 1, 320), np.linspace(-1, 1, 240))), 0.2, 1)[..., None]
    add("no bars, vignette", ((f * edge + 10).clip(0, 255).astype(np.uint8) for f in scene(rng, 240, 320, 50, 24, held_out, without=("night",))[0]), 240, 320, 0, 0, 0, 0)
    add("no bars, fade in", gain(scene(rng, 240, 320, 60, 24, held_out, without=("night",))[0], np.clip(np.arange(60) / 30, 0, 1)), 240, 320, 0, 0, 0, 0)
    return items

# --- (f) motion ------------------------------------------------------------------------------------------------------------------------------------------------
def motions(folder, seed=0, held_out=False, half=False) -> list[list[Item]]:
    "All of them whatever `half` says. Groups of clips of one picture at rising speeds: truth has `speed` in pixels a frame."
    folder, rng, groups = Path(folder), np.random.default_rng((seed, 6, held_out)), []
    for g, (H, W) in enumerate([(144, 176), (180, 320), (240, 320)]):
        picture, name = plate(rng, H, W, held_out)
        angle = rng.uniform(0, 2 * np.pi); group = []
        for k, speed in enumerate(np.geomspace(0.1, 0.02 * H, 8)):
            off = np.arange(52) * speed
            frames = camera(picture, H, W, off * np.sin(angle), off * np.cos(angle)) if g < 2 else camera(picture, H, W, zoom=np.exp((off - off.mean()) / 3 / H))
            group.append(Item(encode(folder / f"motion-{g}-{k}", frames, 24, ["h264", "vp9", "h264"][g]), f"{'pan' if g < 2 else 'zoom'}, {name}", truth=dict(speed=float(speed))))
        groups.append(group)
    return groups

# --- (g) technical defects --------------------------------------------------------------------------------------------------------------------------------------
def technicals(folder, seed=0, held_out=False, half=False) -> list[Item]:
    "All of them whatever `half` says. Clean files in several codecs (truth: reason None), and one of each technical defect in several codecs."
    folder, rng, items = Path(folder), np.random.default_rng((seed, 7, held_out)), []
    def write(H, W, seconds=2.4, fps=24, codec="h264", moves=("pan",), **options):
        return encode(folder / f"technical-{len(items):02d}", scene(rng, H, W, round(seconds * float(fps)), fps, held_out, moves=moves, without=("night", "cartoon", "sky"))[0], fps, codec, **options)     # flat pictures need few bits, and would be squeezed
    def add(kind, reason, path): items.append(Item(path, kind, reason is not None, dict(reason=reason)))
    for codec_, (H, W), fps in [("h264", (240, 320), 24), ("h264", (272, 640), NTSC), ("h264", (720, 1280), 30), ("hevc", (360, 640), 25), ("vp9", (240, 320), 30), ("av1", (180, 320), 24), ("mpeg4", (240, 320), 25), ("mpeg2", (240, 320), 25), ("mjpeg", (180, 320), 16), ("ffv1", (144, 176), 24), ("h264", (480, 360), 60), ("h264", (320, 110), 24), ("h264", (120, 340), 24)]:
        add(f"clean, {codec_}, {W} x {H}, {float(fps):.3f} fps", None, write(H, W, fps=fps, codec=codec_))
    for codec_ in ("h264", "hevc", "vp9", "mpeg4"):
        add(f"short, {codec_}", "duration", write(180, 320, rng.uniform(0.8, 1.8), codec=codec_))
        add(f"slow, {codec_}", "fps", write(180, 320, 3, fps=[12, 10, 15, 12.5][len(items) % 4], codec=codec_))
        add(f"wide, {codec_}", "aspect", write(96, 400, codec=codec_))
        add(f"tall, {codec_}", "aspect", write(400, 96, codec=codec_))
    squeezed = dict(h264=dict(crf="51"), hevc=dict(crf="51"), vp9=dict(crf="63"), av1=dict(crf="63"))
    for codec_, options in squeezed.items(): add(f"squeezed, {codec_}", "bpp", write(360, 640, codec=codec_, moves=("slow",), **options))
    for preset in ("veryfast", "ultrafast"): add(f"baseline, {preset}", "profile", write(180, 320, preset=preset, profile="baseline"))
    for codec_ in ("h264", "hevc", "vp9", "mpeg4"):
        whole = write(180, 320, 6, codec=codec_); data = whole.read_bytes(); whole.unlink()
        name = folder / f"technical-{len(items):02d}-half{whole.suffix}"; name.write_bytes(data[: int(len(data) * rng.uniform(0.4, 0.7))])
        add(f"half of {codec_}", "truncated", name)
    for kind, reason, content in (("no bytes", "empty", b""), ("page", "foreign", b"<!DOCTYPE html><title>Moved</title>" * 9), ("random bytes", "broken", rng.bytes(5000)), ("list of files", "playlist", b"#EXTM3U\n#EXTINF:4,\nhttps://films.invalid/a.ts\n")):
        name = folder / f"technical-{len(items):02d}.mp4"; name.write_bytes(content); add(kind, reason, name)
    return items
