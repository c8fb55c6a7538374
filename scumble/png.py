"""Pixels as PNG files."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image


def to_image(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """A Pillow image of pixels (H, W), (H, W, 1) or (H, W, 3)."""
    grey = pixels.ndim == 3 and pixels.shape[2] == 1
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))


def encode_png(image: Image.Image | npt.NDArray[np.uint8], compress_level: int = -1) -> bytes:
    """The bytes of a PNG file, which loses nothing.

    Args:
        image: a Pillow image, or pixels as `to_image` takes them.
        compress_level: 0 (fastest) to 9 (smallest); -1 is zlib's default.

    Raises:
        OSError, ValueError: PNG cannot hold an image of this mode.
    """
    picture = image if isinstance(image, Image.Image) else to_image(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()
