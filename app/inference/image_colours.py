"""A picture of any mode -> grey or RGB: 16 bits, palettes, alpha, CMYK, ICC profiles."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

from app.inference.bundle import Preprocessing

GROUNDS = {"white": (255, 255, 255, 255), "black": (0, 0, 0, 255)}


def convert(
    picture: Image.Image, mode: str, preprocessing: Preprocessing, profile: bytes | None = None
) -> Image.Image:
    """The picture in the mode `L` or `RGB`.

    Args:
        picture: as Pillow has read it.
        mode: of the network's input.
        preprocessing: says what becomes of transparent pixels.
        profile: the ICC profile from which the colours are converted to sRGB; None for none.
    """
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    ground = GROUNDS.get(preprocessing.alpha)
    if ground is None or not _transparent(picture):
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")  # from P to RGB Pillow warns
        if profile is not None:
            picture = _to_srgb(picture, profile)
        return picture if picture.mode == mode else picture.convert(mode)
    picture = picture.convert("RGBA")
    if profile is not None:
        alpha = picture.getchannel("A")
        picture = _to_srgb(picture.convert("RGB"), profile)
        picture.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture).convert(mode)


def _transparent(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Of 16 bits the upper 8; Pillow would clip at 255, which turns most of the picture white."""
    wide = np.asarray(picture)
    grey = Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
    key = picture.info.get("transparency")
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Convert by an ICC profile; a broken one, or one of other colours, is ignored."""
    if picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (OSError, ImageCms.PyCMSError):
        return picture
    return picture if converted is None else converted
