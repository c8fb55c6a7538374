"""Ways to do a part of a request that were tried and are not used, beside what is used.

    python -m loadtest.alternatives          writes loadtest/alternatives.json

Each pair does the same work in one process. Its halves take turns; a figure is the least processor
time of the rounds, in microseconds. The network is that of one layer of
`loadtest.overhead`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import openvino as ov
import orjson

from app.inference.bundle import open_bundle
from app.inference.engines.openvino import Form
from loadtest.overhead import LINEAR, in_process, make_linear
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
IMAGES = 16
LARGE = 512
REPEATS = 50  # of a half in one round
Work = Callable[[], object]


def _nowhere() -> float:
    return 0.0


@dataclass(frozen=True)
class Pair:
    """Two ways to do the same work.

    Args:
        used: the one in use.
        tried: the other.
        elsewhere: seconds of processor time that other processes have spent on it.
    """

    used: Work
    tried: Work
    elsewhere: Callable[[], float] = _nowhere


@cache
def linear() -> bytes:
    """The ONNX file of a network of one layer."""
    with tempfile.TemporaryDirectory() as folder:
        in_process(make_linear, Path(folder))
        return open_bundle(Path(folder), LINEAR).onnx("float32")


def compiled(size: int, onnx: bytes | None = None) -> ov.CompiledModel:
    """A network for batches of one size, on one thread; the one of one layer by default."""
    core = ov.Core()
    network = core.read_model(onnx or linear())
    shape = network.input().partial_shape
    shape[0] = size
    network.reshape(shape)
    return core.compile_model(network, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1})


def answers() -> Pair:
    """The JSON of an answer with ten probabilities, by orjson and from a template."""
    row = np.random.default_rng(0).dirichlet(np.ones(10)).astype(np.float32)
    labels = [str(k) for k in range(10)]
    whole = orjson.OPT_SERIALIZE_NUMPY
    template = b'{"model":"m","version":"1","id":"%b","predictions":[{"label":"%b","index":%d,"probability":%b,"probabilities":%b}]}'  # noqa: E501

    def used() -> bytes:
        best = int(row.argmax())
        prediction = {
            "label": labels[best],
            "index": best,
            "probability": row[best],
            "probabilities": row,
        }
        answer = {"model": "m", "version": "1", "id": "0" * 32, "predictions": [prediction]}
        return orjson.dumps(answer, option=whole)

    def tried() -> bytes:
        best = int(row.argmax())
        values = orjson.dumps(row, option=whole)
        probability = values[1:-1].split(b",")[best]
        return template % (b"0" * 32, labels[best].encode(), best, probability, values)

    if used() != tried():
        raise RuntimeError("the template gives another answer")
    return Pair(used, tried)


def joined() -> Pair:
    """Images joined to a new array, and in a buffer that is kept."""
    images = [np.zeros((1, 28, 28, 1), np.uint8) for _ in range(IMAGES)]
    buffer = np.empty((IMAGES, 28, 28, 1), np.uint8)
    return Pair(
        lambda: np.concatenate(images),
        lambda: np.concatenate(images, out=buffer),
    )


def copied() -> Pair:
    """Images joined, then copied to the engine's tensor; and copied to it one by one."""
    one = compiled(IMAGES)
    request = one.create_infer_request()
    tensor = request.get_input_tensor().data
    images = [np.zeros((1, *tensor.shape[1:]), tensor.dtype) for _ in range(IMAGES)]

    def used() -> None:
        tensor[...] = np.concatenate(images)
        request.infer()

    def tried() -> None:
        for place, image in enumerate(images):
            tensor[place] = image[0]
        request.infer()

    return Pair(used, tried)


def lent(size: int) -> Pair:
    """A batch copied to the engine's tensor, and memory lent to the engine."""
    form, other = Form(compiled(size)), Form(compiled(size))
    batch = np.zeros_like(form._images)
    return Pair(lambda: form.filled(batch), lambda: other.lent(batch))


def elsewhere(size: int) -> Pair:
    """A batch that runs in this process, and in another one that owns the engine.

    The batch and its answers go over a socket, each with one copy in the kernel; the other process
    adds its processor time to each answer.
    """
    request = compiled(size).create_infer_request()
    tensor, answer = request.get_input_tensor().data, request.get_output_tensor().data
    batch, received = np.zeros_like(tensor), np.zeros_like(answer)
    here, there = socket.socketpair()
    spawn = multiprocessing.get_context("spawn")
    spawn.Process(target=serve, args=(there, linear(), size), daemon=True).start()
    there.close()
    spent = np.zeros(1)

    def used() -> None:
        tensor[...] = batch
        request.infer()
        received[...] = answer

    def tried() -> None:
        here.sendall(batch.data)
        receive(here, received)
        receive(here, spent)

    return Pair(used, tried, lambda: float(spent[0]))


def serve(connection: socket.socket, onnx: bytes, size: int) -> None:
    """Run batches that arrive over a connection until it ends."""
    request = compiled(size, onnx).create_infer_request()
    tensor, answer = request.get_input_tensor().data, request.get_output_tensor().data
    while receive(connection, tensor):
        request.infer()
        connection.sendall(answer.data)
        connection.sendall(np.array([time.process_time()]).data)


def receive(connection: socket.socket, array: np.ndarray[Any, Any]) -> bool:
    """Fill an array from a connection; False where it has ended."""
    rest = array.data.cast("B")
    while rest:
        got = connection.recv_into(rest)
        if not got:
            return False
        rest = rest[got:]
    return True


def started() -> Pair:
    """`infer`, and `start_async` with `wait`."""
    request = compiled(1).create_infer_request()

    def tried() -> None:
        request.start_async()
        request.wait()

    return Pair(request.infer, tried)


PAIRS: dict[str, Callable[[], Pair]] = {
    "the JSON of an answer from a template, not by orjson": answers,
    f"{IMAGES} images of a batch joined in a buffer that is kept, not in a new one": joined,
    f"{IMAGES} images copied to the engine's tensor one by one, not joined first": copied,
    f"memory lent to the engine for {IMAGES} images, not copied": lambda: lent(IMAGES),
    f"memory lent to the engine for {LARGE} images, not copied": lambda: lent(LARGE),
    f"{IMAGES} images inferred in another process, not in the worker's": lambda: elsewhere(IMAGES),
    "`start_async` and `wait` of OpenVINO, not `infer`": started,
}


def least(pair: Pair, rounds: int) -> tuple[float, float]:
    """Microseconds of both halves, by turns."""
    best = [float("inf"), float("inf")]
    for number in range(rounds + 1):  # the first does not count
        for half, work in enumerate((pair.used, pair.tried)):
            start = time.process_time() + pair.elsewhere()
            for _ in range(REPEATS):
                work()
            spent = time.process_time() + pair.elsewhere() - start
            if number:
                best[half] = min(best[half], 1e6 * spent / REPEATS)
    return best[0], best[1]


@click.command()
@click.option("--rounds", default=30, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(rounds: int, out: Path) -> None:
    """Measure, print and write JSON."""
    found: dict[str, dict[str, float]] = {}
    for name, make in PAIRS.items():
        used, tried = least(make(), rounds)
        found[name] = {"used_us": round(used, 2), "tried_us": round(tried, 2)}
        click.echo(f"{name}: {used:.2f} -> {tried:.2f} us")
    document = {
        "command": f"python -m loadtest.alternatives --rounds {rounds}",
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "tries": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
