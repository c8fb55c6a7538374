"""Figures of ONNX files on labelled images, measured through an engine that serves them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from app.inference.bundle import Accuracy, Card, InputShape, Preprocessing
from app.inference.decode import to_pixels
from app.inference.engines import Engine, EngineName, Probs, load, resolve
from app.precision import Precision
from scumble.data.image_sets import Dataset, DatasetError
from scumble.data.png import to_image
from scumble.progress import bar

BATCH = 250
STRETCHED = Preprocessing()


def threads() -> int:
    """How many to compute with: OMP_NUM_THREADS where that is set, else all cores."""
    return torch.get_num_threads()


def fitted(data: Dataset, card: Card) -> Dataset:
    """`data` with pictures of the card's input size, checked against its classes.

    Raises:
        DatasetError: other labels than the card's, or colour where the network takes grey.
    """
    want = card.input
    if len(data.classes) != len(card.labels):
        raise DatasetError(
            f"{data.name} has {len(data.classes)} classes, the bundle {len(card.labels)}"
        )
    if data.images.shape[3] > want.channels:
        raise DatasetError(f"{data.name} is in colour, the bundle takes grey")
    if data.images.shape[1:] == (want.height, want.width, want.channels):
        return data
    images = np.stack([_fit(image, card) for image in data.images])
    return Dataset(data.name, images, data.labels, data.classes, data.groups)


def _fit(image: npt.NDArray[np.uint8], card: Card) -> npt.NDArray[np.uint8]:
    """One picture, brought to size as the service does it."""
    return to_pixels(to_image(image), card.input, card.preprocessing)


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
        found = []
        with bar(len(images), f"{precision} answers", "img", shown=len(images) > BATCH) as shown:
            for i in range(0, len(images), BATCH):
                found.append(run(images[i : i + BATCH]))
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
    return np.stack(
        [to_pixels(to_image(image), shape, preprocessing) for image in data.images[rows]]
    )


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
