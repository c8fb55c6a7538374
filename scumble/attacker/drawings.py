"""Pictures that a program draws: transfer sets for attackers who have no others.

Each function draws `n` of them, (n, SIDE, SIDE, 3) uint8. `strokes` are what digits are made of,
`shapes` what signs are; those of `textures` show nothing.
"""

from __future__ import annotations

import string
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from scumble.attacker.textures import SIDE, Pixels, fractal, noise, texture
from scumble.png import to_image

Points = npt.NDArray[np.float64]  # (M, 2), x and y; or a colour, red, green and blue in [0, 1]
FINER = 4  # pictures are drawn this much larger, for smooth edges
CHARACTERS = list(string.ascii_uppercase + 2 * string.digits)
PAINTS = np.array(
    [[0.05, 0.05, 0.05], [0.95, 0.95, 0.95], [0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.95, 0.8, 0.1]]
)


def strokes(n: int, rng: np.random.Generator) -> Pixels:
    """Lines, arcs and loops of a pen, half of them white on black (n, SIDE, SIDE, 3)."""
    back, front = rng.uniform(0, 1, (2, n, 3))
    plain = rng.random(n) < 0.5
    back[plain], front[plain] = 0, 1
    pictures = [_canvas(back[i]) for i in range(n)]
    for picture, colour in zip(pictures, front, strict=True):
        frame = rng.uniform(0.3, 0.45, 2) * SIDE
        width = rng.uniform(1.5, 4)
        for _ in range(rng.integers(1, 4)):
            _stroke(picture, _curve(rng) * frame + SIDE / 2, width, colour)
    return _reduced(pictures)


def shapes(n: int, rng: np.random.Generator) -> Pixels:
    """A disc or polygon with a rim, and letters, strokes or another one on it (n, SIDE, SIDE, 3).

    They lie on something out of focus, half of them in poor light.
    """
    grounds = [to_image(each) for each in rng.integers(0, 256, (n, 3, 3, 3), np.uint8)]
    whole = (SIDE * FINER, SIDE * FINER)
    pictures = [ground.resize(whole, Image.Resampling.BICUBIC) for ground in grounds]
    for picture in pictures:
        rim, inside, on_it = _colour(rng), _colour(rng), _colour(rng)
        centre, radius = SIDE / 2 + rng.uniform(-2, 2, 2), rng.uniform(0.3, 0.5) * SIDE
        outer = _polygon(rng)
        _fill(picture, outer * radius + centre, rim)
        _fill(picture, outer * radius * rng.uniform(0.6, 0.95) + centre, inside)
        if rng.random() < 0.4:
            _write(
                picture, centre + rng.uniform(-1, 1, 2), radius * rng.uniform(0.6, 1.2), on_it, rng
            )
            continue
        for _ in range(rng.integers(0, 4)):
            place = centre + rng.uniform(-0.2, 0.2, 2) * radius
            size = radius * rng.uniform(0.2, 0.6)
            if rng.random() < 0.3:
                _fill(picture, _polygon(rng) * size + place, on_it)
            else:
                _stroke(picture, _curve(rng) * size + place, rng.uniform(1, 4), on_it)
    light = np.where(rng.random(n) < 0.5, 1, rng.uniform(0.15, 1, n))[:, None, None, None]
    lit: Pixels = np.rint(_reduced(pictures) * light).astype(np.uint8)
    return lit


def _curve(rng: np.random.Generator) -> Points:
    """A line of one to three pieces, an arc or loop, or a cubic Bezier curve, within [-1, 1]."""
    t = np.linspace(0, 1, 24)[:, None]
    match rng.integers(3):
        case 0:
            return rng.uniform(-1, 1, (rng.integers(2, 5), 2))
        case 1:
            start, extent = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.2) * 2 * np.pi
            centre, radii = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.3, 0.8, 2)
            angle = start + t * extent
            arc = np.concatenate([np.cos(angle), np.sin(angle)], 1) * radii + centre
            return arc.clip(-1, 1)
    a, b, c, d = rng.uniform(-1, 1, (4, 2))
    bezier: Points = (1 - t) ** 3 * a + 3 * t * (1 - t) * ((1 - t) * b + t * c) + t**3 * d
    return bezier


def _polygon(rng: np.random.Generator) -> Points:
    """A regular polygon of 3 to 8 corners in the unit circle, or the circle itself."""
    corners = int(rng.choice([3, 4, 5, 6, 8, 32, 32, 3]))
    turn = rng.choice([0.0, 0.5]) * 2 * np.pi / corners + rng.normal(0, 0.05)
    angle = turn + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.sin(angle), np.cos(angle)], 1)


def _colour(rng: np.random.Generator) -> Points:
    """Any colour, or, in half of the cases, one of paint."""
    if rng.random() < 0.5:
        return rng.uniform(0, 1, 3)
    paint: Points = np.clip(PAINTS[rng.integers(len(PAINTS))] + rng.normal(0, 0.05, 3), 0, 1)
    return paint


def _canvas(colour: Points) -> Image.Image:
    return Image.new("RGB", (SIDE * FINER, SIDE * FINER), _rgb(colour))


def _stroke(picture: Image.Image, points: Points, width: float, colour: Points) -> None:
    at = [(float(x), float(y)) for x, y in points * FINER]
    pen, radius = ImageDraw.Draw(picture), width * FINER / 2
    pen.line(at, _rgb(colour), round(2 * radius), joint="curve")
    for x, y in (at[0], at[-1]):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), _rgb(colour))


def _fill(picture: Image.Image, points: Points, colour: Points) -> None:
    at = [(float(x), float(y)) for x, y in points * FINER]
    ImageDraw.Draw(picture).polygon(at, _rgb(colour))


def _write(
    picture: Image.Image, centre: Points, size: float, colour: Points, rng: np.random.Generator
) -> None:
    text = "".join(rng.choice(CHARACTERS, rng.integers(1, 4)))
    font = ImageFont.load_default(size * FINER)
    at = (float(centre[0] * FINER), float(centre[1] * FINER))
    ImageDraw.Draw(picture).text(
        at, text, _rgb(colour), font, anchor="mm", stroke_width=int(rng.integers(0, 3))
    )


def _rgb(colour: Points) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(c)) for c in colour)
    return red, green, blue


def _reduced(pictures: list[Image.Image]) -> Pixels:
    return np.stack([np.asarray(picture.reduce(FINER)) for picture in pictures])


POOLS: dict[str, Callable[[int, np.random.Generator], Pixels]] = {
    "fractal": fractal,
    "noise": noise,
    "shapes": shapes,
    "strokes": strokes,
    "texture": texture,
}
