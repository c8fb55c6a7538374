"""Errors of attacks and modifiers in files say whose they are."""

import pytest

from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.third_party import blamed

FILE = "theirs.py:Attack"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("k"), "theirs.py:Attack failed with KeyError: 'k'"),
        (ImportError("No module named 'x'"), "theirs.py:Attack failed with ImportError: No module"),
        (SystemExit(0), "theirs.py:Attack failed with SystemExit: 0"),
    ],
)
def test_what_a_file_raises_is_an_error_of_that_file(error, said):
    with pytest.raises(AttackError) as raised, blamed("knockoff", FILE):
        raise error
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("names", "error"),
    [(["knockoff"], KeyError("k")), ([FILE], BudgetExhausted("spent")), ([], SystemExit(1))],
)
def test_other_errors_are_left_as_they_are(names, error):
    with pytest.raises(type(error)) as raised, blamed(*names):
        raise error
    assert raised.value is error
