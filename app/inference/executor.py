"""A thread with a bounded queue, for work that would block the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.errors import TooLate, Unavailable
from app.inference.deadline import LATE, Deadline

T = TypeVar("T")


class BoundedExecutor:
    """Runs the tasks of requests on one thread; requests take turns, task by task.

    A request has at most one task in the queue, so that one with many images does not keep others
    waiting for all of them. A second thread would not make the first one faster: workers are as
    many as there are cores.

    Args:
        max_tasks: that may wait or run; more are refused.
        max_bytes: of input that the tasks together may hold; more are refused. What is alone is
            never refused.
        clock: the one of the requests' deadlines.
    """

    def __init__(
        self, max_tasks: int, max_bytes: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._max_tasks = max_tasks
        self._max_bytes = max_bytes
        self._clock = clock
        self._tasks = 0
        self._bytes = 0
        self._started: float | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")

    async def __call__(
        self, tasks: Collection[Callable[[], T]], size: int, deadline: Deadline
    ) -> list[T]:
        """The results of the tasks, which run in order.

        Args:
            tasks: of one request.
            size: bytes of their input.
            deadline: checked before each task; when it passes, the call ends at once, even while a
                task is running.

        Raises:
            Unavailable: too much is waiting.
            TooLate, ClientGone: the client left before the last task began, or the deadline passed
                before it was done.
        """
        if self._tasks and self._tasks + len(tasks) > self._max_tasks:
            raise Unavailable(
                f"{self._tasks} images or bodies are waiting to be read; allowed: {self._max_tasks}"
            )
        if self._bytes and self._bytes + size > self._max_bytes:
            raise Unavailable(
                f"{self._bytes} bytes are waiting to be read; allowed: {self._max_bytes}"
            )
        self._tasks += len(tasks)
        self._bytes += size
        try:
            return [await self._one(task, deadline) for task in tasks]
        finally:
            self._tasks -= len(tasks)
            self._bytes -= size

    @property
    def running_s(self) -> float:
        """For how long the current task has been running; 0 if there is none."""
        started = self._started
        return 0.0 if started is None else self._clock() - started

    def close(self) -> None:
        """Let the running task finish and end the thread; those that wait are cancelled."""
        self._thread.shutdown(cancel_futures=True)

    async def _one(self, task: Callable[[], T], deadline: Deadline) -> T:
        running = asyncio.wrap_future(self._thread.submit(self._run, task, deadline))
        if deadline.at == math.inf:
            return await running
        try:
            return await asyncio.wait_for(running, max(0.0, deadline.at - self._clock()))
        except TimeoutError:  # a waiting task is cancelled, a running one is abandoned
            raise TooLate(LATE) from None

    def _run(self, task: Callable[[], T], deadline: Deadline) -> T:
        """On the thread."""
        started = self._clock()
        ended = deadline.ended(started)
        if ended is not None:
            raise ended
        self._started = started
        try:
            return task()
        finally:
            self._started = None
