"""Round: fewer decimals, and rows that still sum to 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scumble.defenses.base import Defense, Inputs, Probs


@dataclass(frozen=True, kw_only=True)
class Round(Defense):
    """y_i = c_i / 10^decimals, with integers c that sum to 10^decimals.

    This is the largest remainder method: c_i = floor(p_i 10^decimals), and the missing units go to
    the largest remainders (ties to the lower index). p_i > p_j never gives y_i < y_j, but can give
    y_i = y_j, and then the first maximum may be another class.

    Attributes:
        decimals: 1 to 8.

    Raises:
        DefenseError: the parameter is of the wrong type or out of range.
    """

    decimals: int

    def __post_init__(self) -> None:
        self._check_integer("decimals", 1, 8)

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The rounded rows (N, K)."""
        del inputs
        units = 10.0**self.decimals
        # Normalise in float64 first: a sum that is 1e-7 off would be 10 units off at 8 decimals.
        scaled = probs.astype(np.float64)
        scaled *= units / np.add.reduce(scaled, axis=1, keepdims=True)
        count = np.floor(scaled)
        missing = units - np.add.reduce(count, axis=1, keepdims=True)
        # Scaling can make two neighbouring floats equal; the clean value then decides, which keeps
        # the order. lexsort is stable, so remaining ties keep the order of the index.
        order = np.lexsort((-probs, count - scaled), axis=1)
        rows = np.arange(len(probs))[:, None]
        count[rows, order] += np.arange(probs.shape[1]) < missing
        count /= units
        return count.astype(probs.dtype, copy=False)
