"""Out-of-distribution scores of images, in numpy and as ONNX nodes.

Sources: Liu et al., "Energy-based Out-of-distribution Detection" (NeurIPS 2020); Wang et al.,
"ViM: Out-Of-Distribution with Virtual-logit Matching" (CVPR 2022), for the residual. Shapes: `N`
images, `K` classes, `d` features (the input of the network's last linear layer), `r` directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scumble.defenses.base import DefenseError, Nodes

Array = npt.NDArray[np.floating[Any]]
Float32 = npt.NDArray[np.float32]
AXIS = np.array([1])


def energy(logits: Array) -> Array:
    """The energy log sum_k exp z_k of logits (N, K): (N,), larger for in-distribution images."""
    top = np.maximum.reduce(logits, axis=1, keepdims=True)
    found: Array = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return found


def energy_nodes(op: Nodes, logits: str) -> str:
    """The energy as ONNX nodes: (N, 1)."""
    top = op("ReduceMax", logits, AXIS, keepdims=1)
    total = op("ReduceSum", op("Exp", op("Sub", logits, top)), AXIS, keepdims=1)
    return op("Add", top, op("Log", total))


@dataclass(frozen=True, eq=False)
class Whitener:
    """What whitened features have outside of the directions in which classes differ.

    residual = |A (h - mean)|

    No class enters: it is one matrix for all. `scumble/training/gate.py` fits it.

    Attributes:
        mean: (d,) of the features of own images.
        matrix: A (r, d).

    Raises:
        DefenseError: shapes that do not fit each other, or values that are not finite.
    """

    mean: Float32
    matrix: Float32

    def __post_init__(self) -> None:
        d = len(self.mean) if self.mean.ndim == 1 else 0
        fits = d and self.matrix.ndim == 2 and self.matrix.shape[1] == d
        if not (fits and np.isfinite(self.mean).all() and np.isfinite(self.matrix).all()):
            raise DefenseError(
                f"the whitener has mean {self.mean.shape} and matrix {self.matrix.shape}; "
                "allowed: finite (d,) and (r, d)"
            )

    def residual(self, features: Array) -> Array:
        """(N,) of features (N, d): the larger, the more foreign."""
        rest = (features - self.mean) @ self.matrix.T
        found: Array = np.sqrt((rest * rest).sum(axis=1))
        return found

    def nodes(self, op: Nodes, features: str) -> str:
        """The same as nodes: (N, 1)."""
        x = op("Sub", features, self.mean)
        rest = op("MatMul", x, np.ascontiguousarray(self.matrix.T))
        return op("Sqrt", op("ReduceSum", op("Mul", rest, rest), AXIS, keepdims=1))
