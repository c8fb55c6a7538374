"""ModelGuard-W undone: mass that stands close below the top came from the top.

Source: Tang et al., "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks"
(USENIX Security 2024). Its answer keeps the top class ahead by 1e-4 and moves as much mass as its
budget allows to the least likely classes, each up to that height. So a class that is within
2e-4 of the top is a class that was filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.base import Mapped, ModifierParameters, Remembered
from scumble.attacker.adapt.invert import agreed, opinion
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs

LEFT = 1e-6
"""What a class keeps whose mass is given back."""


@dataclass(frozen=True)
class Modelguard(ModifierParameters):
    """Rows with classes within `gap` of the top give the mass of these back to it.

    The last class that was filled need not have reached that height. Where the copy gives the
    labels of at least `trust` of the answers of a call, it decides for each row whether the next
    largest class is given back too; before, it is not.

    Attributes:
        gap: 0 to 1.
        trust: share of labels, 0 to 1.

    Raises:
        AttackError: a parameter is out of range.
    """

    gap: float = 2e-4
    trust: float = 0.5

    def __post_init__(self) -> None:
        self._check_number("gap", 0, 1)
        self._check_number("trust", 0, 1)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with the mass where it was."""

        def answer(rows: Probs, images: Images) -> Probs:
            first = self._returned(rows, further=0)
            prior = opinion(student, images)
            if not agreed(prior, rows.astype(np.float64), self.trust):
                return first
            second = self._returned(rows, further=1)
            nearer = np.abs(second - prior).sum(axis=1) < np.abs(first - prior).sum(axis=1)
            return np.where(nearer[:, None], second, first)

        return Mapped(Remembered(oracle), answer)

    def _returned(self, rows: Probs, further: int) -> Probs:
        """Rows (N, K) without what was filled, and without as many further classes."""
        n, classes = rows.shape
        each, top = np.arange(n), rows.argmax(axis=1)
        filled = rows >= rows.max(axis=1, keepdims=True) - np.float32(self.gap)
        filled[each, top] = False
        if further and classes > 2:
            others = np.where(filled, -1, rows)
            others[each, top] = -1
            touched = filled.any(axis=1)
            filled[each[touched], others.argmax(axis=1)[touched]] = True
        given = np.where(filled, np.maximum(rows - np.float32(LEFT), 0), 0)
        found = (rows - given).astype(np.float32)
        found[each, top] += given.sum(axis=1)
        return found
