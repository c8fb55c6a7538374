"""Micro-batching: requests that wait at the same time share one call of the engine.

While the engine is idle, the first request starts a batch at the end of the event loop's current
iteration, with all requests that arrived in it. While a batch runs, the next one fills up. With a
target latency, `app.inference.adaptive_batch_limit` limits its size. Cancelled and expired requests
(`app.inference.deadline`) are skipped.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from app.errors import TooLate, Unavailable
from app.inference.adaptive_batch_limit import AdaptiveBatchLimit
from app.inference.deadline import LATE, NO_DEADLINE, Deadline
from app.inference.engines import FAST, Batch, Probs, size_within
from app.inference.pipeline import Answers, Compute, Pipeline
from app.request_context import ClientConnection
from app.system.background import give
from app.telemetry.metrics import Metrics
from scumble.defenses import Defense
from scumble.defenses.evidence import Marks

SWEEP_S = 0.01  # least time between two scans of a full queue


class BatchResult(NamedTuple):
    """One request's part of a batch.

    Attributes:
        probabilities: (n, K).
        queue_s: seconds in the queue.
        infer_s: seconds in the engine.
        defend_s: seconds in the defense.
        marks: (n,) what was withheld; None where nothing can be.
    """

    probabilities: Probs
    queue_s: float
    infer_s: float
    defend_s: float
    marks: Marks | None = None


class Waiting(Protocol):
    """What gets the result of a batch: a future, or what is called at once in its place."""

    def done(self) -> bool:
        """Whether a result would come too late."""
        ...

    def set_result(self, result: BatchResult, /) -> None:
        """The batch has run."""
        ...

    def set_exception(self, exception: BaseException, /) -> None:
        """It has not."""
        ...


@dataclass(eq=False, slots=True)  # frozen would take three times as long to make
class Job:
    """A request's images in the queue, and where their answer goes."""

    batch: Batch
    future: Waiting
    submitted: float
    defense: Defense | None
    deadline: Deadline


class Batcher:
    """Collects jobs into batches and runs the pipeline on them, on the event loop or on a thread.

    Args:
        pipeline: what runs.
        metrics: batch sizes, queue depth and the defense's effect are counted here.
        max_size: images in a batch; a larger request runs as a batch of its own.
        max_queue: images that may wait.
        max_wait_s: how long a batch that follows directly on another may wait to fill up.
        target_s: batches get no larger than lets nearly all answers come within it; 0 for none.
        inline: run on the event loop, which saves passing work to a thread but blocks the loop.
    """

    def __init__(
        self,
        pipeline: Compute,
        metrics: Metrics,
        *,
        max_size: int,
        max_queue: int,
        max_wait_s: float = 0.0,
        target_s: float = 0.0,
        inline: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pipeline = pipeline
        self._metrics = metrics
        self._max_size = max_size
        self._max_queue = max_queue
        self._max_wait_s = max_wait_s
        self._batch_limit = AdaptiveBatchLimit(target_s, max_size)
        # By the images that may run: the largest size that engines are fast at.
        self._fast = [size_within(n) for n in range(max_size + 1)]
        self._clock = clock
        self._jobs: deque[Job] = deque()
        self._waiting = 0
        self._busy = False
        self._filling: asyncio.TimerHandle | None = None
        self._started: float | None = None
        self._swept = -math.inf
        self._thread = None if inline else ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def __call__(
        self, batch: Batch, defense: Defense | None = None, deadline: Deadline = NO_DEADLINE
    ) -> BatchResult:
        """Probabilities for (n, ...) images, in order.

        Args:
            batch: the images.
            defense: replaces the defense of the pipeline, which must be a `Pipeline`.
            deadline: of the request, on the clock of this batcher.

        Raises:
            Unavailable: the queue has no room for them.
            TooLate, ClientGone: the deadline passed, or the client left, before their turn.
        """
        (future,) = self._queue([batch], defense, deadline)
        return await future

    async def all(
        self,
        batches: Sequence[Batch],
        defense: Defense | None = None,
        deadline: Deadline = NO_DEADLINE,
    ) -> list[BatchResult]:
        """The same for several at once: either all of them are queued, or none.

        Raises:
            Unavailable: the queue has no room for them.
            TooLate, ClientGone: the deadline passed, or the client left, before all had run.
        """
        return await asyncio.gather(*self._queue(batches, defense, deadline))

    def submit(
        self,
        batch: Batch,
        waiting: Waiting,
        client: ClientConnection,
        defense: Defense | None = None,
    ) -> None:
        """Queue images without a deadline; never waits.

        Args:
            batch: the images.
            waiting: gets the result as soon as there is one, on the event loop.
            client: skipped once it has left.
            defense: replaces the defense of the pipeline, which must be a `Pipeline`.

        Raises:
            Unavailable: the queue has no room for them.
        """
        self._make_room(len(batch))
        job = Job(batch, waiting, self._clock(), defense, Deadline(math.inf, client))
        self._enqueue([job], len(batch))

    @property
    def max_size(self) -> int:
        """Images of the largest batch."""
        return self._max_size

    @property
    def running_s(self) -> float:
        """For how long the current batch has been running; 0 if there is none."""
        return 0.0 if self._started is None else self._clock() - self._started

    def prepare(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Let the engine compile for the batches to come, until told to stop; on another thread."""
        sizes = (size for size in FAST if size <= self._max_size)
        self._pipeline.prepare(itertools.takewhile(lambda _: not stop(), sizes))

    def close(self) -> None:
        """Let the running batch finish and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _queue(
        self, batches: Sequence[Batch], defense: Defense | None, deadline: Deadline
    ) -> list[asyncio.Future[BatchResult]]:
        images = sum(map(len, batches))
        self._make_room(images)
        loop = asyncio.get_running_loop()
        now = self._clock()
        futures: list[asyncio.Future[BatchResult]] = [loop.create_future() for _ in batches]
        jobs = [
            Job(batch, future, now, defense, deadline)
            for batch, future in zip(batches, futures, strict=True)
        ]
        self._enqueue(jobs, images)
        if deadline.at < math.inf:  # a batch may run for longer
            timer = loop.call_later(deadline.at - now, self._withdraw, jobs)
            futures[-1].add_done_callback(lambda _: timer.cancel())
        return futures

    def _make_room(self, images: int) -> None:
        if self._waiting + images > self._max_queue:
            self._drop_ended()
        if self._waiting + images > self._max_queue:
            raise Unavailable(
                f"{self._waiting} images are waiting already; allowed: {self._max_queue}"
            )

    def _enqueue(self, jobs: list[Job], images: int) -> None:
        self._jobs.extend(jobs)
        self._count(images)
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().call_soon(self._start)
        elif self._filling is not None and self._waiting >= self._batch_limit():
            self._filling.cancel()
            self._filling = None
            asyncio.get_running_loop().call_soon(self._start)

    def _withdraw(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job in self._jobs:
                self._jobs.remove(job)
                self._count(-len(job.batch))
                refuse(job, TooLate(LATE))

    def _drop_ended(self) -> None:
        """Remove cancelled and expired jobs from the queue, also while a batch runs."""
        now = self._clock()
        if now - self._swept < SWEEP_S:  # not a scan for each refusal
            return
        self._swept = now
        waiting: deque[Job] = deque()
        for job in self._jobs:
            ended = job.deadline.ended(now)
            if ended is not None:
                refuse(job, ended)
            if job.future.done():
                self._count(-len(job.batch))
            else:
                waiting.append(job)
        self._jobs = waiting

    def _start(self) -> None:
        self._filling = None
        started = self._clock()
        jobs = self._take(started)
        if not jobs:
            self._next()
            return
        self._started = started
        if self._thread is None:
            try:
                answers = self._run(jobs)
            except Exception as exc:  # noqa: BLE001  # any error goes to the waiting requests
                self._finish(jobs, started, exc)
            else:
                self._finish(jobs, started, answers)
            return
        loop = asyncio.get_running_loop()
        running = self._thread.submit(self._run, jobs)
        running.add_done_callback(
            lambda done: loop.call_soon_threadsafe(
                self._finish, jobs, started, done.exception() or done.result()
            )
        )

    def _take(self, now: float) -> list[Job]:
        """Take the next batch, which is empty if all jobs were cancelled or expired."""
        jobs: list[Job] = []
        size, dropped = 0, 0
        # No more than fill a size that engines are fast at: the others are the first of the next
        # batch, together with whatever has arrived by then.
        allowed = self._fast[min(self._batch_limit(), self._waiting)]
        while self._jobs and (not jobs or size + len(self._jobs[0].batch) <= allowed):
            job = self._jobs.popleft()
            ended = job.deadline.ended(now)
            if ended is not None:
                refuse(job, ended)
            if job.future.done():  # by this, or its task was cancelled
                dropped += len(job.batch)
            else:
                size += len(job.batch)
                jobs.append(job)
        if size + dropped:
            self._count(-size - dropped)
        if jobs:
            self._metrics.batch_size.observe(size)
        return jobs

    def _run(self, jobs: list[Job]) -> Answers:
        images = jobs[0].batch if len(jobs) == 1 else np.concatenate([job.batch for job in jobs])
        if isinstance(self._pipeline, Pipeline) and any(job.defense is not None for job in jobs):
            parts = [(len(job.batch), job.defense) for job in jobs]
            return self._pipeline.by_client(images, parts)
        return self._pipeline(images)

    def _finish(self, jobs: list[Job], started: float, outcome: Answers | BaseException) -> None:
        if isinstance(outcome, BaseException):
            for job in jobs:
                refuse(job, outcome)
        else:
            self._deliver(jobs, started, outcome)
        self._next()

    def _next(self) -> None:
        self._started = None
        loop = asyncio.get_running_loop()
        if not self._jobs:
            self._busy = False
        elif self._max_wait_s and self._waiting < self._batch_limit():
            self._filling = loop.call_later(self._max_wait_s, self._start)
        else:
            loop.call_soon(self._start)

    def _deliver(self, jobs: list[Job], started: float, answers: Answers) -> None:
        self._batch_limit.note(len(answers.l1), self._clock() - started)
        self._metrics.defended_rows.inc(int((answers.l1 > 1e-6).sum()))
        self._metrics.response_l1.observe_all(answers.l1.tolist())
        marks = answers.marks
        if marks is not None:
            for kind, counter in self._metrics.withheld.items():
                counter.inc(int((marks == kind).sum()))
        first = 0
        for job in jobs:
            last = first + len(job.batch)
            if not job.future.done():  # done already: its client went away
                served = BatchResult(
                    answers.probabilities[first:last],
                    started - job.submitted,
                    answers.infer_s,
                    answers.defend_s,
                    None if marks is None else marks[first:last],
                )
                give(job.future.set_result, served)
            first = last

    def _count(self, images: int) -> None:
        self._waiting += images
        self._metrics.queue_depth.add(images)  # a worker may have several batchers


class Batchers(NamedTuple):
    """The batchers for one form of images.

    Attributes:
        default: applies the server's defense.
        per_client: applies the defense of each client.
    """

    default: Batcher
    per_client: Batcher

    def prepare(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Compile the engines for the batch sizes to come, until `stop` returns True."""
        for batcher in self:
            batcher.prepare(stop)


def refuse(job: Job, why: BaseException) -> None:
    """Answer a job with an error, unless it is answered already."""
    if not job.future.done():  # done already: its client went away
        give(job.future.set_exception, why)
