"""Tells a worker that hangs from one that works, without asking it.

Each worker writes into memory that the supervisor sees until when all was well: now, if no batch
runs, or when the oldest batch that runs began. An engine that does not return stops that clock,
whether it blocks the worker's loop or only its own thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from ctypes import c_double
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray


@dataclass(frozen=True)
class Pulse:
    """A worker's side.

    Attributes:
        beats: one time per worker, in memory that the supervisor sees.
        number: of this worker.
    """

    beats: object
    number: int

    def beat(self, running_s: float) -> None:
        """All was well until `running_s` ago."""
        # The one clock that is the same for all processes of a machine.
        self.beats[self.number] = time.monotonic() - running_s  # type: ignore[index]  # ctypes has no type for its arrays


class Watchdog:
    """The supervisor's side.

    Args:
        workers: how many numbers there are.
        allowed_s: how long an inference may take; 0 for any time.
    """

    def __init__(
        self, workers: int, allowed_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.allowed_s = allowed_s or math.inf
        self._clock = clock
        self._beats = RawArray(c_double, workers)

    def pulse(self, number: int) -> Pulse:
        """The side of a new worker."""
        return Pulse(self._beats, number)

    def start(self, number: int) -> None:
        """The worker is loaded: from now on it must beat."""
        self._beats[number] = self._clock()

    def late(self, number: int) -> bool:
        """The worker is slow to return: nothing new for it, it may never do so."""
        return self._silent_s(number) > self.allowed_s / 4

    def hung(self, number: int) -> bool:
        """The worker's time is over."""
        return self._silent_s(number) > self.allowed_s

    def _silent_s(self, number: int) -> float:
        return self._clock() - float(self._beats[number])
