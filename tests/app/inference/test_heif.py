"""AVIF and HEIC files: the right pixels of good ones, a refusal of the others."""

import io
import re
import struct
from functools import cache

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from app.errors import TooLarge, Unprocessable
from app.inference.bundle import InputShape, Preprocessing
from app.inference.decode import decode, inspect, to_pixels
from app.inference.heif_header import MOST_BOXES, MOST_ITEMS, MOST_TILES, MOST_UNITS
from app.inference.image_formats import FORMATS
from loadtest.boxed_files import (
    ALPHA,
    AV1C,
    NCLX,
    Item,
    av1,
    box,
    file,
    full,
    grid,
    ispe,
    nested,
    picture,
    with_alpha,
)
from tests.icc import WIDE, matrix_profile
from tests.pictures import encoded
from tests.pictures import picture as noise

if "AVIF" not in FORMATS.values():
    pytest.skip("this Pillow is without AVIF", allow_module_level=True)
KINDS = ["AVIF", "HEIF"] if "HEIF" in FORMATS.values() else ["AVIF"]
STRETCH = Preprocessing()
MAX = 1_000_000
RED, BLUE = (255, 0, 0), (0, 0, 255)
FINE = {"AVIF": {"quality": 95, "subsampling": "4:4:4"}, "HEIF": {"quality": 95, "chroma": 444}}


def shape_of(width: int, height: int) -> InputShape:
    return InputShape(height=height, width=width, channels=3)


def blocks(width: int = 48, height: int = 80) -> Image.Image:
    """A picture of squares of 16 pixels, which codecs change little."""
    small = noise(width // 16, height // 16)
    return small.resize((width, height), Image.Resampling.NEAREST)


def pixels_of(data: bytes, width: int, height: int, rule: Preprocessing = STRETCH) -> np.ndarray:
    return decode(data, shape_of(width, height), rule, MAX).astype(int)


# -- the right values --


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (23, 41), (1, 1), (130, 66)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pixels_are_those_of_pillow(kind, mode, width, height):
    data = encoded(noise(width, height, mode), kind, quality=90)
    expected = to_pixels(Image.open(io.BytesIO(data)), shape_of(width, height), STRETCH)
    np.testing.assert_array_equal(pixels_of(data, width, height), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_once(kind, orientation):
    """Encoders write EXIF's number as irot and imir; a copy that stays in the EXIF counts not."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = blocks()
    data = encoded(source, kind, exif=exif.tobytes(), **FINE[kind])
    assert inspect(data, MAX).orientation == orientation
    source.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(source)
    assert np.abs(pixels_of(data, *upright.size) - np.asarray(upright)).mean() < 3
    off = pixels_of(data, *source.size, Preprocessing(orientation=False))
    assert np.abs(off - np.asarray(source)).mean() < 3


TURNS = {
    (3, None): Image.Transpose.ROTATE_270,
    (1, 0): Image.Transpose.TRANSPOSE,
    (0, 0): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
}


@pytest.mark.parametrize(("turns", "axis"), TURNS)
def test_irot_turns_against_the_clock_and_imir_mirrors_after_it(turns, axis):
    source = blocks()
    data = encoded(source, "AVIF", quality=100, subsampling="4:4:4")
    content = data[data.index(b"mdat") + 4 :]
    properties = [ispe(*source.size), AV1C, NCLX, box(b"irot", bytes([turns]))]
    if axis is not None:
        properties.append(box(b"imir", bytes([axis])))
    upright = source.transpose(TURNS[turns, axis])
    found = pixels_of(file([Item(content, properties)]), *upright.size)
    assert np.abs(found - np.asarray(upright)).mean() < 3


def clap(width: int, height: int, left: int, top: int, of: tuple[int, int]) -> bytes:
    across, down = 2 * left + width - of[0], 2 * top + height - of[1]
    return box(b"clap", struct.pack(">IIIIiIiI", width, 1, height, 1, across, 2, down, 2))


def test_a_clean_aperture_is_cut_out_before_turning():
    source = blocks()
    data = encoded(source, "AVIF", quality=100, subsampling="4:4:4")
    content = data[data.index(b"mdat") + 4 :]
    cut = clap(16, 33, 16, 32, source.size)
    properties = [ispe(*source.size), AV1C, NCLX, cut, box(b"irot", b"\x01")]
    right = source.crop((16, 32, 32, 65)).transpose(Image.Transpose.ROTATE_90)
    found = pixels_of(file([Item(content, properties)]), 33, 16)
    assert np.abs(found - np.asarray(right)).mean() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_transparent_pixels_lie_on_white(kind):
    colours = blocks(64, 64)
    source = colours.copy()
    source.putalpha(blocks(64, 64).getchannel("G"))
    found = pixels_of(encoded(source, kind, **FINE[kind]), 64, 64)
    alpha = np.asarray(source.getchannel("A"))[..., None] / 255.0
    right = np.asarray(colours) * alpha + 255 * (1 - alpha)
    assert np.abs(found - right).mean() < 4
    dropped = pixels_of(encoded(source, kind, **FINE[kind]), 64, 64, Preprocessing(alpha="drop"))
    assert np.abs(dropped - np.asarray(colours)).mean() < 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_icc_profile_is_converted_as_of_a_png(kind):
    srgb = Preprocessing(profile="srgb")
    profile = matrix_profile(WIDE, 2.2)
    source = blocks(64, 64)
    right = pixels_of(encoded(source, icc_profile=profile), 64, 64, srgb)
    data = encoded(source, kind, **FINE[kind], icc_profile=profile)
    assert np.abs(pixels_of(data, 64, 64, srgb) - right).mean() < 4
    assert np.abs(pixels_of(data, 64, 64) - np.asarray(source)).mean() < 4
    assert np.abs(right - np.asarray(source)).mean() > 8


@pytest.mark.parametrize("bits", [10, 12])
def test_more_bits_are_scaled_to_eight(bits):
    levels = np.arange(64 * 64 * 3).reshape(64, 64, 3) // 3 % 2**bits
    data = imagecodecs.avif_encode(
        levels.astype(np.uint16), bitspersample=bits, level=100, pixelformat="444"
    )
    assert np.abs(pixels_of(data, 64, 64) - levels / 2**bits * 255).max() < 3


def test_the_first_frame_of_a_sequence_counts():
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    assert np.abs(pixels_of(data, 64, 64) - RED).max() < 4


FORMS = {
    "in idat": file([picture(64, 64, RED, method=1)]),
    "in three parts": file([picture(64, 64, RED, extents=3)]),
    "in a box of 64 bits": file(
        [picture(64, 64, RED)],
        media=lambda content: struct.pack(">I4sQ", 1, b"mdat", 16 + len(content)) + content,
    ),
    "in a box up to the end": file(
        [picture(64, 64, RED)], media=lambda content: b"\x00\x00\x00\x00mdat" + content
    ),
    "of another brand": file([picture(64, 64, RED)], brand=b"mif1"),
    "beside other items": file(
        [picture(128, 128, BLUE), picture(64, 64, RED), Item(b"<x/>", [], b"mime")], primary=2
    ),
    "beside boxes in boxes": file([picture(64, 64, RED)], more=nested(1000)),
    "with a thumbnail": file(
        [picture(64, 64, RED), picture(8, 8, BLUE)], [(b"thmb", 2, [1])]
    ),
    "with gains": file(
        [picture(64, 64, RED), picture(64, 64, BLUE)],
        [(b"auxl", 2, [1])],
    ),
    "with a property that need not be known": file(
        [picture(64, 64, RED, properties=[ispe(64, 64), AV1C, NCLX, box(b"????")])]
    ),
    "opaque": with_alpha(picture(64, 64, RED), picture(64, 64, (255, 255, 255))),
    "a grid": file(*grid(3, 2, 192, 128, picture(64, 64, RED))),
    "a grid over the edge": file(*grid(3, 2, 130, 66, picture(64, 64, RED))),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_picture_is_read_however_it_is_stored(name):
    assert np.abs(pixels_of(FORMS[name], 8, 8) - RED).max() < 4


def test_tiles_of_a_grid_are_in_rows():
    colours = [RED, BLUE, (0, 255, 0), (9, 9, 9), (255, 255, 0), (200, 100, 50)]
    items, links = grid(3, 2, 180, 120, picture(64, 64))
    tiles = [picture(64, 64, colour) for colour in colours]
    found = pixels_of(file([items[0], *tiles], links), 180, 120)
    corners = found[10::64, 10::64].reshape(6, 3)
    assert np.abs(corners - colours).max() < 4


@cache
def heic_grid() -> tuple[bytes, Image.Image]:
    """A HEIC photo in tiles, as phones write it."""
    pillow_heif = pytest.importorskip("pillow_heif")
    source = noise(9, 7).resize((1100, 700), Image.Resampling.BICUBIC)
    pillow_heif.options.GRID_TILE_SIZE = 512
    try:
        return encoded(source, "HEIF", quality=80), source
    finally:
        pillow_heif.options.GRID_TILE_SIZE = 0


def test_a_photo_in_tiles_is_read_whole():
    data, source = heic_grid()
    assert len(inspect(data, 4 * MAX).spans) == 6
    found = decode(data, shape_of(1100, 700), STRETCH, 4 * MAX).astype(int)
    assert np.abs(found - np.asarray(source)).mean() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_gets_the_picture_alone(kind):
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = encoded(
        blocks(), kind, exif=exif.tobytes(), xmp=b"<xmp/>", icc_profile=matrix_profile(WIDE, 2.2)
    )
    alone = inspect(data, MAX).picture(data)
    for part in (b"Exif", b"<xmp/>", b"prof", b"irot", b"clap"):
        assert part not in alone
    assert Image.open(io.BytesIO(alone)).convert("RGB").size[0] >= 48


# -- refusals --

SMALL = file([picture(64, 64)])
START_OF_FRAME = 4 + av1(64, 64)[3]  # behind a delimiter of 2 bytes and the sequence header
SEQUENCE, FRAME = av1(64, 64)[:START_OF_FRAME], av1(64, 64)[START_OF_FRAME:]


def with_property(*more: bytes, **changes) -> bytes:
    return file([picture(64, 64, properties=[ispe(64, 64), AV1C, NCLX, *more], **changes)])


def sized(size: int, wide: int | None = None) -> bytes:
    """A file whose mdat box says a size, of 32 or 64 bits."""
    more = b"" if wide is None else struct.pack(">Q", wide)
    return file(
        [picture(64, 64)], media=lambda data: struct.pack(">I", size) + b"mdat" + more + data
    )


def replaced(old: bytes, new: bytes) -> bytes:
    assert SMALL.count(old) == 1
    return SMALL.replace(old, new)


def tiles(columns: int, rows: int, width: int, height: int, tile: Item, **changes) -> bytes:
    return file(*grid(columns, rows, width, height, tile, **changes))


def beyond(offset: int, length: int) -> bytes:
    return file([picture(64, 64)], place=lambda _, __: (offset, length))


def one_place_for_all() -> bytes:
    """A file in which 64 tiles have the same bytes."""
    padded = av1(64, 64) + b"\x7a\xe8\x07" + bytes(1000)
    (whole, first, *others), links = grid(8, 8, 512, 512, picture(64, 64, content=padded))
    others = [other._replace(content=b"") for other in others]
    size = len(padded)
    return file(
        [whole, first, *others],
        links,
        place=lambda at, length: (at, length) if length else (at - size, size),
    )


MALFORMED = {
    "a box smaller than its head": (sized(4), "invalid size 4"),
    "a box of 64 bits smaller than its head": (sized(1, 15), "invalid size 15"),
    "a box of 64 bits of all bits": (sized(1, 2**64 - 1), "cut off"),
    "a box beyond the end": (sized(2**31), "cut off"),
    "no meta": (replaced(b"meta", b"free"), "0 boxes b'meta'"),
    "two metas": (SMALL + box(b"meta"), "2 boxes b'meta'"),
    "two locations": (file([picture(64, 64)], more=full(b"iloc")), "2 boxes b'iloc'"),
    "no picture": (replaced(b"pict", b"soun"), "not of a picture"),
    "too many boxes": (file([picture(64, 64)], more=box(b"free") * MOST_BOXES), "too many boxes"),
    "too many items": (file([picture(64, 64)] * (MOST_ITEMS + 1)), f"{MOST_ITEMS + 1} items"),
    "no such item": (file([picture(64, 64)], primary=2), "no item 2"),
    "another kind": (file([picture(64, 64, kind=b"jpeg")]), "kind b'jpeg'"),
    "a derived picture": (file([picture(64, 64, kind=b"iovl")]), "kind b'iovl'"),
    "no size": (file([picture(64, 64, properties=[AV1C])]), "without a size"),
    "two sizes": (with_property(ispe(64, 64)), "two properties b'ispe'"),
    "a size of 0": (file([picture(64, 64, properties=[ispe(0, 64), AV1C])]), "0 x 64"),
    "an absurd size": (
        file([picture(64, 64, properties=[ispe(2**32 - 1, 2**32 - 1), AV1C])]),
        "4294967295 x 4294967295",
    ),
    "a size smaller than the coded one": (
        file([picture(640, 64, properties=[ispe(64, 64), AV1C])]),
        "two sizes: (64, 64), (640, 64)",
    ),
    "a size larger than the coded one": (
        file([picture(64, 64, properties=[ispe(640, 64), AV1C])]),
        "two sizes: (640, 64), (64, 64)",
    ),
    "no configuration": (file([picture(64, 64, properties=[ispe(64, 64)])]), "kind b'av01'"),
    "bytes beyond the file": (beyond(10**9, 10), "not in the file"),
    "bytes over the end": (beyond(0, len(SMALL) + 1), "not in the file"),
    "no bytes": (beyond(0, 0), "not in the file"),
    "bytes of another item": (file([picture(64, 64, method=2)]), "not in the file"),
    "bytes in a missing idat": (
        file([picture(64, 64, method=1)]).replace(b"idat", b"free"),
        "not in the file",
    ),
    "too long lists": (file([picture(64, 64)] * 33, [(b"cdsc", i, [1] * 255) for i in range(33)]),
        "too long lists"),
    "an unknown property that is needed": (
        with_property(box(b"a1op", b"\x00"), essential=(b"a1op", b"av1C")), "needs b'a1op'",
    ),
    "turned before it is cropped": (
        with_property(box(b"irot", b"\x01"), clap(8, 8, 0, 0, (64, 64))), "order",
    ),
    "turned twice": (with_property(box(b"irot", b"\x01"), box(b"irot", b"\x01")), "order"),
    "an empty irot": (with_property(box(b"irot")), "cut off"),
    "cropped to more than it is": (with_property(clap(65, 64, 0, 0, (64, 64))), "clap"),
    "cropped beside it": (with_property(clap(8, 8, 60, 0, (64, 64))), "clap"),
    "cropped to nothing": (with_property(clap(0, 8, 0, 0, (64, 64))), "clap"),
    "cropped by 0": (with_property(box(b"clap", bytes(32))), "denominator is 0"),
    "two frames": (file([picture(64, 64, content=av1(64, 64) * 2)]), "2 frames"),
    "no frame": (file([picture(64, 64, content=SEQUENCE)]), "0 frames"),
    "no sequence header": (file([picture(64, 64, content=FRAME)]), "0 sequence headers"),
    "a unit beyond its item": (file([picture(64, 64, content=av1(64, 64)[:-1])]), "AV1 data"),
    "too many units": (
        file([picture(64, 64, content=b"\x7a\x00" * MOST_UNITS + av1(64, 64))]), "AV1 unit",
    ),
    "bytes that are not AV1": (file([picture(64, 64, content=b"\xff" * 100)]), "AV1 unit"),
    "alpha of another size": (with_alpha(picture(64, 64), picture(8, 8)), "another size"),
    "a grid of missing tiles": (
        file([grid(2, 1, 128, 64, picture(64, 64))[0][0]], [(b"dimg", 1, [2, 3])]), "no item 2",
    ),
    "a grid of itself": (
        file(grid(2, 1, 64, 64, picture(64, 64))[0], [(b"dimg", 1, [1, 1])]), "grid",
    ),
    "a grid of fewer tiles": (
        file(grid(2, 2, 128, 128, picture(64, 64))[0], [(b"dimg", 1, [2, 3])]), "invalid grid",
    ),
    "a grid of too many tiles": (
        tiles(MOST_TILES + 1 - 128, 2, 8256, 100, picture(64, 64)), f"allowed: {MOST_TILES}",
    ),
    "a grid of another size": (
        tiles(2, 1, 128, 64, picture(64, 64), properties=[ispe(64, 64)]), "invalid grid",
    ),
    "a grid beyond its tiles": (tiles(2, 1, 129, 64, picture(64, 64)), "grid of 2 x 1"),
    "a tile that is not shown": (tiles(2, 1, 64, 64, picture(64, 64)), "grid of 2 x 1"),
    "a grid of huge tiles": (
        tiles(1, 1, 64, 64, picture(64, 64, properties=[ispe(2**31, 2**31), AV1C])),
        "2147483648",
    ),
    "a grid of tiles of two sizes": (
        file([*grid(2, 1, 128, 64, picture(64, 64))[0][:2], picture(128, 64)],
             [(b"dimg", 1, [2, 3])]), "two sizes",
    ),
    "a grid cut off": (
        file([Item(b"\x00\x00\x00", [ispe(64, 64)], b"grid"), picture(64, 64)],
             [(b"dimg", 1, [2])]), "cut off",
    ),
    "a grid whose tiles have more bytes than the file": (
        one_place_for_all(), "bytes are not in the file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_before_a_decoder_sees_it(name):
    data, said = MALFORMED[name]
    pattern = said if "|" in said else re.escape(said)
    for read in (inspect, lambda data, most: decode(data, shape_of(8, 8), STRETCH, most)):
        with pytest.raises((Unprocessable, TooLarge), match=pattern):
            read(data, MAX)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_counted_before_decoding(kind):
    data = encoded(Image.new("RGB", (128, 64)), kind)
    assert inspect(data, 128 * 64).pixels == 128 * 64
    with pytest.raises(TooLarge, match=r"pixels; allowed: 8191 \(SCUMBLE_LIMITS__MAX_PIXELS\)"):
        inspect(data, 8191)


def test_tiles_over_the_edge_count():
    data = file(*grid(2, 2, 65, 65, picture(64, 64)))
    with pytest.raises(TooLarge, match="128 x 128 = 16384 pixels; allowed: 16383"):
        inspect(data, 16383)


def hevc() -> bytes:
    if "HEIF" not in FORMATS.values():
        pytest.skip("pillow-heif is not installed")
    return encoded(Image.new("RGB", (64, 64)), "HEIF")


HEVC_DAMAGE = {
    "another size": ((ispe(64, 64), ispe(128, 64)), "two sizes"),
    "no parameter set": ((b"\x61\x00\x01", b"\x61\x00\x00"), "hvcC|cut off|kind|two"),
    "another kind of unit": ((b"\x28\x01\xaf", b"\x42\x01\xaf"), "unit of the kind 33"),
    "another layer": ((b"\x28\x01\xaf", b"\x28\x09\xaf"), "kind 20"),
    "no first slice": ((b"\x28\x01\xaf", b"\x28\x01\x2f"), "0 pictures"),
}


@pytest.mark.parametrize("name", HEVC_DAMAGE)
def test_hevc_data_must_be_one_picture_of_its_size(name):
    (old, new), said = HEVC_DAMAGE[name]
    data = hevc()
    assert data.count(old) == 1
    with pytest.raises(Unprocessable, match=said):
        inspect(data.replace(old, new), MAX)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_off_anywhere_is_refused(kind):
    data = encoded(noise(64, 64), kind)
    for size in range(16, len(data), 1 if len(data) < 2000 else 29):
        with pytest.raises(Unprocessable):
            decode(data[:size], shape_of(8, 8), STRETCH, MAX)


@cache
def samples() -> list[bytes]:
    alpha = encoded(noise(40, 24, "RGBA"), "AVIF")
    return [
        SMALL, alpha, FORMS["a grid"], *(encoded(noise(40, 24), kind) for kind in KINDS)
    ]  # fmt: skip


@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_damage_gives_pixels_or_a_refusal(which, changes):
    damaged = bytearray(samples()[which % len(samples())])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        pixels = decode(bytes(damaged), shape_of(8, 8), STRETCH, MAX)
    except (Unprocessable, TooLarge):
        return
    assert pixels.shape == (8, 8, 3)


# -- what is not installed --


def test_a_format_that_is_not_installed_is_refused_by_what_it_needs(monkeypatch):
    files = {"HEIC": box(b"ftyp", b"heic" + bytes(8)), "AVIF": SMALL}
    needs = {"HEIC": "the package pillow-heif", "AVIF": "Pillow 11.3 or newer with AVIF"}
    for kind in ("image/avif", "image/heic", "image/heif"):
        monkeypatch.delitem(FORMATS, kind, raising=False)
    for name, data in files.items():
        with pytest.raises(Unprocessable) as refusal:
            decode(data, shape_of(8, 8), STRETCH, MAX)
        assert str(refusal.value) == (
            f"image is a file of the format {name}, which is not supported without {needs[name]}; "
            "supported formats: JPEG, PNG, WEBP"
        )


def test_alpha_in_the_old_name_counts_too():
    old = b"urn:mpeg:hevc:2015:auxid:1\x00"
    data = with_alpha(picture(64, 64, RED), picture(64, 64, 0))
    renamed = file(
        [
            picture(64, 64, RED),
            picture(64, 64, 0, properties=[ispe(64, 64), AV1C, full(b"auxC", old)]),
        ],
        [(b"auxl", 2, [1])],
    )
    assert ALPHA in data
    for each in (data, renamed):
        assert pixels_of(each, 8, 8).min() > 250
