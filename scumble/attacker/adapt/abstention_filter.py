"""Discards abstentions, so that the copy does not learn them.

A service that abstains gives every class the same probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.base import Mapped, ModifierParameters
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Probs


@dataclass(frozen=True)
class AbstentionFilter(ModifierParameters):
    """Replaces rows whose entries differ by at most `spread` with NaN. They still cost a query.

    Attributes:
        spread: 0 to 1.

    Raises:
        AttackError: a parameter is out of range.
    """

    spread: float = 1e-4

    def __post_init__(self) -> None:
        self._check_number("spread", 0, 1)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle without abstentions."""
        del student
        return Mapped(oracle, lambda rows, images: without_withheld(rows, self.spread))


def withheld(rows: Probs, spread: float = 1e-4) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which rows (N, K) are abstentions."""
    found: np.ndarray[tuple[int], np.dtype[np.bool_]] = (
        rows.max(axis=1) - rows.min(axis=1) <= spread
    )
    return found


def without_withheld(rows: Probs, spread: float = 1e-4) -> Probs:
    """The rows, with NaN in place of abstentions."""
    return np.where(withheld(rows, spread)[:, None], np.float32(np.nan), rows)
