"""OpenTelemetry spans: one per request, with a child span per stage of a prediction.

They are created when the request has ended, from the times that metrics use. Health checks have no
spans. The module is imported only if a collector is configured, and needs the extra `otel`.
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

CLOSE_S = 2.0  # how long the shutdown of a worker may wait for the collector


def exporting(endpoint: str | None) -> TracerProvider:
    """A provider that sends spans to an OTLP collector on a thread.

    Args:
        endpoint: URL of the collector; None for what the `OTEL_*` variables configure.
    """
    name = Resource({SERVICE_NAME: "scumble"})
    provider = TracerProvider(
        resource=name.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


class Tracing:
    """Creates the spans of requests.

    Args:
        provider: exports them.
        now_ns: nanoseconds since 1970.
    """

    def __init__(
        self, provider: TracerProvider, *, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("scumble")
        self._now_ns = now_ns

    def request(self, scope: Scope, route: str, status: int, start: float, seconds: float) -> None:
        """Record a request that has just ended.

        Args:
            scope: of the request, with its `RequestContext`.
            route: the metrics label of its route.
            status: of the answer.
            start: when it began, on the clock of its stages.
            seconds: its duration.
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
        if status >= 500:  # a refusal is not an error of the server
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)

    def close(self) -> None:
        """Send the remaining spans, for at most `CLOSE_S`."""
        # The provider retries for much longer.
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
