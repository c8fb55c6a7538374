"""Defenses and modifiers check their parameters by the same rules, each with its own error."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from scumble.attacker.adapt.base import ModifierParameters
from scumble.attacker.errors import AttackError
from scumble.defenses.base import Defense, DefenseError
from scumble.defenses.parameters import CheckedParameters


@dataclass(frozen=True)
class Example(CheckedParameters):
    number: Any = 1.0
    integer: Any = 1
    choice: Any = "a"
    counts: Any = (1,)
    scales: Any = (1.0,)

    def __post_init__(self) -> None:
        self._check_number("number", 0, 2)
        self._check_integer("integer", 1, 9)
        self._check_choice("choice", "a", False)
        self._check_positives("counts", int)
        self._check_positives("scales", float)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("number", True, "must be a number from 0 to 2"),
        ("number", float("nan"), "must be a number from 0 to 2"),
        ("number", "1", "must be a number from 0 to 2"),
        ("number", 2.1, "must be a number from 0 to 2"),
        ("integer", True, "must be an integer from 1 to 9"),
        ("integer", 1.0, "must be an integer from 1 to 9"),
        ("integer", 0, "must be an integer from 1 to 9"),
        ("choice", "b", "must be one of 'a', False"),
        ("counts", (), "must be one or more numbers above 0"),
        ("counts", "12", "must be one or more numbers above 0"),
        ("counts", (1.5,), "must hold integers above 0 and below 1e6"),
        ("counts", (True,), "must hold integers above 0 and below 1e6"),
        ("scales", (0.0,), "must hold numbers above 0 and below 1e6"),
        ("scales", (float("nan"),), "must hold numbers above 0 and below 1e6"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_rule(field, value, rule):
    with pytest.raises(ValueError, match=r"^Example: ") as raised:
        Example(**{field: value})
    assert str(raised.value) == f"Example: {field} {rule}, got {value!r}"


def test_numbers_of_numpy_are_stored_as_those_of_python():
    found = Example(np.float32(0.5), np.int64(3), counts=[np.int8(2)], scales=[1])
    assert [found.number, found.integer, found.counts, found.scales] == [0.5, 3, (2,), (1.0,)]
    kinds = [type(found.number), type(found.integer), type(found.counts[0]), type(found.scales[0])]
    assert kinds == [float, int, int, float]


def test_each_room_raises_its_own_error():
    assert Defense.parameter_error is DefenseError
    assert ModifierParameters.parameter_error is AttackError
