"""Label: the predicted class and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scumble.defenses.base import Defense, Inputs, Nodes, Probs


@dataclass(frozen=True, kw_only=True)
class Label(Defense):
    """y = e_t, t the arg-max of p (the first maximum)."""

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """One-hot rows (N, K)."""
        del inputs
        y = np.zeros_like(probs)
        y[np.arange(len(probs)), probs.argmax(axis=1)] = 1
        return y

    def nodes(self, op: Nodes, probs: str) -> str:
        """One-hot rows."""
        top = op("ArgMax", probs, axis=1, keepdims=1)
        return op("Cast", op("Equal", top, np.arange(op.classes)), to=1)
