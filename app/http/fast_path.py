"""Predictions of one small image, answered without a task and an ASGI call.

    admit -> read the header -> charge -> decode, queue -> batch -> audit line -> answer

A small request that arrives whole needs to wait for its charge, its batch and its line in the audit
log alone. It is decoded and queued when it has been parsed and charged, and its answer is written
when the batch has run. What else a request may have (other body forms, `top_k`, a deadline), what
is not admitted, what cannot be queued and what fails is given to the application, so that there is
one place for each of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from starlette.types import Receive, Scope, Send

from app.audit.log import FAILS, NotWritten
from app.errors import ClientGone, RequestError
from app.http.bodies import READERS, raw
from app.http.connections import Cycle
from app.http.middleware import Observe
from app.http.prediction import GONE, Answered, Service
from app.http.protocols.v1 import PREDICT, V1, Answer, PredictRequest
from app.inference.batching import BatchResult
from app.inference.decode import Header
from app.request_context import RequestContext, request_context
from scumble.defenses.evidence import ABSTAINED

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

    from app.access.quotas import Admission
    from scumble.defenses import Defense

    ToApplication = Callable[[Cycle, ASGI3Application | None], None]

log = logging.getLogger("scumble")
LARGEST = 8192  # bytes of a body
TYPES = frozenset(name.encode() for name, reader in READERS.items() if reader is raw)
# Headers that only the application handles.
OTHERS = frozenset((b"content-encoding", b"expect", b"x-deadline-ms"))

ANSWER = b"content-length: %d\r\ncontent-type: application/json%b\r\nx-request-id: %b"
ALL = PredictRequest([], None)  # probabilities of all classes


class DirectPredictions:
    """Implements `app.http.connections.Direct` for `POST /v1/predict`.

    Args:
        service: answers.
        observed: counts and times responses.
    """

    def __init__(self, service: Service, observed: Observe) -> None:
        self.service = service
        self.observed = observed
        self.codec = V1(service.card, service.limits, service.executor)
        self._allowed = min(LARGEST, service.limits.max_body_bytes)
        self._deadlines = bool(service.limits.deadline_ms)

    def __call__(self, cycle: Cycle, to_application: ToApplication) -> bool:
        """Take a request that is complete; see `app.http.connections.Direct`."""
        scope: Scope = cycle.scope  # type: ignore[assignment]  # of the same kind for uvicorn
        if scope["path"] != PREDICT or scope["method"] != "POST" or scope["query_string"]:
            return False
        headers = dict(scope["headers"])
        if (
            headers.get(b"content-type") not in TYPES
            or not OTHERS.isdisjoint(headers)
            or not 0 < len(cycle.body) <= self._allowed
            or self._deadlines
        ):
            return False
        service, observed = self.service, self.observed
        context = request_context(scope)
        start = service.clock()
        if service.audit is not None and service.audit.refusing:
            return False
        if service.access is not None:
            try:
                service.access.admit(scope, context)
            except RequestError:
                return False  # the application refuses it
        body = bytes(cycle.body)
        read = service.clock()
        prediction = Prediction(self, cycle, to_application, context, start, read)
        try:
            header = service.small_header(body)
            if header is None:
                return False
            context.images = 1
            if context.admission is None:
                prediction.queue(body, header)
        except Exception as exc:  # noqa: BLE001  # the application answers all errors
            context.start, context.fault = start, exc
            return False
        cycle.body = bytearray()  # an idle connection keeps its last cycle
        observed.identify(scope, context)
        observed.began()
        if context.admission is not None:
            # In the next turn of the loop it is known whether the client has hung up since.
            loop = asyncio.get_running_loop()
            loop.call_soon(prediction.charge, context.admission, body, header)
        return True


class Prediction:
    """A request in the queue; implements `app.inference.batching.Waiting`.

    Args:
        predictions: what took it.
        cycle: writes the response.
        to_application: gives the request to an application.
        context: of the request.
        start: when it was taken.
        read: when it had been read.
    """

    __slots__ = (
        "_context",
        "_cycle",
        "_decode_start",
        "_decoded",
        "_done",
        "_predictions",
        "_read",
        "_start",
        "_to_application",
    )

    def __init__(
        self,
        predictions: DirectPredictions,
        cycle: Cycle,
        to_application: ToApplication,
        context: RequestContext,
        start: float,
        read: float,
    ) -> None:
        self._predictions = predictions
        self._cycle = cycle
        self._to_application = to_application
        self._context = context
        self._start = start
        self._read = self._decode_start = self._decoded = read
        self._done = False

    def charge(self, admission: Admission, body: bytes, header: Header) -> None:
        """Charge an admitted request, then queue it; a client that has left is charged nothing."""
        if self._context.client.gone:
            self.set_exception(ClientGone(GONE))
            return

        def charged(fault: Exception | None) -> None:
            if fault is not None:
                self.set_exception(fault)
                return
            try:
                self._decode_start = self._predictions.service.clock()
                self.queue(body, header, admission.grant.defense)
            except Exception as exc:  # noqa: BLE001  # the application answers all errors
                self.set_exception(exc)

        try:
            admission.charge_soon(1, charged)
        except Exception as exc:  # noqa: BLE001  # as above
            self.set_exception(exc)

    def queue(self, body: bytes, header: Header, defense: Defense | None = None) -> None:
        """Decode and queue it.

        Args:
            body: the file.
            header: of the file.
            defense: replaces the server's.

        Raises:
            RequestError: the file is refused, or the queue is full.
        """
        service = self._predictions.service
        pixels = service.small_image(body, header)
        self._decoded = service.clock()
        batcher = service.pixels.default if defense is None else service.pixels.per_client
        batcher.submit(pixels, self, self._context.client, defense)

    def done(self) -> bool:
        """Whether it has a result."""
        return self._done

    def set_result(self, served: BatchResult, /) -> None:
        """Answer the request, once its line is in the audit log."""
        predictions, context = self._predictions, self._context
        service, read = predictions.service, self._read
        try:
            if context.client.gone:
                raise ClientGone(GONE)
            back = service.clock()
            abstained = None
            if served.marks is not None:
                abstained = served.marks == ABSTAINED
                context.withheld = int(np.count_nonzero(served.marks))
            body = predictions.codec.document(ALL, served.probabilities, context.id, abstained)
            answered = Answered(served, self._decode_start, self._decoded)
            service.count(context, answered, self._start, read, back)
            if service.access is not None and context.admission is not None:
                service.access.answered(context, context.admission)
            if service.audit is not None:
                self._done = True
                service.audit.note(context, PREDICT, 200, partial(self._noted, body))
                return
        except Exception as exc:  # noqa: BLE001  # the application answers all errors
            self.set_exception(exc)
            return
        self._answer(body)

    def set_exception(self, exception: BaseException, /) -> None:
        """Have the application refuse the request."""
        self._done = True
        context = self._context
        context.start, context.fault = self._start, exception
        self._predictions.service.metrics.inflight.add(-1)  # the application counts it again
        self._to_application(self._cycle, None)

    def _noted(self, body: bytes, written: bool) -> None:
        if written:
            self._answer(body)
        else:
            self.set_exception(NotWritten(FAILS))

    def _answer(self, body: bytes) -> None:
        """Write the answer; raises nothing, since other requests are called back after this one."""
        self._done = True
        context, cycle = self._context, self._cycle
        fields = b""
        if context.admission is not None:
            for name, value in context.admission.headers.items():
                fields += f"\r\n{name.lower()}: {value}".encode()
        lines = ANSWER % (len(body), fields, context.id.encode())
        try:
            if not cycle.answer(lines, body) and not cycle.disconnected:
                self._to_application(cycle, partial(self._send_later, body))
                return
        except Exception as exc:  # noqa: BLE001  # the transport was closed, say
            log.warning("an answer could not be written: %r", exc, extra={"request_id": context.id})
            cycle.transport.abort()
        self._predictions.observed.ended(PREDICT, 200, self._start)

    async def _send_later(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a client that is slow to read."""
        context = self._context
        response = Answer(body)
        if context.admission is not None:
            response.headers.update(context.admission.headers)
        response.raw_headers.append((b"x-request-id", context.id.encode()))
        try:
            await response(scope, receive, send)
        finally:
            self._predictions.observed.ended(PREDICT, 200, self._start)
