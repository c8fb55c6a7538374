"""Checks of the parameters that defenses and modifiers take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

_INTEGER = int | np.integer
_NUMBER = int | float | np.integer | np.floating


class CheckedParameters:
    """Base of frozen dataclasses that check their fields in `__post_init__`.

    No check accepts a bool as a number.
    """

    parameter_error: ClassVar[type[Exception]] = ValueError
    """Raised for a value that is not allowed; its message is one sentence."""

    def _check_number(self, field: str, low: float, high: float) -> None:
        """Require a number in [low, high], so neither NaN nor infinity; store it as a float."""
        value = getattr(self, field)
        if not _is(value, _NUMBER) or not low <= value <= high:
            raise self._refusal(field, f"must be a number from {low:g} to {high:g}")
        object.__setattr__(self, field, float(value))

    def _check_integer(self, field: str, low: int, high: int) -> None:
        """Require an integer in [low, high]; store it as an int."""
        value = getattr(self, field)
        if not _is(value, _INTEGER) or not low <= value <= high:
            raise self._refusal(field, f"must be an integer from {low} to {high}")
        object.__setattr__(self, field, int(value))

    def _check_choice(self, field: str, *allowed: object) -> None:
        """Require one of the given values."""
        if getattr(self, field) not in allowed:
            raise self._refusal(field, f"must be one of {', '.join(map(repr, allowed))}")

    def _check_positives(self, field: str, kind: type[int] | type[float]) -> None:
        """Require one or more numbers above 0; store them as a tuple of `kind`."""
        value = getattr(self, field)
        if not isinstance(value, Sequence) or not value or isinstance(value, str):
            raise self._refusal(field, "must be one or more numbers above 0")
        for part in value:
            if not _is(part, _INTEGER if kind is int else _NUMBER) or not 0 < part < 1e6:
                numbers = "integers" if kind is int else "numbers"
                raise self._refusal(field, f"must hold {numbers} above 0 and below 1e6")
        object.__setattr__(self, field, tuple(kind(part) for part in value))

    def _refusal(self, field: str, rule: str) -> Exception:
        """The error for a field, with its name, what is allowed, and its value."""
        message = f"{type(self).__name__}: {field} {rule}, got {getattr(self, field)!r}"
        return self.parameter_error(message)


def _is(value: object, kind: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # type: ignore[arg-type]
