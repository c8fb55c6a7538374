"""Clean rows drawn from nothing but what a classifier's answers tend to look like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scumble.attacker.adapt.perturbation_formulas import Array


def draw(n: int, classes: int, scales: Sequence[float], rng: np.random.Generator) -> Array:
    """Softmax of s N(0, 1) logits, s drawn from `scales`; every second row with a confident class.

    A trained network is sure of most answers, which Gaussian logits alone rarely are: so half of
    the rows have up to 15 added to one logit.

    Returns:
        float64 (n, classes); no entry is 0.
    """
    logits = rng.standard_normal((n, classes)) * rng.choice(np.asarray(scales), (n, 1))
    sure = rng.random(n) < 0.5
    logits[:, 0] += np.where(sure, rng.uniform(0, 15, n), 0)
    logits -= logits.max(axis=1, keepdims=True)
    odds = np.exp(logits)
    p: Array = odds / odds.sum(axis=1, keepdims=True)
    return rng.permuted(p, axis=1) if classes > 1 else p
