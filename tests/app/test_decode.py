import contextlib
import io
import os
import random
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.bundle import InputShape, Preprocessing
from app.decode import _quick, decode, inspect, to_pixels
from app.errors import RequestError, TooLarge, Unprocessable
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


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (100_000, 100_000), (2**31 - 1, 1)])
def test_a_bomb_is_stopped_by_its_header(width, height):
    with pytest.raises(TooLarge, match="allowed: 1000000"):
        decode(bomb(width, height), RGB, STRETCH, MAX)


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
    if not options.get("progressive"):
        assert header.channels == shape.channels
        assert _quick(header.picture(data), header) is not None
    expected = to_pixels(Image.open(io.BytesIO(data)), shape, STRETCH)
    np.testing.assert_array_equal(decode(data, shape, STRETCH, MAX), expected)


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(mode="P")),
        encoded(picture(mode="RGBA")),
        encoded(picture(mode="1")),
        encoded(picture(), "WEBP"),
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
    none, memory = sys.getrefcount(None), resident_mb()
    for _ in range(300):
        data = bytearray(source)
        data[draw.randrange(33, len(source))] ^= 1 << draw.randrange(8)
        with contextlib.suppress(RequestError):
            decode(bytes(data), RGB, STRETCH, MAX)
    assert sys.getrefcount(None) > none - 100
    assert resident_mb() < memory + 30  # 300 of them are 137 MB


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
