"""Image bytes -> uint8 (H, W, C) of the network's input size.

A strict reader (`image_header.py`) walks the file first: format, number of pixels and structure are
checked before any pixel is decoded, and decoders get the file without its metadata. Pixels are
not normalised here; that is inside the graph.

Plain files, 8 bits a channel and as many channels as the network takes, are decoded by imagecodecs,
which is quicker than Pillow on small images, as it makes no objects on the way. All others, and all
that it refuses, are Pillow's, which gives the same pixels.
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
from app.inference.image_header import Header, inspect

__all__ = ["Header", "Pixels", "decode", "inspect", "to_pixels"]

MODES = {1: "L", 3: "RGB"}

Pixels = npt.NDArray[np.uint8]

# Not its png_decode: with a broken file that keeps the whole array, and gives back a reference to
# None that it does not have, so that broken files fill the memory and end the process.
QUICK: dict[str, Callable[[bytes], Pixels]] = {
    "PNG": imagecodecs.spng_decode,
    "JPEG": imagecodecs.jpeg8_decode,
    "WEBP": partial(imagecodecs.webp_decode, hasalpha=False),
}
ERRORS = (imagecodecs.SpngError, imagecodecs.Jpeg8Error, imagecodecs.WebpError, ValueError)

# Pillow knows PNG and JPEG from the start, WebP once its plugin is imported.
assert WebPImagePlugin.SUPPORTED, "Pillow was built without WebP"  # noqa: S101  # at import, not input


def decode(
    data: bytes,
    shape: InputShape,
    preprocessing: Preprocessing,
    max_pixels: int,
    header: Header | None = None,
) -> Pixels:
    """The pixels of one encoded image, uint8 (H, W, C).

    Args:
        data: a PNG, JPEG or WebP file; of an animation the first frame counts. Transparency is
            dropped, EXIF rotation is not applied.
        shape: the network's input; grey images become RGB and the reverse.
        preprocessing: how another size is brought to `shape`.
        max_pixels: width x height that is still decoded.
        header: what `inspect` found in `data`, if it was asked before.

    Raises:
        TooLarge: more pixels than allowed.
        Unprocessable: not such a file, or a broken one.
    """
    if header is None or not header.whole:
        header = inspect(data, max_pixels, whole=True)
    if header.spans:
        data = header.picture(data)
    if header.channels == shape.channels:
        pixels = _quick(data, header)
        if pixels is not None:
            if (header.width, header.height) == (shape.width, shape.height):
                return pixels
            grey_or_rgb = pixels[..., 0] if shape.channels == 1 else pixels
            return to_pixels(Image.fromarray(grey_or_rgb), shape, preprocessing)
    try:
        picture = Image.open(io.BytesIO(data), formats=(header.format,))
        if picture.size != (header.width, header.height):
            raise Unprocessable(f"{header.format} says two sizes: {picture.size}, {header[1:3]}")
        return to_pixels(picture, shape, preprocessing)
    except RequestError:
        raise
    except Image.DecompressionBombError as exc:
        raise TooLarge(f"image has too many pixels; allowed: {max_pixels}") from exc
    except Exception as exc:  # codecs raise whatever they like on hostile bytes
        raise Unprocessable(f"image is corrupt: {exc}") from exc


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
