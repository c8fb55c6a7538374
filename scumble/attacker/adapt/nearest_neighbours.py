"""What the clean row behind an answer may have been, by made-up pairs of the two.

Source: the partial Bayes attacker of Tang et al., "ModelGuard: Information-Theoretic Defense
Against Model Extraction Attacks" (USENIX Security 2024): the mean of the clean rows whose answers
are nearest. Sorting each pair by its answer makes one table do for all classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scumble.attacker.adapt.perturbation_formulas import Array, KnownDefense
from scumble.attacker.adapt.posteriors import draw

CHUNK = 32  # rows at a time, so that their distances fit the cache


class NearestNeighbours:
    """Nearest neighbours among `pairs` drawn rows.

    Args:
        known: the defense.
        classes: K.
        pairs: rows to draw.
        neighbours: how many are averaged.
        scales: of the logits of the drawn rows.
        rng: what draws them.
    """

    def __init__(
        self,
        known: KnownDefense,
        classes: int,
        pairs: int,
        neighbours: int,
        scales: Sequence[float],
        rng: np.random.Generator,
    ) -> None:
        clean = draw(pairs, classes, scales, rng)
        answers = known(clean)
        order = np.argsort(-answers, axis=1, kind="stable")
        self._clean = np.take_along_axis(clean, order, axis=1)
        self._answers = _single(answers, order).T.contiguous()
        self._squares = (self._answers**2).sum(dim=0)
        self._neighbours = neighbours

    def __call__(self, y: Array) -> Array:
        """The mean clean rows (N, K) of answers near y in L2."""
        order = np.argsort(-y, axis=1, kind="stable")
        mean = np.empty_like(y)
        for i, part in enumerate(_single(y, order).split(CHUNK)):
            # |a - y|^2 less |y|^2, which is the same for all pairs.
            far = torch.addmm(self._squares, part, self._answers, alpha=-2)
            nearest = far.topk(self._neighbours, largest=False, sorted=False).indices.numpy()
            mean[i * CHUNK : i * CHUNK + len(part)] = self._clean[nearest].mean(axis=1)
        prior = np.empty_like(y)
        np.put_along_axis(prior, order, mean, axis=1)
        return prior


def _single(rows: Array, order: np.ndarray[tuple[int, ...], np.dtype[np.intp]]) -> torch.Tensor:
    """Sorted rows in float32, for speed."""
    return torch.from_numpy(np.take_along_axis(rows, order, axis=1).astype(np.float32))
