"""Engines run a bundle's ONNX file: they map a batch of images to probabilities.

Each engine is a file with `load(model, *, threads, precision)`. The table has names of modules
rather than functions, so that an engine's library is imported only when that engine is chosen.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from app.inference.engine_selection import ENGINES, EngineName, resolve
from app.precision import Precision

__all__ = [
    "ENGINES", "FAST", "Batch", "Engine", "EngineName", "Probs", "load", "parts", "resolve",
    "size_within",
]  # fmt: skip
Batch = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Probs = npt.NDArray[np.float32]

# Batch sizes that an engine may be compiled for. They are few, as each takes memory and time.
FAST = (1, 2, 4, 8, 16)


class Engine(Protocol):
    """A loaded network.

    Takes uint8 (N, H, W, C) pixels or, for a graph with the input `tensor` (`app.inference.graph`),
    float32 (N, C, H, W) in [0, 1]. Returns float32 (N, K) probabilities. A row does not depend on
    the rest of the batch.
    """

    def __call__(self, batch: Batch, /) -> Probs:
        """Probabilities of each image."""
        ...

    def prepare(self, sizes: Iterable[int], /) -> None:
        """Compile for batches of these sizes; may run on another thread.

        After the first call, no batch waits for compilation.
        """
        ...


class Loader(Protocol):
    """`load` of an engine module."""

    def __call__(self, model: bytes, /, *, threads: int, precision: Precision) -> Engine:
        """Compile the ONNX bytes for `threads` threads; ConfigError if that is impossible."""
        ...


def size_within(n: int) -> int:
    """The largest of the `FAST` sizes that is at most `n`."""
    return max(size for size in FAST if size <= max(n, 1))


def parts(n: int) -> list[int]:
    """The `FAST` sizes in which `n` images run, largest first: 13 as 8, 4 and 1."""
    sizes = []
    while n:
        sizes.append(size_within(n))
        n -= sizes[-1]
    return sizes


def load(name: EngineName, model: bytes, *, threads: int, precision: Precision) -> Engine:
    """Load ONNX bytes in the engine `name`."""
    loader: Loader = importlib.import_module(ENGINES[name]).load
    return loader(model, threads=threads, precision=precision)
