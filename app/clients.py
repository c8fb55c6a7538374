"""What each client with a key has asked, as metrics.

The label `client` is closed like all labels: its values are the names in the file of keys, so no
stranger can add a series. Without keys there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge

from app.quota import by_client
from app.stores import Bucket, Charge


class Clients:
    """Counts for the clients that keys name."""

    def __init__(self, registry: CollectorRegistry) -> None:
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
        # labels() looks a child up under a lock; a request should not.
        self._child = cache(lambda metric, *labels: metric.labels(*labels))

    def answered(self, client: str, images: int) -> None:
        """A client got the probabilities of so many images."""
        self._child(self._images, client).inc(images)

    def refused(self, client: str) -> None:
        """A budget had no room for a client's request."""
        self._child(self._refused, client).inc()

    def charged(self, client: str, buckets: Sequence[Bucket], charge: Charge) -> None:
        """What is left of a client's budgets, granted or not."""
        for name, bucket, left in by_client(buckets, charge):
            # Keys of one client may have windows of different lengths: each is its own series.
            budget = f"{name}_{bucket.window_s}s" if bucket.window_s else name
            self._child(self._limit, client, budget).set(bucket.limit)
            self._child(self._left, client, budget).set(left)
