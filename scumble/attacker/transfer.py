"""Transfer sets made from public material: parts, variants, and pictures that a program draws.

A source is a list of terms, `fashion_mnist,fashion_mnist@outlines,fractal[:5000]`, whose images are
put together. A term is what `scumble.data.image_sets.load` opens, or the name of a drawn set; then
`:train` or `:test`, `@VARIANT` and `[FROM:TO]`, each of which may be left out. A drawn set has
20,000 images where TO is left out; any up to 100,000 can be named.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scumble.attacker.drawings import POOLS
from scumble.attacker.textures import Pixels, pixels
from scumble.data.image_sets import Dataset, DatasetError, load, require
from scumble.png import to_image

DRAWN, MOST_DRAWN = 20_000, 100_000  # images of a drawn set, and those that can be named
BLOCK = 500  # images drawn at a time
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
    if _is_there(source):
        return load(source, split, root=root)
    return joined([_term(term.strip(), split, root) for term in source.split(",")], source)


def require_data(source: str, split: str, root: Path | None) -> None:
    """Check that `data` finds all terms of `source`. Nothing is decoded or drawn.

    Raises:
        DatasetError: a term is malformed, or its data set is not there.
    """
    if _is_there(source):
        return require(source, split, root=root)
    for term in source.split(","):
        match = parsed(term.strip())
        if match["name"] not in POOLS:
            require(match["name"], match["part"] or split, root=root)
    return None


def require_labelled(source: str, split: str, root: Path | None) -> None:
    """As `require_data`, for images that a copy is measured on.

    Raises:
        DatasetError: a term is malformed, its data set is not there, or a program draws it.
    """
    require_data(source, split, root)
    names = [] if _is_there(source) else [parsed(t.strip())["name"] for t in source.split(",")]
    if drawn := [name for name in names if name in POOLS]:
        raise DatasetError(f"{drawn[0]} has no labels; allowed to measure on: labelled images")


def _is_there(source: str) -> bool:
    return source != "" and Path(source).exists()


def parsed(term: str) -> re.Match[str]:
    """The parts of a term.

    Raises:
        DatasetError: it has another form, or an unknown variant.
    """
    match = TERM.match(term)
    if match is None:
        raise DatasetError(f"data set is {term!r}; allowed: NAME[:PART][@VARIANT][[FROM:TO]]")
    drawing = match["name"] in POOLS
    first, last = _bounds(match, *((DRAWN, MOST_DRAWN) if drawing else (sys.maxsize,) * 2))
    if first >= last:
        most = f": {match['name']} has {MOST_DRAWN}, {DRAWN} where TO is left out"
        raise DatasetError(f"{term!r} has no images{most if drawing else ''}")
    if match["variant"] not in (None, *VARIANTS):
        raise DatasetError(
            f"variant of {term!r} is {match['variant']!r}; allowed: {', '.join(VARIANTS)}"
        )
    return match


def _bounds(match: re.Match[str], usual: int, most: int) -> tuple[int, int]:
    """The range of a term: the first row, and the one after the last."""
    return int(match["first"] or 0), min(int(match["last"] or usual), most)


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
    if name in POOLS:
        first, last = _bounds(match, DRAWN, MOST_DRAWN)
        found = drawn(name, last, first)
    else:
        found = load(name, part or split, root=root)
        first, last = _bounds(match, len(found), len(found))
        rows = np.arange(first, last)
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
    return pixels(F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1))


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


def drawn(name: str, last: int = DRAWN, first: int = 0) -> Dataset:
    """The images from `first` to `last` of a set that a program draws, the same each time."""
    begin = first // BLOCK
    parts = [POOLS[name](BLOCK, np.random.default_rng(i)) for i in range(begin, -(-last // BLOCK))]
    images = np.concatenate(parts)[first - begin * BLOCK : last - begin * BLOCK]
    labels = np.zeros(len(images), np.int64)
    return Dataset(name, images, labels, (name,), tuple(f"{name}/{i}" for i in range(first, last)))


def _planes(images: Pixels) -> Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
