"""No defense: the clean rows. This is the default."""

from __future__ import annotations

from dataclasses import dataclass

from scumble.defenses.base import Defense, Inputs, Nodes, Probs


@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """y = p, the same array."""

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The clean rows (N, K), unchanged."""
        del inputs
        return probs

    def nodes(self, op: Nodes, probs: str) -> str:
        """The clean rows, without any node."""
        del op
        return probs
