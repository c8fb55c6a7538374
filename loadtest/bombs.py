"""Measures what expensive requests cost a worker.

    python -m loadtest.bombs                    writes loadtest/bombs.json

A real server with one worker gets each file of `loadtest/bomb_files.py`, and forms, JSON and V2
requests with many of them, none longer than 10 MiB. While a request runs, another connection sends
`/livez` to the same worker every 2 ms. The longest answer minus the median of an idle worker is a
bound on how long the event loop was blocked. The increase of the worker's peak resident memory is
what the request needed; the processor time of the loop's thread is what it took there, `/livez`
included.

Each request is sent in several rounds and the smallest of its figures counts, since other load on
the machine can only increase them. The exit code is 1 if the worst request misses a target, if any
answer is a 5xx other than 503 and 504, or if the worker dies. Linux only.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx2

from loadtest.bomb_files import FILES, MOST_BYTES, huffman_groups, jpeg, png
from scumble.evaluation.local_server import Server, serving
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
MODEL = "cifar10"
POLL_S = 0.002
TARGETS = {"hold_ms": 50.0, "livez_ms": 100.0, "memory_mib": 128.0}
DOCUMENTED = (503, 504)
INFER = f"/v2/models/{MODEL}/infer"


class Bomb(NamedTuple):
    """A request.

    Attributes:
        body: its bytes.
        path: where it goes.
        headers: its own.
    """

    body: bytes
    path: str
    headers: dict[str, str]


def raw(data: bytes) -> Bomb:
    """One file as the body."""
    kind = {b"\x89": "png", b"\xff": "jpeg", b"\x00": "avif"}.get(data[:1], "webp")
    return Bomb(data, "/v1/predict", {"Content-Type": f"image/{kind}"})


def form(*files: bytes) -> Bomb:
    """Many files in a form."""
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    body = b"".join(head + file + b"\r\n" for file in files) + b"--b--\r\n"
    return Bomb(body, "/v1/predict", {"Content-Type": "multipart/form-data; boundary=b"})


def instances(*files: bytes) -> Bomb:
    """Many files in JSON, in base64."""
    rows = [{"b64": base64.b64encode(file).decode()} for file in files]
    body = json.dumps({"instances": rows}).encode()
    return Bomb(body, "/v1/predict", {"Content-Type": "application/json"})


def v2_json(*files: bytes) -> Bomb:
    """Many files as a BYTES tensor in JSON."""
    data = [base64.b64encode(file).decode() for file in files]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(files)], "data": data}
    body = json.dumps({"inputs": [tensor]}).encode()
    return Bomb(body, INFER, {"Content-Type": "application/json"})


def v2_bytes(*files: bytes) -> Bomb:
    """Many files as a BYTES tensor in bytes."""
    data = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(files)],
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return Bomb(head + data, INFER, {**headers, "Content-Type": "application/octet-stream"})


def bombs() -> Iterator[tuple[str, Callable[[], Bomb]]]:
    """All requests, made one at a time."""
    for name, make in FILES.items():
        yield name, lambda make=make: raw(make())  # type: ignore[misc]
    full, half = png(2000, 2000, colour=6), png(500, 500, colour=6)
    scans = jpeg(500, 500, progressive=True, repeat_last_scan=27)
    groups = huffman_groups(512, 16_384)
    text, many = FILES["png-ztxt-300-mib"](), FILES["jpeg-2500-scans"]()
    stuffed = jpeg(scan_data=b"\xff\x00" * 60_000)
    one_pixel = png(1, 1)
    yield "form-30-huffman-groups-512", lambda: form(*[groups] * 30)
    sets = {
        "32-rgba-2000": [full] * 32,
        "2-rgba-2000": [full] * 2,
        "32-rgba-500": [half] * 32,
        "32-progressive-500": [scans] * 32,
        "8-huffman-groups-512": [groups] * 8,
        "10-ztxt": [text] * 10,
        "31-and-a-bomb": [half] * 31 + [many],
        "32-stuffed-scans": [stuffed] * 32,
        "32-of-one-pixel": [one_pixel] * 32,
        "32-avif-256-tiles": [FILES["avif-256-tiles"]()] * 32,
        "10-avif-long-lists": [FILES["avif-long-lists"]()] * 10,
        "empty-segments": [FILES["jpeg-62000-empty-segments"]()] * 10,
    }
    for name, files in sets.items():
        for pack in (form, instances, v2_bytes, v2_json):
            yield f"{pack.__name__}-{name}", lambda pack=pack, files=files: pack(*files)  # type: ignore[misc]


class Livez:
    """Requests `/livez` repeatedly on one connection, and keeps the times of the answers."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.answers_s: list[float] = []

    def __enter__(self) -> Livez:
        self._thread.start()
        while not self.answers_s:  # connected
            time.sleep(0.001)
        self.answers_s.clear()
        return self

    def __exit__(self, *_: object) -> None:
        enough = len(self.answers_s) + 3
        while len(self.answers_s) < enough and self._thread.is_alive():
            time.sleep(0.001)
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _ask(self) -> None:
        while not self._stop.is_set():
            start = time.perf_counter()
            self._connection.request("GET", "/livez")
            self._connection.getresponse().read()
            self.answers_s.append(time.perf_counter() - start)
            time.sleep(POLL_S)


def status_mib(pid: int, name: str) -> float:
    """A line of a process's status, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def loop_cpu_s(pid: int) -> float:
    """Processor time of a process's first thread, which runs the event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def send(server: Server, worker: int, client: httpx2.Client, bomb: Bomb) -> dict[str, float]:
    """Send one request and measure its effect on the worker."""
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # resets the peak
    before, cpu, start = status_mib(worker, "VmRSS"), loop_cpu_s(worker), time.perf_counter()
    with Livez(server.url) as livez:
        answer = client.post(bomb.path, content=bomb.body, headers=bomb.headers)
    return {
        "status": answer.status_code,
        "seconds": round(time.perf_counter() - start, 3),
        "livez_ms": round(max(livez.answers_s) * 1000, 1),
        "loop_cpu_ms": round((loop_cpu_s(worker) - cpu) * 1000, 1),
        "memory_mib": round(max(0.0, status_mib(worker, "VmHWM") - before), 1),
    }


def least(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The smallest of each figure; the status is the last one."""
    figures = {name: min(one[name] for one in rounds) for name in rounds[0]}
    return {**figures, "status": rounds[-1]["status"]}


def run(server: Server, rounds: int) -> dict[str, Any]:
    """Send all requests; returns the report.

    Raises:
        ClickException: the worker was killed, or a request of ours is too long.
    """
    (worker,) = server.workers()
    each: dict[str, dict[str, float]] = {}
    with httpx2.Client(base_url=server.url, timeout=300) as client:
        for _ in range(5):
            send(server, worker, client, form(*[png(32, 32, colour=2)] * 32))
        with Livez(server.url) as livez:
            time.sleep(2)
        idle_ms = statistics.median(livez.answers_s) * 1000
        for name, make in bombs():
            bomb = make()
            if len(bomb.body) > MOST_BYTES:
                raise click.ClickException(f"{name} has {len(bomb.body)} bytes")
            figures = least([send(server, worker, client, bomb) for _ in range(rounds)])
            figures["hold_ms"] = round(max(0.0, figures["livez_ms"] - idle_ms), 1)
            each[name] = {"bytes": len(bomb.body), **figures}
            click.echo(f"{name:32} {each[name]}")
    if server.workers() != [worker]:
        raise click.ClickException("the worker was killed")
    return {"rounds": rounds, "idle_livez_ms": round(idle_ms, 2), **summary(each)}


def summary(each: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The worst of all requests, and each."""
    worst = {}
    for figure in ("hold_ms", "livez_ms", "memory_mib", "loop_cpu_ms", "seconds"):
        name = max(each, key=lambda name: each[name][figure])
        worst[figure] = {"value": each[name][figure], "request": name}
    statuses = sorted(Counter(int(one["status"]) for one in each.values()).items())
    return {
        "requests": len(each),
        "statuses": {str(status): count for status, count in statuses},
        "worst": worst,
        "each": each,
    }


def verdict(report: dict[str, Any]) -> list[str]:
    """Everything that went wrong; empty if nothing did."""
    faults = [
        f"{figure} is {worst['value']} for {worst['request']}; allowed: {TARGETS[figure]:g}"
        for figure, worst in report["worst"].items()
        if worst["value"] > TARGETS.get(figure, math.inf)
    ]
    return faults + [
        f"status {int(one['status'])} for {name}"
        for name, one in report["each"].items()
        if one["status"] >= 500 and one["status"] not in DOCUMENTED
    ]


@click.command()
@click.option("--rounds", type=click.IntRange(1, 10), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(rounds: int, out: Path) -> None:
    """Send all requests, print the report and write it as JSON."""
    with serving(model=MODEL, workers=1) as server:
        found = run(server, rounds)
    report = {
        "command": f"python -m loadtest.bombs --rounds {rounds}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "targets": TARGETS,
        **found,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps({**report, "each": None}, indent=1))
    faults = verdict(report)
    click.echo("\n".join(faults) or "no faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
