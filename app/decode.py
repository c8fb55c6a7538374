"""Image bytes -> uint8 (H, W, C) of the network's input size.

The header is read first: format and number of pixels are checked before any pixel is decoded, so a
decompression bomb costs nothing. Pixels are not normalised here; that is inside the graph.

Plain files, 8 bits a channel and as many channels as the network takes, are decoded by imagecodecs,
which is quicker than Pillow on small images, as it makes no objects on the way. All others, and all
that it refuses, are Pillow's, which gives the same pixels.
"""

from __future__ import annotations

import io
import struct

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, WebPImagePlugin

from app.bundle import InputShape, Preprocessing
from app.errors import RequestError, TooLarge, Unprocessable
from app.formats import FORMATS

MODES = {1: "L", 3: "RGB"}

Pixels = npt.NDArray[np.uint8]

PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
PNG_COLOURS = {0: 1, 2: 3}  # colour type -> channels; not palettes, not transparency
JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers with the size

# Pillow knows PNG and JPEG from the start, WebP once its plugin is imported.
assert WebPImagePlugin.SUPPORTED, "Pillow was built without WebP"  # noqa: S101  # at import, not input


def decode(data: bytes, shape: InputShape, preprocessing: Preprocessing, max_pixels: int) -> Pixels:
    """The pixels of one encoded image, uint8 (H, W, C).

    Args:
        data: a PNG, JPEG or WebP file; of an animation the first frame counts. Transparency is
            dropped, EXIF rotation is not applied.
        shape: the network's input; grey images become RGB and the reverse.
        preprocessing: how another size is brought to `shape`.
        max_pixels: width x height that is still decoded.

    Raises:
        TooLarge: more pixels than allowed.
        Unprocessable: not such a file, or a broken one.
    """
    plain = _plain(data)
    if plain is not None and plain[2] == shape.channels:
        width, height, _ = plain
        _check(width, height, max_pixels)
        pixels = _quick(data, plain)
        if pixels is not None:
            if (width, height) == (shape.width, shape.height):
                return pixels
            return to_pixels(Image.fromarray(pixels.squeeze()), shape, preprocessing)
    try:
        picture = Image.open(io.BytesIO(data), formats=tuple(FORMATS.values()))
        _check(*picture.size, max_pixels)
        return to_pixels(picture, shape, preprocessing)
    except RequestError:
        raise
    except UnidentifiedImageError as exc:
        raise Unprocessable(
            f"{len(data)} bytes that begin with {data[:8]!r} are no image; "
            f"allowed: {', '.join(FORMATS.values())}"
        ) from exc
    except Image.DecompressionBombError as exc:
        raise TooLarge(f"the image has too many pixels; allowed: {max_pixels}") from exc
    except Exception as exc:  # codecs raise whatever they like on hostile bytes
        raise Unprocessable(f"the image is broken: {exc}") from exc


def _check(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(
            f"the image is {width} x {height} = {width * height} pixels; allowed: {max_pixels}"
        )


def _plain(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and channels by the header of a plain PNG or JPEG, else None."""
    if data.startswith(PNG_START):
        if len(data) < 33 or data[24] != 8:
            return None
        width, height = struct.unpack_from(">II", data, 16)
        return width, height, PNG_COLOURS.get(data[25], 0)
    # Without its end marker a file was cut off, and imagecodecs would fill it up with grey.
    if not (data.startswith(JPEG_START) and data.endswith(JPEG_END)):
        return None
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:  # a segment: marker, length, content
        (length,) = struct.unpack_from(">H", data, at + 2)
        if data[at + 1] in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return (width, height, data[at + 9]) if data[at + 4] == 8 else None
        at += 2 + length
    return None


def _quick(data: bytes, plain: tuple[int, int, int]) -> Pixels | None:
    """Pixels (H, W, C) of a plain file; None where they are not what its header promised."""
    width, height, channels = plain
    # Not its png_decode: with a broken file that keeps the whole array, and gives back a reference
    # to None that it does not have, so that broken files fill the memory and end the process.
    read = imagecodecs.spng_decode if data[0] == PNG_START[0] else imagecodecs.jpeg8_decode
    try:
        pixels: Pixels = read(data)
    except (imagecodecs.SpngError, imagecodecs.Jpeg8Error, ValueError):
        return None  # Pillow says what is wrong, or can read it after all
    if pixels.dtype != np.uint8 or pixels.size != height * width * channels:
        return None
    return pixels.reshape(height, width, channels)


def to_pixels(picture: Image.Image, shape: InputShape, preprocessing: Preprocessing) -> Pixels:
    """A picture of any size and mode -> uint8 (H, W, C)."""
    mode = MODES[shape.channels]
    if picture.mode != mode:
        picture = _convert(picture, mode)
    if picture.size != (shape.width, shape.height):
        picture = _resize(picture, shape, preprocessing)
    pixels = np.asarray(picture)
    return pixels.reshape(shape.height, shape.width, shape.channels)


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16 bits a pixel: Pillow would clip at 255, which turns most of the picture white.
        wide = np.asarray(picture)
        picture = Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert(mode)


def _resize(picture: Image.Image, shape: InputShape, preprocessing: Preprocessing) -> Image.Image:
    target = (shape.width, shape.height)
    if preprocessing.fit == "stretch":
        return picture.resize(target, Image.Resampling.BILINEAR)
    # The largest centred box of the target's proportions, shrunk by the ratio, becomes the input.
    width, height = picture.size
    scale = min(width / shape.width, height / shape.height) * preprocessing.ratio
    box_w, box_h = shape.width * scale, shape.height * scale
    left, top = (width - box_w) / 2, (height - box_h) / 2
    box = (left, top, left + box_w, top + box_h)
    return picture.resize(target, Image.Resampling.BILINEAR, box=box)
