"""What each client with a key has asked, as metrics.

The label `client` is closed like all labels: its values are the names in the file of keys, so no
stranger can add a series. Without keys there are none.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge


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

    def budget(self, client: str, name: str, *, limit: int, left: int) -> None:
        """What a budget of a client allows, and what is left of it, granted or not."""
        self._child(self._limit, client, name).set(limit)
        self._child(self._left, client, name).set(left)
