"""Metrics of the supervisor: restarts, reloads, refused connections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.errors import REASONS

End = Literal["ended", "hung"]
Reload = Literal["done", "failed"]
Refusal = Literal["limit", "descriptors", "aborted"]


class Incidents(Collector):
    """The counters, in this process only."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        restarts = Counter(
            "scumble_worker_restarts_total",
            "Workers that were replaced because they ended or hung.",
            ["reason"],
            registry=self._registry,
        )
        reloads = Counter(
            "scumble_reloads_total", "Reloads of the model.", ["result"], registry=self._registry
        )
        refused = Counter(
            "scumble_connections_refused_total",
            "Connections to the public port that no worker took.",
            ["reason"],
            registry=self._registry,
        )
        rejections = Counter(
            "scumble_admin_rejections_total",
            "Requests to the admin port that its connections refused.",
            ["reason"],
            registry=self._registry,
        )
        self.admin_rejections = {reason: rejections.labels(reason) for reason in REASONS}
        self.connections = {reason: refused.labels(reason) for reason in get_args(Refusal)}
        self.reloads = {result: reloads.labels(result) for result in get_args(Reload)}
        self.restarts = {reason: restarts.labels(reason) for reason in get_args(End)}

    def collect(self) -> Iterable[Metric]:
        """What prometheus_client asks for."""
        return self._registry.collect()
