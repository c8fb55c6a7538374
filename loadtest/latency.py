"""Measures the latency of single requests with and without a defense, in one run.

Servers with and without the defense run side by side, and rounds alternate between them, so that
other load on the machine affects both. Several pairs of servers are started, as two processes of
the same program differ by a few percent. A round's figure is the median over its requests, the
result the median over all rounds. The client is a plain socket on a kept-alive connection.

    python loadtest/latency.py            writes loadtest/latency.json
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import click
import numpy as np

from app.inference.bundle import golden_inputs, open_bundle
from app.settings import default_model_dir
from scumble.client.wire import encode
from scumble.evaluation.local_server import Server, serving
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
DCP = {"defense": "dcp", "defense_params": {"beta": 1.2, "gamma": 0.2}}
CASES = [("mnist", "int8"), ("cifar10", "int8"), ("cifar10", "float32")]


class Connection:
    """One kept-alive connection that sends the same prediction request repeatedly."""

    def __init__(self, url: str, image: bytes) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = (
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            b"Content-Length: %d\r\n\r\n" % len(image)
        ) + image

    def seconds(self) -> float:
        """Duration of one request, from the first byte sent to the last byte received."""
        start = time.perf_counter()
        self._socket.sendall(self._request)
        answer = self._socket.recv(65536)
        head, _, body = answer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
        while len(body) < length:
            body += self._socket.recv(65536)
        elapsed = time.perf_counter() - start
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server refused: {answer!r}")
        return elapsed

    def quantiles(self, requests: int) -> tuple[float, float]:
        """Median and 99th percentile of `requests` requests, in ms."""
        seconds = [self.seconds() for _ in range(requests)]
        return float(np.median(seconds)) * 1e3, float(np.quantile(seconds, 0.99)) * 1e3


def compare(
    model: str, precision: str, pairs: int, rounds: int, requests: int
) -> dict[str, object]:
    """Measure one case: p50 and p99 with and without the defense, and their ratio."""
    card = open_bundle(default_model_dir(), model).card
    image, _ = encode(golden_inputs(card.input)[1])
    common = {"model": model, "precision": precision, "workers": 1}
    found: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    memory: list[float] = []
    ready: list[float] = []
    for _ in range(pairs):
        with serving(**common) as off, serving(**common, **DCP) as on:
            clients = {"off": Connection(off.url, image), "on": Connection(on.url, image)}
            for client in clients.values():
                client.quantiles(requests)  # warm-up
            for number in range(rounds):
                for name in ("off", "on") if number % 2 else ("on", "off"):
                    found[name].append(clients[name].quantiles(requests))
            memory.append(resident_mb(on))
            ready.append(on.ready_s)
    p50 = {name: [q[0] for q in quantiles] for name, quantiles in found.items()}
    p99 = {name: [q[1] for q in quantiles] for name, quantiles in found.items()}
    ratios = [on / off for on, off in zip(p50["on"], p50["off"], strict=True)]
    return {
        "model": model,
        "precision": precision,
        "p50_ms": {name: round(statistics.median(v), 3) for name, v in p50.items()},
        "p99_ms": {name: round(statistics.median(v), 3) for name, v in p99.items()},
        "dcp_over_none_p50": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        "worker_resident_mb": max(memory),
        "process_start_to_ready_s": round(statistics.median(ready), 2),
    }


def resident_mb(server: Server) -> float:
    """Memory of the largest worker."""
    samples = server.metrics().items()
    return round(
        max(v for k, v in samples if k.startswith("scumble_worker_resident_bytes")) / 2**20, 1
    )


@click.command()
@click.option("--pairs", default=5, show_default=True, help="Of servers, one after the other.")
@click.option("--rounds", default=10, show_default=True, help="With each pair.")
@click.option("--requests", default=300, show_default=True, help="In each round.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(pairs: int, rounds: int, requests: int, out: Path) -> None:
    """Measure, print and write JSON."""
    cases = []
    for model, precision in CASES:
        cases.append(compare(model, precision, pairs, rounds, requests))
        click.echo(json.dumps(cases[-1]))
    packages = ("openvino", "onnxruntime", "fastapi", "uvicorn", "numpy")
    document = {
        "command": "python loadtest/latency.py "
        f"--pairs {pairs} --rounds {rounds} --requests {requests}",
        "defense": DCP,
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "cases": cases,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
