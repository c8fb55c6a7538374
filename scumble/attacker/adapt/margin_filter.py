"""Only the answers with a clear lead: labels that a perturbation changed are among the others.

Source: follows from every perturbation that is bounded: it can change the label of a row only where
two classes are close, and then they are close in the answer too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.base import Mapped, ModifierParameters
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class MarginFilter(ModifierParameters):
    """Of the answers to each call, the `share` with the narrowest lead becomes NaN.

    The lead is the largest probability less the second. Discarded answers are paid for.

    Attributes:
        share: 0 to 0.99.

    Raises:
        AttackError: a parameter is out of range.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        self._check_number("share", 0, 0.99)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with only clear answers."""
        del student
        return Mapped(oracle, self._filter)

    def _filter(self, rows: Probs, images: Images) -> Probs:
        del images
        ordered = np.sort(rows, axis=1)
        lead = ordered[:, -1] - (ordered[:, -2] if rows.shape[1] > 1 else 0)
        kept = rows.copy()
        kept[np.argsort(lead, kind="stable")[: int(self.share * len(rows))]] = np.nan
        return kept
