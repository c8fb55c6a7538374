import contextlib
import gc
import io
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from app.errors import RequestError, TooLarge, Unprocessable
from app.inference.bundle import InputShape, Preprocessing
from app.inference.decode import Header, _quick, decode, inspect, to_pixels
from app.inference.image_formats import FORMATS, has_part
from app.inference.image_header import MOST_SCANS, SMALL_JPEG
from loadtest import bomb_files
from loadtest.bomb_files import chunk, png
from tests.pictures import PNG, encoded, picture

RGB = InputShape(height=8, width=8, channels=3)
GREY = InputShape(height=8, width=8, channels=1)
STRETCH = Preprocessing()
MAX = 1_000_000


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_formats_give_the_exact_pixels(kind):
    source = picture()
    pixels = decode(encoded(source, kind, lossless=True), RGB, STRETCH, MAX)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(source))


def test_jpeg_is_close():
    source = Image.new("RGB", (8, 8), (200, 100, 50))
    pixels = decode(encoded(source, "JPEG", quality=95), RGB, STRETCH, MAX)
    assert np.abs(pixels.astype(int) - np.asarray(source)).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("shape", [RGB, GREY], ids=["rgb", "grey"])
def test_every_mode_becomes_the_network_input(mode, shape):
    source = picture()
    source = (
        Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else source.convert(mode)
    )
    pixels = decode(encoded(source), shape, STRETCH, MAX)
    assert pixels.shape == (8, 8, shape.channels)


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    wide = encoded(Image.fromarray(grey.astype(np.uint16) * 257))
    np.testing.assert_array_equal(decode(wide, GREY, STRETCH, MAX)[..., 0], grey)


def test_palette_with_transparency_is_silent():
    source = picture(mode="P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encoded(source, transparency=b"\x00\x01"), RGB, STRETCH, MAX)


def test_another_size_is_resized():
    flat = Image.new("RGB", (40, 30), (10, 20, 30))
    pixels = decode(encoded(flat), RGB, STRETCH, MAX)
    np.testing.assert_array_equal(pixels, np.full((8, 8, 3), (10, 20, 30)))


def test_crop_keeps_the_centre():
    """The middle third is white; a crop of the whole height sees white only, a stretch does not."""
    wide = Image.new("RGB", (24, 8))
    wide.paste((255, 255, 255), (8, 0, 16, 8))
    cropped = decode(encoded(wide), RGB, Preprocessing(fit="crop", ratio=1.0), MAX)
    assert cropped.min() == 255
    assert decode(encoded(wide), RGB, STRETCH, MAX).min() == 0


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data, RGB, STRETCH, MAX)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (100_000, 100_000), (2**31 - 1, 1)])
def test_a_bomb_is_stopped_by_its_header(width, height):
    with pytest.raises(TooLarge, match="allowed: 1000000"):
        decode(png(width, height, colour=2, pixels=[chunk(b"IDAT", b"")]), RGB, STRETCH, MAX)


REFUSED = {
    TooLarge: """
        png-100000-x-100000 png-1-x-4000000 png-4000000-x-1 jpeg-two-frames webp-huge-canvas
        webp-16383-x-16383 webp-lossless-16383-x-16383 webp-huffman-groups
        webp-huffman-groups-frame avif-says-100000-x-100000
    """,
    Unprocessable: """
        png-palette-5-mib png-two-headers png-empty-idats png-empty-texts png-huge-chunk-length
        png-apng-frames jpeg-2500-scans jpeg-100000-scans jpeg-repeated-baseline-scan
        jpeg-two-headers jpeg-frame-after-the-scan jpeg-62000-empty-segments
        jpeg-empty-segments-full-body jpeg-fill-bytes jpeg-ff-in-the-scan jpeg-arithmetic
        jpeg-lossless-arithmetic jpeg-lossless jpeg-12-bit jpeg-255-components jpeg-height-later
        jpeg-lines-after-the-scan jpeg-hierarchical jpeg-10000-huffman-tables
        jpeg-10000-quantizations webp-small-canvas webp-large-canvas webp-metadata-chunks
        webp-frame-of-another-size webp-says-4-gib avif-1024-tiles avif-huge-tiles
        avif-tiles-beyond-the-edge avif-says-64-is-2000 avif-many-boxes avif-2000-items
        avif-long-lists avif-1000-frames avif-empty-units avif-one-place-for-all
    """,
}
REFUSALS = {
    name: error
    for error, names in REFUSED.items()
    for name in names.split()
    if "AVIF" in FORMATS.values() or not name.startswith("avif")
}
WORKS_MOST = {"png-empty-blocks"}  # refused by the decoder, after work in proportion to its bytes


@pytest.mark.parametrize("name", REFUSALS)
def test_bombs_are_refused_before_a_decoder_sees_them(name):
    data = bomb_files.FILES[name]()
    with pytest.raises(REFUSALS[name]):
        inspect(data, 4_000_000, whole=True)
    with pytest.raises(REFUSALS[name]):
        decode(data, RGB, STRETCH, 4_000_000)


HARMLESS = bomb_files.FILES.keys() - REFUSALS - WORKS_MOST
LONG_SCANS = {"jpeg-stuffed-scan", "jpeg-restarts-in-the-scan", "jpeg-zeros-in-the-scan"}


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_of_other_bombs_a_decoder_gets_the_picture_alone(name):
    data = bomb_files.FILES[name]()
    header = inspect(data, 4_000_000, whole=True)
    assert header.pixels <= 4_000_000
    picture_alone = header.picture(data)
    for kind in (b"zTXt", b"iTXt", b"iCCP", b"tEXt", b"eXIf", b"MPF", b"ICC_PROFILE", b"ICCP"):
        assert kind not in picture_alone
    if header.pixels == 28 * 28 and name not in {*LONG_SCANS, "png-idat-300-mib"}:
        assert len(picture_alone) < 1000
    pixels = decode(data, RGB, Preprocessing(alpha="drop"), 4_000_000)
    if name not in {
        "png-noise",
        "jpeg-32-scans-cmyk",
        "jpeg-cmyk",
        "jpeg-restart-after-each-block",
        "avif-10-bit-alpha",
    }:
        assert pixels.max() == 0  # black, as their pictures are


@pytest.mark.parametrize("part", [chunk(b"tEXt"), chunk(b"IDAT")], ids=["text", "pixels"])
def test_parts_of_a_file_are_counted_and_capped(part):
    """As many as fit `MOST_PARTS` and its bytes are read, one more is not."""
    pixels = chunk(b"IDAT", bomb_files.zeros(29 * 28))
    few = png(pixels=[*[part] * 200, pixels])
    assert decode(few, GREY, STRETCH, MAX).max() == 0
    with pytest.raises(Unprocessable, match=r"too many parts for its \d+ bytes; allowed: 2"):
        inspect(png(pixels=[*[part] * 300, pixels]), MAX)


def test_progressive_scans_are_counted_and_capped():
    own = len(bomb_files.parts(bomb_files.jpeg(progressive=True))) - len(
        bomb_files.parts(bomb_files.jpeg())
    )
    assert own < MOST_SCANS
    for repeats, allowed in ((1, True), (20, True), (MOST_SCANS + 1, False)):
        data = bomb_files.jpeg(progressive=True, repeat_last_scan=repeats)
        if allowed:
            assert decode(data, GREY, STRETCH, MAX).max() == 0
        else:
            with pytest.raises(Unprocessable, match=f"too many scans; allowed: {MOST_SCANS}"):
                inspect(data, MAX)


def test_scans_of_a_large_jpeg_are_read_by_decode_alone():
    """`inspect` takes as many steps as the file has parts before its first scan, no more."""
    data = bomb_files.jpeg(scan_data=bytes(SMALL_JPEG))
    header = inspect(data, MAX)
    assert (header.width, header.height, header.whole, header.plain) == (28, 28, False, False)
    assert decode(data, GREY, STRETCH, MAX, header).max() == 0
    many = bomb_files.jpeg(progressive=True, repeat_last_scan=3000)
    with pytest.raises(Unprocessable, match="too many scans"):
        decode(many, GREY, STRETCH, MAX, inspect(many, MAX))


def test_a_decoder_that_finds_another_size_is_not_believed():
    with pytest.raises(Unprocessable, match="two sizes"):
        decode(PNG, GREY, STRETCH, MAX, Header("PNG", 9, 9, channels=3))


NO_IMAGES = {
    "empty": b"",
    "text": b"hello",
    "png header only": PNG[:30],
    "png cut off": PNG[:-60],
    "png with a hole": PNG[:40] + bytes(20) + PNG[60:],
    "gif": encoded(picture(), "GIF"),
    "bmp": encoded(picture(), "BMP"),
    "tiff": encoded(picture(), "TIFF"),
    "jpeg header only": b"\xff\xd8\xff\xe0" + bytes(50),
    "webp header only": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_allowed_image_is_refused(name):
    with pytest.raises(Unprocessable):
        decode(NO_IMAGES[name], RGB, STRETCH, MAX)


OTHERS = {
    "GIF": encoded(picture(), "GIF"),
    "BMP": encoded(picture(), "BMP"),
    "TIFF": encoded(picture(), "TIFF"),
    "JPEG XL": b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused_by_their_name(name):
    for read in (lambda data: inspect(data, MAX), lambda data: decode(data, RGB, STRETCH, MAX)):
        with pytest.raises(Unprocessable) as refusal:
            read(OTHERS[name])
        assert str(refusal.value) == (
            f"image is a file of the format {name}, which is not supported; supported formats: "
            + ", ".join(dict.fromkeys(FORMATS.values()))
        )


@given(st.binary(max_size=200))
def test_any_bytes_give_pixels_or_a_refusal(data):
    _pixels_or_refusal(data)


@given(
    st.sampled_from([PNG, encoded(picture(), "JPEG"), encoded(picture(), "WEBP")]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    st.integers(0, 10_000),
)
def test_any_damage_gives_pixels_or_a_refusal(data, changes, length):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    _pixels_or_refusal(bytes(damaged[: length % (len(damaged) + 1) or None]))


def _pixels_or_refusal(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # codecs warn about what they repair
        try:
            pixels = decode(data, RGB, STRETCH, MAX)
        except (Unprocessable, TooLarge):
            return
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (37, 21)])
@pytest.mark.parametrize("shape", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("PNG", {"compress_level": 0}),
        ("PNG", {"optimize": True}),
        ("PNG", {"dpi": (72, 72)}),
        ("JPEG", {"quality": 20}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 80, "subsampling": 2, "progressive": True}),
        ("JPEG", {"quality": 80, "restart_marker_blocks": 1}),
        ("JPEG", {"quality": 80, "comment": b"of a length"}),
        ("JPEG", {"quality": 80, "exif": b"Exif\x00\x00" + bytes(40)}),
        ("WEBP", {"quality": 60}),
        ("WEBP", {"lossless": True}),
    ],
)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4, deadline=None)
def test_the_quick_way_gives_what_pillow_gives(kind, options, shape, size, seed):
    rng = np.random.default_rng(seed)
    mode = {1: "L", 3: "RGB"}[shape.channels]
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).convert(mode)
    data = encoded(small.resize(size), kind, **options)
    header = inspect(data, MAX)
    assert (header.width, header.height) == size
    if not options.get("progressive") and (kind, shape.channels) != ("WEBP", 1):
        assert header.channels == shape.channels
        assert _quick(header.picture(data), header) is not None
    expected = to_pixels(Image.open(io.BytesIO(data)), shape, STRETCH)
    np.testing.assert_array_equal(decode(data, shape, STRETCH, MAX), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("shape", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("fit", [STRETCH, Preprocessing(fit="crop", ratio=0.875)])
def test_every_small_size_gives_what_pillow_gives(kind, mode, shape, fit):
    for width in range(1, 10):
        for height in range(1, 10):
            data = encoded(picture(width, height, mode, seed=width), kind)
            expected = to_pixels(Image.open(io.BytesIO(data)), shape, fit)
            np.testing.assert_array_equal(decode(data, shape, fit, MAX), expected)


def with_metadata() -> dict[str, bytes]:
    """Files of many kinds with much beside their picture."""
    icc, exif = bytes(70_000), b"Exif\x00\x00MM\x00*" + bytes(400)
    source = picture(21, 13)
    text = PngInfo()
    text.add_text("a", "b" * 5000, zip=True)
    text.add_itxt("c", "d" * 5000, zip=True)
    options = {"pnginfo": text, "dpi": (72, 72), "icc_profile": icc, "exif": exif}
    frames = [picture(21, 13, seed=seed) for seed in (1, 2)]
    noise = np.random.default_rng(0).integers(0, 256, (2, 13, 21, 4), np.uint8)
    clear = [Image.fromarray(pixels) for pixels in noise]
    more = {"save_all": True, "append_images": frames}
    wide = Image.fromarray(np.arange(273, dtype=np.uint16).reshape(13, 21) * 200)
    small = [
        bomb_files.frame_of(encoded(picture(8, 6, seed=seed), "WEBP")[12:], 4, 2, 8, 6)
        for seed in (1, 2)
    ]
    return {
        **{
            f"png {mode}": encoded(source.convert(mode), **options)
            for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
        },
        "png palette, transparent": encoded(source.convert("P"), transparency=bytes(range(256))),
        "png rgb, transparent": encoded(source, transparency=(1, 2, 3)),
        "png grey, transparent": encoded(source.convert("L"), transparency=7),
        "png interlaced": png(21, 13, 8, 6, 1),
        "png 16 bit": encoded(wide),
        "apng": encoded(source, **more),
        "apng, its default image apart": encoded(source, default_image=True, **more),
        "png, bytes after": encoded(source) + bytes(1000),
        "jpeg": encoded(source, "JPEG", icc_profile=icc, exif=exif, comment=b"of a length"),
        "jpeg grey": encoded(source.convert("L"), "JPEG", icc_profile=icc, exif=exif),
        "jpeg cmyk": encoded(source.convert("CMYK"), "JPEG", icc_profile=icc, exif=exif),
        "jpeg rgb": encoded(source, "JPEG", keep_rgb=True, icc_profile=icc),
        "jpeg progressive": encoded(source, "JPEG", progressive=True, icc_profile=icc),
        "jpeg, bytes after": encoded(source, "JPEG") + bytes(1000),
        "mpo": encoded(source, "MPO", save_all=True, append_images=[source]),
        "webp": encoded(source, "WEBP", icc_profile=icc, exif=exif, xmp=b"<x/>"),
        "webp lossless": encoded(source, "WEBP", lossless=True, icc_profile=icc, exif=exif),
        "webp alpha": encoded(clear[0], "WEBP", exif=exif),
        "webp animation": encoded(source, "WEBP", exif=exif, icc_profile=icc, **more),
        "webp animation, alpha": encoded(
            clear[0], "WEBP", save_all=True, append_images=clear[1:], lossless=True, exact=True
        ),
        "webp animation, alpha, lossy": encoded(
            clear[0], "WEBP", save_all=True, append_images=clear[1:]
        ),
        "webp small frame": bomb_files.animation(21, 13, *small),
        "webp, bytes after": encoded(source, "WEBP") + bytes(1001),
    }  # fmt: skip


@pytest.mark.parametrize("name", with_metadata())
@pytest.mark.parametrize("shape", [RGB, GREY], ids=["rgb", "grey"])
def test_pictures_are_the_same_without_their_metadata(name, shape):
    data = with_metadata()[name]
    header = inspect(data, MAX, whole=True)
    left_out = name not in {"png interlaced", "png 16 bit", "jpeg rgb", "jpeg"} and (
        "transparent" not in name
    )
    assert header.picture(data) != data or not left_out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of a palette with transparency
        expected = to_pixels(Image.open(io.BytesIO(data)), shape, STRETCH)
    np.testing.assert_array_equal(decode(data, shape, STRETCH, MAX), expected)


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(mode="P")),
        encoded(picture(mode="RGBA")),
        encoded(picture(mode="1")),
        bomb_files.animation(28, 28, bomb_files.frame_of(bomb_files.bitstream(8, 8), 0, 0, 8, 8)),
        encoded(picture())[:30],
        encoded(picture(), "JPEG")[:10],
        b"\xff\xd8\xff" + b"\xff" * 40,
        b"",
    ],
)
def test_what_is_not_plain_is_left_to_pillow(data):
    try:
        assert not inspect(data, MAX).plain
    except Unprocessable:
        return


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@given(cut=st.floats(0, 1), flip=st.floats(0, 0.999), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_broken_files_are_refused_or_read_whatever_reads_them(kind, cut, flip, bit):
    data = bytearray(encoded(picture(), kind))
    data[int(flip * len(data))] ^= 1 << bit
    data = bytes(data[: max(1, int(cut * len(data)))])
    try:
        pixels = decode(data, RGB, STRETCH, MAX)
    except (TooLarge, Unprocessable):
        return
    assert pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_that_was_cut_off_is_refused(kind):
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    for size in range(len(data) // 3, len(data) - 12, 97):
        with pytest.raises(Unprocessable):
            decode(data[:size], RGB, STRETCH, MAX)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_files_leave_nothing_behind(kind):
    """A codec kept each broken image, and gave back references to None that it did not have."""
    draw = random.Random(1)  # noqa: S311  # no secret
    source = encoded(picture(400, 400), kind)
    gc.collect()  # what other tests left would give its references to None back in the meantime
    none, memory = sys.getrefcount(None), resident_mb()
    for _ in range(300):
        data = bytearray(source)
        data[draw.randrange(33, len(source))] ^= 1 << draw.randrange(8)
        with contextlib.suppress(RequestError):
            decode(bytes(data), RGB, STRETCH, MAX)
    assert sys.getrefcount(None) > none - 250
    assert resident_mb() < memory + 30  # 300 of them are 137 MB


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_pillow_itself_says_the_same_of_avif():
    assert has_part("PIL", "_avif") == ("avif" in features.get_supported_modules())
    assert not has_part("PIL", "_none")
    assert not has_part("no_such_package", "_avif")
