"""Pictures that a program draws: transfer sets for attackers who have no others.

Each function draws `n` of them, (n, SIDE, SIDE, 3) uint8. Sources: Kataoka et al., "Pre-training
without Natural Images" (IJCV 2022), for fractals; Baradad et al., "Learning to See by Looking at
Noise" (NeurIPS 2021), for noise.
"""

from __future__ import annotations

import string
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from scumble.png import to_image

Pixels = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]  # (M, 2), x and y; or a colour, red, green and blue in [0, 1]
SIDE = 32  # of an image
FINER = 4  # pictures are drawn this much larger, for smooth edges
CHARACTERS = list(string.ascii_uppercase + 2 * string.digits)
PAINTS = np.array(
    [[0.05, 0.05, 0.05], [0.95, 0.95, 0.95], [0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.95, 0.8, 0.1]]
)


def fractal(n: int, rng: np.random.Generator) -> Pixels:
    """Attractors of random iterated function systems, in random colours (n, SIDE, SIDE, 3)."""
    maps, points, steps = 4, 48, 60
    # Contractions only: each matrix is scaled to a norm below 1.
    matrices = rng.uniform(-1, 1, (n, maps, 2, 2))
    norms = np.linalg.norm(matrices, 2, axis=(2, 3))
    matrices *= (rng.uniform(0.4, 0.9, (n, maps)) / norms)[..., None, None]
    shifts = rng.uniform(-1, 1, (n, maps, 2))
    at = np.zeros((n, points, 2))
    each = np.arange(n)[:, None]
    counts = np.zeros((n, SIDE * SIDE))
    low, high = np.full((n, 1, 2), -3.0), np.full((n, 1, 2), 3.0)
    for step in range(steps):
        chosen = rng.integers(0, maps, (n, points))
        at = np.einsum("npij,npj->npi", matrices[each, chosen], at) + shifts[each, chosen]
        if step == steps // 3:  # settled: the frame is what the points fill
            low, high = at.min(1, keepdims=True) - 0.05, at.max(1, keepdims=True) + 0.05
        if step > steps // 3:
            cell = ((at - low) / (high - low) * SIDE).clip(0, SIDE - 1).astype(np.int64)
            np.add.at(counts, (each, cell[..., 0] * SIDE + cell[..., 1]), 1)
    light = np.minimum(counts / 3, 1).reshape(n, SIDE, SIDE, 1)
    back, front = rng.uniform(0, 0.4, (n, 1, 1, 3)), rng.uniform(0.6, 1, (n, 1, 1, 3))
    drawn: Pixels = np.rint(255 * (back + light * (front - back))).astype(np.uint8)
    return drawn


def noise(n: int, rng: np.random.Generator) -> Pixels:
    """Noise of several scales, half of it in black and white (n, SIDE, SIDE, 3)."""
    total = torch.zeros(n, 3, SIDE, SIDE)
    for side in (2, 4, 8, 16, 32):
        grid = torch.from_numpy(rng.standard_normal((n, 3, side, side)).astype(np.float32))
        weight = torch.from_numpy(rng.uniform(0, 1, (n, 1, 1, 1)).astype(np.float32))
        total += weight * F.interpolate(grid, (SIDE, SIDE), mode="bilinear", align_corners=False)
    total = (total / total.flatten(1).std(1).view(-1, 1, 1, 1) / 4 + 0.5).clamp(0, 1)
    hard = torch.from_numpy(rng.random(n) < 0.5).view(-1, 1, 1, 1)
    return pixels(torch.where(hard, (total[:, :1] > 0.6).float().expand_as(total), total))


def texture(n: int, rng: np.random.Generator) -> Pixels:
    """Two crossing waves, bent by a smooth field, in two colours (n, SIDE, SIDE, 3).

    Half of them have hard edges: stripes, dots and checks.
    """
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    bends = torch.from_numpy(rng.standard_normal((n, 2, 4, 4)).astype(np.float32))
    smooth = F.interpolate(bends, (SIDE, SIDE), mode="bicubic", align_corners=True).numpy()
    total = np.ones((n, SIDE, SIDE))
    for k in range(2):
        angle, phase = rng.uniform(0, 2 * np.pi, (2, n, 1, 1))
        cycles, bend = rng.uniform(1, 8, (n, 1, 1)), rng.uniform(0, 2, (n, 1, 1))
        along = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * cycles * along + phase + bend * smooth[:, k])
        total *= np.where(rng.random((n, 1, 1)) < 0.5 * k, 1, wave)
    hard = rng.random((n, 1, 1)) < 0.5
    light = np.where(hard, total > rng.uniform(-0.3, 0.3, (n, 1, 1)), (total + 1) / 2)[..., None]
    back, front = rng.uniform(0, 1, (2, n, 1, 1, 3))
    drawn: Pixels = np.rint(255 * (back + light * (front - back))).astype(np.uint8)
    return drawn


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


def pixels(planes: Tensor) -> Pixels:
    """Images (N, H, W, C) of planes (N, C, H, W) in [0, 1]."""
    found: Pixels = np.rint(planes.clamp(0, 1).numpy() * 255).astype(np.uint8)
    return np.ascontiguousarray(found.transpose(0, 2, 3, 1))


POOLS: dict[str, Callable[[int, np.random.Generator], Pixels]] = {
    "fractal": fractal,
    "noise": noise,
    "shapes": shapes,
    "strokes": strokes,
    "texture": texture,
}
