"""What is computed for a batch: answer(x) = defense(engine(x), x)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from app.errors import BundleError, ConfigError
from app.inference.bundle import Bundle, golden_inputs
from app.inference.engines import FAST, Batch, Engine, Probs, parts, size_within
from app.inference.graph import with_l1_output
from app.precision import Precision
from scumble.defenses.base import Defense
from scumble.defenses.none import NoDefense

# A steep gate magnifies the engine's rounding; a graph that computes something else is far off.
FUSED_TOLERANCE = 1e-3
log = logging.getLogger("scumble")


@dataclass(frozen=True)
class Answers:
    """A batch's answers, with what they cost.

    Attributes:
        probabilities: (N, K), defended.
        l1: (N,) distance to the clean probabilities, in [0, 2].
        infer_s: seconds in the engine.
        defend_s: seconds in the defense.
    """

    probabilities: Probs
    l1: Probs
    infer_s: float
    defend_s: float


@dataclass(frozen=True)
class Pipeline:
    """Engine and defense as one function of a batch."""

    engine: Engine
    defense: Defense
    clock: Callable[[], float] = time.perf_counter

    def __call__(self, batch: Batch) -> Answers:
        """Answer uint8 (N, H, W, C) or float32 (N, C, H, W)."""
        start = self.clock()
        clean = self.engine(batch)
        inferred = self.clock()
        probabilities = self.defense(clean, batch)
        defended = self.clock()
        if probabilities is clean:
            l1 = np.zeros(len(batch), np.float32)
        else:
            l1 = np.abs(probabilities - clean).sum(1)
        return Answers(probabilities, l1, inferred - start, defended - inferred)

    def by_client(self, batch: Batch, parts: Sequence[tuple[int, Defense | None]]) -> Answers:
        """The same where clients differ: one call of the engine, then a defense for each part.

        Args:
            batch: as above.
            parts: number of images and their defense, in order; None for the pipeline's own.
        """
        start = self.clock()
        clean = self.engine(batch)
        inferred = self.clock()
        rows, first = [], 0
        for n, defense in parts:
            last = first + n
            own = self.defense if defense is None else defense
            rows.append(own(clean[first:last], batch[first:last]))
            first = last
        probabilities = rows[0] if len(rows) == 1 else np.concatenate(rows)
        l1 = np.abs(probabilities - clean).sum(1)
        return Answers(probabilities, l1, inferred - start, self.clock() - inferred)


@dataclass(frozen=True)
class Fused:
    """Engine and defense in one graph, as `app.inference.graph.with_l1_output` makes it.

    The seconds of the defense are among those of the engine.
    """

    engine: Engine
    clock: Callable[[], float] = time.perf_counter

    def __call__(self, batch: Batch) -> Answers:
        """Answer uint8 (N, H, W, C) or float32 (N, C, H, W)."""
        start = self.clock()
        rows = self.engine(batch)
        return Answers(rows[:, :-1], rows[:, -1], self.clock() - start, 0.0)


Compute = Pipeline | Fused


def fuse(
    pipeline: Pipeline, load: Callable[[bytes], Engine], model: bytes, example: Batch
) -> Compute:
    """The pipeline with its defense inside the graph, where it can be written so.

    Args:
        pipeline: the engine of `model`, and a defense.
        load: makes an engine of ONNX bytes.
        model: the clean network.
        example: images; on these both forms must give the same.
    """
    graph = None
    if not isinstance(pipeline.defense, NoDefense):
        graph = with_l1_output(model, pipeline.defense)
    if graph is None:
        return pipeline
    fused = Fused(load(graph), pipeline.clock)
    fused.engine.prepare((1,))
    apart = max(
        float(np.abs(fused(one).probabilities - pipeline(one).probabilities).max())
        for one in singly(example)
    )
    if not apart <= FUSED_TOLERANCE:
        log.warning("the defense runs behind the engine: its graph is off by %.2g", apart)
        return pipeline
    return fused


@dataclass(frozen=True)
class Composed:
    """What answers images of one kind, warm.

    Attributes:
        fused: with the defense in the graph, where that can be.
        unfused: with the defense behind the engine; the same one if it cannot.
        max_size: images of the largest batch.
        seconds: of that batch.
    """

    fused: Compute
    unfused: Pipeline
    max_size: int
    seconds: float


@dataclass(frozen=True)
class Composer:
    """Puts engine and defense together.

    Attributes:
        load: makes an engine of ONNX bytes.
        defense: of the server.
        fusible: it may become a part of the graph.
        limit_s: how long a batch may take.
        clock: of the seconds that batches take.
    """

    load: Callable[[bytes], Engine]
    defense: Defense
    fusible: bool
    limit_s: float = math.inf
    clock: Callable[[], float] = time.perf_counter

    def __call__(self, model: bytes, example: Batch, largest: int) -> Composed:
        """From the ONNX bytes of the clean network, `example` images, and the largest batch.

        Raises:
            ConfigError: one image alone takes longer than a batch may.
        """
        plain = Pipeline(self.load(model), self.defense, self.clock)
        plain.engine.prepare((1,))
        whole = fuse(plain, self.load, model, example) if self.fusible else plain
        max_size, seconds = warm_up(whole, example, largest, self.limit_s)
        if seconds > self.limit_s:
            raise ConfigError(
                f"one image takes {seconds:.2g} s; allowed: {self.limit_s:.2g} s, "
                "1/4 of SCUMBLE_WATCHDOG_S"
            )
        return Composed(whole, plain, max_size, seconds)


def self_test(bundle: Bundle, engine: Engine, precision: Precision) -> None:
    """Compare the engine with what the bundle's maker recorded.

    Raises:
        BundleError: the answers differ by more than the recorded tolerance.
    """
    golden = bundle.golden()
    if precision not in golden.probabilities:
        raise BundleError(
            f"{bundle} has no golden outputs for {precision}; "
            f"there: {', '.join(golden.probabilities)}"
        )
    expected = np.array(golden.probabilities[precision], np.float32)
    found = np.concatenate([engine(one) for one in singly(golden_inputs(bundle.card.input))])
    distance = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
    if not distance <= golden.tolerance[precision]:
        raise BundleError(
            f"{bundle} fails its self-test: {precision} answers of shape {found.shape} are off by "
            f"{distance:.2g}; allowed: {expected.shape}, {golden.tolerance[precision]:.2g}"
        )


def singly(batch: Batch) -> list[Batch]:
    """Batches of one: an engine need not be compiled for more than that to be tested."""
    return [batch[i : i + 1] for i in range(len(batch))]


def warm_up(
    pipeline: Compute, example: Batch, largest: int, limit_s: float = math.inf
) -> tuple[int, float]:
    """Run a batch of one and the largest batch, each twice: the first time may load something.

    The largest batch is made smaller if it would take longer than it may. That is first estimated
    from the time of one image, so that no batch runs for much longer than the limit.

    A defense behind the engine may have networks of its own, so with one all of the engines' sizes
    run. Else those between can wait for `prepare`.

    Args:
        pipeline: what runs.
        example: images.
        largest: images of the largest batch that is wanted.
        limit_s: how long it may take.

    Returns:
        The images of the largest batch, and its seconds. More than the limit if one image takes
        that long.
    """

    def seconds_of(size: int) -> float:
        batch = example[:1].repeat(size, 0)
        pipeline.engine.prepare(parts(size))
        pipeline(batch)
        answers = pipeline(batch)
        return answers.infer_s + answers.defend_s

    size, seconds = largest, seconds_of(1)
    if largest == 1:
        return 1, seconds
    if seconds * largest > limit_s:
        size = size_within(int(limit_s / seconds))
    if size > 1:
        if not isinstance(pipeline, Fused) and not isinstance(pipeline.defense, NoDefense):
            for between in FAST[1:]:
                if between < size:
                    pipeline(example[:1].repeat(between, 0))
        seconds = seconds_of(size)
    while seconds > limit_s and size > 1:  # many take longer than as many times one
        size = size_within(size - 1)
        seconds = seconds_of(size)
    return size, seconds
