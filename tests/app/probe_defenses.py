"""Defenses whose answers show how they were called, for tests of the whole service.

Each answer has all of its probability on one class, whose number is what it shows.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scumble.defenses import DCP
from scumble.defenses.base import Defense

FIRST = f"{Path(__file__)}:First"
OPPOSITE = f"{Path(__file__)}:Opposite"
THREAD = f"{Path(__file__)}:Thread"
SLOW = f"{Path(__file__)}:Slow"
WRONG_GRAPH = f"{Path(__file__)}:WrongGraph"
SLOW_TENSORS = f"{Path(__file__)}:SlowTensors"
IMAGE_S = 0.15
seen: set[np.dtype] = set()


def certain(probs, number):
    return np.eye(probs.shape[1], dtype=probs.dtype)[[number] * len(probs)]


@dataclass(frozen=True, kw_only=True)
class First(Defense):
    """1 for the first batch of pixels and the first of tensors, 0 for all others."""

    def __call__(self, probs, inputs):
        first = inputs.dtype not in seen
        seen.add(inputs.dtype)
        return certain(probs, int(first))


@dataclass(frozen=True, kw_only=True)
class Opposite(Defense):
    """The least probable class."""

    def __call__(self, probs, inputs):
        return np.eye(probs.shape[1], dtype=probs.dtype)[probs.argmin(1)]


@dataclass(frozen=True, kw_only=True)
class Thread(Defense):
    """1 on the engine's own thread, 0 on the event loop's."""

    def __call__(self, probs, inputs):
        return certain(probs, int(threading.current_thread().name.startswith("engine")))


@dataclass(frozen=True, kw_only=True)
class Slow(Defense):
    """Takes its time for each image."""

    def __call__(self, probs, inputs):
        time.sleep(IMAGE_S * len(probs))
        return probs


@dataclass(frozen=True, kw_only=True)
class SlowTensors(Defense):
    """Takes its time for the first tensors."""

    def __call__(self, probs, inputs):
        if inputs.dtype == np.float32 and inputs.dtype not in seen:
            seen.add(inputs.dtype)
            time.sleep(1)
        return probs


@dataclass(frozen=True, kw_only=True)
class WrongGraph(DCP):
    """Has a graph that computes something else."""

    def nodes(self, op, probs):
        return op("Mul", probs, 0.5)
