"""What is made when somebody first asks for it, on a thread, once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Late(Generic[T]):
    """Makes its value at the first call; whoever calls meanwhile waits for the same one.

    Args:
        make: makes it; what it raises, every caller gets.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._making: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        """The value."""
        if self._making is None:
            self._making = asyncio.ensure_future(asyncio.to_thread(self._make))
        return await asyncio.shield(self._making)  # one caller may go, the others still wait

    @property
    def made(self) -> T | None:
        """The value, or None while nobody has it."""
        making = self._making
        if making is None or not making.done() or making.cancelled() or making.exception():
            return None
        return making.result()
