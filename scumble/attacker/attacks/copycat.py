"""Copycat CNN: labels of natural images, as many of each class, cross-entropy.

Source: Correia-Silva et al., "Copycat CNN: Stealing Knowledge by Persuading Confession with Random
Non-Labeled Data" (IJCNN 2018, arXiv 1806.05476): labels alone are used, and images of classes that
the victim names seldom are repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scumble.attacker.attacks.knockoff import Knockoff, Rows
from scumble.attacker.students import Fitting
from scumble.attacker.transports import Probs

MOST = 10  # times that an image is repeated


@dataclass(frozen=True)
class Copycat(Knockoff):
    """`Knockoff` that learns the label of each answer, balanced; the fields are the same."""

    def _learned(self, rows: Rows, answers: Probs) -> tuple[Rows, Probs]:
        """Labels in place of probabilities, rare ones several times."""
        kept = np.isfinite(answers).all(1)
        labels = answers[kept].argmax(1)
        counts = np.bincount(labels, minlength=answers.shape[1])
        times = np.minimum(MOST, counts.max(initial=1) // np.maximum(1, counts))
        chosen = np.repeat(np.arange(len(labels)), times[labels])
        return rows[kept][chosen], np.eye(answers.shape[1], dtype=np.float32)[labels[chosen]]


def paper(seed: int) -> Copycat:
    """SGD without a schedule's warm-up, five passes, as a network is fine-tuned."""
    how = Fitting(
        epochs=5, lr=0.01, optimizer="sgd", loss="ce", batch=64, warmup=0, ema=0, seed=seed
    )
    return Copycat(fitting=how, seed=seed)


def cpu(seed: int) -> Copycat:
    """For a network that starts from nothing: more passes and a higher rate."""
    how = Fitting(optimizer="sgd", lr=0.1, loss="ce", smoothing=0.1, seed=seed)
    return Copycat(fitting=how, curve=(0.1, 0.3), seed=seed)


PROFILES: dict[str, Callable[[int], Copycat]] = {"paper": paper, "cpu": cpu}
