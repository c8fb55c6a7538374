"""Background tasks whose exceptions are logged, throttled logging, backoff, and futures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

LOG_EVERY_S = 10.0
T = TypeVar("T")
log = logging.getLogger("scumble")


class Throttle:
    """Allows one log line per `every_s` seconds.

    Args:
        clock: monotonic seconds.
        every_s: minimum time between two lines.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, every_s: float = LOG_EVERY_S
    ) -> None:
        self._clock = clock
        self._every_s = every_s
        self._next = -float("inf")

    def __call__(self) -> bool:
        """Return whether a line may be written now, and assume that it is."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._every_s
        return True


class Backoff:
    """Delays between attempts, doubled each time up to a maximum.

    Args:
        first_s: the first delay.
        cap_s: the longest delay.
    """

    def __init__(self, first_s: float, cap_s: float) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._next_s = first_s

    def __call__(self) -> float:
        """Return the delay before the next attempt."""
        delay, self._next_s = self._next_s, min(2 * self._next_s, self._cap_s)
        return delay

    def reset(self) -> None:
        """Start again with the first delay."""
        self._next_s = self._first_s


def settle(future: asyncio.Future[T], result: T | Exception) -> None:
    """Give a future its result, or the error that it is, unless it was cancelled."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def give(callback: Callable[[T], object], result: T) -> None:
    """Call back; an error of the callback is logged, so that those after it are called as well."""
    try:
        callback(result)
    except Exception:
        log.exception("a callback failed")


async def repeat(
    what: str,
    turn: Callable[[], Awaitable[None]],
    every_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> NoReturn:
    """Call `turn` every `every_s` seconds until cancelled.

    An exception is logged, at most once per `LOG_EVERY_S`, and does not end the loop.

    Args:
        what: name of the work in the log.
        turn: does the work once.
        every_s: pause before each call.
        clock: monotonic seconds.
        sleep: pauses.
    """
    throttle = Throttle(clock)
    while True:
        await sleep(every_s)
        try:
            await turn()
        except Exception:
            if throttle():
                log.exception("%s failed, retrying", what)


def start(
    what: str, work: Coroutine[Any, Any, object], held: set[asyncio.Task[object]]
) -> asyncio.Task[object]:
    """Start `work` as a task on the running loop; log an exception that it raises.

    Args:
        what: name of the work in the log.
        work: runs once.
        held: keeps a reference to the task until it ends, since the loop holds tasks weakly.
    """

    def ended(task: asyncio.Task[object]) -> None:
        held.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("%s failed", what, exc_info=failure)

    task = asyncio.get_running_loop().create_task(work)
    held.add(task)
    task.add_done_callback(ended)
    return task
