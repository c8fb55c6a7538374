"""Metrics of confidence: calibration error and ranking. N images, K classes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]


def calibration_error(answers: Rows, labels: Labels, bins: int = 15) -> float:
    """Expected calibration error: Σ_b n_b/N |accuracy_b − confidence_b| over equal bins.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), equation 3.
    """
    confidence = answers.max(1)
    right = answers.argmax(1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)


def ranking(answers: Rows, labels: Labels) -> float | None:
    """Probability that a right answer is more confident than a wrong one, ties counting half.

    The area under the ROC curve of the confidence (Mann-Whitney); None where all answers are right
    or all are wrong.
    """
    confidence = answers.max(1)
    right = answers.argmax(1) == labels
    hits, misses = int(right.sum()), int((~right).sum())
    if not hits or not misses:
        return None
    _, level, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[level]  # of equal values, their mean
    return float((ranks[right].sum() - hits * (hits + 1) / 2) / (hits * misses))
