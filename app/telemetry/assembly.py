"""Metrics and traces as the settings ask for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from app.errors import ConfigError
from app.settings import Settings, collector
from app.system.installation import install_command
from app.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from app.telemetry.tracing import Tracing

OTEL_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
log = logging.getLogger("scumble")


def make_metrics(model: Mapping[str, str]) -> Metrics:
    """Make the metrics of a worker.

    Args:
        model: the labels of `scumble_model_info`.
    """
    metrics = Metrics(CollectorRegistry())
    metrics.model_info.labels(**model).set(1)
    return metrics


def make_tracing(settings: Settings, environ: Mapping[str, str]) -> Tracing | None:
    """Make the exporter of spans; None if neither settings nor `OTEL_*` name a collector.

    Raises:
        ConfigError: the settings name a collector and the extra `otel` is not installed.
    """
    named = settings.otel_endpoint is not None
    if not named and not any(environ.get(name) for name in OTEL_ENDPOINTS):
        return None
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    for name in () if named else OTEL_ENDPOINTS:
        try:
            collector(environ.get(name) or "http://localhost")
        except ValueError as exc:  # the exporter would log parts of it
            log.warning("no traces: %s: %s", name, exc)
            return None
    try:
        from app.telemetry.tracing import Tracing, exporting
    except ImportError as exc:
        sentence = f"no traces: {exc}; install it with: {install_command('otel')}"
        if named:
            raise ConfigError(sentence) from exc
        log.warning("%s", sentence)  # a platform may set OTEL_* for everything that runs on it
        return None
    return Tracing(exporting(settings.otel_endpoint))
