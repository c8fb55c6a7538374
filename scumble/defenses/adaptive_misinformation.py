"""Adaptive Misinformation: a network that was trained to be wrong answers for unsure rows.

Source: Kariyappa, Qureshi, "Defending Against Model Stealing Attacks with Adaptive Misinformation"
(CVPR 2020), in the form of the baseline of Khaled et al. (ICMLA 2023): the gate is steeper, and
the victim is not trained to be unsure of out-of-distribution images.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import tanh
from typing import ClassVar

import numpy as np

from scumble.defenses.auxiliary_network import AuxiliaryNetworkDefense
from scumble.defenses.base import Inputs, Probs


@dataclass(frozen=True, kw_only=True)
class AdaptiveMisinformation(AuxiliaryNetworkDefense):
    """Rows less confident than tau are replaced by those of the misinformation network f.

    m = max p,  a = 1 / (1 + exp(nu (m - tau))),  y = (1 - a) p + a f(x).

    A replaced row loses its predicted class and gets that of f.

    Attributes:
        tau: confidence threshold, 0 (none) to 2; from 1.03 on every row is replaced.
        nu: steepness of the gate, 1 to 1e6; the gate is m = tau +- 0.03 wide at 1000.

    Raises:
        DefenseError: a parameter is of the wrong type or out of range.
    """

    file: ClassVar[str] = "misinformation.onnx"
    output: ClassVar[str] = "probabilities"

    tau: float
    nu: float = 1000.0

    def __post_init__(self) -> None:
        self._check_number("tau", 0, 2)
        self._check_number("nu", 1, 1e6)

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The gated rows (N, K).

        Raises:
            ValueError: there are no images, or the network has another number of classes.
        """
        false = self._ask(probs, inputs)
        if false.dtype != probs.dtype:  # float32 rows do not sum to 1 in float64
            false = false.astype(probs.dtype)
            false /= np.add.reduce(false, axis=1, keepdims=True)
        # As in `dcp`: tanh does not overflow, and nu magnifies the rounding of float32.
        slope = self.nu / 2
        gates = [
            (1 - tanh(slope * (m - self.tau))) / 2
            for m in np.maximum.reduce(probs, axis=1).tolist()
        ]
        a = np.array(gates, dtype=probs.dtype)[:, None]
        y = (1 - a) * probs
        y += a * false
        return y
