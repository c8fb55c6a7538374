"""Scores against examples worked by hand."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scumble.evaluation import scores

CLEAN = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [1.0, 0.0, 0.0]])
SERVED = np.array([[0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]])
LABELS = np.array([0, 1, 2, 1])


def test_accuracy_and_agreement():
    assert scores.accuracy(CLEAN, LABELS) == 0.75
    assert scores.accuracy(SERVED, LABELS) == 0.5
    assert scores.agreement(CLEAN, SERVED) == 0.75


def test_l1():
    np.testing.assert_allclose(scores.l1(SERVED, CLEAN), [0.6, 0, 0, 1.0])


def test_kl():
    first = 0.7 * math.log(0.7 / 0.4) + 0.2 * math.log(0.2 / 0.5)
    last = math.log(1 / 0.5)
    assert scores.kl(SERVED, CLEAN) == pytest.approx((first + last) / 4)


def test_kl_is_finite_where_the_served_row_has_a_zero():
    assert scores.kl(np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])) == pytest.approx(
        0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(1e-12))
    )


def test_calibration_error():
    # Confidences .7, .8, .4, 1 in four bins of their own; right, right, right, wrong.
    expected = (abs(1 - 0.7) + abs(1 - 0.8) + abs(1 - 0.4) + abs(0 - 1)) / 4
    assert scores.calibration_error(CLEAN, LABELS) == pytest.approx(expected)
    # One bin: mean confidence .725 against an accuracy of .75.
    assert scores.calibration_error(CLEAN, LABELS, bins=1) == pytest.approx(0.025)


def test_spread_is_students_interval():
    found = scores.spread([0.80, 0.82, 0.87])
    assert found.mean == pytest.approx(0.83)
    # s = .036056, t(2) = 4.303: 4.303 * .036056 / sqrt(3)
    assert found.half == pytest.approx(0.08957, abs=1e-4)
    assert str(found) == "83.0% ± 9.0"
    assert str(scores.spread([0.5])) == "50.0%"
    with pytest.raises(ValueError, match="no values"):
        scores.spread([])


@pytest.mark.parametrize(
    ("seeds", "t"),  # 97.5 % points of Student's t as tables print them
    [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (11, 2.228), (12, 2.201), (31, 2.042)],
)
def test_the_interval_has_students_quantile_for_any_number_of_seeds(seeds, t):
    values = [(-1) ** n for n in range(seeds)]
    expected = t * statistics.stdev(values) / math.sqrt(seeds)
    assert scores.spread(values).half == pytest.approx(expected, rel=3e-4)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_the_interval_is_around_the_mean(values):
    found = scores.spread(values)
    assert min(values) - 1e-9 <= found.mean <= max(values) + 1e-9
    assert found.half >= 0


@given(hnp.arrays(np.float64, (5, 4), elements=st.floats(0.01, 1)))
def test_nothing_is_lost_without_a_defense(raw):
    rows = raw / raw.sum(1, keepdims=True)
    assert scores.l1(rows, rows).max() == 0
    assert scores.kl(rows, rows) == pytest.approx(0, abs=1e-12)
    assert 0 <= scores.calibration_error(rows, np.zeros(5, np.int64)) <= 1


@pytest.mark.parametrize(
    ("rows", "bits"),
    [([[1, 0]], 0), ([[1, 0]] * 9, 0), ([[1, 0], [0, 1]] * 3, 1), (np.eye(8), 3)],
)
def test_an_answer_tells_as_much_as_there_are_answers(rows, bits):
    assert scores.bits(np.asarray(rows, np.float32)) == pytest.approx(bits)
