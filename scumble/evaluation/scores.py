"""Metrics of answers, as plain functions of arrays. N images, K classes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from scumble.training.confidence import Labels, Rows, calibration_error, ranking

__all__ = [
    "Labels",
    "Rows",
    "Spread",
    "accuracy",
    "agreement",
    "bits",
    "calibration_error",
    "kl",
    "l1",
    "ranking",
    "spread",
]

TINY = 1e-12  # as small as a probability is taken to be in a logarithm


@dataclass(frozen=True)
class Spread:
    """Mean and half of the 95 % interval over seeds; None with a single seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1%}" + ("" if self.half is None else f" ± {100 * self.half:.1f}")


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95 % interval (Student's t) of one value per seed.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("no values")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Spread(mean, None)
    t = float(stdtrit(n - 1, 0.975))  # the quantile with n - 1 degrees of freedom
    return Spread(mean, t * statistics.stdev(values) / math.sqrt(n))


def accuracy(answers: Rows, labels: Labels) -> float:
    """Share of rows (N, K) whose largest entry is the label."""
    return float((answers.argmax(1) == labels).mean())


def agreement(one: Rows, other: Rows) -> float:
    """Share of rows on which both have the same largest entry."""
    return float((one.argmax(1) == other.argmax(1)).mean())


def l1(served: Rows, clean: Rows) -> npt.NDArray[np.float64]:
    """Σ_k |y_k − p_k| per row, (N,), 0 to 2."""
    distance: npt.NDArray[np.float64] = np.abs(np.float64(served) - np.float64(clean)).sum(1)
    return distance


def kl(served: Rows, clean: Rows) -> float:
    """Mean over the rows of KL(p ‖ y) = Σ_k p_k ln(p_k / y_k), in nats; clamped to `TINY`."""
    p, y = np.float64(clean), np.float64(served)
    terms = p * (np.log(np.maximum(p, TINY)) - np.log(np.maximum(y, TINY)))
    return float(terms.sum(1).mean())


def bits(answers: Rows) -> float:
    """Entropy of the distinct rows, in bits: what one answer can tell at most.

    At most log2 N, so a sample says "at least" where most rows are distinct.
    """
    _, counts = np.unique(answers, axis=0, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0
