"""Only the answers that DCP's gate let through untouched.

Source: follows from the gate of Khaled et al., "Efficient Defense Against Model Stealing Attacks on
Convolutional Neural Networks" (ICMLA 2023): rows with max p > beta are answered as they are, and
perturbed rows never reach beta, so the edge shows in the answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.base import Mapped, ModifierParameters
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class ConfidenceFilter(ModifierParameters):
    """Rows with max y <= beta + margin become NaN; the others are clean.

    From beta + margin >= 1 on no row is clean, so all become NaN: there is nothing to learn from
    DCP by this way, and the attack is to find that out. Thrown away answers are paid for.

    Attributes:
        beta: of the defense, 0 to 10.
        margin: half the width of the gate, 0 to 1; 0.03 is where nu 1000 leaves 1e-13 of it.

    Raises:
        AttackError: a parameter is out of range.
    """

    beta: float = 1.0
    margin: float = 0.03

    def __post_init__(self) -> None:
        self._check_number("beta", 0, 10)
        self._check_number("margin", 0, 1)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with only clean answers."""
        del student
        return Mapped(oracle, self._filter)

    def _filter(self, rows: Probs, images: Images) -> Probs:
        del images
        clean = rows.max(axis=1, keepdims=True) > self.beta + self.margin
        return np.where(clean, rows, np.float32(np.nan))
