"""Reverse Sigmoid, and the perturbation it shares with DCP.

Source: Lee, Edwards, Molloy, Su, "Defending Against Neural Network Model Stealing Attacks Using
Deceptive Perturbations" (DLS 2018), equations 3-4; with clamped odds as in the baseline of Khaled
et al., "Efficient Defense Against Model Stealing Attacks on CNNs" (ICMLA 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from scumble.defenses.base import Defense, Inputs, Nodes, Probs

Odds = Literal["clamped", "lee2018"]

FLOOR = 1e-12  # the published code's lower bound of the odds
LEE_FLOOR = 1e-9  # and of the probability, in the form without clamped odds


@dataclass(frozen=True, kw_only=True)
class ReverseSigmoid(Defense):
    """Moves every row by a reversed sigmoid.

    r_i = beta (s(gamma ln o_i) - 1/2),  y_i ~ p_i - r_i,  s the logistic function.

    Attributes:
        beta: strength, 0 (none) to 10.
        gamma: slope, 0 to 10.
        odds: "clamped": o = p/(1-p) kept in [1e-12, 1], so r <= 0 and entries above 1/2 shrink only
            by the renormalisation. "lee2018": the original odds, p kept in [1e-9, 1-1e-9] for r
            only, negative y set to 0; confident rows can lose their top-1.

    Raises:
        DefenseError: a parameter is of the wrong type or out of range.
    """

    beta: float
    gamma: float = 0.2
    odds: Odds = "clamped"

    def __post_init__(self) -> None:
        self._check_number("beta", 0, 10)
        self._check_number("gamma", 0, 10)
        self._check_choice("odds", "clamped", "lee2018")

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The perturbed rows (N, K)."""
        del inputs
        return perturb(probs, self.beta / 2, self.gamma, self.odds)

    def nodes(self, op: Nodes, probs: str) -> str:
        """The perturbed rows, in float32."""
        return perturb_nodes(op, probs, self.beta / 2, self.gamma, self.odds)


def perturb(probs: Probs, half: float | Probs, gamma: float, odds: Odds) -> Probs:
    """Rows p - 2 half (s(gamma ln o) - 1/2), renormalised.

    Uses s(z) - 1/2 = tanh(z/2)/2, which neither overflows nor cancels. Clamping the odds to 1 means
    clamping p to 1/2, so neither form divides by zero, and the clamped one is exact enough in
    float32.

    Args:
        probs: float (N, K).
        half: half the strength; a number, or float (N, 1) of the dtype of `probs`.
        gamma: slope.
        odds: as in `ReverseSigmoid`.

    Returns:
        A new array (N, K) of the dtype of `probs`.
    """
    if probs.shape[1] == 1:  # the only row is 1, and "lee2018" could leave a sum of 0
        return np.ones_like(probs)
    # All steps share one buffer. Two ufuncs clip faster than np.clip.
    if odds == "clamped":
        y = np.minimum(probs, 0.5)
        np.maximum(y, FLOOR, out=y)
        np.divide(y, 1 - y, out=y)
    else:
        # 1 - 1e-9 is 1 in float32.
        wide = np.clip(probs.astype(np.float64), LEE_FLOOR, 1 - LEE_FLOOR)
        y = (wide / (1 - wide)).astype(probs.dtype)
    np.log(y, out=y)
    y *= gamma / 2
    np.tanh(y, out=y)
    y *= half
    np.subtract(probs, y, out=y)
    if odds == "lee2018":
        np.maximum(y, 0, out=y)
    y /= np.add.reduce(y, axis=1, keepdims=True)
    return y


def perturb_nodes(op: Nodes, probs: str, half: float | str, gamma: float, odds: Odds) -> str:
    """`perturb` as nodes of a graph.

    Args:
        op: appends a node.
        probs: float32 (N, K).
        half: half the strength; a number, or float32 (N, 1).
        gamma: slope.
        odds: as in `ReverseSigmoid`.
    """
    if op.classes == 1:
        return op("Clip", probs, 1.0, 1.0)
    if odds == "clamped":
        p = op("Clip", probs, FLOOR, 0.5)
        rest = op("Sub", 1.0, p)
    else:
        # Clip p and 1-p separately: in float32 the bound 1-f of p would be 1.
        p = op("Clip", probs, LEE_FLOOR, 1.0)
        rest = op("Clip", op("Sub", 1.0, probs), LEE_FLOOR, 1.0)
    turned = op("Tanh", op("Mul", op("Log", op("Div", p, rest)), gamma / 2))
    y = op("Sub", probs, op("Mul", turned, half))
    if odds == "lee2018":
        y = op("Relu", y)
    return op("Div", y, op("ReduceSum", y, np.array([1]), keepdims=1))
