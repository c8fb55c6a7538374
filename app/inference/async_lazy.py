"""What is made when somebody first asks for it, on a thread, once."""

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
    """Makes its value at the first call; whoever calls meanwhile waits for the same one.

    Args:
        make: makes it. What it raises is logged, and every caller gets it for `retry_s`; who comes
            later makes it try again.
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
        return await asyncio.shield(self._making)  # one caller may go, the others still wait

    @property
    def made(self) -> T | None:
        """The value, or None while nobody has it."""
        making = self._making
        if making is None or not making.done() or making.cancelled() or making.exception():
            return None
        return making.result()

    def _ended(self, making: asyncio.Future[T]) -> None:
        if not making.cancelled() and (failure := making.exception()) is not None:
            self._retry_at = self._clock() + self._retry_s
            log.error("not made, tried again in %g s: %r", self._retry_s, failure)
