"""Figures of ONNX files on labelled images, measured through an engine that serves them."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import numpy.typing as npt

from app.bundle import Accuracy
from app.engines import Engine, EngineName, Precision, Probs, load, resolve
from scumble.data import Dataset

BATCH = 250
THREADS = os.cpu_count() or 1


def answers(
    model: bytes,
    images: npt.NDArray[np.uint8],
    precision: Precision,
    engine: EngineName | None = None,
) -> Probs:
    """Probabilities float32 (N, K) of uint8 images (N, H, W, C); by default from the best engine."""
    run: Engine = load(engine or resolve("auto"), model, threads=THREADS, precision=precision)
    return np.concatenate([run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])


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
