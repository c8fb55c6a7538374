"""The workers' metrics as one small document: totals since the start; the page computes rates."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from app.telemetry.metrics import BATCH, STAGE_SECONDS, STAGES

CLASSES = ("2xx", "3xx", "4xx", "5xx")


def by_client(families: Iterable[Metric]) -> list[dict[str, Any]]:
    """What each client with a key has received, the one with the most images first.

    Args:
        families: all metrics of the admin port.
    """
    found: dict[str, dict[str, Any]] = {}
    for family in families:
        for sample in family.samples:
            name = sample.labels.get("client")
            if name is None:
                continue
            row = found.setdefault(
                name,
                {"name": name, "images": 0, "withheld": 0, "refused": 0, "limits": {}, "left": {}},
            )
            value, budget = int(sample.value), sample.labels.get("budget")
            match sample.name:
                case "scumble_client_images_total":
                    row["images"] = value
                case "scumble_client_withheld_images_total":
                    row["withheld"] = value
                case "scumble_client_refused_total":
                    row["refused"] = value
                case "scumble_client_budget_images":
                    row["limits"][budget] = value
                case "scumble_client_budget_left_images":
                    row["left"][budget] = value
    return sorted(found.values(), key=lambda row: (-row["images"], row["name"]))


def numbers(families: Iterable[Metric], connections: dict[int, int], pids: dict[int, int]) -> Any:
    """The document for the page.

    Args:
        families: all metrics of the admin port.
        connections: open ones, by worker number.
        pids: by worker number.
    """
    samples: dict[str, list[Sample]] = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return {
        "time": time.monotonic(),
        "requests": _by_class(samples.get("scumble_requests_total", [])),
        "images": _total(samples, "scumble_images_total"),
        "defended": _total(samples, "scumble_defended_rows_total"),
        "queue_depth": _total(samples, "scumble_queue_depth"),
        "inflight": _total(samples, "scumble_inflight"),
        "l1": {
            "count": _total(samples, "scumble_response_l1_count"),
            "sum": _total(samples, "scumble_response_l1_sum"),
        },
        "batch": _histogram(samples, "scumble_batch_size", BATCH),
        "stages": {
            stage: _histogram(samples, "scumble_stage_seconds", STAGE_SECONDS, stage=stage)
            for stage in STAGES
        },
        "workers": [
            {
                "worker": number,
                "pid": pid,
                "memory": _total(samples, "scumble_worker_resident_bytes", worker=str(number)),
                "cpu": _total(samples, "scumble_worker_cpu_seconds_total", worker=str(number)),
                "connections": connections.get(number),
            }
            for number, pid in pids.items()
        ],
    }


def _by_class(samples: list[Sample]) -> dict[str, float]:
    found = dict.fromkeys(CLASSES, 0.0)
    for sample in samples:
        found[f"{sample.labels['code'][0]}xx"] += sample.value
    return found


def _histogram(
    samples: dict[str, list[Sample]], name: str, bounds: tuple[float, ...], **labels: str
) -> dict[str, Any]:
    """Count, sum, upper bounds and how many observations are at or below each."""
    counted = {
        float(sample.labels["le"]): sample.value
        for sample in samples.get(f"{name}_bucket", [])
        if _has(sample, labels)
    }
    return {
        "count": _total(samples, f"{name}_count", **labels),
        "sum": _total(samples, f"{name}_sum", **labels),
        "bounds": bounds,
        "below": [counted.get(float(bound), 0.0) for bound in bounds],
    }


def _total(samples: dict[str, list[Sample]], name: str, **labels: str) -> float:
    return sum(sample.value for sample in samples.get(name, []) if _has(sample, labels))


def _has(sample: Sample, labels: dict[str, str]) -> bool:
    return all(sample.labels[name] == value for name, value in labels.items())
