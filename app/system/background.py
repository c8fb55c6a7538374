"""Work that goes on in the background: what it raises is logged, none of it ends silently."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

LOG_EVERY_S = 10.0
log = logging.getLogger("scumble")


class Throttle:
    """Lets one log line through in `every_s` seconds.

    Args:
        clock: seconds.
        every_s: between two lines.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, every_s: float = LOG_EVERY_S
    ) -> None:
        self._clock = clock
        self._every_s = every_s
        self._next = -float("inf")

    def __call__(self) -> bool:
        """Whether it is time for another line, which is then taken to be written."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._every_s
        return True


class Backoff:
    """Delays between attempts: each twice the one before, up to a cap.

    Args:
        first_s: the first delay.
        cap_s: no delay is longer.
    """

    def __init__(self, first_s: float, cap_s: float) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._next_s = first_s

    def __call__(self) -> float:
        """How long to wait before the next attempt."""
        delay, self._next_s = self._next_s, min(2 * self._next_s, self._cap_s)
        return delay

    def reset(self) -> None:
        """Begin with the first delay again."""
        self._next_s = self._first_s


async def repeat(
    what: str,
    turn: Callable[[], Awaitable[None]],
    every_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> NoReturn:
    """Call `turn` every `every_s` seconds until cancelled.

    A turn that raises is logged, at most once in `LOG_EVERY_S`, and the next one comes all the
    same.

    Args:
        what: names the work in the log.
        turn: does it once.
        every_s: pause before each turn.
        clock: seconds.
        sleep: pauses.
    """
    due = Throttle(clock)
    while True:
        await sleep(every_s)
        try:
            await turn()
        except Exception:
            if due():
                log.exception("%s failed, it is tried again", what)


def start(
    what: str, work: Coroutine[Any, Any, object], held: set[asyncio.Task[object]]
) -> asyncio.Task[object]:
    """Begin `work` on the running loop; an exception that it raises is logged.

    Args:
        what: names the work in the log.
        work: runs once.
        held: has the task until it ends, since nobody else may hold it.
    """

    def ended(task: asyncio.Task[object]) -> None:
        held.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("%s failed", what, exc_info=failure)

    task = asyncio.get_running_loop().create_task(work)
    held.add(task)
    task.add_done_callback(ended)
    return task
