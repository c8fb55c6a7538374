"""What is computed for a batch: answer(x) = defense(engine(x), x)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from app.bundle import Bundle, golden_inputs
from app.defenses.base import Defense
from app.defenses.none import NoDefense
from app.engines import FAST, Batch, Engine, Probs
from app.errors import BundleError
from app.graph import measured
from app.precision import Precision

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

    def apart(self, batch: Batch, parts: Sequence[tuple[int, Defense | None]]) -> Answers:
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
    """Engine and defense in one graph, as `app.graph.measured` makes it.

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
        graph = measured(model, pipeline.defense)
    if graph is None:
        return pipeline
    fused = Fused(load(graph))
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
        whole: with the defense in the graph, where that can be.
        plain: with the defense behind the engine; the same one if it cannot.
        seconds: of the largest batch.
    """

    whole: Compute
    plain: Pipeline
    seconds: float


@dataclass(frozen=True)
class Composer:
    """Puts engine and defense together.

    Attributes:
        load: makes an engine of ONNX bytes.
        defense: of the server.
        fusible: it may become a part of the graph.
    """

    load: Callable[[bytes], Engine]
    defense: Defense
    fusible: bool

    def __call__(self, model: bytes, example: Batch, largest: int) -> Composed:
        """From the ONNX bytes of the clean network, `example` images, and the largest batch."""
        plain = Pipeline(self.load(model), self.defense)
        whole = fuse(plain, self.load, model, example) if self.fusible else plain
        return Composed(whole, plain, warm_up(whole, example, largest))


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


def warm_up(pipeline: Compute, example: Batch, largest: int) -> float:
    """Run a batch of one, and the largest twice; gives its seconds.

    A defense behind the engine may have networks of its own, so with one all of the engines' sizes
    run. Else those between can wait for `prepare`.
    """
    alone = isinstance(pipeline, Fused) or isinstance(pipeline.defense, NoDefense)
    between = () if alone else FAST[1:]
    sizes = (1, *(size for size in between if size < largest), largest)
    batches = [example[:1].repeat(size, 0) for size in sizes]
    for batch in batches:
        pipeline(batch)
    answers = pipeline(batches[-1])
    return answers.infer_s + answers.defend_s
