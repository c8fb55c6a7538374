"""Only the answers whose label a small change of the image does not change.

Source: the multiple-query attackers of Tang et al., "ModelGuard: Information-Theoretic Defense
Against Model Extraction Attacks" (USENIX Security 2024), with a vote in place of a mean: where
labels are drawn for images, or near borders, repeats disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.average import Average, Averaged
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Probs


@dataclass(frozen=True)
class ConsistencyFilter(Average):
    """The first of `repeats` answers where all have the same label, else NaN.

    Each repeat costs a query; the attributes are those of `average`.
    """

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with only consistent answers."""
        del student
        return _Consistent(oracle, self)


class _Consistent(Averaged):
    def _combined(self, answers: Probs) -> Probs:
        labels = np.where(np.isnan(answers).any(axis=2), -1, answers.argmax(axis=2))
        same = (labels == labels[0]).all(axis=0) & (labels[0] >= 0)
        return np.where(same[:, None], answers[0], np.float32(np.nan))
