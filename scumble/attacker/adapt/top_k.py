"""The few largest entries, which a defense that fills the tail leaves in proportion.

Source: the truncated answers of Orekondy, Schiele, Fritz, "Knockoff Nets: Stealing Functionality of
Black-Box Models" (CVPR 2019), here chosen by the attacker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.base import Mapped, ModifierParameters
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class TopK(ModifierParameters):
    """The k largest entries of every row, renormalised; the others are 0.

    Attributes:
        k: 1 to the number of classes.

    Raises:
        AttackError: k is not an integer above 0.
    """

    k: int = 3

    def __post_init__(self) -> None:
        self._check_integer("k", 1, 1_000_000)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with truncated answers.

        Raises:
            AttackError: k is more than the number of classes.
        """
        del student
        if self.k > oracle.labels:
            raise self._refusal("k", f"must be an integer from 1 to {oracle.labels}")
        return Mapped(oracle, self._truncate)

    def _truncate(self, rows: Probs, images: Images) -> Probs:
        del images
        # Stable, so that of equal entries the first are kept, as arg-max does.
        tail = np.argsort(-rows, axis=1, kind="stable")[:, self.k :]
        kept = rows.copy()
        np.put_along_axis(kept, tail, 0, axis=1)
        kept /= kept.sum(axis=1, keepdims=True)
        return kept
