"""Top-k: the k largest probabilities, and nothing about the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scumble.defenses.base import Defense, Inputs, Probs


@dataclass(frozen=True, kw_only=True)
class TopK(Defense):
    """y_i ~ p_i for the k largest (ties go to the lower index), 0 for the others.

    Attributes:
        k: how many to keep, 1 to 1,000,000; with K or more, rows do not change.

    Raises:
        DefenseError: the parameter is of the wrong type or out of range.
    """

    k: int

    def __post_init__(self) -> None:
        self._check_integer("k", 1, 1_000_000)

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The truncated rows (N, K)."""
        del inputs
        n, classes = probs.shape
        if self.k >= classes:
            return probs
        rest = np.argsort(-probs, axis=1, kind="stable")[:, self.k :]
        y = probs.copy()
        y[np.arange(n)[:, None], rest] = 0
        y /= np.add.reduce(y, axis=1, keepdims=True)
        return y
