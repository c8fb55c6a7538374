"""Fit a gate: a whitener of features, and thresholds that lose a chosen share of own images.

Sources: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks" (NeurIPS 2018), for the tied covariance; Wang et al., "ViM" (CVPR 2022), for
the weight of the residual. Shapes: `N` images, `K` classes, `d` features.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from scumble.defenses.evidence import Evidence
from scumble.defenses.gate import MEASURES, Gate, Measure
from scumble.defenses.scores import Whitener

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
LOSSES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
DIRECTIONS = 64  # of the whitener: more are directions of the noise of a few thousand images
SHRINK = 0.003  # of the mean variance, added to each
ROUNDS = 20  # of the bisection


def fit_whitener(features: Array, classes: Labels) -> Whitener:
    """The whitener of features (N, d) of own images.

    The covariance is the one within classes, shared by all of them. Its principal directions are
    whitened, and those in which the means of classes differ are taken out: what a class is says
    nothing about whether an image is foreign.

    Args:
        features: of own images.
        classes: (N,) of the images, as predicted or as labelled.
    """
    features = np.asarray(features, np.float64)
    present, member = np.unique(classes, return_inverse=True)
    means = np.stack([features[member == k].mean(axis=0) for k in range(len(present))])
    inside = features - means[member]
    values, vectors = np.linalg.eigh(inside.T @ inside / len(inside))
    count = min(DIRECTIONS, len(values))
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    floor = SHRINK * max(float(values.mean()), 1e-12)
    matrix = (vectors / np.sqrt(np.maximum(values, 0) + floor)).T
    mean = features.mean(axis=0)
    _, lengths, across = np.linalg.svd((means - mean) @ matrix.T, full_matrices=False)
    differ = across[: min(int((lengths > 1e-6 * lengths[0]).sum()), len(present) - 1, count // 2)]
    matrix = matrix - differ.T @ (differ @ matrix)
    return Whitener(mean.astype(np.float32), matrix.astype(np.float32))


def fit_gate(
    own: Evidence, shifted: Sequence[Evidence], whitener: Whitener | None, logits: Array
) -> Gate:
    """The gate whose loss is a share of own images, of which half are mildly shifted.

    Args:
        own: evidence of the images as they are.
        shifted: of the same under each shift.
        whitener: that the residuals are of; None for the energy alone.
        logits: (N, K) of the images as they are.
    """
    weight = 0.0
    if whitener is not None and own.residual is not None:
        weight = float(logits.max(axis=1).mean() / max(float(own.residual.mean()), 1e-12))
    gate = Gate(np.array(LOSSES), {}, weight, whitener)
    measures = [m for m in MEASURES if whitener is not None or m in ("top", "energy")]
    values = {
        m: np.concatenate([gate.measure(m, part) for part in (own, *shifted)]) for m in measures
    }
    weights = np.ones(len(own.top))
    if shifted:
        rest = sum(len(part.top) for part in shifted)
        weights = np.concatenate([weights / len(weights), np.full(rest, 1 / rest)])
    weights = weights / weights.sum()
    ranked = {m: Ranked(values[m], weights) for m in measures}
    alone: dict[str, npt.NDArray[np.float64]] = {
        m: np.array([[ranked[m].cut(q) for q in LOSSES]]) for m in measures
    }
    both = {
        f"{m}+top": np.array([_pair(ranked[m], ranked["top"], q) for q in LOSSES]).T
        for m in measures
        if m != "top"
    }
    return Gate(gate.losses, {**alone, **both}, weight, whitener)


class Ranked:
    """Values with weights, in order.

    Args:
        values: (N,).
        weights: (N,), their sum being 1.
    """

    def __init__(self, values: Array, weights: Array) -> None:
        self.values = values
        self.weights = weights
        order = np.argsort(values, kind="stable")
        self._sorted = values[order].astype(np.float64)
        self._below = np.cumsum(weights[order])

    def cut(self, share: float) -> float:
        """A threshold below which at most this share of the weight lies, between two values."""
        at = int(np.searchsorted(self._below, share + 1e-12, side="right"))
        at = min(at, len(self._sorted) - 1)
        last = self._sorted[at - 1] if at else self._sorted[at] - 1e-6
        return float((last + self._sorted[at]) / 2)


def _pair(first: Ranked, second: Ranked, share: float) -> tuple[float, float]:
    """Thresholds that lose the same share each, and `share` together."""
    low, high = 0.0, share
    for _ in range(ROUNDS):
        each = (low + high) / 2
        below = (first.values < first.cut(each)) | (second.values < second.cut(each))
        if first.weights[below].sum() > share:
            high = each
        else:
            low = each
    return first.cut(low), second.cut(low)


def caught(gate: Gate, measures: tuple[Measure, ...], loss: float, evidence: Evidence) -> float:
    """Share of images that the gate withholds."""
    cuts = gate.at(measures, loss)
    below = [
        gate.measure(m, evidence) < np.float32(cut) for m, cut in zip(measures, cuts, strict=True)
    ]
    return float(np.logical_or.reduce(below).mean())


def document(gate: Gate, shares: Mapping[str, Any]) -> dict[str, Any]:
    """As `scumble.defenses.gate.read_gate` reads it."""
    assert all(a < b for a, b in pairwise(gate.losses))  # noqa: S101  # the reader asks for it
    whitener = gate.whitener
    return {
        "format": "scumble-gate/1",
        "losses": list(LOSSES),
        "thresholds": {
            name: [[float(f"{cut:.9g}") for cut in row] for row in rows]
            for name, rows in gate.thresholds.items()
        },
        "weight": float(f"{gate.weight:.9g}"),
        "whitener": None
        if whitener is None
        else {
            "mean": b64encode(whitener.mean.astype("<f4").tobytes()).decode(),
            "matrix": b64encode(whitener.matrix.astype("<f4").tobytes()).decode(),
        },
        "shares": dict(shares),
    }
