"""Pure ASGI middleware: a request's id, time and status, and the dispatch of hot routes."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.endpoint_type import Endpoint
from app.request_context import RequestContext, ensure_context
from app.telemetry.counters import increment
from app.telemetry.metrics import Metrics
from app.telemetry.traceparent import read_traceparent

if TYPE_CHECKING:
    from app.telemetry.tracing import Tracing

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("scumble.access")


class Observe:
    """Gives each request an id and sends it back; counts and times the response.

    Args:
        app: the application.
        metrics: of this worker.
        routes: path -> label of the metrics; other paths have the label `other`, so that a scanner
            adds no series.
        access_log: log every request.
        linked: read the `traceparent` header, for logs and spans.
        tracing: makes a span of each request.
        untraced: paths without spans.
        clock: in seconds.
        rng: draws ids.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: Mapping[str, str],
        *,
        access_log: bool = False,
        linked: bool = False,
        tracing: Tracing | None = None,
        untraced: Collection[str] = (),
        clock: Callable[[], float] = time.perf_counter,
        rng: random.Random | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log
        self._linked = linked
        self._tracing = tracing
        self._untraced = untraced
        self._clock = clock
        # Each worker is seeded by the operating system.
        rng = rng or random.Random()  # noqa: S311  # ids must differ, not be secret
        self._draw = rng.getrandbits
        self._routes = routes
        self._seconds = {
            route: metrics.request_seconds(route) for route in {*routes.values(), "other"}
        }
        self._requests: dict[tuple[str, int], Callable[[float], None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = ensure_context(scope)
        start = context.start or self._clock()
        self.identify(scope, context)
        request_id = context.id
        header = (b"x-request-id", request_id.encode())
        status = 500

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        self.began()
        try:
            await self._app(scope, receive, observe)
        finally:
            route = self._routes.get(scope["path"], "other")
            seconds = self.ended(route, status, start)
            if self._tracing is not None and scope["path"] not in self._untraced:
                self._tracing.request(scope, route, status, start, seconds)
            if self._access_log:
                log.info(
                    "request",
                    extra={
                        "id": request_id,
                        "method": scope["method"],
                        "route": route,
                        "status": status,
                        "ms": round(seconds * 1000, 3),
                        "traceparent": context.traceparent,
                    },
                )

    def identify(self, scope: Scope, context: RequestContext) -> None:
        """Give a request its id, and its trace where logs or spans link to it."""
        context.id = context.id or self._request_id(scope)
        if self._linked:
            context.traceparent = read_traceparent(scope["headers"])

    def began(self) -> None:
        """Count a request that is being answered."""
        self._metrics.inflight.add(1)
        self._metrics.flush_soon()

    def ended(self, route: str, status: int, start: float) -> float:
        """Count its response; gives the seconds that it took since `start`."""
        self._metrics.inflight.add(-1)
        seconds = self._clock() - start
        self._seconds[route].observe(seconds)
        self._count(route, status)
        self._metrics.flush_soon()
        return seconds

    def _count(self, route: str, status: int) -> None:
        count = self._requests.get((route, status))
        if count is None:
            count = increment(self._metrics.requests.labels(route, str(status)))
            self._requests[route, status] = count
        count(1)

    def _request_id(self, scope: Scope) -> str:
        """The client's id if it has the right form, or a random one."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                return str(value, "ascii")
        return f"{self._draw(64):016x}"


class Dispatch:
    """Calls the endpoint of a hot route; all other requests go on to the router.

    Args:
        hot: (method, path) -> endpoint.
        refused: makes the response to an exception.
        router: answers the other requests.
    """

    def __init__(
        self,
        hot: Mapping[tuple[str, str], Endpoint],
        refused: Callable[[Request, Exception], Awaitable[Response]],
        router: ASGIApp,
    ) -> None:
        self._hot = hot
        self._refused = refused
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI call."""
        endpoint = None
        if scope["type"] == "http":
            endpoint = self._hot.get((scope["method"], scope["path"]))
        if endpoint is None:
            await self._router(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Exception as exc:  # noqa: BLE001  # our faults are answered like refusals
            response = await self._refused(request, exc)
        await response(scope, receive, send)
