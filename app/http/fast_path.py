"""Predictions of one small image, answered without a task and an ASGI call.

A small request that arrives whole needs to wait for its batch alone. Here it is decoded and queued
when it has been parsed, and its answer is written when the batch has run. What else a request may
have (other body forms, `top_k`, a deadline), what cannot be queued and what fails is given to the
application, so that there is one place for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from app.errors import ClientGone
from app.http.bodies import READERS, raw
from app.http.connections import Cycle
from app.http.middleware import Observe
from app.http.prediction import GONE, Answered, Service
from app.http.protocols.v1 import PREDICT, V1, Answer, PredictRequest
from app.inference.batching import BatchResult
from app.request_context import RequestContext, request_context
from scumble.defenses.evidence import ABSTAINED

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

    ToApplication = Callable[[Cycle, ASGI3Application | None], None]

LARGEST = 8192  # bytes of a body
TYPES = frozenset(name.encode() for name, reader in READERS.items() if reader is raw)
# Headers that only the application handles.
OTHERS = frozenset((b"content-encoding", b"expect", b"x-deadline-ms"))

ANSWER = b"content-length: %d\r\ncontent-type: application/json\r\nx-request-id: %b"
ALL = PredictRequest([], None)  # probabilities of all classes


class DirectPredictions:
    """Implements `app.http.connections.Direct` for `POST /v1/predict`.

    Args:
        service: answers; it has no keys and no audit log.
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
        service = self.service
        start = service.clock()
        context = request_context(scope)
        body = bytes(cycle.body)
        read = service.clock()
        try:
            pixels = service.small_image(body)
            if pixels is None:
                return False
            context.images = 1
            times = start, read, service.clock()
            waiting = Prediction(self, cycle, to_application, context, times)
            service.pixels.default.submit(pixels, waiting, context.client)
        except Exception as exc:  # noqa: BLE001  # the application answers all errors
            context.start, context.fault = start, exc
            return False
        cycle.body = bytearray()  # an idle connection keeps its last cycle
        context.id = self.observed.request_id(scope)
        self.observed.began()
        return True


class Prediction:
    """A request in the queue; implements `app.inference.batching.Waiting`.

    Args:
        predictions: what took it.
        cycle: writes the response.
        to_application: gives the request to an application.
        context: of the request.
        times: when it was taken, read and decoded.
    """

    __slots__ = ("_context", "_cycle", "_done", "_predictions", "_times", "_to_application")

    def __init__(
        self,
        predictions: DirectPredictions,
        cycle: Cycle,
        to_application: ToApplication,
        context: RequestContext,
        times: tuple[float, float, float],
    ) -> None:
        self._predictions = predictions
        self._cycle = cycle
        self._to_application = to_application
        self._context = context
        self._times = times
        self._done = False

    def done(self) -> bool:
        """Whether it has a result."""
        return self._done

    def set_result(self, served: BatchResult, /) -> None:
        """Answer the request."""
        predictions, context, cycle = self._predictions, self._context, self._cycle
        service, observed = predictions.service, predictions.observed
        start, read, decoded = self._times
        try:
            if context.client.gone:
                raise ClientGone(GONE)
            back = service.clock()
            abstained = None if served.marks is None else served.marks == ABSTAINED
            body = predictions.codec.document(ALL, served.probabilities, context.id, abstained)
            service.count(context, Answered(served, read, decoded), start, read, back)
        except Exception as exc:  # noqa: BLE001  # the application answers all errors
            self.set_exception(exc)
            return
        self._done = True
        lines = ANSWER % (len(body), context.id.encode())
        if not cycle.answer(lines, body) and not cycle.disconnected:
            self._to_application(cycle, partial(self._send_later, body))
            return
        observed.ended(PREDICT, 200, start)

    def set_exception(self, exception: BaseException, /) -> None:
        """Have the application refuse the request."""
        self._done = True
        context = self._context
        context.start, context.fault = self._times[0], exception
        self._predictions.service.metrics.inflight.add(-1)  # the application counts it again
        self._to_application(self._cycle, None)

    async def _send_later(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a client that is slow to read."""
        response = Answer(body)
        response.raw_headers.append((b"x-request-id", self._context.id.encode()))
        try:
            await response(scope, receive, send)
        finally:
            self._predictions.observed.ended(PREDICT, 200, self._times[0])
