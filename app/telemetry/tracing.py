"""Spans for OpenTelemetry: one per request, below it one per stage of a prediction.

They are made when the request is over, from the times that the metrics are made of. Health checks
have none. Imported only where a collector is named; needs the extra `otel`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from starlette.types import Scope

from app.request_context import request_context

CLOSE_S = 2.0  # how long the end of a worker may wait for the collector


def exporting(endpoint: str | None) -> TracerProvider:
    """A provider that sends spans to an OTLP collector on a thread; None: as OTEL_* says."""
    name = Resource({SERVICE_NAME: "scumble"})
    provider = TracerProvider(
        resource=name.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


class Tracing:
    """Makes the spans of requests.

    Args:
        provider: takes them.
        now_ns: nanoseconds since 1970.
    """

    def __init__(
        self, provider: TracerProvider, *, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("scumble")
        self._now_ns = now_ns

    def request(self, scope: Scope, route: str, status: int, start: float, seconds: float) -> None:
        """Note a request that has just ended.

        Args:
            scope: with its state.
            route: the closed label that metrics count it under.
            status: of the answer.
            start: by the clock of its stages.
            seconds: that it took.
        """
        context = request_context(scope)
        end_ns = self._now_ns()
        start_ns = end_ns - round(seconds * 1e9)
        attributes = {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "url.scheme": scope.get("scheme", "http"),
            "scumble.request_id": context.id,
        }
        if context.images:
            attributes["scumble.images"] = context.images
        if context.refusal is not None:
            attributes["scumble.refusal"] = context.refusal
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            _parent(context.traceparent),
            SpanKind.SERVER,
            attributes,
            start_time=start_ns,
        )
        stages = context.stages
        if stages is not None and span.is_recording():
            below = set_span_in_context(span, Context())
            for stage, begin, end in stages.spans():
                child = self._tracer.start_span(
                    stage, below, start_time=start_ns + round((begin - start) * 1e9)
                )
                child.end(start_ns + round((end - start) * 1e9))
        if status >= 500:  # a refusal is an answer, not a fault of the server
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)

    def close(self) -> None:
        """Send what is left, as far as the collector takes it soon."""
        # The provider would try again for as long as it does while serving.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _parent(traceparent: str | None) -> Context:
    if traceparent is None:
        return Context()
    _, trace, span, flags = traceparent.split("-")
    context = SpanContext(
        int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )
    return set_span_in_context(NonRecordingSpan(context), Context())
