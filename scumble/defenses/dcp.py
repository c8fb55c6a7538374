"""DCP, the paper's defense: Reverse Sigmoid behind a confidence gate.

Source: Khaled, Dhaouadi, Gohring de Magalhães, Nicolescu, "Efficient Defense Against Model Stealing
Attacks on Convolutional Neural Networks" (ICMLA 2023, arXiv 2309.01838), as in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import tanh
from typing import Literal

import numpy as np

from scumble.defenses.base import Defense, Inputs, Nodes, Probs
from scumble.defenses.reverse_sigmoid import Odds, perturb, perturb_nodes

Mode = Literal["reference", "lee2018"]

OPEN = 10  # from here on, tanh is 1 in float32, and the gate moves every row alike
_ODDS: dict[Mode, Odds] = {"reference": "clamped", "lee2018": "lee2018"}


@dataclass(frozen=True, kw_only=True)
class DCP(Defense):
    """Rows less confident than beta are moved by a reversed sigmoid of strength beta.

    m = max p,  a = 1 / (1 + exp(nu (m - beta))),  r_i = beta (s(gamma ln o_i) - 1/2),
    y_i ~ p_i - a r_i,  s the logistic function.

    The work is the same whether a row is perturbed or not, so timing does not reveal which were.

    Attributes:
        beta: strength and confidence threshold at once, 0 (none) to 10; from 1 on every row moves.
        gamma: slope, 0 to 10; the paper uses 0.2, and 0.1 for CIFAR-100.
        nu: steepness of the gate, 1 to 1e6; the gate is m = beta +- 0.03 wide at 1000.
        mode: "reference": odds clamped as the published code does, a row with m >= 1/2 keeps its
            top-1 up to beta 1. "lee2018": the original odds behind the same gate.

    Raises:
        DefenseError: a parameter is of the wrong type or out of range.
    """

    beta: float
    gamma: float = 0.2
    nu: float = 1000.0
    mode: Mode = "reference"

    def __post_init__(self) -> None:
        self._check_number("beta", 0, 10)
        self._check_number("gamma", 0, 10)
        self._check_number("nu", 1, 1e6)
        self._check_choice("mode", *_ODDS)

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The gated rows (N, K)."""
        del inputs
        # a = (1 - tanh(nu (m - beta) / 2)) / 2 does not overflow. It is computed in float64, as nu
        # magnifies rounding. At a service's batch sizes, Python scalars beat six numpy calls.
        beta, slope, scale = self.beta, self.nu / 2, self.beta / 4
        gates = [
            (1 - tanh(slope * (m - beta))) * scale
            for m in np.maximum.reduce(probs, axis=1).tolist()
        ]
        half = np.array(gates, dtype=probs.dtype)[:, None]
        return perturb(probs, half, self.gamma, _ODDS[self.mode])

    def nodes(self, op: Nodes, probs: str) -> str:
        """The gated rows, in float32."""
        if self.nu / 2 * (self.beta - 1) >= OPEN:  # eight nodes less
            return perturb_nodes(op, probs, self.beta / 2, self.gamma, _ODDS[self.mode])
        top = op("ReduceMax", probs, np.array([1]), keepdims=1)
        # Subtract beta and then its rounding error, so that nu magnifies neither. The clip changes
        # nothing: it keeps optimisers from folding the subtraction into the product.
        near = float(np.float32(self.beta))
        over = op("Clip", op("Sub", top, near), -16.0, 16.0)
        gate = op("Tanh", op("Mul", op("Sub", over, self.beta - near), self.nu / 2))
        half = op("Mul", op("Sub", 1.0, gate), self.beta / 4)
        return perturb_nodes(op, probs, half, self.gamma, _ODDS[self.mode])
