"""Queries at the rate of an ordinary client."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.base import Mapped, ModifierParameters
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class Paced(ModifierParameters):
    """At most `rate` images a second, so that limits per time and alarms see nothing unusual.

    Attributes:
        rate: 0.001 to a million.
        burst: images that are asked at a time, 1 to a million.

    Raises:
        AttackError: a parameter is out of range.
    """

    rate: float = 10.0
    burst: int = 16

    def __post_init__(self) -> None:
        self._check_number("rate", 0.001, 1e6)
        self._check_integer("burst", 1, 1_000_000)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle that is asked slowly."""
        del student
        return PacedOracle(oracle, self.rate, self.burst)


class PacedOracle(Mapped):
    """An oracle that is asked in bursts, each of which waits for its time.

    Args:
        inner: the oracle that is asked.
        rate: images a second.
        burst: images at a time.
        clock: seconds.
        sleep: waits for so many of them.
    """

    def __init__(
        self,
        inner: Oracle,
        rate: float,
        burst: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner, lambda rows, images: rows)
        self._rate, self._burst = rate, burst
        self._clock, self._sleep = clock, sleep
        self._next = clock()

    def __call__(self, images: Images) -> Probs:
        """See `Oracle`."""
        if len(images) <= self._burst or len(images) > self.remaining:
            return self._one(images)
        rows: list[Probs] = []
        for i in range(0, len(images), self._burst):
            part = images[i : i + self._burst]
            if rows and len(part) > self.remaining:  # the service has ended it since
                rows.append(np.full((len(part), self.labels), np.nan, np.float32))
            else:
                rows.append(self._one(part))
        return np.concatenate(rows)

    def _one(self, images: Images) -> Probs:
        wait = self._next - self._clock()
        if wait > 0:
            self._sleep(wait)
        self._next = max(self._next, self._clock()) + len(images) / self._rate
        return super().__call__(images)
