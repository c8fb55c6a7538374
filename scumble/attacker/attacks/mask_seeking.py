"""Mask seeking: against a service that withholds answers, ask about what it is likely to answer.

A first part of the budget goes to images drawn at random. A small network learns from them which
are answered; then the images of the pool that it finds most likely to be answered are asked about,
in steps, and each step is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import nn

from scumble.attacker import students
from scumble.attacker.adapt.abstention_filter import withheld
from scumble.attacker.attacks import knockoff
from scumble.attacker.attacks.knockoff import Knockoff, Rows
from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import Fitting, fit, predict
from scumble.attacker.transports import Probs

PREDICTOR = Fitting(epochs=4, batch=64, loss="ce")


@dataclass(frozen=True)
class MaskSeeking(Knockoff):
    """`Knockoff` with a choice of queries; withheld answers are not learned.

    Attributes:
        first: share of the budget that is drawn at random.
        steps: in how many parts the rest is asked, with a new predictor before each.
    """

    first: float = 0.2
    steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy != "random":
            raise AttackError(f"strategy is {self.strategy!r}; allowed with this attack: 'random'")

    def _plan(self, oracle: Oracle, pool: Pool, student: nn.Module) -> Seeker:
        del student
        return Seeker(self, oracle, pool)

    def _learned(self, rows: Rows, answers: Probs) -> tuple[Rows, Probs]:
        kept = answered(answers)
        return rows[kept], answers[kept]


def answered(answers: Probs) -> npt.NDArray[np.bool_]:
    """Which rows (N, K) say something."""
    return np.isfinite(answers).all(1) & ~withheld(np.nan_to_num(answers))


class Seeker:
    """The plan: a random part, then what a predictor finds most likely to be answered.

    Args:
        attack: its settings.
        oracle: what will be asked.
        pool: the images.
    """

    def __init__(self, attack: MaskSeeking, oracle: Oracle, pool: Pool) -> None:
        self._attack = attack
        self._shape = oracle.shape
        self._pool = pool
        self._budget = min(oracle.remaining, len(pool))
        self._left = np.random.default_rng(attack.seed).permutation(len(pool))
        self._asked: list[Rows] = []
        self._passed: list[npt.NDArray[np.bool_]] = []

    def __iter__(self) -> Iterator[Rows]:
        first = max(2, round(self._attack.first * self._budget))
        yield from self._take(first)
        each = max(1, -(-(self._budget - first) // self._attack.steps))
        while len(self._left):
            self._sort(each)
            yield from self._take(each)

    def learn(self, rows: Rows, answers: Probs) -> None:
        """Note which were answered."""
        self._asked.append(rows)
        self._passed.append(answered(answers))

    def _take(self, count: int) -> Iterator[Rows]:
        taken, self._left = np.split(self._left, [min(count, len(self._left))])
        for i in range(0, len(taken), self._attack.ask):
            yield taken[i : i + self._attack.ask]

    def _sort(self, count: int) -> None:
        """Order what is left, of which `count` are asked next, by how likely it is answered."""
        del count
        asked, passed = np.concatenate(self._asked), np.concatenate(self._passed)
        if passed.all() or not passed.any():  # there is nothing to tell apart
            return
        predictor = students.make("small_cnn", self._shape, 2, seed=self._attack.seed)
        labels = np.eye(2, dtype=np.float32)[passed.astype(np.int64)]
        fit(predictor, self._pool.images[asked], labels, replace(PREDICTOR, seed=self._attack.seed))
        likely = predict(predictor, self._pool.images[self._left])[:, 1]
        self._left = self._left[np.argsort(-likely, kind="stable")]


def paper(seed: int) -> MaskSeeking:
    """`knockoff` as published, with this choice of queries."""
    return MaskSeeking(fitting=knockoff.paper(seed).fitting, seed=seed)


def cpu(seed: int) -> MaskSeeking:
    """For two cores."""
    return MaskSeeking(fitting=knockoff.cpu(seed).fitting, seed=seed)


PROFILES: dict[str, Callable[[int], MaskSeeking]] = {"paper": paper, "cpu": cpu}
