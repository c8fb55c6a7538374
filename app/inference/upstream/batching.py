"""Micro-batching for another server: several batches are in flight at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from app.errors import TooLate, Unavailable
from app.inference.batching import Batcher, BatchResult, Job, refuse
from app.inference.deadline import LATE, NO_DEADLINE, Deadline
from app.inference.engines import Batch
from app.inference.pipeline import Answers, Pipeline, defended
from app.inference.upstream.client import Answer, UpstreamClient
from app.inference.upstream.network_interface import Found, Network
from app.telemetry.metrics import Metrics
from scumble.defenses import Defense
from scumble.defenses.scores import Whitener

LEAST_S = 1.0  # that a batch may take, whatever the deadlines of its requests
INVALID = "upstream gave no distribution for an image of the request"


class UpstreamBatcher(Batcher):
    """Collects jobs into batches, and has up to `concurrency` of them in flight.

    A batch starts at once while fewer are in flight. It ends when the upstream answers, or when the
    last of its requests' deadlines passes, after `LEAST_S` at the earliest; each request is
    answered when its own passes.

    Args:
        pipeline: with the server's defense.
        metrics: of this worker.
        client: sends the requests.
        network: writes them and reads the answers.
        concurrency: batches in flight.
        whitener: for the scores of the defense; None where it needs no residual.
        threaded: defend on a thread, since the defense would hold the event loop.
        options: of `Batcher`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        metrics: Metrics,
        *,
        client: UpstreamClient,
        network: Network,
        concurrency: int,
        whitener: Callable[[], Whitener | None] = lambda: None,
        threaded: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(pipeline, metrics, **options)
        self._fast = [max(n, 1) for n in range(self._max_size + 1)]  # any size will do
        self._defense = pipeline.defense
        self._client = client
        self._network = network
        self._concurrency = concurrency
        self._whitener = whitener
        self._flying: dict[asyncio.Task[None], list[Job]] = {}
        self._defending = ThreadPoolExecutor(1, thread_name_prefix="defense") if threaded else None

    async def __call__(
        self, batch: Batch, defense: Defense | None = None, deadline: Deadline = NO_DEADLINE
    ) -> BatchResult:
        """Probabilities for (n, ...) images, in order.

        Raises:
            Unavailable: the queue has no room for them, or the upstream does not answer.
            TooLate, ClientGone: the deadline passed, or the client left, before the answer.
        """
        self._client.refuse_unusable()
        return await super().__call__(batch, defense, deadline)

    async def all(
        self,
        batches: Sequence[Batch],
        defense: Defense | None = None,
        deadline: Deadline = NO_DEADLINE,
    ) -> list[BatchResult]:
        """The same for several at once.

        Raises:
            Unavailable: the queue has no room for them, or the upstream does not answer.
            TooLate, ClientGone: the deadline passed, or the client left, before the answers.
        """
        self._client.refuse_unusable()
        return await super().all(batches, defense, deadline)

    @property
    def running_s(self) -> float:
        """0: no batch holds the worker, and each has a time limit of its own."""
        return 0.0

    def prepare(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Does nothing: the other server prepares itself."""

    def close(self) -> None:
        """End the batches in flight, whose requests have ended, and the thread."""
        for task in self._flying:
            task.cancel()
        if self._defending is not None:
            self._defending.shutdown()

    def _start(self) -> None:
        self._filling = None
        if len(self._flying) < self._concurrency:
            started = self._clock()
            jobs = self._take(started)
            if jobs:
                task = asyncio.get_running_loop().create_task(self._answer(jobs, started))
                self._flying[task] = jobs
                task.add_done_callback(self._ended)
        self._next()

    def _next(self) -> None:
        if self._filling is not None:
            return
        full = len(self._flying) >= self._concurrency
        self._busy = full or bool(self._jobs)
        if full or not self._jobs:
            return
        loop = asyncio.get_running_loop()
        if self._max_wait_s and self._flying and self._waiting < self._batch_limit():
            self._filling = loop.call_later(self._max_wait_s, self._start)
        else:
            loop.call_soon(self._start)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._flying[task]
        self._next()

    def _withdraw(self, jobs: list[Job]) -> None:
        super()._withdraw(jobs)
        for job in jobs:
            refuse(job, TooLate(LATE))

    async def _answer(self, jobs: list[Job], started: float) -> None:
        try:
            images = jobs[0].batch if len(jobs) == 1 else np.concatenate([j.batch for j in jobs])
            found = await self._ask(images, jobs)
            inferred = self._clock()
            defend = partial(self._defend, images, found, jobs)
            if self._defending is None:
                rows, marks, l1 = defend()
            else:
                loop = asyncio.get_running_loop()
                rows, marks, l1 = await loop.run_in_executor(self._defending, defend)
            answers = Answers(rows, l1, inferred - started, self._clock() - inferred, marks)
        except Exception as exc:  # noqa: BLE001  # any error goes to the waiting requests
            for job in jobs:
                refuse(job, exc)
            return
        except asyncio.CancelledError:
            for job in jobs:
                refuse(job, Unavailable("draining"))
            raise
        if found.valid is not None:
            self._refuse_invalid(jobs, found.valid)
        self._deliver(jobs, started, answers)

    async def _ask(self, images: Batch, jobs: list[Job]) -> Found:
        network = self._network
        if images.size <= network.inline_values:
            body, headers = network.request(images)
        else:
            body, headers = await asyncio.to_thread(network.request, images)
        trace = next((job.deadline.traceparent for job in jobs if job.deadline.traceparent), None)
        if trace is not None:
            headers["traceparent"] = trace

        def read(answer: Answer) -> Found:
            found = network.read(answer, len(images))
            if found.valid is not None:
                self._client.note_invalid(answer, int((~found.valid).sum()))
            return found

        # A connection is not given up, and the next one checked, for a client's short deadline.
        until = max(max(job.deadline.at for job in jobs), self._clock() + LEAST_S)
        return await self._client.ask(
            network.path, body, headers, read, until=until, method=network.method
        )

    def _defend(self, images: Batch, found: Found, jobs: list[Job]) -> Any:
        evidence = None
        if found.logits is not None or found.features is not None:
            evidence = found.evidence(self._whitener())
        parts = [(len(job.batch), job.defense) for job in jobs]
        if all(defense is None for _, defense in parts):
            parts = [(len(images), None)]
        rows, marks = defended(self._defense, found.rows, evidence, images, parts)
        return rows, marks, np.abs(rows - found.rows).sum(1)

    def _refuse_invalid(self, jobs: list[Job], valid: Any) -> None:
        """Refuse the requests that hold an image for which the upstream gave no distribution."""
        first = 0
        for job in jobs:
            last = first + len(job.batch)
            if not valid[first:last].all():
                refuse(job, Unavailable(INVALID))
            first = last
