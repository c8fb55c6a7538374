"""Every metric's name, help and buckets.

`Metrics` is made once per worker, in a registry of its own. Label sets are closed, children are
made at start, and the hot path only calls `observe` and `inc` on them. Under several workers
prometheus_client keeps the values in files that the supervisor adds up.

Counters are written at once, so that a client's count of its images and ours are the same at any
time. Histograms and gauges are not: a request makes nine observations and moves two gauges up and
down, each of which takes 1 to 3 us in such a file, a tenth of a small request. They are buffered in
the process and written together `FLUSH_S` later.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from app.errors import REASONS
from app.system.file_watcher import FILE_NAMES
from app.telemetry.client_usage import ClientUsage

Stage = Literal["read", "decode", "queue", "infer", "defend", "encode"]
STAGES: tuple[Stage, ...] = get_args(Stage)

# From 250 us: a small network answers in less than a millisecond.
SECONDS = (
    0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
# Stages are shorter than requests.
STAGE_SECONDS = (0.00001, 0.000025, 0.00005, 0.0001, *SECONDS)
L1 = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# By the marks of `scumble.defenses.evidence`, which imports numpy; the supervisor needs none.
WITHHELD = {1: "keyed", 2: "abstained"}

FLUSH_S = 0.05


class BufferedHistogram:
    """Buffers the observations of a histogram.

    Attributes:
        observe: notes one observation.
        observe_all: notes several.
    """

    def __init__(self, histogram: Histogram) -> None:
        # The library has no call for many observations at once; these two are what `observe` uses.
        self._buckets = histogram._buckets
        self._sum_value = histogram._sum
        self._bounds = histogram._upper_bounds
        self._amounts: list[float] = []
        # Methods of the list, so that an observation costs no call of a Python function.
        self.observe = self._amounts.append
        self.observe_all = self._amounts.extend

    def flush(self) -> None:
        """Write them to the histogram."""
        if not self._amounts:
            return
        import numpy as np  # a worker has it; the supervisor needs none

        amounts = np.array(self._amounts, np.float64)
        self._amounts.clear()
        # Without the last bound, which is infinite: what is not a number counts there as well.
        places = np.searchsorted(self._bounds[:-1], amounts)
        for i, count in enumerate(np.bincount(places).tolist()):
            if count:
                self._buckets[i].inc(count)
        self._sum_value.inc(float(amounts.sum()))


class BufferedGauge:
    """Buffers the moves of a gauge."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._value = self._flushed = 0

    def add(self, amount: int) -> None:
        """Move it."""
        self._value += amount

    def flush(self) -> None:
        """Write the value to the gauge."""
        if self._value != self._flushed:
            self._gauge.set(self._value)
            self._flushed = self._value


@dataclass(frozen=True)
class UpstreamMetrics:
    """The metrics of one replica of another server, which the engine `upstream` asks."""

    answered: Counter
    failed: Counter
    late: Counter
    invalid: Counter
    seconds: BufferedHistogram
    circuit_open: Gauge
    usable: Gauge


class Metrics:
    """The metrics of one worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no hints there
        self.registry = registry
        self.requests = Counter(
            "scumble_requests_total", "Answered requests.", ["route", "code"], registry=registry
        )
        self._request_seconds = Histogram(
            "scumble_request_seconds",
            "From the first byte of a request's body to the last of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        stage_seconds = Histogram(
            "scumble_stage_seconds",
            "One stage of a prediction; a request passes each stage once.",
            ["stage"],
            buckets=STAGE_SECONDS,
            registry=registry,
        )
        self._buffered: list[BufferedHistogram | BufferedGauge | ClientUsage] = []
        self._flushing = False
        self.stage = {stage: self._buffer(stage_seconds.labels(stage)) for stage in STAGES}
        self.batch_size = self._buffer(
            Histogram(
                "scumble_batch_size",
                "Images in one call of the engine.",
                buckets=BATCH,
                registry=registry,
            )
        )
        self.queue_depth = self._buffered_gauge(
            "scumble_queue_depth", "Images that wait for the engine."
        )
        self.inflight = self._buffered_gauge("scumble_inflight", "Requests being answered.")
        self.images = Counter(
            "scumble_images_total",
            "Images answered with probabilities: what a client's query budget counts.",
            ["model", "precision"],
            registry=registry,
        )
        rejections = Counter(
            "scumble_rejections_total", "Refused requests.", ["reason"], registry=registry
        )
        self.rejections = {reason: rejections.labels(reason) for reason in REASONS}
        self.store_failures = Counter(
            "scumble_store_failures_total",
            "Times that the store of budgets did not answer.",
            registry=registry,
        )
        reload_failures = Counter(
            "scumble_reload_failures_total",
            "Attempts to read a changed file of the service that failed.",
            ["file"],
            registry=registry,
        )
        self.reload_failures = {name: reload_failures.labels(name) for name in FILE_NAMES}
        reload_failing_s = Gauge(
            "scumble_reload_failing_seconds",
            "Seconds since such a file could last be read; 0 while it can.",
            ["file"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.reload_failing_s = {name: reload_failing_s.labels(name) for name in FILE_NAMES}
        self.clients = ClientUsage(registry, self.flush_soon)
        self._buffered.append(self.clients)
        audit_lines = Counter(
            "scumble_audit_lines_total",
            "Lines of the audit log.",
            ["outcome"],
            registry=registry,
        )
        self.audit_written = audit_lines.labels("written")
        self.audit_lost = audit_lines.labels("lost")
        self.defended_rows = Counter(
            "scumble_defended_rows_total",
            "Answers that the defense changed (L1 above 1e-6).",
            registry=registry,
        )
        withheld = Counter(
            "scumble_withheld_images_total",
            "Images whose answer the defense withheld: a uniform row, or one that a key draws.",
            ["answer"],
            registry=registry,
        )
        self.withheld = {mark: withheld.labels(answer) for mark, answer in WITHHELD.items()}
        self.response_l1 = self._buffer(
            Histogram(
                "scumble_response_l1",
                "L1 distance between the defended and the clean probabilities of an image.",
                buckets=L1,
                registry=registry,
            )
        )
        self._upstream_requests = Counter(
            "scumble_upstream_requests_total",
            "Requests to the server that has the model, by outcome.",
            ["replica", "outcome"],
            registry=registry,
        )
        self._upstream_seconds = Histogram(
            "scumble_upstream_seconds",
            "A batch's request to the server that has the model, until its whole answer.",
            ["replica"],
            buckets=SECONDS,
            registry=registry,
        )
        self._upstream_circuit_open = Gauge(
            "scumble_upstream_circuit_open",
            "1 while some worker sends nothing to a replica, because it has failed.",
            ["replica"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._upstream_usable = Gauge(
            "scumble_upstream_usable",
            "1 while every worker finds that a replica answers, with the expected network.",
            ["replica"],
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.model_info = Gauge(
            "scumble_model_info",
            "1 for what is served.",
            ["model", "version", "precision", "engine", "defense", "sha256"],
            multiprocess_mode="livemax",
            registry=registry,
        )

    def request_seconds(self, route: str) -> BufferedHistogram:
        """The histogram of a route; ask once, at start."""
        return self._buffer(self._request_seconds.labels(route))

    def upstream(self, replica: str) -> UpstreamMetrics:
        """The metrics of a replica; ask once, at start."""
        return UpstreamMetrics(
            **{
                outcome: self._upstream_requests.labels(replica, outcome)
                for outcome in ("answered", "failed", "late", "invalid")
            },
            seconds=self._buffer(self._upstream_seconds.labels(replica)),
            circuit_open=self._upstream_circuit_open.labels(replica),
            usable=self._upstream_usable.labels(replica),
        )

    def flush(self) -> None:
        """Write all buffered values."""
        self._flushing = False
        for buffered in self._buffered:
            buffered.flush()

    def flush_soon(self) -> None:
        """The same in `FLUSH_S`, on the running event loop."""
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def _buffer(self, histogram: Histogram) -> BufferedHistogram:
        buffered = BufferedHistogram(histogram)
        self._buffered.append(buffered)
        return buffered

    def _buffered_gauge(self, name: str, help_: str) -> BufferedGauge:
        gauge = Gauge(name, help_, multiprocess_mode="livesum", registry=self.registry)
        level = BufferedGauge(gauge)
        self._buffered.append(level)
        return level
