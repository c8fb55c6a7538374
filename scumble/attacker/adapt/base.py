"""What every modifier is: something that stands between an attack and the oracle it asks.

A modifier wraps an oracle in another one, so it works with any attack, and modifiers stack. An
answer that it throws away becomes a row of NaN, which losses leave out and later modifiers pass on.
Shapes: `N` images, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torch import nn

from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs


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
        answers = self._inner(images)
        kept = ~np.isnan(answers).any(axis=1)
        mapped = np.full(answers.shape, np.nan, np.float32)
        if kept.any():
            mapped[kept] = self._answer(answers[kept], images[kept])
        return mapped


def check_number(owner: object, field: str, low: float, high: float) -> None:
    """Refuses all but numbers in [low, high], so also bool and NaN; stores a float."""
    value = getattr(owner, field)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise refusal(owner, field, f"must be a number from {low:g} to {high:g}")
    object.__setattr__(owner, field, float(value))


def check_integer(owner: object, field: str, low: int, high: int) -> None:
    """Refuses all but integers in [low, high]."""
    value = getattr(owner, field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise refusal(owner, field, f"must be an integer from {low} to {high}")


def check_choice(owner: object, field: str, *allowed: object) -> None:
    """Refuses all but the given values."""
    if getattr(owner, field) not in allowed:
        raise refusal(owner, field, f"must be one of {', '.join(map(repr, allowed))}")


def check_positives(owner: object, field: str, kind: type[int] | type[float]) -> None:
    """Refuses all but one or more numbers above 0; stores a tuple."""
    value = getattr(owner, field)
    if not isinstance(value, Sequence) or not value or isinstance(value, str):
        raise refusal(owner, field, "must be one or more numbers above 0")
    for part in value:
        allowed = int if kind is int else int | float
        if not isinstance(part, allowed) or isinstance(part, bool) or not 0 < part < 1e6:
            rule = f"must hold {'integers' if kind is int else 'numbers'} above 0 and below 1e6"
            raise refusal(owner, field, rule)
    object.__setattr__(owner, field, tuple(kind(part) for part in value))


def refusal(owner: object, field: str, rule: str) -> AttackError:
    """The error for a parameter: which, what is allowed, what it was."""
    return AttackError(f"{type(owner).__name__}: {field} {rule}, got {getattr(owner, field)!r}")
