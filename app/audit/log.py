"""The audit log: one line per prediction, answered or refused, in a chain of hashes.

    endpoint -> entry -> [thread: line, write, fsync] -> open: later; closed: before the answer

Lines are written on a thread; one write takes all lines that are waiting. While they cannot be
written, `open` serves on and counts what is lost, and `closed` refuses: no answer leaves whose line
is not written. The log says itself how many lines it lost, as soon as it can be written again.
Neither images nor probabilities get in, nor any key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

from prometheus_client import Counter
from starlette.requests import Request
from starlette.responses import Response

from app.endpoint_type import Endpoint
from app.errors import Internal, RequestError, Unavailable
from app.request_context import RequestContext, request_context
from app.system.background import Throttle, give, settle
from app.system.timestamps import timestamp

FLUSH_S = 0.05  # how long an open log gathers lines
WAITING = 20_000  # lines that wait for a slow disk; more are lost
FAILS = "audit log cannot be written"
log = logging.getLogger("scumble")


class NotWritten(Unavailable):
    """The line of the request's answer could not be written; no other is tried."""


class Sink(Protocol):
    """Where lines go; called from one thread at a time."""

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write all of them or none.

        Raises:
            OSError: none was written.
        """
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class Audit:
    """Writes what became of predictions.

    Args:
        sink: takes the lines.
        facts: stand in every line.
        policy: name of the defense where there are no keys; else each key's grant has it.
        closed: answer only what is written.
        written, lost: count lines.
        now: seconds since 1970, for the lines.
        clock: seconds, for the ordinary log.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        facts: Mapping[str, str],
        policy: str | None,
        closed: bool,
        written: Counter,
        lost: Counter,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink = sink
        self._facts = facts
        self._policy = policy
        self._closed = closed
        self._count_written = written
        self._count_lost = lost
        self._now = now
        self._log_due = Throttle(clock)
        self._failing = False
        self._unsaid = 0  # lines lost since the log last said so
        self._waiting: list[tuple[dict[str, Any] | None, Callable[[bool], None] | None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")

    def guard(self, route: str, endpoint: Endpoint) -> Endpoint:
        """The endpoint, with a line for each call."""

        async def audited(request: Request) -> Response:
            context = request_context(request.scope)
            try:
                if self.refusing and context.fault is None:
                    raise Unavailable(FAILS)
                response = await endpoint(request)
            except NotWritten:  # has been tried
                raise
            except Exception as exc:
                error = exc if isinstance(exc, RequestError) else Internal(str(exc))
                await self._note(context, route, error.status, error.reason)
                raise
            if not await self._note(context, route, response.status_code):
                if context.admission is not None:
                    await context.admission.refund()
                raise NotWritten(FAILS)
            return response

        return audited

    @property
    def refusing(self) -> bool:
        """Whether requests are refused because the log cannot be written."""
        return self._closed and self._failing

    def note(
        self,
        context: RequestContext,
        route: str,
        status: int,
        done: Callable[[bool], None],
        refusal: str | None = None,
    ) -> None:
        """Take a line.

        Args:
            context: of the request.
            route: label of its path.
            status: of the answer.
            done: called at once or later on the event loop, with False if the answer must not
                leave.
            refusal: why there is none.
        """
        entry = self._entry(context, route, status, refusal)
        if self._closed:
            self._put(entry, done)
            return
        if len(self._waiting) >= WAITING:
            self._lose(1)
        else:
            self._put(entry, None)
        done(True)

    async def ready(self) -> bool:
        """Whether no request would be refused for want of the log; tries it if it failed."""
        if not self.refusing:
            return True
        done = asyncio.get_running_loop().create_future()
        self._put(None, partial(settle, done))
        return bool(await done)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write what is left at the end."""
        try:
            yield
        finally:
            if self._writing is not None:
                await self._writing
            self._thread.shutdown()
            self._sink.close()

    async def _note(
        self, context: RequestContext, route: str, status: int, refusal: str | None = None
    ) -> bool:
        """Take a line; False if the answer must not leave."""
        if not self._closed:
            self.note(context, route, status, _ignore, refusal)
            return True
        done = asyncio.get_running_loop().create_future()
        self.note(context, route, status, partial(settle, done), refusal)
        return bool(await done)

    def _put(self, entry: dict[str, Any] | None, done: Callable[[bool], None] | None) -> None:
        """Take a line, or with None try whether one can be written."""
        self._waiting.append((entry, done))
        self._start()

    def _start(self) -> None:
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        """One batch after another until nothing waits."""
        try:
            while self._waiting:
                if not self._closed:
                    await asyncio.sleep(FLUSH_S)
                batch, self._waiting = self._waiting, []
                written = await self._batch([entry for entry, _ in batch if entry is not None])
                for _, done in batch:
                    if done is not None:
                        give(done, written)
        finally:
            self._writing = None

    async def _batch(self, entries: list[dict[str, Any]]) -> bool:
        unsaid = self._unsaid
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._append, entries, unsaid)
        except Exception as exc:  # noqa: BLE001  # any error is handled by the policy
            self._lose(len(entries))
            self._fail(exc)
            return False
        self._failing = False
        self._unsaid -= unsaid
        self._count_written.inc(len(entries))
        return True

    def _append(self, batch: list[dict[str, Any]], unsaid: int) -> None:
        said = [{"kind": "lost", "time": self._now(), "lines": unsaid}] if unsaid else []
        self._sink.append([entry | {"time": timestamp(entry["time"])} for entry in [*said, *batch]])

    def _entry(
        self, context: RequestContext, route: str, status: int, refusal: str | None
    ) -> dict[str, Any]:
        admission = context.admission
        entry: dict[str, Any] = {
            "kind": "prediction",
            "time": self._now(),
            "id": context.id,
            "route": route,
            "status": status,
            "images": context.images,
            **self._facts,
            "client": None,
            "policy": self._policy,
        }
        if admission is not None:
            entry |= {"client": admission.grant.client or None, "policy": admission.grant.policy}
            if admission.left is not None:
                entry["left"] = admission.left
        if context.withheld:
            entry["withheld"] = context.withheld
        if context.facts is not None:
            entry |= context.facts
        if refusal is not None:
            entry["refusal"] = refusal
        if context.traceparent is not None:
            entry["traceparent"] = context.traceparent
        return entry

    def _lose(self, lines: int) -> None:
        self._unsaid += lines
        self._count_lost.inc(lines)

    def _fail(self, exc: Exception) -> None:
        self._failing = True
        if self._log_due():
            log.error("audit log cannot be written: %s", exc)


def _ignore(written: bool) -> None:
    """For those who do not wait."""
    del written
