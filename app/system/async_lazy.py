"""A value that is made once, on a thread, when it is first needed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

RETRY_S = 10.0
log = logging.getLogger("scumble")

T = TypeVar("T")


class AsyncLazy(Generic[T]):
    """Makes its value at the first call. Concurrent calls wait for the same value.

    Args:
        make: makes the value. An error is logged and raised to all callers for `retry_s`; the next
            call after that tries again.
        retry_s: seconds between two attempts.
        clock: seconds.
    """

    def __init__(
        self,
        make: Callable[[], T],
        *,
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._retry_s = retry_s
        self._clock = clock
        self._making: asyncio.Future[T] | None = None
        self._retry_at: float | None = None  # set once an attempt has failed

    async def __call__(self) -> T:
        """The value."""
        if self._making is None or (self._retry_at is not None and self._clock() >= self._retry_at):
            self._retry_at = None
            self._making = asyncio.ensure_future(asyncio.to_thread(self._make))
            self._making.add_done_callback(self._ended)
        return await asyncio.shield(self._making)  # a cancelled caller must not cancel the others

    @property
    def made(self) -> T | None:
        """The value, or None if it has not been made."""
        making = self._making
        if making is None or not making.done() or making.cancelled() or making.exception():
            return None
        return making.result()

    def _ended(self, making: asyncio.Future[T]) -> None:
        if not making.cancelled() and (failure := making.exception()) is not None:
            self._retry_at = self._clock() + self._retry_s
            log.error("loading failed; no retry for %g s: %r", self._retry_s, failure)
