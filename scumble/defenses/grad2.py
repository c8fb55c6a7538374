"""GRAD²: moves mass to the class whose likelihood grows most along a fixed direction.

Source: Mazeika, Li, Forsyth, "How to Steer Your Adversary: Targeted and Efficient Model Stealing
Defenses with Gradient Redirection" (ICML 2022), with the all-ones direction, as in the baseline of
Khaled et al. (ICMLA 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from scumble.defenses.auxiliary_network import AuxiliaryNetworkDefense
from scumble.defenses.base import Inputs, Probs

FLOOR = 1e-15  # as in the published code, which takes logarithms


@dataclass(frozen=True, kw_only=True)
class Grad2(AuxiliaryNetworkDefense):
    """Maximises <G^T y, 1> over |y - p|_1 <= epsilon, G the gradients of a surrogate's log-softmax.

    The objective is linear in y, with the coefficients score_k = <d log softmax_k / d theta, 1>
    over all parameters theta of the surrogate, so a greedy exchange solves it: epsilon/2 (or all
    other mass, if that is less) moves to the class with the largest score, from the classes with
    the lowest scores first, each emptied before the next. Then y is clipped to [1e-15, 1] and
    divided by its sum.

    The scores are an output of the surrogate's graph, which propagates values and derivatives
    together, so no gradient is computed per class. `scumble/training/dual_numbers.py` makes it.

    Attributes:
        epsilon: bound on the L1 distance, 0 (none) to 2.

    Raises:
        DefenseError: the parameter is of the wrong type or out of range.
    """

    file: ClassVar[str] = "surrogate.onnx"
    output: ClassVar[str] = "scores"

    epsilon: float

    def __post_init__(self) -> None:
        self._check_number("epsilon", 0, 2)

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The redirected rows (N, K).

        Raises:
            ValueError: there are no images, or the network has another number of classes.
        """
        scores = self._ask(probs, inputs)
        if self.epsilon == 0:  # without the floor of 1e-15
            return probs
        y = probs.astype(np.float64)
        best = np.arange(len(y)), scores.argmax(axis=1)
        kept = y[best]
        y[best] = 0  # no mass is taken from this class
        order = scores.argsort(axis=1, kind="stable")
        there = np.take_along_axis(y, order, axis=1)
        total = np.add.accumulate(there, axis=1)
        give = np.minimum(total[:, -1:], self.epsilon / 2)
        # In order: all of a class while the sum is below `give`, then the rest, then nothing.
        taken = np.clip(give - (total - there), 0, there)
        np.put_along_axis(y, order, there - taken, axis=1)
        y[best] = kept + give[:, 0]
        np.clip(y, FLOOR, 1, out=y)
        y /= np.add.reduce(y, axis=1, keepdims=True)
        return y.astype(probs.dtype, copy=False)
