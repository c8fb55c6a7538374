"""The computation for a batch: answer(x) = defense(engine(x), x)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from app.errors import BundleError, ConfigError
from app.inference.bundle import Bundle, golden_inputs
from app.inference.engines import FAST, Batch, Engine, Probs, parts, size_within
from app.inference.graph import with_l1_output
from app.inference.score_graph import ScoredEngine
from app.precision import Precision
from scumble.defenses.base import Defense
from scumble.defenses.evidence import ABSTAINED, Evidence, Marks, Score
from scumble.defenses.none import NoDefense
from scumble.defenses.scores import Whitener

# A steep gate magnifies the engine's rounding; a graph that computes something else is far off.
FUSED_TOLERANCE = 1e-3
log = logging.getLogger("scumble")


@dataclass(frozen=True)
class Answers:
    """The answers to a batch, with the time that they took.

    Attributes:
        probabilities: (N, K), defended.
        l1: (N,) distance to the clean probabilities, in [0, 2].
        infer_s: seconds in the engine.
        defend_s: seconds in the defense.
        marks: (N,) what was withheld; None where nothing can be.
    """

    probabilities: Probs
    l1: Probs
    infer_s: float
    defend_s: float
    marks: Marks | None = None

    @property
    def seconds(self) -> float:
        """Seconds of both together."""
        return self.infer_s + self.defend_s


class Scores(Protocol):
    """An engine whose one call gives clean rows and scores, as `ScoredEngine`."""

    @property
    def made(self) -> bool:
        """Whether it is loaded."""
        ...

    def require(self, images: Batch) -> Evidence:
        """Load it; the evidence of example images."""
        ...

    def __call__(self, batch: Batch) -> tuple[Probs, Evidence]:
        """Clean rows and evidence."""
        ...

    def prepare(self, sizes: Iterable[int]) -> None:
        """Compile for batches of these sizes."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """Engine and defense as one function of a batch.

    Attributes:
        engine: gives clean rows.
        defense: the server's.
        clock: seconds.
        scores: takes the engine's place once a defense needs scores; None where none can.
    """

    engine: Engine
    defense: Defense
    clock: Callable[[], float] = time.perf_counter
    scores: Scores | None = None

    @cached_property
    def withholds(self) -> bool:
        """Whether the server's defense may withhold rows, asked once and not for every batch."""
        return self.defense.withholds

    def __call__(self, batch: Batch) -> Answers:
        """Answer uint8 (N, H, W, C) or float32 (N, C, H, W)."""
        if self.withholds:
            return self.by_client(batch, [(len(batch), None)])
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
        """Answer clients with different defenses: one call of the engine, a defense for each part.

        Args:
            batch: uint8 (N, H, W, C) or float32 (N, C, H, W).
            parts: number of images and their defense, in order; None for the pipeline's own.
        """
        start = self.clock()
        if self.scores is not None and self.scores.made:
            clean, evidence = self.scores(batch)
        else:
            clean = self.engine(batch)
            evidence = None
        inferred = self.clock()
        probabilities, marks = defended(self.defense, clean, evidence, batch, parts)
        l1 = np.abs(probabilities - clean).sum(1)
        return Answers(probabilities, l1, inferred - start, self.clock() - inferred, marks)

    def evidence(self, images: Batch, rows: Probs, needs: frozenset[Score]) -> Evidence:
        """Evidence of example images, to warm up a defense; loads the engine of the scores.

        Raises:
            ConfigError: the network has no such scores.
        """
        if not needs:
            return Evidence.of(rows)
        if self.scores is None:
            raise ConfigError(f"no scores ({', '.join(sorted(needs))}) of this network")
        return self.scores.require(images)

    def prepare(self, sizes: Iterable[int]) -> None:
        """Compile for batches of these sizes."""
        for size in sizes:
            self.engine.prepare((size,))
            if self.scores is not None and self.scores.made:
                self.scores.prepare((size,))


def defended(
    default: Defense,
    clean: Probs,
    evidence: Evidence | None,
    batch: Batch,
    parts: Sequence[tuple[int, Defense | None]],
) -> tuple[Probs, Marks | None]:
    """Defend the rows of clients with different defenses.

    Args:
        default: of clients that have none of their own.
        clean: (N, K).
        evidence: of the clean rows; None for what they alone tell.
        batch: the N images.
        parts: number of images and their defense, in order; None for `default`.

    Returns:
        The rows to send out, and what was withheld; None where nothing can be.
    """
    rows, first, marks = [], 0, None
    for n, defense in parts:
        last = first + n
        chosen = default if defense is None else defense
        part, images = clean[first:last], batch[first:last]
        if chosen.withholds:
            known = Evidence.of(part) if evidence is None else evidence[first:last]
            answered = chosen.answer(part, images, known)
            rows.append(answered.rows)
            marks = np.zeros(len(batch), np.uint8) if marks is None else marks
            marks[first:last] = 0 if answered.marks is None else answered.marks
        else:
            rows.append(chosen(part, images))
        first = last
    return rows[0] if len(rows) == 1 else np.concatenate(rows), marks


@dataclass(frozen=True)
class Fused:
    """Engine and defense in one graph, as `app.inference.graph.with_l1_output` makes it.

    The time of the defense counts as time of the engine.

    Attributes:
        engine: runs the graph.
        clock: seconds.
        withholds: the graph says in its last column which rows are abstained.
    """

    engine: Engine
    clock: Callable[[], float] = time.perf_counter
    withholds: bool = False

    def __call__(self, batch: Batch) -> Answers:
        """Answer uint8 (N, H, W, C) or float32 (N, C, H, W)."""
        start = self.clock()
        rows = self.engine(batch)
        if self.withholds:
            marks = (rows[:, -1] > 0.5).astype(np.uint8) * np.uint8(ABSTAINED)
            return Answers(rows[:, :-2], rows[:, -2], self.clock() - start, 0.0, marks)
        return Answers(rows[:, :-1], rows[:, -1], self.clock() - start, 0.0)

    def prepare(self, sizes: Iterable[int]) -> None:
        """Compile for batches of these sizes."""
        self.engine.prepare(sizes)


Compute = Pipeline | Fused


def fuse(
    pipeline: Pipeline, load: Callable[[bytes], Engine], model: bytes, example: Batch
) -> Compute:
    """Move the defense of a pipeline into its graph, if it can be expressed in ONNX.

    Args:
        pipeline: the engine of `model`, and a defense.
        load: makes an engine from ONNX bytes.
        model: the undefended network.
        example: images on which both forms must agree.

    Returns:
        `pipeline` itself if the defense cannot be moved.
    """
    graph = None
    if not isinstance(pipeline.defense, NoDefense):
        graph = with_l1_output(model, pipeline.defense)
    if graph is None:
        return pipeline
    fused = Fused(load(graph), pipeline.clock, pipeline.defense.withholds)
    fused.engine.prepare((1,))
    difference = max(
        float(np.abs(fused(one).probabilities - pipeline(one).probabilities).max())
        for one in singly(example)
    )
    if not difference <= FUSED_TOLERANCE:
        log.warning("the defense runs behind the engine: its graph is off by %.2g", difference)
        return pipeline
    return fused


@dataclass(frozen=True)
class Composed:
    """The pipelines for one form of images, tested and warm.

    Attributes:
        fused: with the defense in the graph, if it can be expressed in ONNX; else `unfused`.
        unfused: with the defense behind the engine.
        max_size: images of the largest batch.
        seconds: that the largest batch takes.
        engine_s: of these, in the engine.
    """

    fused: Compute
    unfused: Pipeline
    max_size: int
    seconds: float
    engine_s: float


@dataclass(frozen=True)
class Composer:
    """Combines engine and defense.

    Attributes:
        load: makes an engine from ONNX bytes.
        defense: the server's defense.
        fusible: the defense may be moved into the graph.
        limit_s: seconds that a batch may take.
        clock: seconds.
        whitener: gives what the score `residual` needs, where the bundle has it.
    """

    load: Callable[[bytes], Engine]
    defense: Defense
    fusible: bool
    limit_s: float = math.inf
    clock: Callable[[], float] = time.perf_counter
    whitener: Callable[[], Whitener | None] = lambda: None

    def __call__(self, model: bytes, example: Batch, largest: int) -> Composed:
        """Load, fuse and warm up a network.

        Args:
            model: ONNX bytes of the undefended network.
            example: images.
            largest: images of the largest batch wanted.

        Raises:
            ConfigError: one image alone takes longer than a batch may, or the network lacks scores
                that the defense needs.
        """
        scores = ScoredEngine(self.load, model, self.whitener, largest)
        unfused = Pipeline(self.load(model), self.defense, self.clock, scores)
        unfused.engine.prepare((1,))
        if self.defense.needs:
            scores.require(example)
        fused = fuse(unfused, self.load, model, example) if self.fusible else unfused
        max_size, answers = warm_up(fused, example, largest, self.limit_s)
        if answers.seconds > self.limit_s:
            raise ConfigError(
                f"one image takes {answers.seconds:.2g} s; allowed: {self.limit_s:.2g} s, "
                "1/4 of SCUMBLE_WATCHDOG_S"
            )
        return Composed(fused, unfused, max_size, answers.seconds, answers.infer_s)


def self_test(bundle: Bundle, engine: Engine, precision: Precision) -> None:
    """Compare the engine with the outputs recorded in the bundle.

    Raises:
        BundleError: the answers differ by more than the recorded tolerance.
    """
    golden = bundle.golden()
    if precision not in golden.probabilities:
        raise BundleError(
            f"{bundle} has no golden outputs for {precision}; "
            f"available: {', '.join(golden.probabilities)}"
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
    """Split into batches of one, for which every engine is compiled."""
    return [batch[i : i + 1] for i in range(len(batch))]


def warm_up(
    pipeline: Compute, example: Batch, largest: int, limit_s: float = math.inf
) -> tuple[int, Answers]:
    """Run a batch of one and the largest batch, each twice: the first run may load something.

    The largest batch is reduced if it takes longer than `limit_s`. A first estimate from the time
    of one image keeps every batch close to the limit.

    A defense behind the engine may have networks of its own, so all sizes of the engine run with
    it. Without one, the sizes between can wait for `prepare`.

    Args:
        pipeline: what runs.
        example: images.
        largest: images of the largest batch wanted.
        limit_s: seconds that a batch may take.

    Returns:
        The images of the largest batch, and its answers. They take longer than the limit only if
        one image does.
    """

    def answer(size: int) -> Answers:
        batch = example[:1].repeat(size, 0)
        pipeline.prepare(parts(size))
        pipeline(batch)
        return pipeline(batch)

    size, answers = largest, answer(1)
    if largest == 1:
        return 1, answers
    if answers.seconds * largest > limit_s:
        size = size_within(int(limit_s / answers.seconds))
    if size > 1:
        if not isinstance(pipeline, Fused) and not isinstance(pipeline.defense, NoDefense):
            for between in FAST[1:]:
                if between < size:
                    pipeline(example[:1].repeat(between, 0))
        answers = answer(size)
    while answers.seconds > limit_s and size > 1:  # time may grow faster than the size
        size = size_within(size - 1)
        answers = answer(size)
    return size, answers
