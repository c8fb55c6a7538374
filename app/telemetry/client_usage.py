"""Metrics of each client with an API key.

The values of the label `client` are the names in the key file, so requests cannot add series.
Without keys there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge

from app.telemetry.counters import increment


class ClientUsage:
    """Counts for the clients that keys name.

    Args:
        registry: of the worker.
        flush_soon: has `flush` called before long, once for many changes; None to write budgets at
            once.
    """

    def __init__(
        self, registry: CollectorRegistry, flush_soon: Callable[[], None] | None = None
    ) -> None:
        self._flush_soon = flush_soon or self.flush
        self._images = Counter(
            "scumble_client_images_total",
            "Images answered with probabilities, by client.",
            ["client"],
            registry=registry,
        )
        self._refused = Counter(
            "scumble_client_refused_total",
            "Requests refused because the client's budget is spent.",
            ["client"],
            registry=registry,
        )
        self._withheld = Counter(
            "scumble_client_withheld_images_total",
            "Images whose answer the defense withheld, by client.",
            ["client"],
            registry=registry,
        )
        self._limit = Gauge(
            "scumble_client_budget_images",
            "Images that a budget allows.",
            ["client", "budget"],
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._left = Gauge(
            "scumble_client_budget_left_images",
            "Images that were left of a budget after the client's last request.",
            ["client", "budget"],
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._budgets: dict[tuple[str, str], tuple[int, int]] = {}  # not written yet
        # labels() looks a child up under a lock; a request should not.
        self._child = cache(lambda metric, *labels: metric.labels(*labels))
        self._images_of = cache(lambda client: increment(self._images.labels(client)))

    def answered(self, client: str, images: int) -> None:
        """Count images that were answered with probabilities."""
        self._images_of(client)(images)
        self._child(self._withheld, client)  # a series from the first answer on, at 0

    def withheld(self, client: str, images: int) -> None:
        """Count images whose answer was withheld; they are among those that were answered."""
        self._child(self._withheld, client).inc(images)

    def refused(self, client: str) -> None:
        """Count a request that exceeded a budget."""
        self._child(self._refused, client).inc()

    def budget(self, client: str, name: str, *, limit: int, left: int) -> None:
        """Record the limit of a budget and what is left of it."""
        self._budgets[client, name] = limit, left
        self._flush_soon()

    def flush(self) -> None:
        """Write the budgets that have changed."""
        changed, self._budgets = self._budgets, {}
        for names, (limit, left) in changed.items():
            self._child(self._limit, *names).set(limit)
            self._child(self._left, *names).set(left)
