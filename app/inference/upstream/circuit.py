"""A circuit breaker: what has failed several times in a row is not asked for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.system.background import Backoff

FAILURES = 3  # in a row that open a circuit
FIRST_S = 0.1
CAP_S = 1.0  # between two checks of a replica that does not answer


class Circuit:
    """Closed while requests may be sent; opened by failures, closed by a successful check.

    Args:
        failures: in a row that open it.
        clock: monotonic seconds.
    """

    def __init__(
        self, failures: int = FAILURES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._allowed = failures
        self._clock = clock
        self._backoff = Backoff(FIRST_S, CAP_S)
        self._failures = 0
        self._check_at: float | None = None

    @property
    def closed(self) -> bool:
        """Whether requests may be sent."""
        return self._check_at is None

    @property
    def check_due(self) -> bool:
        """Whether it is open and has been for long enough to try a check."""
        return self._check_at is not None and self._clock() >= self._check_at

    def failed(self) -> None:
        """A request or a check has failed."""
        self._failures += 1
        if self._check_at is not None:
            if self.check_due:
                self._check_at = self._clock() + self._backoff()
        elif self._failures >= self._allowed:
            self._check_at = self._clock() + self._backoff()

    def succeeded(self) -> None:
        """A request was answered; one that was sent before it opened does not close it."""
        if self._check_at is None:
            self._failures = 0

    def open(self) -> None:
        """Open it at once."""
        self._failures = self._allowed
        if self._check_at is None:
            self._check_at = self._clock() + self._backoff()

    def close(self) -> None:
        """A check has succeeded."""
        self._failures = 0
        self._check_at = None
        self._backoff.reset()
