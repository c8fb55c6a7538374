"""Detects workers that hang, without asking them.

Each worker writes a time into memory shared with the supervisor: now, if no batch is running, or
else when the oldest running batch began. If an engine does not return, that time stops advancing,
whether the call blocks the worker's event loop or only its inference thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from ctypes import c_double
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray


@dataclass(frozen=True)
class Heartbeat:
    """The worker's side.

    Attributes:
        times: one time per worker, in memory shared with the supervisor.
        number: index of this worker.
    """

    times: object
    number: int

    def beat(self, running_s: float) -> None:
        """Report that the oldest batch has been running for `running_s`; 0 if there is none."""
        # The monotonic clock is the same in all processes.
        self.times[self.number] = time.monotonic() - running_s  # type: ignore[index]  # ctypes has no type for its arrays


class Watchdog:
    """The supervisor's side.

    Args:
        workers: how many worker numbers exist.
        allowed_s: how long an inference may take; 0 for no limit.
        clock: monotonic seconds.
    """

    def __init__(
        self, workers: int, allowed_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.allowed_s = allowed_s or math.inf
        self._clock = clock
        self._times = RawArray(c_double, workers)

    def heartbeat(self, number: int) -> Heartbeat:
        """The side of a new worker."""
        return Heartbeat(self._times, number)

    def start(self, number: int) -> None:
        """Expect heartbeats from the worker, which has loaded."""
        self._times[number] = self._clock()

    def slow(self, number: int) -> bool:
        """Whether the worker should get no new connections, since it may never respond."""
        return self._silent_s(number) > self.allowed_s / 4

    def hung(self, number: int) -> bool:
        """Whether the worker has exceeded the limit."""
        return self._silent_s(number) > self.allowed_s

    def _silent_s(self, number: int) -> float:
        return self._clock() - float(self._times[number])
