"""Figures of ONNX files on labelled images, measured through an engine that serves them."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from app.errors import RequestError
from app.inference.bundle import Accuracy, Card, InputShape, Preprocessing
from app.inference.decode import Pixels, decode, to_pixels
from app.inference.engine_selection import resolve
from app.inference.engines import Engine, EngineName, Probs, load
from app.inference.image_formats import SIGNATURE
from app.precision import Precision
from scumble.data import image_sets
from scumble.data.image_sets import Dataset, DatasetError, Decoder, numbered_as
from scumble.png import to_image
from scumble.progress import bar

BATCH_VALUES = 250 * 32 * 32 * 3  # levels of the images in a batch: 250 small ones or 5 photos
MOST_PIXELS = 10**9  # of an image of the owner's
STRETCHED = Preprocessing()


def threads() -> int:
    """How many to compute with: OMP_NUM_THREADS where that is set, else all cores."""
    return torch.get_num_threads()


def decoder_of(card: Card) -> Decoder:
    """Reads image files as the service of the bundle does, and also those of other formats."""
    shape, preprocessing = card.input, card.preprocessing

    def read(content: bytes) -> Pixels:
        try:
            if SIGNATURE.match(content):
                return decode(content, shape, preprocessing, MOST_PIXELS)
            picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            return to_pixels(picture, shape, preprocessing)
        except RequestError as exc:
            raise ValueError(str(exc)) from exc

    return read


def open_set(
    source: str, split: str, root: Path | None, card: Card, *, unlabelled: bool = False
) -> Dataset:
    """A data set as the network of `card` sees it, with the numbers of its labels.

    Raises:
        DatasetError: no such set, or other classes than the card's.
    """
    data = image_sets.load(
        source, split, root=root, decoder=decoder_of(card), unlabelled=unlabelled
    )
    return fitted(data, card)


def own_set(card: Card, split: str, root: Path | None, option: str) -> str:
    """The data set that a bundle was trained on: the one it is named after, if none is stated.

    Args:
        card: of the bundle.
        split: `train` or `test`.
        root: folder with data sets by name.
        option: that names other images.

    Raises:
        DatasetError: there is no such set.
    """
    found = str(card.training.get("set", card.name))
    if not image_sets.named(found, split, root):
        raise DatasetError(
            f"no image set is known that {card.name!r} was trained on; give images of yours with "
            f"{option}"
        )
    return found


def fitted(data: Dataset, card: Card) -> Dataset:
    """`data` with pictures of the card's input size and the numbers of its labels.

    Raises:
        DatasetError: other classes than the card's.
    """
    want = card.input
    if data.labelled:
        data = numbered_as(data, card.labels)
    if data.images.shape[1:] != (want.height, want.width, want.channels):
        data = replace(data, images=fit_images(data.images, want, card.preprocessing))
    return data


def fit_images(
    images: npt.NDArray[np.uint8], shape: InputShape, preprocessing: Preprocessing
) -> npt.NDArray[np.uint8]:
    """Images in memory, brought to the input as the service does it."""
    return np.stack([to_pixels(to_image(image), shape, preprocessing) for image in images])


def batch_size(image: tuple[int, ...], values: int = BATCH_VALUES) -> int:
    """Images (H, W, C) in a batch of `values` levels: large images need no more memory."""
    return max(1, values // math.prod(image))


def answers(
    model: bytes,
    images: npt.NDArray[np.uint8],
    precision: Precision,
    engine: EngineName | None = None,
) -> Probs:
    """Probabilities (N, K) of uint8 images (N, H, W, C), by default from the best engine."""
    return runner(model, precision, engine)(images)


def runner(
    model: bytes, precision: Precision, engine: EngineName | None = None
) -> Callable[[npt.NDArray[np.uint8]], Probs]:
    """`answers` for many sets of images, with the model loaded once."""
    chosen = engine or resolve("auto", precision)
    run: Engine = load(chosen, model, threads=threads(), precision=precision)

    def answer(images: npt.NDArray[np.uint8]) -> Probs:
        found, size = [], batch_size(images.shape[1:])
        with bar(len(images), f"{precision} answers", "img", shown=len(images) > size) as shown:
            for i in range(0, len(images), size):
                found.append(run(images[i : i + size]))
                shown.update(len(found[-1]))
        return np.concatenate(found)

    return answer


def as_input(
    data: Dataset,
    shape: InputShape,
    most: int,
    preprocessing: Preprocessing = STRETCHED,
) -> npt.NDArray[np.uint8]:
    """At most so many images of a set that may be foreign, as a network takes them.

    They are drawn with a fixed seed, and brought to the input's size and number of channels.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(data))[:most])
    return fit_images(data.images[rows], shape, preprocessing)


def share_right(probs: Probs, data: Dataset) -> float:
    """Share of arg-maxes that are the label, in [0, 1]."""
    return float((probs.argmax(1) == data.labels).mean())


def card_accuracy(probs: Probs, data: Dataset) -> Accuracy:
    """The same as it stands in a card."""
    return Accuracy(value=share_right(probs, data), images=len(data), data=describe(data))


def describe(data: Dataset) -> str:
    """A set's name and a digest of its pixels and labels, by which it can be told again."""
    digest = hashlib.sha256(data.images.tobytes())
    digest.update(data.labels.tobytes())
    return f"{data.name} (sha256 of pixels and labels {digest.hexdigest()[:12]})"


def gap(a: Probs, b: Probs) -> float:
    """Mean L1 distance of two answers to the same images, in [0, 2]."""
    return float(np.abs(a - b).sum(1).mean())
