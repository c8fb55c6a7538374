"""The base of modifiers, which sit between an attack and its oracle.

A modifier wraps an oracle in another one, so it works with any attack, and modifiers can be
stacked. A discarded answer becomes a row of NaN, which losses ignore and later modifiers pass on.
Shapes: `N` images, `K` classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import ClassVar, Protocol

import numpy as np
from torch import nn

from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs
from scumble.defenses.parameters import CheckedParameters

PART = 1024  # images that are mapped at a time
REVISED = "attack.rounds needs answers that can be given again, as invert or modelguard keep them"


class Modifier(Protocol):
    """Makes an oracle of an oracle."""

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle that the attack asks instead.

        Args:
            oracle: what is asked in the end.
            student: the copy in training, float32 (N, C, H, W) in [0, 1] -> logits (N, K).

        Raises:
            AttackError: the modifier does not fit the oracle.
        """
        ...


class ModifierParameters(CheckedParameters):
    """Base of the modifiers that take parameters."""

    parameter_error: ClassVar[type[Exception]] = AttackError


class Remembered:
    """An oracle that can give its answers again, without a query.

    Args:
        inner: the oracle that is asked.
    """

    def __init__(self, inner: Oracle) -> None:
        self.labels = inner.labels
        self.shape = inner.shape
        self.step = inner.step
        self._inner = inner
        self._rows: dict[bytes, Probs] = {}

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        return self._inner.remaining

    def __call__(self, images: Images) -> Probs:
        """The inner oracle's answers, which are kept."""
        answers = self._inner(images)
        self._rows.update(zip(map(_digest, images), answers, strict=True))
        return answers

    def again(self, images: Images) -> Probs:
        """The answers (N, K) to images that have been asked about."""
        return np.stack([self._rows[_digest(image)] for image in images])


def _digest(image: Images) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


class Mapped:
    """An oracle whose answers go through a function of each row.

    Args:
        inner: the oracle that is asked.
        answer: (rows (n, K) without NaN, their images (n, C, H, W)) -> rows (n, K), n > 0.
    """

    def __init__(self, inner: Oracle, answer: Callable[[Probs, Images], Probs]) -> None:
        self.labels = inner.labels
        self.shape = inner.shape
        self.step = inner.step
        self._inner = inner
        self._answer = answer

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        return self._inner.remaining

    def __call__(self, images: Images) -> Probs:
        """The mapped answers, float32 (N, K); rows of NaN stay so.

        Raises:
            BudgetExhausted: N is more than `remaining`; nothing was asked.
        """
        return self._map(self._inner(images), images)

    def again(self, images: Images) -> Probs:
        """What the function makes now of answers that have been paid for.

        Raises:
            AttackError: no modifier below it keeps its answers.
        """
        inner = getattr(self._inner, "again", None)
        if inner is None:
            raise AttackError(f"{REVISED}; {type(self._inner).__name__} gives none again")
        return self._map(inner(images), images)

    def _map(self, answers: Probs, images: Images) -> Probs:
        kept = ~np.isnan(answers).any(axis=1)
        mapped = np.full(answers.shape, np.nan, np.float32)
        if kept.any():
            mapped[kept] = self._answer(answers[kept], images[kept])
        return mapped


def again(oracle: Oracle, images: Images) -> Probs:
    """Answers (N, K) that have been paid for, as the modifiers see them with the copy of now.

    They are mapped in parts of at most `PART` images.

    Raises:
        AttackError: no modifier keeps its answers.
    """
    found: Callable[[Images], Probs] | None = getattr(oracle, "again", None)
    if found is None:
        raise AttackError(f"{REVISED}; allowed without them: 0")
    return np.concatenate([found(images[i : i + PART]) for i in range(0, len(images), PART)])
