"Still pictures as they are found: shown as a person would see them, or refused with the right word."
import io, os, traceback
from collections import Counter
import numpy as np, pytest
from PIL import Image, ImageCms, ImageOps
from opensora_nb.cluster.files import UserError
from opensora_nb.data.filters import FilterConfig
from opensora_nb.data.images import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, ImageError, ImageInfo, image_faults, image_row, probe_image, read_image, write_image
from opensora_nb.data.manifest import COLUMNS, REASONS
from opensora_nb.data.video import VideoError

rng = np.random.default_rng(0)
SCENE = np.asarray(Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((96, 72), Image.BICUBIC)).copy()
SCENE[:20, :20] = 250, 20, 10                        # a red corner: which way is up
PICTURE = Image.fromarray(SCENE)
FORMATS = {"jpg": ("JPEG", dict(quality=95, subsampling=0)), "png": ("PNG", {}), "webp": ("WEBP", dict(lossless=True)), "avif": ("AVIF", dict(quality=95)), "tif": ("TIFF", {}), "bmp": ("BMP", {})}

def encode(format, picture=PICTURE, **options):
    picture.save(data := io.BytesIO(), format, **options)
    return data.getvalue()

def reason(path):
    with pytest.raises(ImageError) as error: read_image(path)
    assert isinstance(error.value, VideoError) and isinstance(error.value, UserError) and error.value.reason in REASONS and "\n" not in str(error.value)
    return error.value.reason

def store(path, content):
    path.write_bytes(content)
    return path

def error_of(path, picture=SCENE): return np.abs(read_image(path).astype(int) - picture).mean()

@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_and_probed(tmp_path, suffix):
    format, options = FORMATS[suffix]
    path = store(tmp_path / f"x.{suffix}", data := encode(format, **options)); info = probe_image(path)
    assert error_of(path) < 3 and (info.height, info.width, info.codec) == (72, 96, format.lower()) and info.bpp == 8 * len(data) / (72 * 96)
    assert f".{suffix}" in IMAGE_SUFFIXES and read_image(path).flags.c_contiguous

@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_as_pillow_itself_turns_them(tmp_path, suffix, orientation):
    format, options = FORMATS[suffix]
    exif = Image.Exif(); exif[0x0112] = orientation
    path = store(tmp_path / "x", encode(format, exif=exif, **options))
    with Image.open(path) as image: upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    info = probe_image(path)
    assert np.array_equal(read_image(path), upright) and (info.height, info.width) == upright.shape[:2]

@pytest.mark.parametrize("orientation", [0, 9, 77, 65535])
def test_an_absurd_note_to_turn_is_ignored(tmp_path, orientation):
    exif = Image.Exif(); exif[0x0112] = orientation
    assert error_of(store(tmp_path / "x", encode("PNG", exif=exif))) == 0

def test_four_inks_sixteen_bits_palettes_and_one_bit(tmp_path):
    grey = np.asarray(PICTURE.convert("L"))
    assert error_of(store(tmp_path / "cmyk", encode("JPEG", PICTURE.convert("CMYK"), quality=95))) < 6
    deep = np.random.default_rng(1).integers(0, 65536, (72, 96), dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        assert np.array_equal(read_image(store(tmp_path / format, encode(format, Image.fromarray(deep))))[..., 0], np.round(deep / 257).astype(np.uint8))
    palette = PICTURE.quantize(256)
    assert error_of(store(tmp_path / "palette", encode("PNG", palette)), np.asarray(palette.convert("RGB"))) == 0
    assert set(np.unique(read_image(store(tmp_path / "bit", encode("PNG", PICTURE.convert("1")))))) == {0, 255}
    assert error_of(store(tmp_path / "grey", encode("JPEG", PICTURE.convert("L"), quality=95)), grey[..., None]) < 2

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    picture = (PICTURE.convert("L") if mode == "LA" else PICTURE).copy(); picture.putalpha(Image.fromarray((np.indices((72, 96)).sum(0) > 90).astype(np.uint8) * 255))
    data = encode("PNG", picture.quantize(64) if mode == "P" else picture)
    seen = read_image(store(tmp_path / "x", data))
    assert (seen[:30, :30] == 255).all() and seen[60, 80].max() < 255
    if mode == "RGBA":
        assert np.array_equal(seen[60:, 60:], SCENE[60:, 60:])
        half = PICTURE.copy(); half.putalpha(128)
        assert np.abs(read_image(store(tmp_path / "half", encode("PNG", half))).astype(float) - (SCENE * 128.0 + 255 * 127) / 255).max() <= 1

def test_a_profile_is_applied_and_a_broken_one_ignored(tmp_path):
    lab = ImageCms.profileToProfile(PICTURE, ImageCms.createProfile("sRGB"), ImageCms.createProfile("sRGB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert error_of(store(tmp_path / "srgb", encode("PNG", lab, icc_profile=srgb))) < 1
    linear = np.where((x := SCENE / 255) <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)        # the same light written with another curve: a profile of gamma 1
    at = srgb.index(b"para"); curve = b"curv" + bytes(4) + (0).to_bytes(4, "big")                     # no points: a straight line
    profile = srgb[:at] + curve + srgb[at + len(curve) :]
    path = store(tmp_path / "linear", encode("PNG", Image.fromarray(np.round(255 * linear).astype(np.uint8)), icc_profile=profile))
    bright = SCENE > 60                                                                                # where 8 linear bits suffice
    assert np.abs(read_image(path).astype(int) - SCENE)[bright].mean() < 2 and np.abs(np.round(255 * linear) - SCENE)[bright].mean() > 30
    for broken in (b"nonsense", srgb[:200], bytes(500)):
        assert error_of(store(tmp_path / "broken", encode("PNG", icc_profile=broken))) == 0

def test_a_phones_file_of_two_jpegs_is_its_first_picture(tmp_path):
    second = ImageOps.mirror(PICTURE)
    path = store(tmp_path / "x.jpg", encode("MPO", save_all=True, append_images=[second], quality=95, subsampling=0))
    with Image.open(path) as image: assert image.format == "MPO" and image.n_frames == 2
    assert error_of(path) < 3 and probe_image(path).codec == "jpeg"

@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF", "GIF"])
def test_animations_are_no_pictures(tmp_path, format):
    assert reason(store(tmp_path / "x.png", encode(format, save_all=True, append_images=[ImageOps.mirror(PICTURE)]))) == "foreign"

def test_larger_pictures_are_shrunk_and_smaller_ones_left(tmp_path):
    big = np.asarray(PICTURE.resize((960, 720), Image.BICUBIC))
    for suffix in ("jpg", "png"):
        format, options = FORMATS[suffix]
        path = store(tmp_path / suffix, encode(format, Image.fromarray(big), **options))
        small = read_image(path, max_side=96)
        assert small.shape == (72, 96, 3) and np.abs(small[24:, 24:].astype(int) - SCENE[24:, 24:]).mean() < 6
        assert read_image(path, max_side=5000).shape == big.shape

def test_what_is_written_is_read_again_and_nothing_is_half_written(tmp_path):
    path = write_image(tmp_path / "new" / "x.jpg", SCENE)
    assert error_of(path) < 3 and list(path.parent.iterdir()) == [path]
    with Image.open(path) as image: assert image.format == "JPEG" and image.layer[0][1:3] == (1, 1) and not image.getexif()      # 4:4:4, no notes
    for wrong in (SCENE[..., :2], SCENE.astype(float), SCENE[:0]):
        with pytest.raises(ValueError): write_image(path, wrong)
    assert error_of(path) < 3

@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_files_that_end_too_early_are_truncated(tmp_path, suffix, share):
    data = encode(*[FORMATS[suffix][0]], **FORMATS[suffix][1])
    assert reason(store(tmp_path / f"x.{suffix}", data[: int(len(data) * share)])) == "truncated"

@pytest.mark.parametrize("content, word", [(b"", "empty"), (b"<html>404</html>", "foreign"), (bytes(range(256)) * 9, "foreign"), (encode("GIF"), "foreign"), (encode("TIFF", Image.new("F", (32, 32))), "foreign"),
                                           (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "foreign"), (encode("PNG", Image.new("L", (15, 400))), "size"), (encode("PNG", Image.new("1", (16384, 8192))), "size"),
                                           (encode("PNG", Image.new("1", (32768, 32768))), "size"), (encode("PNG")[:40] + b"?" + encode("PNG")[41:], "broken")])
def test_what_is_no_picture_has_a_word(tmp_path, content, word): assert reason(store(tmp_path / "x.jpg", content)) == word

def test_a_header_that_promises_too_much_is_not_believed(tmp_path):
    import struct, zlib
    data = bytearray(encode("PNG")); data[16:24] = struct.pack(">II", 8000, 8000); data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert 8000 * 8000 < MAX_IMAGE_PIXELS and reason(store(tmp_path / "x.png", data)) in ("truncated", "broken")

def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "folder.jpg").mkdir(); os.mkfifo(tmp_path / "pipe.jpg"); (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert {reason(tmp_path / f"{name}.jpg") for name in ("missing", "folder", "pipe", "gone", "nul\0")} == {"unreadable"}
    strange = os.fsencode(tmp_path) + b"/two\nlines \xff.jpg"
    with open(strange, "wb") as file: file.write(encode("JPEG"))
    assert read_image(os.fsdecode(strange)).shape == (72, 96, 3)

def test_rules_for_pictures():
    info = ImageInfo("x.jpg", "jpeg", 300, 100, 2.0)
    assert info.aspect_ratio == 3 and image_faults(info) == [] and image_row(info).keys() <= COLUMNS.keys() and image_row(info)["num_frames"] == 1
    assert image_faults(ImageInfo("x.jpg", "jpeg", 301, 100, 2.0)) == ["aspect"] and image_faults(info, FilterConfig(min_side=128)) == ["size"] == image_faults(info, FilterConfig(max_image_pixels=29_999))

def test_five_hundred_damaged_pictures_are_read_or_refused(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    seeds = [encode(f, **o) for f, o in FORMATS.values()] + [encode("JPEG", exif=exif, icc_profile=srgb), encode("PNG", exif=exif, icc_profile=srgb), encode("TIFF", compression="tiff_lzw"), encode("TIFF", compression="jpeg"),
             encode("JPEG", PICTURE.convert("CMYK")), encode("PNG", PICTURE.quantize(16)), encode("WEBP", quality=80, exif=exif, icc_profile=srgb), encode("JPEG", progressive=True)]
    words = Counter()
    for k in range(500):
        dice, seed = np.random.default_rng((5, k)), seeds[k % len(seeds)]
        x = bytearray(seed); n = len(x)
        match int(dice.integers(6)):
            case 0:
                for _ in range(int(dice.integers(1, 40))): x[int(dice.integers(n))] ^= 1 << int(dice.integers(8))
            case 1:
                for _ in range(int(dice.integers(1, 10))): x[int(dice.integers(min(n, 300)))] = int(dice.choice([0, 1, 127, 128, 255]))           # the header
            case 2: x = x[: int(dice.integers(n))]
            case 3: i = int(dice.integers(n)); x[i : i + 64] = bytes(64)
            case 4: i, m = int(dice.integers(n)), int(dice.integers(1, 600)); x[i:i] = x[i : i + m]
            case 5: other = seeds[int(dice.integers(len(seeds)))]; x = x[: int(dice.integers(1, 200))] + other[int(dice.integers(1, 200)) :]
        path = store(tmp_path / "x", bytes(x))
        try: info, picture = probe_image(path), read_image(path); words["read"] += 1; assert picture.shape == (info.height, info.width, 3) and picture.dtype == np.uint8
        except ImageError as error: assert error.reason in REASONS and "\n" not in str(error); words[error.reason] += 1
        except BaseException: pytest.fail(f"file {k}: {traceback.format_exc()}")
    print(dict(words))
    assert words["read"] > 50 and words["broken"] > 20 and words["truncated"] > 50
