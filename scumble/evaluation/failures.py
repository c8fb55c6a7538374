"""Recognises attacks that failed on their own, so that no defense gets the credit.

A copy that answers one class for nearly all images, that stays at chance level from the first
checkpoint to the last, or that is at chance level with the same accuracy whatever the defense, has
not learned: the attack needs other settings. Its accuracy says nothing about the defense.

A single copy at chance level is a failure only of an undefended service: an attacker who takes
misleading answers as they are gets one, and with the same settings a good one from true answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from scumble.attacker.result import Point
from scumble.evaluation.scores import Labels, Rows

ONE_CLASS = 0.95  # share of the test images from which a copy answers one class
CHECKPOINTS = 5  # a shorter curve is not judged
CHANCE = 1.5  # times 1/K: agreement up to which a checkpoint is at chance level
DEFENSES = 3  # with copies of exactly the same accuracy
REPEATED = ("fit.lr", "attack.lr_s", "attack.step")
"""The settings with which `repeats.py` tries a failed attack again, one after another."""


def failure(
    copied: Rows, labels: Labels, curve: Sequence[Point], *, undefended: bool = False
) -> str | None:
    """Why an attack counts as failed, None if it does not.

    Args:
        copied: answers (N, K) of the copy on the test set.
        labels: (N,) of the test set.
        curve: checkpoints of the copy.
        undefended: whether the answers were those of the network.
    """
    return one_class(copied, labels) or flat(curve, copied.shape[1], undefended=undefended)


def one_class(copied: Rows, labels: Labels) -> str | None:
    """The reason if the copy answers one class for nearly all images of a test set with several."""
    counts = np.bincount(copied.argmax(1), minlength=copied.shape[1])
    share = counts.max() / len(copied)
    if share < ONE_CLASS or np.bincount(labels).max() / len(labels) >= ONE_CLASS:
        return None
    return f"the copy answers class {counts.argmax()} for {share:.1%} of the test images"


def flat(curve: Sequence[Point], classes: int, *, undefended: bool = False) -> str | None:
    """The reason if no checkpoint of the copy is above chance level."""
    best = max((point.agreement for point in curve), default=0.0)
    if best > CHANCE / classes or len(curve) < (1 if undefended else CHECKPOINTS):
        return None
    if len(curve) == 1:
        return "the copy is at chance level, of an undefended service"
    return f"the copy stays at chance level at all {len(curve)} checkpoints"


def equal(accuracy: float, copies: Iterable[tuple[str, float, int]]) -> str | None:
    """The reason if a copy at chance level is as accurate as those on other defenses.

    Args:
        accuracy: of the copy.
        copies: defense, accuracy and number of classes of all copies of the victim, this one too.
    """
    same = {
        name
        for name, other, classes in copies
        # Far below chance a copy has learned: from answers that mislead.
        if 1 / (CHANCE * classes) <= accuracy == other <= CHANCE / classes
    }
    if len(same) < DEFENSES:
        return None
    return f"copies on {len(same)} defenses have the same accuracy, {accuracy:.2%}"
