"""Measures Scumble in front of another server of the V2 protocol, in one run.

The other server is a Scumble without a defense, with one worker, or the one at `--upstream`. wrk
asks both with the same batches, and rounds alternate between them, so that other load on the
machine affects both. All share the cores. `--kill` then ends the other server again and again under
load, and checks every answer.

    python -m loadtest.upstream               writes loadtest/upstream.json
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import httpx2
import numpy as np

from app.inference.bundle import golden_inputs, open_bundle
from app.settings import default_model_dir
from loadtest import wrk
from loadtest.latency import resident_mb
from scumble.evaluation.local_server import Server, serving, start
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
MODEL, PRECISION = "cifar10", "int8"
BATCHES = (1, 8, 32)
FRONT = "front"
CLIENTS = 4  # of the kill test


def request(images: int) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a binary V2 request."""
    pixels = golden_inputs(open_bundle(default_model_dir(), MODEL).card.input)
    batch = np.resize(pixels, (images, *pixels.shape[1:]))
    tensor = {
        "name": "pixels",
        "datatype": "UINT8",
        "shape": list(batch.shape),
        "parameters": {"binary_data_size": batch.nbytes},
    }
    output = {"name": "probabilities", "parameters": {"binary_data": True}}
    header = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
    return header + batch.tobytes(), {"Inference-Header-Content-Length": str(len(header))}


def connect(url: str, models: Path) -> dict[str, Any]:
    """Describe the model of a server; gives the settings of a service in front of it."""
    words = ["connect", url, "--name", FRONT, "--models", str(models), "--input", "pixels"]
    command = [sys.executable, "-m", "scumble.cli", *words, "--datatype", "UINT8"]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603  # our own command
    settings = {"model_dir": models, "model": FRONT, "engine": "upstream", "upstream": url}
    return {**settings, "workers": 1, "console": False}


def behind(port: int) -> Server:
    """Start the other server; does not wait."""
    common = {"model": MODEL, "precision": PRECISION, "workers": 1, "console": False}
    return start({**common, "port": port}, new_session=True)


def pss_mb(server: Server) -> float:
    """Memory of the largest worker, with shared pages divided among those that share them."""
    found = []
    for pid in server.workers():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found += [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    return round(max(found) / 1024, 1)


def compare(
    direct: str, front: str, images: int, connections: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """One case: the figures of both servers, and the median of the rounds' ratios."""
    body, headers = request(images)
    urls = {"alone": direct, "front": f"{front}/v2/models/{FRONT}"}
    found: dict[str, list[wrk.Load]] = {name: [] for name in urls}
    for number in range(rounds):
        for name in list(urls)[:: 1 if number % 2 else -1]:
            found[name].append(
                wrk.load(
                    f"{urls[name]}/infer",
                    body=body,
                    content_type="application/octet-stream",
                    connections=connections,
                    seconds=seconds,
                    headers=headers,
                )
            )
    pairs = list(zip(found["front"], found["alone"], strict=True))
    return {
        "images": images,
        "connections": connections,
        "images_per_s": {
            name: round(images * statistics.median(load.rps for load in loads), 1)
            for name, loads in found.items()
        },
        "p99_ms": {
            name: round(statistics.median(load.p99_ms for load in loads), 2)
            for name, loads in found.items()
        },
        "errors": {name: sum(load.errors for load in loads) for name, loads in found.items()},
        "throughput_ratio": round(statistics.median(f.rps / a.rps for f, a in pairs), 3),
        "p99_ratio": round(statistics.median(f.p99_ms / a.p99_ms for f, a in pairs), 3),
    }


def kill_test(
    settings: dict[str, Any], other: Server, port: int, seconds: float, every_s: float
) -> dict[str, Any]:
    """Load while the other server is killed and started again; what clients got."""
    body, headers = request(1)
    ending = threading.Event()
    answers: list[tuple[float, int, str | None, bytes]] = []
    given = {**settings, "defense": "label"}

    def load(url: str) -> None:
        with httpx2.Client(timeout=60, trust_env=False) as client:
            while not ending.is_set():
                got = client.post(f"{url}/v2/models/{FRONT}/infer", content=body, headers=headers)
                row = got.content[int(got.headers.get("inference-header-content-length", 0)) :]
                answers.append(
                    (time.perf_counter(), got.status_code, got.headers.get("retry-after"), row)
                )

    recovered: list[float] = []
    with serving(**given) as front:
        clients = [threading.Thread(target=load, args=(front.url,)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            time.sleep(every_s)
            os.killpg(other.process.pid, signal.SIGKILL)
            other.wait()
            other = behind(port)
            other.wait_ready()
            ready = time.perf_counter()
            while not any(at > ready and status == 200 for at, status, *_ in answers[-20:]):
                time.sleep(0.02)
            recovered.append(min(a[0] for a in answers if a[0] > ready and a[1] == 200) - ready)
        ending.set()
        for client in clients:
            client.join()
    with suppress(ProcessLookupError):
        os.killpg(other.process.pid, signal.SIGTERM)
    other.wait()
    good = [row for _, status, _, row in answers if status == 200]
    rows = [np.frombuffer(row, "<f4") for row in good]
    refused = [(status, retry) for _, status, retry, _ in answers if status != 200]
    return {
        "seconds": seconds,
        "kills": len(recovered),
        "answered": len(good),
        "refused": {str(s): [r[0] for r in refused].count(s) for s in {r[0] for r in refused}},
        "undocumented": sum(
            not (status == 504 or (status == 503 and retry)) for status, retry in refused
        ),
        "wrong": sum(row != good[0] for row in good),
        "undefended": sum(sorted(row.tolist())[-2:] != [0.0, 1.0] for row in rows),
        "recovery_s": {"median": statistics.median(recovered), "longest": max(recovered)},
    }


@click.command()
@click.option("--upstream", help="URL of the model on another server, instead of our own.")
@click.option("--connections", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Of each round.")
@click.option("--starts", default=3, show_default=True, help="Of the service, to time them.")
@click.option("--kill", default=0.0, show_default=True, help="Seconds of the kill test; 0: none.")
@click.option("--every", default=60.0, show_default=True, help="Seconds between two kills.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(
    upstream: str | None,
    connections: int,
    rounds: int,
    seconds: float,
    starts: int,
    kill: float,
    every: float,
    out: Path,
) -> None:
    """Measure, print and write JSON."""
    with ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        other, port = None, 0
        if upstream is None:
            other = behind(0)
            other.wait_ready()
            port = urlsplit(other.url).port or 0
            upstream = f"{other.url}/v2/models/{MODEL}"
        settings = connect(upstream, models)
        ready = []
        for _ in range(starts):
            with serving(**settings) as front:
                ready.append(front.ready_s)
        with serving(**settings) as front:
            cases = [
                compare(upstream, front.url, images, connections, rounds, seconds)
                for images in BATCHES
            ]
            memory = {"resident": resident_mb(front), "pss": pss_mb(front)}
        killed = None
        if other is not None and kill:
            killed = kill_test(settings, other, port, kill, every)
        elif other is not None:
            other.stop()
    packages = ("aiohttp", "fastapi", "uvicorn", "numpy", "openvino")
    document = {
        "command": f"python -m loadtest.upstream --connections {connections} --rounds {rounds} "
        f"--seconds {seconds:g} --starts {starts} --kill {kill:g} --every {every:g}",
        "upstream": "Scumble without a defense, one worker" if other else "of the user",
        "model": f"{MODEL} {PRECISION}",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "worker_mb": memory,
        "process_start_to_ready_s": round(statistics.median(ready), 2),
        "cases": cases,
        "kill": killed,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
