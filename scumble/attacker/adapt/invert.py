"""Answers inverted by an attacker who knows the defense and its parameters.

Sources: Tang et al., "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks"
(USENIX Security 2024), whose partial Bayes attacker stops at the prior of `nearest_neighbours.py`.
The root search of `exact_inverse.py` makes it exact; it follows from the formulas in
`perturbation_formulas.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from scumble.attacker import device
from scumble.attacker.adapt.base import Mapped, ModifierParameters, Remembered
from scumble.attacker.adapt.exact_inverse import ExactInverse
from scumble.attacker.adapt.nearest_neighbours import NearestNeighbours
from scumble.attacker.adapt.perturbation_formulas import Array, Kind, KnownDefense, Odds
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs

CHUNK = 256  # images that the student sees at a time


@dataclass(frozen=True)
class Invert(ModifierParameters):
    """The clean row behind each answer, as far as answer and prior tell.

    An answer has a few to hundreds of clean rows that the defense maps to it. A prior guesses which
    it was, and the one nearest to the guess is taken; where none is found the guess itself.

    Attributes:
        defense: "dcp" or "reverse_sigmoid".
        beta: of the defense, 0 to 10.
        gamma: of the defense, 0.001 to 0.999; from 1 on the map has other branches.
        nu: of DCP's gate, 1 to 1e6.
        odds: of the defense, "clamped" or "lee2018".
        prior: "table": the mean of the `neighbours` nearest of `pairs` made-up pairs. "student":
            what the copy in training says of the image, as soon as it gives the labels of at least
            `trust` of the answers of a call; the table before. With `attack.rounds`, fits and
            inversions take turns.
        trust: share of labels, 0 to 1.
        pairs: of the table, 1,000 to 10 million; more are slower and hardly better.
        neighbours: of the table, 1 to 1,000.
        scales: of the logits of the table's rows.
        seed: of the table.

    Raises:
        AttackError: a parameter is out of range.
    """

    defense: Kind = "dcp"
    beta: float = 1.0
    gamma: float = 0.2
    nu: float = 1000.0
    odds: Odds = "clamped"
    prior: Literal["table", "student"] = "table"
    trust: float = 0.5
    pairs: int = 50_000
    neighbours: int = 5
    scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choice("defense", "dcp", "reverse_sigmoid")
        self._check_number("beta", 0, 10)
        self._check_number("gamma", 0.001, 0.999)
        self._check_number("nu", 1, 1e6)
        self._check_choice("odds", "clamped", "lee2018")
        self._check_choice("prior", "table", "student")
        self._check_number("trust", 0, 1)
        self._check_integer("pairs", 1000, 10_000_000)
        self._check_integer("neighbours", 1, 1000)
        self._check_positives("scales", float)
        self._check_integer("seed", 0, 2**63 - 1)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with inverted answers."""
        known = KnownDefense(self.defense, self.beta, self.gamma, self.nu, self.odds)
        exact = ExactInverse(known, oracle.labels)
        rng = np.random.default_rng(self.seed)
        table = NearestNeighbours(
            known, oracle.labels, self.pairs, self.neighbours, self.scales, rng
        )

        def answer(rows: Probs, images: Images) -> Probs:
            # Beyond the gate the answer is the clean row; a row that was moved never gets there.
            moved = rows.max(axis=1) <= known.open_above
            if not moved.any():
                return rows
            y = rows[moved].astype(np.float64)
            y /= y.sum(axis=1, keepdims=True)
            prior = opinion(student, images[moved]) if self.prior == "student" else table(y)
            if self.prior == "student" and not agreed(prior, y, self.trust):
                prior = table(y)
            inverted = rows.copy()
            inverted[moved] = exact(y, prior)
            return inverted

        return Mapped(Remembered(oracle), answer)


def agreed(one: Array, other: Array, share: float) -> bool:
    """Whether rows (N, K) have the same largest entry at least so often."""
    return bool((one.argmax(axis=1) == other.argmax(axis=1)).mean() >= share)


def opinion(student: nn.Module, images: Images) -> Array:
    """The student's rows (N, K), without a trace of the asking in it."""
    where = device.of(student)
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        with torch.no_grad():
            parts = [
                student(part.to(where)).double().softmax(dim=1).cpu()
                for part in torch.from_numpy(images).split(CHUNK)
            ]
    finally:
        for module, mode in modes:
            module.training = mode
    found: Array = torch.cat(parts).numpy()
    return found
