"""Decodes image files to uint8 arrays (H, W, C) of the network's input size.

A strict parser (`image_header.py`) reads the file first. It checks format, number of pixels and
structure before any pixel is decoded, and removes the metadata. Pixels are not normalised here; the
graph does that.

imagecodecs decodes plain files, which have 8 bits per channel and the channels that the network
takes: on small images it is faster than Pillow. Pillow decodes all other files, and those that
imagecodecs refuses; both give the same pixels. A large JPEG is reduced while it is decoded
(`image_fit.reduction`). Of an AVIF or HEIC file, decoders get a new one with the picture alone
(`heif_header.py`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image, WebPImagePlugin

from app.errors import RequestError, TooLarge, Unprocessable
from app.inference.bundle import InputShape, Preprocessing
from app.inference.image_colours import convert
from app.inference.image_fit import REDUCED_FROM, Box, fit, reduction
from app.inference.image_formats import FORMATS
from app.inference.image_header import PIXELS_SETTING, Header, inspect

__all__ = [
    "Header",
    "Pixels",
    "check_decoded",
    "decode",
    "decoded_pixels",
    "inspect",
    "to_pixels",
]

MODES = {1: "L", 3: "RGB"}
# EXIF's orientation -> what turns the stored picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = 5  # from here on width and height change places
MIRRORED_X, MIRRORED_Y = (2, 3, 6, 7), (3, 4, 7, 8)  # whose last column or row becomes the first

Pixels = npt.NDArray[np.uint8]

# Not its png_decode: with a broken file that keeps the whole array, and gives back a reference to
# None that it does not have, so that broken files fill the memory and end the process.
QUICK: dict[str, Callable[[bytes], Pixels]] = {
    "PNG": imagecodecs.spng_decode,
    "JPEG": imagecodecs.jpeg8_decode,
    "WEBP": partial(imagecodecs.webp_decode, hasalpha=False),
}
ERRORS = (imagecodecs.SpngError, imagecodecs.Jpeg8Error, imagecodecs.WebpError, ValueError)

if "AVIF" in FORMATS.values():
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # workers are as many as there are cores
if "HEIF" in FORMATS.values():
    import app.inference.heif_decoder  # noqa: F401  # registers itself

# Pillow knows PNG and JPEG from the start, WebP once its plugin is imported.
assert WebPImagePlugin.SUPPORTED, "Pillow was built without WebP"  # noqa: S101  # at import, not input


def decode(
    data: bytes,
    shape: InputShape,
    preprocessing: Preprocessing,
    max_pixels: int,
    header: Header | None = None,
    max_jpeg_pixels: int = 0,
) -> Pixels:
    """The pixels of one encoded image, uint8 (H, W, C).

    Args:
        data: a file of one of `FORMATS`; of an animation the first frame counts.
        shape: the network's input; grey images become RGB and the reverse.
        preprocessing: how another size is brought to `shape`, and what counts of orientation,
            transparency and ICC profile.
        max_pixels: width x height that is still decoded.
        header: what `inspect` found in `data`, if it was asked before.
        max_jpeg_pixels: width x height of a JPEG that is reduced to `max_pixels` or fewer.

    Raises:
        TooLarge: more pixels than allowed.
        Unprocessable: not such a file, or a broken one.
    """
    if header is None or not header.whole:
        header = inspect(data, max_pixels, max_jpeg_pixels, whole=True)
    stored, reduced = header.width * header.height, 1
    if stored > max_pixels:
        check_decoded(header, shape, preprocessing, max_pixels)
    if stored > REDUCED_FROM:
        reduced = _reduction(header, shape, preprocessing)
    profile = header.icc(data) if preprocessing.profile == "srgb" and header.profile else None
    if header.spans:
        data = header.picture(data)
    if header.channels == shape.channels and reduced == 1:
        pixels = _quick(data, header)
        if pixels is not None:
            same = (header.width, header.height) == (shape.width, shape.height)
            if same and header.orientation == 1 and profile is None:
                return pixels
            grey_or_rgb = pixels[..., 0] if shape.channels == 1 else pixels
            picture = Image.fromarray(grey_or_rgb)
            return to_pixels(picture, shape, preprocessing, header.orientation, profile)
    try:
        picture = Image.open(io.BytesIO(data), formats=(header.format,))
        size = (header.width, header.height)
        if picture.size != size:
            raise Unprocessable(f"{header.format} says two sizes: {picture.size}, {size}")
        if header.format == "PNG":
            _widen_key(picture, depth=data[24])
        if header.crop is not None:
            picture = picture.crop(header.crop)
        extent = None
        if reduced > 1:
            extent = (header.width / reduced, header.height / reduced)
            picture.draft(picture.mode, (header.width // reduced, header.height // reduced))
        return to_pixels(picture, shape, preprocessing, header.orientation, profile, extent)
    except RequestError:
        raise
    except Image.DecompressionBombError as exc:
        raise TooLarge(
            f"image has too many pixels; allowed: {max_pixels} ({PIXELS_SETTING})"
        ) from exc
    except Exception as exc:  # codecs raise whatever they like on hostile bytes
        raise Unprocessable(f"image is corrupt: {exc}") from exc


def _widen_key(picture: Image.Image, depth: int) -> None:
    """Bring the transparent colour of a PNG to 8 bits, as Pillow does with its pixels alone."""
    key = picture.info.get("transparency")
    if isinstance(key, tuple) and depth == 16:
        picture.info["transparency"] = tuple(level >> 8 for level in key)
    elif isinstance(key, int) and picture.mode == "L" and depth < 8:
        picture.info["transparency"] = key * (255 // (2**depth - 1))


def decoded_pixels(header: Header, shape: InputShape, preprocessing: Preprocessing) -> int:
    """Width x height that is decoded: fewer than the file has where a JPEG is reduced."""
    reduced = _reduction(header, shape, preprocessing)
    return -(-header.width // reduced) * -(-header.height // reduced)


def check_decoded(
    header: Header, shape: InputShape, preprocessing: Preprocessing, max_pixels: int
) -> None:
    """Refuse a JPEG that has too many pixels even at the reduced size.

    Raises:
        TooLarge: it has.
    """
    pixels = decoded_pixels(header, shape, preprocessing)
    if pixels > max_pixels:
        raise TooLarge(
            f"image is {header.width} x {header.height} = {header.pixels} pixels, of which this "
            f"model needs {pixels}; allowed: {max_pixels} ({PIXELS_SETTING})"
        )


def _reduction(header: Header, shape: InputShape, preprocessing: Preprocessing) -> int:
    if header.format != "JPEG" or not preprocessing.reduce_jpeg:
        return 1
    sides = header.width, header.height
    if header.orientation >= SIDEWAYS and preprocessing.orientation:
        sides = header.height, header.width
    return reduction(*sides, shape, preprocessing)


def _quick(data: bytes, header: Header) -> Pixels | None:
    """Pixels (H, W, C) of a plain file; None where they are not what its header promised."""
    try:
        pixels = QUICK[header.format](data)
    except ERRORS:
        return None  # Pillow says what is wrong, or can read it after all
    height, width, channels = header.height, header.width, header.channels
    if pixels.dtype != np.uint8 or pixels.size != height * width * channels:
        return None
    return pixels.reshape(height, width, channels)


def to_pixels(
    picture: Image.Image,
    shape: InputShape,
    preprocessing: Preprocessing,
    orientation: int = 1,
    profile: bytes | None = None,
    extent: tuple[float, float] | None = None,
) -> Pixels:
    """A picture of any size and mode -> uint8 (H, W, C).

    Args:
        picture: as it is stored.
        shape: the network's input.
        preprocessing: how the picture is brought to it.
        orientation: EXIF's number.
        profile: the ICC profile from which colours are converted to sRGB; None for none.
        extent: width and height of the picture as it is stored, where its last column and row
            are filled only in part, as they are in a reduced JPEG.
    """
    mode = MODES[shape.channels]
    if picture.mode != mode or profile is not None or "transparency" in picture.info:
        picture = convert(picture, mode, preprocessing, profile)
    if orientation != 1 and preprocessing.orientation:
        picture = picture.transpose(TURNS[orientation])
    else:
        orientation = 1
    area = None if extent is None else _area(picture.size, extent, orientation)
    pixels = np.asarray(fit(picture, shape, preprocessing, area))
    return pixels.reshape(shape.height, shape.width, shape.channels)


def _area(size: tuple[int, int], extent: tuple[float, float], orientation: int) -> Box:
    """Where in an upright picture the pixels are that are filled."""
    width, height = extent[::-1] if orientation >= SIDEWAYS else extent
    left = size[0] - width if orientation in MIRRORED_X else 0.0
    top = size[1] - height if orientation in MIRRORED_Y else 0.0
    return left, top, left + width, top + height
