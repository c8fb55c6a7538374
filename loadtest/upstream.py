"""Measures Scumble in front of another server of the V2 protocol, in one run.

The other server is a Scumble without a defense, with one worker; NVIDIA Triton, through PyTriton
(`--server triton`, with the Python of runs/upstreams/triton); or the one at `--upstream`. wrk asks
both with the same batches, and rounds alternate between them, so that other load on the machine
affects both. All share the cores. Before Triton, image files are measured as well: Scumble decodes
them and asks Triton, or Triton's own Python code decodes them. `--kill` then ends the other server
again and again under load, and checks every answer.

    python -m loadtest.upstream                    writes loadtest/upstream.json
    python -m loadtest.upstream --server triton    writes loadtest/upstream-triton.json
    python -m loadtest.upstream --server triton --rounds 0 --kill 600 --out FILE    the kills alone
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import httpx2
import numpy as np

from app.inference.bundle import golden_inputs, open_bundle
from app.settings import default_model_dir
from loadtest import wrk
from loadtest.latency import resident_mb
from loadtest.peers.classifier import ROOT
from loadtest.peers.processes import Running, running
from loadtest.peers.run import Post, free_ports
from scumble.client.wire import encode
from scumble.evaluation.local_server import Server, serving, variables, without_settings
from scumble.machine import processor

MODEL, PRECISION = "cifar10", "int8"
BATCHES = (1, 8, 32)
FRONT = "front"
CLIENTS = 4  # of the kill test
WAITING = 256  # images of all connections together
READY_S = 120.0
NAMES = {
    "scumble": "Scumble without a defense, one worker",
    "triton": "NVIDIA Triton (PyTriton), one instance with ONNX Runtime",
}
TRITON = ROOT / "runs" / "upstreams" / "triton" / "bin" / "python"


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


class Other:
    """The other server, which can be killed and started again at its place.

    Args:
        name: `scumble` or `triton`.
        folder: for its log.
    """

    def __init__(self, name: str, folder: Path) -> None:
        ports = free_ports(3)
        self.base = f"http://127.0.0.1:{ports[0]}"
        self.url = f"{self.base}/v2/models/{MODEL}"
        self._models = [MODEL, f"{MODEL}-files"] if name == "triton" else [MODEL]
        self._log = folder / f"{name}.log"
        env = without_settings(os.environ)
        if name == "triton":
            script = ROOT / "deploy" / "upstreams" / "serve_triton.py"
            onnx = ROOT / "models" / MODEL / f"{PRECISION}.onnx"
            listed = ",".join(map(str, ports))
            self._command = [str(TRITON), str(script), str(onnx), "--ports", listed]
            library = sysconfig.get_config_var("LIBDIR")  # its backend loads the libpython there
            self._env = env | {"LD_LIBRARY_PATH": str(library)}
        else:
            common = {"model": MODEL, "precision": PRECISION, "workers": 1, "console": False}
            own = variables({**common, "port": ports[0], "admin_port": ports[1]})
            self._command = [sys.executable, "-m", "scumble.cli", "serve"]
            self._env = env | {"PYTHONPATH": str(ROOT)} | own
        self._stack = ExitStack()
        self._running: Running

    def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            RuntimeError: it ended, or took too long; the message has the end of its log.
        """
        self._running = self._stack.enter_context(running(self._command, self._env, self._log))
        end = time.perf_counter() + READY_S
        while not self._ready():
            if self._running.leader.poll() is not None or time.perf_counter() > end:
                raise RuntimeError(f"not ready: {self._running.last_words()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        for process in self._running.alive():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """End it."""
        self._stack.pop_all().close()

    def _ready(self) -> bool:
        urls = [f"{self.base}/v2/models/{model}/ready" for model in self._models]
        try:
            answers = [httpx2.get(url, timeout=2, trust_env=False) for url in urls]
        except httpx2.TransportError:
            return False
        return all(answer.status_code == 200 for answer in answers)


def pss_mb(server: Server) -> float:
    """Memory of the largest worker, with shared pages divided among those that share them."""
    found = []
    for pid in server.workers():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found += [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    return round(max(found) / 1024, 1)


def compare(
    urls: dict[str, str],
    posts: dict[str, Post],
    images: int,
    connections: int,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """One case: the figures of both servers, and the median of the rounds' ratios."""
    found: dict[str, list[wrk.Load]] = {name: [] for name in urls}
    for number in range(rounds):
        for name in list(urls)[:: 1 if number % 2 else -1]:
            post = posts[name]
            found[name].append(
                wrk.load(
                    urls[name] + post.path,
                    body=post.body,
                    content_type=post.content_type,
                    connections=connections,
                    seconds=seconds,
                    headers=post.headers,
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


def tensors(images: int) -> dict[str, Post]:
    """The same batch for both servers."""
    body, headers = request(images)
    return {
        name: Post(f"/v2/models/{model}/infer", body, "application/octet-stream", headers)
        for name, model in (("alone", MODEL), ("front", FRONT))
    }


def files() -> dict[str, Post]:
    """An image file, which Triton's own Python code decodes, or Scumble."""
    pixels = golden_inputs(open_bundle(default_model_dir(), MODEL).card.input)
    png = encode(pixels[0])[0]
    raw = {"Inference-Header-Content-Length": "0"}
    return {
        "alone": Post(f"/v2/models/{MODEL}-files/infer", png, "application/octet-stream", raw),
        "front": Post("/v1/predict", png, "image/png"),
    }


def kill_test(
    settings: dict[str, Any], other: Other, seconds: float, every_s: float
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
            other.kill()
            other.start()
            ready = time.perf_counter()
            while not any(at > ready and status == 200 for at, status, *_ in answers[-20:]):
                time.sleep(0.02)
            recovered.append(min(a[0] for a in answers if a[0] > ready and a[1] == 200) - ready)
        ending.set()
        for client in clients:
            client.join()
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
@click.option("--server", type=click.Choice(["scumble", "triton"]), default="scumble")
@click.option("--upstream", help="URL of the model on another server, instead of --server.")
@click.option("--connections", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="0: the kill test alone.")
@click.option("--seconds", default=3.0, show_default=True, help="Of each round.")
@click.option("--starts", default=3, show_default=True, help="Of the service, to time them.")
@click.option("--kill", default=0.0, show_default=True, help="Seconds of the kill test; 0: none.")
@click.option("--every", default=60.0, show_default=True, help="Seconds between two kills.")
@click.option("--out", type=click.Path(path_type=Path), help="[default: beside this script]")
def main(
    server: str,
    upstream: str | None,
    connections: int,
    rounds: int,
    seconds: float,
    starts: int,
    kill: float,
    every: float,
    out: Path | None,
) -> None:
    """Measure, print and write JSON."""
    if upstream is None and server == "triton" and not TRITON.exists():
        raise click.ClickException(f"no {TRITON}: see deploy/upstreams/serve_triton.py")
    suffix = "" if server == "scumble" else f"-{server}"
    out = out or Path(__file__).with_name(f"upstream{suffix}.json")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        other = None
        if upstream is None:
            other = Other(server, folder)
            stack.callback(other.stop)
            other.start()
            upstream = other.url
        settings = connect(upstream, folder)
        ready = []
        for _ in range(starts):
            with serving(**settings) as front:
                ready.append(front.ready_s)
        with serving(**settings) as front:

            def load(urls: dict[str, str], posts: dict[str, Post], images: int) -> dict[str, Any]:
                # More would wait longer than a round lasts.
                clients = min(connections, WAITING // images)
                return compare(urls, posts, images, clients, rounds, seconds)

            urls = {"alone": upstream.partition("/v2/")[0], "front": front.url}
            cases = [load(urls, tensors(images), images) for images in BATCHES if rounds]
            pictures = load(urls, files(), 1) if server == "triton" and other and rounds else None
            memory = {"resident": resident_mb(front), "pss": pss_mb(front)}
        killed = kill_test(settings, other, kill, every) if other is not None and kill else None
    packages = ("aiohttp", "fastapi", "uvicorn", "numpy", "openvino")
    document = {
        "command": f"python -m loadtest.upstream --server {server} --connections {connections} "
        f"--rounds {rounds} --seconds {seconds:g} --starts {starts} --kill {kill:g} "
        f"--every {every:g}",
        "upstream": NAMES[server] if other else "of the user",
        "model": f"{MODEL} {PRECISION}",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "worker_mb": memory,
        "process_start_to_ready_s": round(statistics.median(ready), 2),
        "cases": cases,
        "files": pictures,
        "kill": killed,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
