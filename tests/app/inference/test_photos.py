"""Photos as cameras and programs make them: the right pixels of each, by Pillow or a formula."""

import io
import struct

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pydantic import ValidationError
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from app.errors import TooLarge, Unprocessable
from app.inference.bundle import Card, InputShape, Preprocessing
from app.inference.decode import check_decoded, decode, decoded_pixels, inspect, to_pixels
from app.inference.image_fit import plan
from app.inference.image_header import MOST_PROFILE, MOST_SCANS_LARGE
from loadtest import bomb_files
from loadtest.bomb_files import chunk, png
from tests.icc import SRGB_D50, WIDE, matrix_profile
from tests.pictures import encoded, picture

RGB = InputShape(height=8, width=8, channels=3)
GREY = InputShape(height=8, width=8, channels=1)
WIDE_INPUT = InputShape(height=20, width=33, channels=3)
STRETCH = Preprocessing()
MAX = 1_000_000
ORIENTATION = 0x0112
PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def exif(orientation: int, order: str = "<") -> bytes:
    """An EXIF block, without its name, of the one entry."""
    mark = b"II*\x00" if order == "<" else b"MM\x00*"
    entry = struct.pack(order + "HHIHH", ORIENTATION, 3, 1, orientation, 0)
    return mark + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def pasted(source: Image.Image, block: bytes, kind: str) -> bytes:
    return encoded(source, kind, exif=b"Exif\x00\x00" + block, **LOSSLESS.get(kind, {}))


LOSSLESS = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
KINDS = ["PNG", "JPEG", "WEBP"]
FITS = [
    STRETCH,
    Preprocessing(fit="crop", ratio=0.8),
    Preprocessing(fit="resize_crop", shorter=40),
    Preprocessing(fit="letterbox", fill=99),
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.fit)
def test_a_picture_is_turned_as_its_exif_says(kind, order, orientation, fit):
    data = pasted(picture(41, 23), exif(orientation, order), kind)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert inspect(data, MAX).orientation == orientation
    np.testing.assert_array_equal(
        decode(data, WIDE_INPUT, fit, MAX), to_pixels(upright, WIDE_INPUT, fit)
    )


def test_a_picture_of_the_input_size_is_turned_too():
    source = picture()
    found = decode(pasted(source, exif(6), "PNG"), RGB, STRETCH, MAX)
    np.testing.assert_array_equal(found, np.asarray(source.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("kind", KINDS)
def test_turning_can_be_switched_off_in_the_card(kind):
    off = Preprocessing(orientation=False)
    data = pasted(picture(41, 23), exif(6), kind)
    stored = to_pixels(Image.open(io.BytesIO(data)), RGB, STRETCH)
    np.testing.assert_array_equal(decode(data, RGB, off, MAX), stored)


BROKEN_EXIF = {
    "empty": b"",
    "cut off": exif(6)[:13],
    "another order": b"XX*\x00" + exif(6)[4:],
    "9": exif(9),
    "0": exif(0),
    "an entry of two values": exif(6)[:14] + b"\x02" + exif(6)[15:],
    "starts behind its end": b"II*\x00" + struct.pack("<I", 2**31) + bytes(20),
    "65,535 entries": b"II*\x00" + struct.pack("<IH", 8, 65535) + bytes(60),
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_is_refused_or_turned_for_broken_exif(kind, name):
    source = picture(41, 23)
    data = pasted(source, BROKEN_EXIF[name], kind)
    plain = encoded(source, kind, **LOSSLESS.get(kind, {}))
    np.testing.assert_array_equal(decode(data, RGB, STRETCH, MAX), decode(plain, RGB, STRETCH, MAX))


@given(st.binary(max_size=80), st.sampled_from(KINDS))
def test_any_exif_gives_pixels(block, kind):
    data = pasted(picture(9, 7), b"II*\x00" + block, kind)
    assert decode(data, RGB, STRETCH, MAX).shape == (8, 8, 3)


# -- transparency --


def on(ground: int, rgba: np.ndarray) -> np.ndarray:
    colours, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255.0
    return colours * alpha + ground * (1 - alpha)


def clear(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 4), np.uint8)
    return Image.fromarray(pixels)


def grey_key(depth: int, key: int) -> tuple[bytes, np.ndarray]:
    """A grey PNG of `depth` bits in which the level `key` is transparent, and its RGBA."""
    levels = np.arange(64).reshape(8, 8) * 977 % 2**depth
    levels[2] = key
    if depth == 16:
        rows = [levels[y].astype(">u2").tobytes() for y in range(8)]
        eight = levels >> 8
    else:
        bits = (levels[..., None] >> np.arange(depth)[::-1]) & 1
        rows = [np.packbits(bits[y].reshape(-1)).tobytes() for y in range(8)]
        eight = levels * (255 // (2**depth - 1))
    rgba = np.stack([eight, eight, eight, np.where(levels == key, 0, 255)], -1)
    return png_of(rows, depth, 0, struct.pack(">H", key)), rgba


def png_of(rows: list[bytes], depth: int, colour: int, key: bytes) -> bytes:
    import zlib

    body = zlib.compress(b"".join(b"\x00" + row for row in rows))
    return png(8, 8, depth, colour, pixels=[chunk(b"tRNS", key), chunk(b"IDAT", body)])


def rgb_key(depth: int) -> tuple[bytes, np.ndarray]:
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    wide = levels.astype(np.uint16) * (257 if depth == 16 else 1)
    rows = [wide[y].astype(">u2" if depth == 16 else "u1").tobytes() for y in range(8)]
    alpha = np.full((8, 8, 1), 255)
    alpha[3, 4] = 0
    return png_of(rows, depth, 2, struct.pack(">3H", *map(int, wide[3, 4]))), np.dstack(
        [levels, alpha]
    )


def palette() -> tuple[bytes, np.ndarray]:
    source = picture(mode="P")
    alphas = bytes((i * 37) % 256 for i in range(256))
    data = encoded(source, transparency=alphas)
    alpha = np.array(list(alphas))[np.asarray(source)]
    return data, np.dstack([np.asarray(source.convert("RGB")), alpha])


def transparent() -> dict[str, tuple[bytes, np.ndarray]]:
    """File -> what Pillow or the formula says of its colours and alpha."""
    rgba = clear()
    files = {
        "rgba": encoded(rgba),
        "grey and alpha": encoded(rgba.convert("LA")),
        "webp lossless": encoded(rgba, "WEBP", lossless=True, exact=True),
        "webp lossy": encoded(rgba, "WEBP", quality=90),
        "webp lossy with exif": encoded(rgba, "WEBP", quality=90, exif=b"Exif\x00\x00" + exif(1)),
        "webp animation": encoded(
            rgba, "WEBP", save_all=True, append_images=[clear(1)], lossless=True, exact=True
        ),
        "png, one colour of the palette": encoded(
            picture(mode="P"), transparency=picture(mode="P").getpixel((3, 4))
        ),
    }
    made = {
        name: (data, np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")))
        for name, data in files.items()
    }
    made["palette"] = palette()
    for depth, key in ((1, 1), (2, 2), (4, 9), (8, 200), (16, 0x1234)):
        made[f"grey of {depth} bits, one level"] = grey_key(depth, key)
    for depth in (8, 16):
        made[f"rgb of {depth} bits, one colour"] = rgb_key(depth)
    return made


TRANSPARENT = transparent()


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize(("alpha", "ground"), [("white", 255), ("black", 0)])
def test_transparent_pixels_lie_on_the_ground_of_the_card(name, alpha, ground):
    data, rgba = TRANSPARENT[name]
    found = decode(data, RGB, Preprocessing(alpha=alpha), MAX).astype(float)
    assert np.abs(found - on(ground, rgba)).max() <= 1
    assert (rgba[..., 3] < 255).any()


@pytest.mark.parametrize("name", TRANSPARENT)
def test_dropped_transparency_leaves_the_stored_colours(name):
    data, rgba = TRANSPARENT[name]
    found = decode(data, RGB, Preprocessing(alpha="drop"), MAX)
    assert np.abs(found.astype(int) - rgba[..., :3]).max() <= 1


def test_on_a_grey_network_too():
    data, rgba = TRANSPARENT["grey and alpha"]
    found = decode(data, GREY, STRETCH, MAX)[..., 0]
    assert np.abs(found - on(255, rgba)[..., 0]).max() <= 1


@pytest.mark.parametrize(
    "key", [b"", b"\x00", bytes(6), bytes(300)], ids=["empty", "short", "of rgb", "long"]
)
def test_an_invalid_transparent_colour_is_left_out(key):
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    data = png_of([row.tobytes() for row in levels], 8, 0, key)
    np.testing.assert_array_equal(decode(data, GREY, STRETCH, MAX)[..., 0], levels)


# -- colours --


def test_sixteen_bits_of_colour_keep_their_upper_eight():
    wide = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(">u2")
    data = png_of([wide[y].tobytes() for y in range(8)], 16, 2, b"")
    np.testing.assert_array_equal(decode(data, RGB, STRETCH, MAX), wide >> 8)


COLOURS = {"red": (200, 30, 20), "green": (30, 160, 60), "white": (255, 255, 255)}


@pytest.mark.parametrize("stored", ["CMYK", "YCCK"])
@pytest.mark.parametrize("name", COLOURS)
def test_four_inks_become_the_colours_that_they_print(name, stored):
    """Adobe's files, whose levels are inverted; YCCK is what its programs write."""
    colour = COLOURS[name]
    key = 255 - max(colour)
    inks = [255 - level - key for level in colour]
    inks = [round(255 * ink / (255 - key)) for ink in inks]
    pixels = np.full((16, 16, 4), [*inks, key], np.uint8)
    if stored == "CMYK":
        data = encoded(Image.fromarray(pixels, "CMYK"), "JPEG", quality=95)
    else:
        data = adobe(
            imagecodecs.jpeg8_encode(255 - pixels, 95, colorspace="CMYK", outcolorspace="YCCK")
        )
    found = decode(data, RGB, STRETCH, MAX)
    assert np.abs(found.astype(int) - colour).max() <= 6


def adobe(data: bytes) -> bytes:
    """With Adobe's marker for YCCK, if the encoder has not written it."""
    if b"Adobe" in data:
        return data
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x02" + data[2:]


SRGB = Preprocessing(profile="srgb")


def in_srgb(pixels: np.ndarray) -> np.ndarray:
    """What colours of the wide profile are in sRGB, by its matrices."""
    linear = (pixels / 255.0) ** 2.2
    to_srgb = np.linalg.inv(np.array(SRGB_D50)) @ np.array(WIDE)
    found = np.clip(linear @ to_srgb.T, 0, 1)
    curve = np.where(found <= 0.0031308, 12.92 * found, 1.055 * found ** (1 / 2.4) - 0.055)
    return curve * 255


@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_gamut_is_converted_where_the_card_asks_for_it(kind):
    profile = matrix_profile(WIDE, gamma=2.2)
    pixels = np.random.default_rng(0).integers(60, 200, (8, 8, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), kind, icc_profile=profile, **LOSSLESS.get(kind, {}))
    stored = decode(data, RGB, STRETCH, MAX)
    converted = decode(data, RGB, SRGB, MAX).astype(float)
    assert np.abs(converted - in_srgb(stored)).max() <= 2
    assert np.abs(converted - stored).max() > 8
    plain = encoded(Image.fromarray(pixels), kind, **LOSSLESS.get(kind, {}))
    np.testing.assert_array_equal(stored, decode(plain, RGB, SRGB, MAX))


def test_a_profile_of_a_transparent_picture_leaves_the_alpha():
    profile = matrix_profile(WIDE, gamma=2.2)
    rgba = np.asarray(clear())
    data = encoded(clear(), icc_profile=profile)
    expected = on(255, np.dstack([in_srgb(rgba[..., :3]), rgba[..., 3]]))
    assert np.abs(decode(data, RGB, SRGB, MAX) - expected).max() <= 2


@pytest.mark.parametrize(
    "profile",
    [b"no profile", bytes(200), b"\xff" * 70_000, bytes(MOST_PROFILE + 1)],
    ids=["text", "zeros", "in two segments", "too long"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_profile_is_ignored(kind, profile):
    source = picture()
    data = encoded(source, kind, icc_profile=profile, **LOSSLESS.get(kind, {}))
    np.testing.assert_array_equal(decode(data, RGB, SRGB, MAX), decode(data, RGB, STRETCH, MAX))


# -- fitting --

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(640, 427), (427, 640), (300, 300), (257, 999), (600, 99)])
@pytest.mark.parametrize(
    ("shorter", "crop"), [(256, (224, 224)), (232, (224, 224)), (64, (48, 64))]
)
def test_resize_then_crop_is_torchvisions(interpolation, size, shorter, crop):
    mode = v2.InterpolationMode(interpolation)
    theirs = v2.Compose([v2.Resize(shorter, mode), v2.CenterCrop(crop)])
    source = PHOTOS[0].resize(size)
    shape = InputShape(height=crop[0], width=crop[1], channels=3)
    rule = Preprocessing(fit="resize_crop", shorter=shorter, interpolation=interpolation)
    found = decode(encoded(source), shape, rule, MAX).astype(int)
    apart = np.abs(found - np.asarray(theirs(source)))
    assert apart.max() <= (1 if max(size) > 4 * min(size) else 0)
    assert (apart > 0).mean() < 0.02


@pytest.mark.parametrize("interpolation", FILTERS)
def test_crop_and_stretch_take_the_filter_of_the_card(interpolation):
    source = PHOTOS[0]
    rule = Preprocessing(interpolation=interpolation)
    expected = source.resize((33, 20), FILTERS[interpolation])
    np.testing.assert_array_equal(decode(encoded(source), WIDE_INPUT, rule, MAX), expected)


@pytest.mark.parametrize("size", [(40, 10), (10, 40), (33, 21), (500, 3)])
def test_letterbox_shows_the_whole_picture_on_its_ground(size):
    source = Image.new("RGB", size, (10, 20, 30))
    found = decode(encoded(source), WIDE_INPUT, Preprocessing(fit="letterbox", fill=77), MAX)
    inside = (found == (10, 20, 30)).all(-1)
    assert ((found == 77).all(-1) | inside).all()
    height, width = inside.any(1).sum(), inside.any(0).sum()
    scale = min(33 / size[0], 20 / size[1])
    assert (width, height) == tuple(max(1, round(side * scale)) for side in size)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert abs(rows[0] - (19 - rows[-1])) <= 1
    assert abs(columns[0] - (32 - columns[-1])) <= 1


def test_no_rule_makes_a_large_picture_of_a_narrow_one():
    """torchvision's own resize would make one of 4 gigapixels of it."""
    for rule in FITS:
        for size in ((65_500, 1), (1, 65_500)):
            assert max(plan(*size, WIDE_INPUT, rule).size) <= 4 * 40
            data = encoded(Image.new("RGB", size))
            assert decode(data, WIDE_INPUT, rule, MAX).shape == (20, 33, 3)


def card(**preprocessing) -> Card:
    return Card.model_validate(
        {
            "format": "scumble-bundle/1",
            "name": "x",
            "version": "1",
            "labels": ["a"],
            "input": WIDE_INPUT.model_dump(),
            "files": {},
            "preprocessing": preprocessing,
        }
    )


def test_a_crop_is_never_larger_than_what_was_resized():
    assert card(fit="resize_crop", shorter=33).preprocessing.shorter == 33
    for wrong in ({"fit": "resize_crop"}, {"fit": "resize_crop", "shorter": 32}):
        with pytest.raises(ValidationError, match="needed: 33 or more"):
            card(**wrong)


# -- large JPEG files --

IMAGENET = InputShape(height=224, width=224, channels=3)
PHOTO_FITS = [
    Preprocessing(),
    Preprocessing(fit="crop", ratio=0.875, interpolation="bicubic"),
    Preprocessing(fit="resize_crop", shorter=256),
]


def waves(width: int, height: int) -> Image.Image:
    """A zone plate: every frequency up to half a wave a pixel, the hardest picture to reduce."""
    y, x = np.mgrid[:height, :width]
    level = 127.5 + 127.5 * np.sin((x * x + y * y) * (np.pi / 2 / max(width, height)))
    return Image.fromarray(level.astype(np.uint8)).convert("RGB")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


LARGE = {
    "photo": lambda: PHOTOS[0].resize((2003, 1501), Image.Resampling.LANCZOS),
    "flower": lambda: PHOTOS[1].resize((4003, 3001), Image.Resampling.LANCZOS),
    "waves": lambda: waves(2003, 1501),
    "noise": lambda: noise(2003, 1501),
}
MEAN_APART, MOST_APART = 1.5, 20  # levels of 255, from full decoding


@pytest.mark.parametrize("name", LARGE)
def test_a_reduced_jpeg_is_close_to_full_decoding(name):
    data = encoded(LARGE[name](), "JPEG", quality=90)
    whole = Image.open(io.BytesIO(data))
    for rule in PHOTO_FITS:
        header = inspect(data, 1, 10**8)
        assert decoded_pixels(header, IMAGENET, rule) < header.pixels
        full = to_pixels(whole, IMAGENET, rule).astype(int)
        apart = np.abs(full - decode(data, IMAGENET, rule, 10**8))
        assert apart.mean() <= MEAN_APART
        assert apart.max() <= MOST_APART


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_turned_without_a_shift(orientation):
    """Its sides are not multiples of 8: the last column and row are half empty."""
    source = PHOTOS[0].resize((1203, 907), Image.Resampling.LANCZOS)
    data = pasted(source, exif(orientation), "JPEG")
    full = to_pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), GREY, STRETCH)
    apart = np.abs(full.astype(int) - decode(data, GREY, STRETCH, 10**8))
    assert apart.max() <= 1


def test_what_is_decoded_stays_under_the_limit_of_pixels():
    """12 megapixels are reduced to 0.75 for a network of 224, and refused for one of 2,000."""
    data = encoded(Image.new("RGB", (4000, 3000)), "JPEG")
    header = inspect(data, 4_000_000, 25_000_000)
    rule = Preprocessing(fit="crop", ratio=0.875)
    assert decoded_pixels(header, IMAGENET, rule) == 1000 * 750
    found = decode(data, IMAGENET, rule, 4_000_000, header, 25_000_000)
    assert found.shape == (224, 224, 3)
    large = InputShape(height=2000, width=2000, channels=3)
    for call in (
        lambda: check_decoded(header, large, rule, 4_000_000),
        lambda: decode(data, large, rule, 4_000_000, header, 25_000_000),
        lambda: decode(data, large, rule, 4_000_000, None, 25_000_000),
    ):
        with pytest.raises(TooLarge, match="of which this model needs 12000000; allowed: 4000000"):
            call()
    with pytest.raises(TooLarge, match="allowed: 4000000"):
        inspect(data, 4_000_000)


def test_a_card_can_ask_for_full_decoding():
    rule = Preprocessing(fit="crop", ratio=0.875, interpolation="bicubic", reduce_jpeg=False)
    photo = PHOTOS[0].resize((2003, 1501), Image.Resampling.LANCZOS)
    data = encoded(photo, "JPEG", quality=90)
    header = inspect(data, 4_000_000)
    assert decoded_pixels(header, IMAGENET, rule) == header.pixels
    full = to_pixels(Image.open(io.BytesIO(data)), IMAGENET, rule)
    np.testing.assert_array_equal(decode(data, IMAGENET, rule, 4_000_000), full)
    with pytest.raises(TooLarge, match="of which this model needs 3006503; allowed: 1000000"):
        check_decoded(header, IMAGENET, rule, MAX)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_only_a_jpeg_may_have_more_pixels(kind):
    data = encoded(Image.new("RGB", (2500, 2000)), kind)
    with pytest.raises(TooLarge, match="allowed: 4000000"):
        inspect(data, 4_000_000, 25_000_000)


def test_a_large_progressive_jpeg_has_few_scans_and_half_as_many_pixels():
    source = Image.new("RGB", (1200, 1000))
    data = encoded(source, "JPEG", progressive=True)
    assert decode(data, RGB, STRETCH, 100_000, None, MAX * 3).shape == (8, 8, 3)
    half = r"allowed: 1000000 \(half of SCUMBLE_LIMITS__MAX_JPEG_PIXELS: progressive\)"
    with pytest.raises(TooLarge, match=half):
        decode(data, RGB, STRETCH, 100_000, None, MAX * 2)
    with pytest.raises(TooLarge, match=r"allowed: 1100000 \(SCUMBLE_LIMITS__MAX_PIXELS\)"):
        inspect(data, 1_100_000, MAX * 2)
    many = bomb_files.jpeg(progressive=True, repeat_last_scan=MOST_SCANS_LARGE + 1)
    with pytest.raises(Unprocessable, match=f"too many scans; allowed: {MOST_SCANS_LARGE}"):
        decode(many, RGB, STRETCH, 100, None, MAX * 2)


def test_torchvision_sees_the_same_numbers():
    """The whole way of a photo: orientation, resizing, crop, to numbers in [0, 1]."""
    source = PHOTOS[1]
    rule = Preprocessing(fit="resize_crop", shorter=232)
    theirs = v2.Compose([v2.Resize(232), v2.CenterCrop(224), v2.PILToTensor()])(source)
    ours = torch.from_numpy(decode(encoded(source), IMAGENET, rule, MAX).copy()).permute(2, 0, 1)
    assert (theirs.int() - ours.int()).abs().float().mean() < 1e-3
