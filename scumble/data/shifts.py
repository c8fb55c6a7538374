"""Mild shifts: what cameras and users do to images that still show the same thing."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from scumble.png import to_image

Pixels = npt.NDArray[np.uint8]
One = Callable[[Pixels, np.random.Generator], Pixels]

BLUR = 0.7  # radius in pixels
LIGHT = 0.25  # darker and brighter by this share
DEGREES = 10.0
QUALITY = 50  # of JPEG
SIGMA = 8.0  # of the noise, in levels
PIXELS = 2  # moved by at most


def blurred(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A little out of focus."""
    del rng
    return _pixels(to_image(image).filter(ImageFilter.GaussianBlur(BLUR)), image)


def lit(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Darker or brighter."""
    factor = 1 + LIGHT * rng.choice([-1.0, 1.0])
    return _levels(image * factor)


def turned(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Rotated by up to `DEGREES` to either side; the border goes on outside."""
    height, width = image.shape[:2]
    wide = np.pad(image, ((height, height), (width, width), (0, 0)), mode="edge")
    angle = float(rng.uniform(-DEGREES, DEGREES))
    whole = _pixels(to_image(wide).rotate(angle, Image.Resampling.BILINEAR), image)
    return whole[height : 2 * height, width : 2 * width]


def compressed(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Through a JPEG file."""
    del rng
    file = io.BytesIO()
    to_image(image).save(file, "JPEG", quality=QUALITY)
    with Image.open(file) as picture:
        return _pixels(picture, image)


def noisy(image: Pixels, rng: np.random.Generator) -> Pixels:
    """With noise of each pixel's own."""
    noise = rng.normal(0, SIGMA, image.shape)
    return _levels(image + noise)


def moved(image: Pixels, rng: np.random.Generator) -> Pixels:
    """By one or two pixels; the border goes on outside."""
    height, width = image.shape[:2]
    wide = np.pad(image, ((PIXELS, PIXELS), (PIXELS, PIXELS), (0, 0)), mode="edge")
    moves = [(y, x) for y in range(5) for x in range(5) if (y, x) != (PIXELS, PIXELS)]
    y, x = moves[rng.integers(len(moves))]
    return wide[y : y + height, x : x + width]


SHIFTS: dict[str, One] = {
    "blur": blurred,
    "light": lit,
    "rotation": turned,
    "jpeg": compressed,
    "noise": noisy,
    "move": moved,
}


def shift(name: str, images: Pixels, seed: int = 0) -> Pixels:
    """All images (N, H, W, C) under one of `SHIFTS`; the seed draws angles, noise and the like."""
    rng = np.random.default_rng([seed, *name.encode()])
    return np.stack([SHIFTS[name](image, rng) for image in images])


def _levels(values: npt.NDArray[np.float64]) -> Pixels:
    levels: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return levels


def _pixels(picture: Image.Image, like: Pixels) -> Pixels:
    return np.asarray(picture).reshape(picture.height, picture.width, like.shape[2])
