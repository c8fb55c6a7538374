"""Measures the machine's limit: the work of the service in plain loops, without HTTP.

It runs one process with one thread per core, all at the same time. `model` is the engine alone at
some batch size; `whole` is decode, infer, defend and encode, one image after another: what a
service without overhead and without batching could reach.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from app.inference import engines
from app.inference.bundle import golden_inputs, open_bundle
from app.inference.decode import decode
from app.inference.pipeline import Pipeline, fuse
from app.precision import Precision
from scumble import defenses

BATCHES = (1, 32, 256)


def work(
    models: Path,
    model: str,
    precision: Precision,
    defense: tuple[str, dict[str, Any]],
    image: bytes,
    batches: Sequence[int],
    orders: Any,
    answers: Any,
) -> None:
    """Run a process that gets (task, seconds), repeats the task, and returns images per second."""
    bundle = open_bundle(models, model)
    load = partial(
        engines.load, engines.resolve("auto", precision), threads=1, precision=precision
    )  # fmt: skip
    onnx, examples = bundle.onnx(precision), golden_inputs(bundle.card.input)
    engine = load(onnx)
    name, params = defense
    pipeline = fuse(Pipeline(engine, defenses.configure(name, params)), load, onnx, examples)

    def whole() -> int:
        card = bundle.card
        pixels = decode(image, card.input, card.preprocessing, 1 << 30)
        (row,) = pipeline(pixels[np.newaxis]).probabilities
        best = int(row.argmax())
        label = card.labels[best]
        prediction = {"label": label, "index": best, "probability": row[best], "probabilities": row}
        answer = {"model": card.name, "version": card.version, "predictions": [prediction]}
        orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return 1

    def infer(pixels: engines.Batch) -> int:
        return len(engine(pixels))

    tasks: dict[str, Callable[[], int]] = {"whole": whole} if image else {}
    for batch in batches:
        repeats = -(-batch // len(examples))
        tasks[f"model {batch}"] = partial(infer, np.concatenate([examples] * repeats)[:batch])
    for task in tasks.values():
        task()
    answers.put(0.0)
    for task_name, seconds in iter(orders.get, None):
        task = tasks[task_name]
        start = now = time.perf_counter()
        images = 0
        while now < start + seconds:
            images += task()
            now = time.perf_counter()
        answers.put(images / (now - start))


class Limits:
    """Processes that run tasks when they are told to.

    Args:
        models: folder of bundles.
        model: name of one.
        precision: which of its networks.
        count: of processes.
        image: an encoded image for `whole`, which is not available without it.
        defense: name and parameters, for `whole`.
        batches: sizes for `model`.
    """

    def __init__(
        self,
        models: Path,
        model: str,
        precision: Precision,
        count: int,
        *,
        image: bytes = b"",
        defense: tuple[str, dict[str, Any]] = ("none", {}),
        batches: Sequence[int] = BATCHES,
    ) -> None:
        context = mp.get_context("spawn")
        self._orders = [context.Queue() for _ in range(count)]
        self._answers = context.Queue()
        self._processes = [
            context.Process(
                target=work,
                args=(models, model, precision, defense, image, batches, orders, self._answers),
            )
            for orders in self._orders
        ]
        for process in self._processes:
            process.start()
        for _ in self._processes:
            self._answers.get(timeout=120)

    def model(self, batch: int, seconds: float) -> float:
        """Images per second of the engine alone, all processes together."""
        return self._rate(f"model {batch}", seconds)

    def whole(self, seconds: float) -> float:
        """Images per second from encoded image to encoded answer."""
        return self._rate("whole", seconds)

    def close(self) -> None:
        """End the processes."""
        for orders in self._orders:
            orders.put(None)
        for process in self._processes:
            process.join()

    def _rate(self, task: str, seconds: float) -> float:
        for orders in self._orders:
            orders.put((task, seconds))
        return sum(float(self._answers.get()) for _ in self._orders)
