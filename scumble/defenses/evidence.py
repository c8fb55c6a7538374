"""Inputs of a defense besides the clean row, and marks for the answers that it withholds.

Shapes: `N` images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Score = Literal["energy", "residual"]
"""A score computed from the network itself: see `scumble.defenses.scores`."""

SCORES: tuple[Score, ...] = ("energy", "residual")

Column = npt.NDArray[np.floating[Any]]
Marks = npt.NDArray[np.uint8]
"""One of the three marks below for each image."""

ANSWERED, DRAWN, ABSTAINED = 0, 1, 2
"""The row comes from the network; it is pseudorandom; it is uniform and marked as an abstention."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Scores of a batch, from the same engine call as its clean rows.

    Attributes:
        top: (N,) largest clean probability.
        energy: (N,) logsumexp of the logits; None if no defense needs it.
        residual: (N,) of the features; None if no defense needs it.
    """

    top: Column
    energy: Column | None = None
    residual: Column | None = None

    @classmethod
    def of(cls, clean: npt.NDArray[Any]) -> Evidence:
        """What clean rows (N, K) alone tell."""
        return cls(np.maximum.reduce(clean, axis=1))

    def first(self, n: int) -> Evidence:
        """The evidence of the first image, `n` times."""
        return self._each(lambda column: column[:1].repeat(n))

    def __getitem__(self, rows: slice) -> Evidence:
        """The evidence of some images."""
        return self._each(lambda column: column[rows])

    def _each(self, change: Callable[[Column], Column]) -> Evidence:
        energy, residual = self.energy, self.residual
        return Evidence(
            change(self.top),
            None if energy is None else change(energy),
            None if residual is None else change(residual),
        )


class Answered(NamedTuple):
    """Rows to send out.

    Attributes:
        rows: (N, K).
        marks: what was withheld; None where the defense withholds nothing.
    """

    rows: npt.NDArray[np.floating[Any]]
    marks: Marks | None = None
