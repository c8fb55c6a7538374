"""Scores that tell a network's own kind of images from foreign ones, in numpy and as ONNX nodes.

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
    """The energy log sum_k exp z_k of logits (N, K): (N,), larger for what was learned."""
    top = np.maximum.reduce(logits, axis=1, keepdims=True)
    found: Array = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return found


def energy_nodes(op: Nodes, logits: str) -> str:
    """The same as nodes: (N, 1)."""
    top = op("ReduceMax", logits, AXIS, keepdims=1)
    total = op("ReduceSum", op("Exp", op("Sub", logits, top)), AXIS, keepdims=1)
    return op("Add", top, op("Log", total))


@dataclass(frozen=True, eq=False)
class Whitener:
    """What is left of whitened features outside of the directions that own images fill.

    x = scale * (h - mean);  residual = |x - B^T B x|

    No class enters: it is one subspace for all.

    Attributes:
        mean: (d,) of the features of own images.
        scale: (d,) one over their standard deviation.
        basis: B (r, d), orthonormal rows: their principal directions.

    Raises:
        DefenseError: shapes that do not fit each other, or values that are not finite.
    """

    mean: Float32
    scale: Float32
    basis: Float32

    def __post_init__(self) -> None:
        d = len(self.mean) if self.mean.ndim == 1 else 0
        fits = d and self.scale.shape == (d,) and self.basis.ndim == 2 and self.basis.shape[1] == d
        if not fits or not all(
            np.isfinite(part).all() for part in (self.mean, self.scale, self.basis)
        ):
            raise DefenseError(
                f"the whitener has mean {self.mean.shape}, scale {self.scale.shape} and basis "
                f"{self.basis.shape}; allowed: finite (d,), (d,) and (r, d)"
            )

    def residual(self, features: Array) -> Array:
        """(N,) of features (N, d): the larger, the more foreign."""
        x = (features - self.mean) * self.scale
        rest = x - (x @ self.basis.T) @ self.basis
        found: Array = np.sqrt((rest * rest).sum(axis=1))
        return found

    def nodes(self, op: Nodes, features: str) -> str:
        """The same as nodes: (N, 1)."""
        x = op("Mul", op("Sub", features, self.mean), self.scale)
        along = op("MatMul", x, np.ascontiguousarray(self.basis.T))
        rest = op("Sub", x, op("MatMul", along, self.basis))
        return op("Sqrt", op("ReduceSum", op("Mul", rest, rest), AXIS, keepdims=1))


def fit_whitener(features: Array, directions: int) -> Whitener:
    """The whitener of features (N, d) of own images; features that never change weigh nothing."""
    features = np.asarray(features, np.float64)
    mean, spread = features.mean(axis=0), features.std(axis=0)
    moves = spread > 1e-6 * max(float(spread.max()), 1e-12)
    scale = np.where(moves, 1 / np.where(moves, spread, 1), 0)
    x = (features - mean) * scale
    _, vectors = np.linalg.eigh(x.T @ x / max(len(x), 1))
    count = min(directions, x.shape[1] - 1)
    basis = vectors[:, ::-1][:, :count].T
    return Whitener(mean.astype(np.float32), scale.astype(np.float32), basis.astype(np.float32))
