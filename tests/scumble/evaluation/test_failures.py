"""Copies that have learned nothing are marked, and no defense gets the credit for them."""

import numpy as np
import pytest

from scumble.attacker.result import Point
from scumble.evaluation.failures import failure

CLASSES = 10
LABELS = np.arange(200) % CLASSES
ONE_CLASS, FLAT = "the copy answers class 3 for", "the copy stays at chance level at all"


def answers(wrong, single=None):
    """Rows (200, K): labels that are right but for the first `wrong`, or one class for all."""
    classes = (LABELS + (np.arange(200) < wrong)) % CLASSES
    return np.eye(CLASSES)[classes if single is None else np.full(200, single)]


def curve(*agreements):
    return [Point(queries=i, accuracy=a, agreement=a) for i, a in enumerate(agreements)]


NEARLY = answers(0, single=3)
NEARLY[:10] = answers(0)[:10]
MIXED = answers(0, single=3)
MIXED[:12] = answers(12, single=5)[:12]

CASES = {
    "a good copy": (answers(10), LABELS, curve(0.1, 0.1, 0.5, 0.9, 0.95), None),
    "a bad copy that answers several classes": (answers(200), LABELS, curve(0.0), None),
    "one class for all images": (answers(0, single=3), LABELS, curve(0.1), ONE_CLASS),
    "one class for nearly all images": (NEARLY, LABELS, curve(0.1), ONE_CLASS),
    "one class for fewer": (MIXED, LABELS, curve(0.1), None),
    "one class, as the test set has it": (NEARLY, np.full(200, 3), curve(1.0), None),
    "a flat curve": (answers(200), LABELS, curve(0.1, 0.1, 0.1, 0.1, 0.1), FLAT),
    "a curve within chance": (answers(200), LABELS, curve(0.06, 0.1, 0.15, 0.1, 0.1), FLAT),
    "a flat curve of a good copy": (answers(10), LABELS, curve(*[0.95] * 20), None),
    "a curve that left chance once": (answers(200), LABELS, curve(0.1, 0.2, 0.1, 0.1, 0.1), None),
    "a curve that is too short to judge": (answers(200), LABELS, curve(0.1, 0.1, 0.1, 0.1), None),
    "no curve": (answers(200), LABELS, [], None),
}


@pytest.mark.parametrize(
    ("agreements", "reason"),
    [
        ((0.1,), "the copy is at chance level, of an undefended service"),
        ((0.1, 0.15), "the copy stays at chance level at all 2 checkpoints"),
        ((0.1, 0.16), None),
        ((), None),
    ],
)
def test_a_copy_of_true_answers_has_no_excuse(agreements, reason):
    assert failure(answers(200), LABELS, curve(*agreements), undefended=True) == reason


@pytest.mark.parametrize("case", CASES)
def test_what_counts_as_a_failed_attack(case):
    copied, labels, points, reason = CASES[case]
    found = failure(copied, labels, points)
    assert (found or "").startswith(reason or "")
    assert (found is None) == (reason is None)
