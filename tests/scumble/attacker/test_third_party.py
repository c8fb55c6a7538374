"""Errors of attacks and modifiers in files say whose they are."""

import httpx2
import pytest
from click.testing import CliRunner

from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.oracle import _detail
from scumble.attacker.third_party import blamed
from scumble.cli import main

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


ATTACK = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Theirs:
    field: object = {field}
    seed: int = 0

    def check(self, budget, *, images):
        {check}

    def __call__(self, oracle, student, pool, watch):
        pass
"""


@pytest.mark.parametrize(
    ("field", "check", "said"),
    [
        ("None", "raise KeyError('k')", "failed with KeyError: 'k'"),
        ("None", "raise SystemExit(0)", "failed with SystemExit: 0"),
        ("print", "pass", "failed with TypeError: Object of type builtin_function_or_method"),
    ],
)
def test_a_file_that_cannot_work_is_refused_before_anything_is_asked(field, check, said, tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(ATTACK.format(field=field, check=check))
    words = ["attack", "http://localhost:1", "--attack", f"{file}:Theirs", "--queries", "digits"]
    words += ["--budget", "100"]
    words += ["--test", "digits:test", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert f"theirs.py:Theirs {said}" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b'{"detail": "no key"}', "no key"),
        (b"x" * 1000, "x" * 200),
        (b"a\x1b]0;title\x07b", "a ]0;title b"),
        (b"[" * 100_000, "[" * 200),
    ],
)
def test_an_error_answer_is_shown_short_and_without_control_characters(sent, shown):
    assert _detail(httpx2.Response(500, content=sent)) == shown
