"""A wrapper that keeps the predicted class, whatever the wrapped defense does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scumble.defenses.base import Defense, DefenseError, Inputs, Probs

# Bound, in units of machine epsilon times max p, on what rounding adds to p + t (y - p).
_ROUNDING = 16


@dataclass(frozen=True)
class KeepTop1(Defense):
    """y' = p + t (y - p) per row, with the largest t in [0, 1] that keeps the arg-max of p.

    For class j with gap g = p_top - p_j and approach s = (y_j - p_j) - (y_top - p_top), the top
    stays above j while t s < g, so t is the least g / s. Rows that keep their arg-max stay y. If
    two top classes differ by rounding only, t is 0: the clean row.

    Attributes:
        defense: the wrapped defense, which gives y.

    Raises:
        DefenseError: the defense withholds rows.
    """

    defense: Defense

    def __post_init__(self) -> None:
        if self.defense.withholds:
            raise DefenseError(
                "keep_top1 would answer what the defense withholds; allowed: one of the two"
            )

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The guarded rows (N, K); their arg-max (first maximum) is that of `probs`."""
        y = self.defense(probs, inputs)
        top = probs.argmax(axis=1)
        at = np.arange(len(probs)), top
        highest = probs[at][:, None]
        move = y - probs
        approach = move - move[at][:, None]
        gap = highest - probs
        gap -= _ROUNDING * np.finfo(probs.dtype).eps * highest
        np.maximum(gap, 0, out=gap)
        limit = np.ones_like(probs)
        np.divide(gap, approach, out=limit, where=approach > gap)
        t = np.minimum.reduce(limit, axis=1, keepdims=True)
        move *= t
        move += probs
        kept = (y.argmax(axis=1) == top)[:, None]
        safe = (move.argmax(axis=1) == top)[:, None]
        return np.where(kept, y, np.where(safe, move, probs))
