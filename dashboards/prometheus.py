"""A real Prometheus on loopback that evaluates the dashboards' expressions."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

PROGRAM = shutil.which("prometheus")
LISTENS = re.compile(r'"Listening on" address=(\S+)')
LIMIT_S = 30
GRAFANA_FILLS_IN = {"$job": ".+", "$__rate_interval": "1m"}


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """Series of an instant query."""
        return self._query("query", query=expr)

    def ask_range(self, expr: str, start: float, end: float, step_s: int) -> list[dict[str, Any]]:
        """Series of a range query; times are seconds of the epoch."""
        return self._query("query_range", query=expr, start=start, end=end, step=step_s)

    def _query(self, kind: str, **params: str | float) -> list[dict[str, Any]]:
        answer = httpx2.get(f"{self.url}/api/v1/{kind}", params=params, trust_env=False).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        series: list[dict[str, Any]] = answer["data"]["result"]
        return series


@contextmanager
def running(config: str, folder: Path) -> Iterator[Prometheus]:
    """Start Prometheus with this configuration on a free port; data and log go into `folder`.

    Raises:
        RuntimeError: it did not start; the message has its log.
    """
    (folder / "prometheus.yml").write_text(config)
    log = folder / "log"
    with log.open("w") as written:
        process = subprocess.Popen(  # noqa: S603  # the Prometheus on the path
            [
                PROGRAM or "prometheus",
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=data",
                "--web.listen-address=127.0.0.1:0",
            ],
            cwd=folder,
            stderr=written,
        )
    try:
        end = time.monotonic() + LIMIT_S
        while not (found := LISTENS.search(log.read_text())) or not _ready(found[1]):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Prometheus did not start: {log.read_text()}")
            time.sleep(0.1)
        yield Prometheus(f"http://{found[1]}")
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def _ready(address: str) -> bool:
    """Whether it answers queries: it listens before its storage is there."""
    return httpx2.get(f"http://{address}/-/ready", trust_env=False).status_code == 200


def filled_in(expr: str, rate_interval: str = GRAFANA_FILLS_IN["$__rate_interval"]) -> str:
    """An expression of a dashboard with values for Grafana's variables."""
    for name, value in {**GRAFANA_FILLS_IN, "$__rate_interval": rate_interval}.items():
        expr = expr.replace(name, value)
    return expr
