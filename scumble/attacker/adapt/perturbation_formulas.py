"""The maps of DCP and Reverse Sigmoid, written from the papers alone.

Sources: Khaled et al., "Efficient Defense Against Model Stealing Attacks on Convolutional Neural
Networks" (ICMLA 2023); Lee et al., "Defending Against Neural Network Model Stealing Attacks Using
Deceptive Perturbations" (DLS 2018), equations 3-4.

With m = max p, the row is y_i = g(p_i) / S, S the sum of g over the row, and

    g(p) = p + c h(p),  h(p) = 1/2 - s(gamma ln o),  c = a beta,  a = 1 / (1 + exp(nu (m - beta))),

s the logistic function, o the odds; Reverse Sigmoid has a = 1. For 0 < gamma < 1 the function g is
convex on (0, 1/2): it falls to its fold p*, then rises. So each class below 1/2 has two inverses.
All in float64, as the inverse magnifies rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Kind = Literal["dcp", "reverse_sigmoid"]
Odds = Literal["clamped", "lee2018"]

FLOOR: dict[str, float] = {"clamped": 1e-12, "lee2018": 1e-9}
"""The probability below which all classes look the same."""


def lift(p: Array, gamma: float | Array, odds: Odds) -> Array:
    """h(p): what is added to a class per unit of c; negative above 1/2 with the odds of Lee."""
    return 0.5 - _logistic(p, gamma, odds)


def lift_slope(p: Array, gamma: float, odds: Odds) -> Array:
    """h'(p); 0 where the odds are clamped."""
    s = _logistic(p, gamma, odds)
    top = 0.5 if odds == "clamped" else 1 - FLOOR[odds]
    inside = (p >= FLOOR[odds]) & (p < top)
    room = np.where(inside, p * (1 - p), 1)
    return np.where(inside, -gamma * s * (1 - s) / room, 0)


def perturb(p: Array, c: float | Array, gamma: float | Array, odds: Odds) -> Array:
    """Rows (N, K) moved by strength c and renormalised; c and gamma may be (N, 1)."""
    q = np.maximum(p + c * lift(p, gamma, odds), 0)
    y: Array = q / q.sum(axis=1, keepdims=True)
    return y


def gate(m: Array, beta: float | Array, nu: float) -> Array:
    """a: 1 for rows less confident than beta, 0 for those more, 1/2 at beta."""
    a: Array = 1 / (1 + np.exp(np.clip(nu * (m - beta), -700, 700)))
    return a


@dataclass(frozen=True)
class KnownDefense:
    """A defense whose parameters the attacker knows.

    Attributes:
        defense: "dcp" or "reverse_sigmoid".
        beta: strength, and for DCP the gate's threshold.
        gamma: slope.
        nu: steepness of DCP's gate.
        odds: "clamped" as the code of DCP has them, or "lee2018".
    """

    defense: Kind
    beta: float
    gamma: float
    nu: float
    odds: Odds

    def __call__(self, p: Array) -> Array:
        """The answers (N, K) to clean rows."""
        return perturb(p, self.strength(p.max(axis=1, keepdims=True)), self.gamma, self.odds)

    def strength(self, m: Array) -> Array:
        """The c of rows whose largest entry is m."""
        if self.defense == "reverse_sigmoid":
            return np.full_like(m, self.beta)
        return self.beta * gate(m, self.beta, self.nu)

    def strength_slope(self, m: Array) -> Array:
        """dc/dm."""
        if self.defense == "reverse_sigmoid":
            return np.zeros_like(m)
        a = gate(m, self.beta, self.nu)
        return -self.beta * self.nu * a * (1 - a)

    @property
    def closed_below(self) -> float:
        """The m up to which at least half of the strength is there; 1 without a gate."""
        return min(self.beta, 1.0) if self.defense == "dcp" else 1.0

    @property
    def open_above(self) -> float:
        """The m above which c < 1e-8 beta; infinite without a gate."""
        return self.beta + 20 / self.nu if self.defense == "dcp" else inf

    def raised(self, p: Array, c: Array) -> Array:
        """g(p)."""
        return p + c * lift(p, self.gamma, self.odds)

    def raised_slope(self, p: Array, c: Array) -> Array:
        """g'(p)."""
        return 1 + c * lift_slope(p, self.gamma, self.odds)

    def fold(self, c: Array) -> Array:
        """p*, where g turns from falling to rising; its slope rises on the way, so bisection."""
        low = np.full_like(c, np.log(FLOOR[self.odds]))
        high = np.full_like(c, np.log(0.5))
        for _ in range(50):
            middle = (low + high) / 2
            falls = self.raised_slope(np.exp(middle), c) < 0
            low, high = np.where(falls, middle, low), np.where(falls, high, middle)
        return np.exp(high)


def _logistic(p: Array, gamma: float | Array, odds: Odds) -> Array:
    """s(gamma ln o) = o^gamma / (1 + o^gamma)."""
    # Odds clamped to 1 are those of p clamped to 1/2, without a division by 0 at p = 1.
    wide = np.clip(p, FLOOR[odds], 0.5 if odds == "clamped" else 1 - FLOOR[odds])
    power = (wide / (1 - wide)) ** gamma
    s: Array = power / (1 + power)
    return s
