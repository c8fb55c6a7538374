"""What a request costs the processor beside the engine, over a bare HTTP server's cost.

    python -m loadtest.overhead                          writes loadtest/overhead.json
    python -m loadtest.overhead --baseline loadtest/overhead.json --out runs/overhead.json

The figure is the processor time of all processes of the service during a load, less what the engine
takes for as many images in batches of the same size, over the requests. The floor is a server of
httptools and uvloop that reads the same request and answers two bytes. `application_us` is the same
figure for requests that go through the ASGI application. Rounds take turns; a figure
is the median over the rounds, a ratio the median of each round's ratio. A baseline is only compared
with a run on the same processor.

The case `linear` is a network of one layer for 28x28 grey images, made for the run. Its engine
takes so little that an error in the engine's share does not matter.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing as mp
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import httptools
import numpy as np
import uvloop

from app.inference import engines
from app.inference.bundle import InputShape, golden_inputs, open_bundle
from app.inference.pipeline import Pipeline, fuse
from app.precision import Precision
from app.settings import default_model_dir
from app.telemetry.metrics import FLUSH_S
from loadtest.bench import picture
from loadtest.wrk import Load, load
from scumble import defenses
from scumble.evaluation.local_server import Server, children, serving
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
DCP: dict[str, Any] = {"beta": 1.2, "gamma": 0.2}
SIZES = engines.FAST  # batches whose engine time is measured; larger ones run in parts
ENGINE_S = 0.3  # for each of them
FIGURES = (
    *("batch", "whole_us", "engine_us", "beside_us", "hello_us", "over_hello"),
    *("rps", "p50_us", "p50_beside_us", "application_us"),
)
# With this header, a small image goes through the ASGI application; see `app.http.fast_path`.
TO_APPLICATION = {"X-Deadline-Ms": "60000"}
LINEAR = "linear"
SHAPE = InputShape(height=28, width=28, channels=1)


class Hello(asyncio.Protocol):
    """Answers `ok` to every request."""

    RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nok"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start parsing."""
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """A request, body included, was read."""
        self._transport.write(self.RESPONSE)  # type: ignore[attr-defined]  # of a TCP transport


def hello(listening: socket.socket) -> None:
    """Serve `Hello` until the process is ended."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Hello, sock=listening)
        await server.serve_forever()

    uvloop.run(serve())


@contextmanager
def greeting() -> Iterator[tuple[str, int]]:
    """A running `hello`: its URL and process id."""
    listening = socket.create_server(("127.0.0.1", 0))
    process = mp.get_context("spawn").Process(target=hello, args=(listening,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/", process.pid or 0
    finally:
        process.terminate()
        process.join()
        listening.close()


def make_linear(models: Path) -> None:
    """Make the bundle `linear` in a folder."""
    import torch

    from scumble.training.bundle_export import export_bundle

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10))
    card = {
        "name": LINEAR,
        "version": "1",
        "labels": [str(k) for k in range(10)],
        "preprocessing": {},
        "training": {"command": "python -m loadtest.overhead", "weights": "random"},
        "data_licence": "",
    }
    export_bundle(network.eval(), models / LINEAR, SHAPE, card)


def engine_us(
    models: Path, model: str, precision: Precision, defense: str, seconds: float
) -> dict[int, float]:
    """Processor microseconds of an image in the engine, defense included, by batch size."""
    bundle = open_bundle(models, model)
    engine_name = engines.resolve("auto", precision)
    onnx, examples = bundle.onnx(precision), golden_inputs(bundle.card.input)
    make = partial(engines.load, engine_name, threads=1, precision=precision)
    defended = Pipeline(make(onnx), defenses.configure(defense, DCP if defense == "dcp" else {}))
    pipeline = fuse(defended, make, onnx, examples)
    pipeline.prepare(SIZES)
    found = {}
    for size in SIZES:
        batch = np.concatenate([examples] * math.ceil(size / len(examples)))[:size]
        pipeline(batch)
        images, start, until = 0, time.process_time(), time.perf_counter() + seconds
        while time.perf_counter() < until:
            pipeline(batch)
            images += size
        found[size] = 1e6 * (time.process_time() - start) / images
    return found


def at_size(by_size: dict[int, float], size: float) -> float:
    """The engine's figure for a mean batch size that need not be whole."""
    sizes = sorted(by_size)
    return float(np.interp(size, sizes, [by_size[s] for s in sizes]))


def processor_s(pid: int) -> float:
    """Seconds that a process and its descendants have run so far, in all their threads."""
    own = sum(map(_ran_ns, Path(f"/proc/{pid}/task").iterdir()))
    return own / 1e9 + sum(map(processor_s, children(pid)))


def _ran_ns(thread: Path) -> int:
    """Nanoseconds that a thread has run; 0 of one that ends meanwhile."""
    try:
        return int((thread / "schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def spent(pid: int, url: str, **words: Any) -> tuple[Load, float]:
    """A load, and the processor microseconds of a process and its descendants for each request."""
    before = processor_s(pid)
    done = load(url, **words)
    return done, 1e6 * (processor_s(pid) - before) / max(1, done.requests)


def batches(server: Server) -> tuple[float, float]:
    """Images and batches so far."""
    time.sleep(4 * FLUSH_S)
    found = server.metrics()
    return found["scumble_batch_size_sum"], found["scumble_batch_size_count"]


def beside(
    server: Server, in_engine: dict[int, float], **words: Any
) -> tuple[Load, float, float, float]:
    """A load, its mean batch, and microseconds of a request: all of it, and in the engine."""
    images, counted = batches(server)
    done, whole = spent(server.process.pid, f"{server.url}/v1/predict", **words)
    more_images, more_counted = batches(server)
    size = (more_images - images) / max(1.0, more_counted - counted)
    return done, size, whole, at_size(in_engine, size)


def compare(
    models: Path, model: str, precision: Precision, defense: str, connections: list[int],
    rounds: int, seconds: int,
) -> dict[str, Any]:  # fmt: skip
    """One network: service, engine and bare server, by turns."""
    body, kind = picture(open_bundle(models, model).card)
    asked = {"body": body, "content_type": kind}
    figures: dict[str, list[float]] = {}
    errors = 0
    settings = {"defense": defense, "defense_params": DCP if defense == "dcp" else {}}
    place = {"model": model, "model_dir": models, "precision": precision}
    with greeting() as (url, pid), serving(**place, **settings, workers=1) as server:
        for count in connections:  # the forms for its batch sizes are compiled meanwhile
            load(f"{server.url}/v1/predict", **asked, connections=count, seconds=1)  # type: ignore[arg-type]
        for number in range(rounds):
            in_engine = in_process(engine_us, models, model, precision, defense, ENGINE_S)
            for count in connections:
                words = {**asked, "connections": count, "seconds": seconds, "warmup": 0}
                done, size, whole, share = beside(server, in_engine, **words)
                bare, floor = spent(pid, url, **words)
                other, _, application, its_share = beside(
                    server, in_engine, headers=TO_APPLICATION, **words
                )
                errors += done.errors + bare.errors + other.errors
                p50_us = 1e3 * done.p50_ms
                row = (
                    *(size, whole, share, whole - share, floor, (whole - share) / floor),
                    *(done.rps, p50_us, p50_us - in_engine[1], application - its_share),
                )
                for name, value in zip(FIGURES, row, strict=True):
                    figures.setdefault(f"{count} {name}", []).append(value)
            click.echo(f"{model} {precision} {defense}: round {number + 1} of {rounds}")
    return {
        "model": model,
        "precision": precision,
        "defense": defense,
        "body": f"{kind}, {len(body)} bytes",
        "errors": errors,
        "connections": {
            str(count): {
                name: round(statistics.median(figures[f"{count} {name}"]), 2) for name in FIGURES
            }
            for count in connections
        },
    }


def in_process(function: Any, *args: Any) -> Any:
    """The result of a function in a process of its own, which has the memory of a new one."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def worse(document: dict[str, Any], baseline: dict[str, Any], tolerance: float) -> list[str]:
    """Ratios over the bare server that grew by more than `tolerance`, on the same processor.

    Raises:
        click.ClickException: the baseline has no figures of this processor.
    """
    name = document["processor"]
    if baseline["processor"] != name:
        raise click.ClickException(
            f"the baseline is of {baseline['processor']!r}, this machine has {name!r}"
        )
    before = {(c["model"], c["precision"], c["defense"]): c for c in baseline["cases"]}
    found = []
    for case in document["cases"]:
        old = before.get((case["model"], case["precision"], case["defense"]))
        if old is None:
            continue
        for count, row in case["connections"].items():
            was, now = old["connections"].get(count, {}).get("over_hello"), row["over_hello"]
            if was and now / was - 1 > tolerance:
                found.append(f"{case['model']} {case['precision']}, c={count}: {was} -> {now}")
    return found


@click.command()
@click.option("--cases", default="linear:float32", show_default=True)
@click.option("--defense", default="dcp", show_default=True)
@click.option("--connections", default="1,8,64", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2, show_default=True, help="Of each measurement.")
@click.option("--baseline", type=click.Path(exists=True, path_type=Path))
@click.option("--tolerance", default=0.10, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(
    cases: str,
    defense: str,
    connections: str,
    rounds: int,
    seconds: int,
    baseline: Path | None,
    tolerance: float,
    out: Path,
) -> None:
    """Measure, print, write JSON, and compare with a baseline if there is one."""
    counts = [int(count) for count in connections.split(",")]
    pairs: list[Any] = [case.split(":") for case in cases.split(",")]
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for model, precision in pairs:
            models = default_model_dir()
            if model == LINEAR:
                models = Path(folder)
                in_process(make_linear, models)
            measured.append(compare(models, model, precision, defense, counts, rounds, seconds))
    document = {
        "command": f"python -m loadtest.overhead --cases {cases} --defense {defense} "
        f"--connections {connections} --rounds {rounds} --seconds {seconds}",
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "cases": measured,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    for case in measured:
        click.echo(json.dumps(case["connections"], indent=1))
    if baseline and (found := worse(document, json.loads(baseline.read_text()), tolerance)):
        raise click.ClickException("worse than the baseline:\n" + "\n".join(found))


if __name__ == "__main__":
    main()
