"""Transfer sets made from public material: parts, variants, and pictures that a program draws.

A source is a list of terms, `fashion_mnist,fashion_mnist@outlines,fractal[:5000]`, whose images are
put together. A term is what `scumble.data.image_sets.load` opens, or the name of a drawn set; then
`:train` or `:test`, `@VARIANT` and `[FROM:TO]`, each of which may be left out. A drawn set has
20,000 images where TO is left out; any up to 100,000 can be named.

Sources: Kataoka et al., "Pre-training without Natural Images" (IJCV 2022), for fractals; Baradad et
al., "Learning to See by Looking at Noise" (NeurIPS 2021), for noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scumble.data.image_sets import Dataset, DatasetError, load, require
from scumble.png import to_image

Pixels = npt.NDArray[np.uint8]
DRAWN, MOST_DRAWN = 20_000, 100_000  # images of a drawn set, and those that can be named
BLOCK, SIDE = 500, 32  # images drawn at a time, and their size
TERM = re.compile(
    r"(?P<name>.+?)(?::(?P<part>train|test))?(?:@(?P<variant>\w+))?"
    r"(?:\[(?P<first>\d*):(?P<last>\d*)\])?$"
)


def data(source: str, split: str, root: Path | None) -> Dataset:
    """The images of all terms of `source`, in order.

    Args:
        source: see above.
        split: part of a name that does not say which.
        root: folder with data sets by name.

    Raises:
        DatasetError: a term cannot be read; the message says what is allowed.
    """
    if Path(source).exists():
        return load(source, split, root=root)
    return joined([_term(term.strip(), split, root) for term in source.split(",")], source)


def require_data(source: str, split: str, root: Path | None) -> None:
    """Check that `data` finds all terms of `source`. Nothing is decoded or drawn.

    Raises:
        DatasetError: a term is malformed, or its data set is not there.
    """
    if Path(source).exists():
        return require(source, split, root=root)
    for term in source.split(","):
        match = parsed(term.strip())
        if match["name"] not in POOLS:
            require(match["name"], match["part"] or split, root=root)
    return None


def parsed(term: str) -> re.Match[str]:
    """The parts of a term.

    Raises:
        DatasetError: it has another form, or an unknown variant.
    """
    match = TERM.match(term)
    if match is None:
        raise DatasetError(f"data set is {term!r}; allowed: NAME[:PART][@VARIANT][[FROM:TO]]")
    if match["variant"] not in (None, *VARIANTS):
        raise DatasetError(
            f"variant of {term!r} is {match['variant']!r}; allowed: {', '.join(VARIANTS)}"
        )
    return match


def joined(sets: list[Dataset], name: str) -> Dataset:
    """Several sets as one, in the size and colours of the first."""
    if len(sets) == 1:
        return replace(sets[0], name=name)
    _, height, width, channels = sets[0].images.shape
    offsets = np.cumsum([0, *(len(one.classes) for one in sets)])
    return Dataset(
        name,
        np.concatenate([fitted(one.images, height, width, channels) for one in sets]),
        np.concatenate([one.labels + at for one, at in zip(sets, offsets, strict=False)]),
        tuple(f"{one.name}/{label}" for one in sets for label in one.classes),
        tuple(f"{one.name}/{group}" for one in sets for group in one.groups),
    )


def fitted(images: Pixels, height: int, width: int, channels: int) -> Pixels:
    """Images (N, H, W, C) in another size, in grey or in colour."""
    if images.shape[1:3] != (height, width):
        scaled = [
            np.asarray(to_image(image).resize((width, height), Image.Resampling.BILINEAR))
            for image in images
        ]
        images = np.stack(scaled).reshape(len(scaled), height, width, -1)
    if images.shape[3] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    # Rec. 601, as Pillow turns colour into grey.
    grey: Pixels = np.rint(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return grey[..., None]


def _term(term: str, split: str, root: Path | None) -> Dataset:
    match = parsed(term)
    name, part, variant = match["name"], match["part"], match["variant"]
    first = int(match["first"] or 0)
    if name in POOLS:
        last = min(MOST_DRAWN, int(match["last"] or DRAWN))
        if first >= last:
            raise DatasetError(f"{term!r} has no images: {name} has {MOST_DRAWN}")
        found = drawn(name, last, first)
    else:
        found = load(name, part or split, root=root)
        rows = np.arange(len(found))[first : int(match["last"] or len(found))]
        if not len(rows):
            raise DatasetError(f"{term!r} has no images: {name} has {len(found)}")
        if len(rows) < len(found):
            found = found.subset(rows)
    if variant is None:
        return found
    return replace(found, name=f"{found.name}@{variant}", images=VARIANTS[variant](found.images))


def outlines(images: Pixels) -> Pixels:
    """Light edges on black: in each window of 3 x 3 the largest value less the smallest."""
    x = _planes(images)
    return _pixels(F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1))


def posterised(images: Pixels) -> Pixels:
    """Four levels a channel."""
    found: Pixels = np.rint(np.rint(images / 85.0) * 85).astype(np.uint8)
    return found


def blended(images: Pixels) -> Pixels:
    """The mean of each image and another, drawn at random."""
    order = np.random.default_rng(0).permutation(len(images))
    found: Pixels = ((images.astype(np.uint16) + images[order]) // 2).astype(np.uint8)
    return found


VARIANTS: dict[str, Callable[[Pixels], Pixels]] = {
    "outlines": outlines,
    "posterised": posterised,
    "blended": blended,
}


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
    return _pixels(torch.where(hard, (total[:, :1] > 0.6).float().expand_as(total), total))


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


POOLS: dict[str, Callable[[int, np.random.Generator], Pixels]] = {
    "fractal": fractal,
    "noise": noise,
    "texture": texture,
}


def drawn(name: str, last: int = DRAWN, first: int = 0) -> Dataset:
    """The images from `first` to `last` of a set that a program draws, the same each time."""
    begin = first // BLOCK
    parts = [POOLS[name](BLOCK, np.random.default_rng(i)) for i in range(begin, -(-last // BLOCK))]
    images = np.concatenate(parts)[first - begin * BLOCK : last - begin * BLOCK]
    labels = np.zeros(len(images), np.int64)
    return Dataset(name, images, labels, (name,), tuple(f"{name}/{i}" for i in range(first, last)))


def _planes(images: Pixels) -> Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def _pixels(planes: Tensor) -> Pixels:
    pixels: Pixels = np.rint(planes.clamp(0, 1).numpy() * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
