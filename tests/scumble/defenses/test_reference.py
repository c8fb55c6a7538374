"""Numbers: the published outputs, the equations in plain Python, the facts of the paper."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scumble.defenses import make
from tests.strategies import probs

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "defenses.json").read_text())
CLEAN = {row["id"]: row["p"] for row in VECTORS["rows"]}

betas = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5])
gammas = st.sampled_from([0.1, 0.2, 1.0])


def answer(name, row, **params):
    return make(name, **params)(np.array([row]), None)[0]


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["id"])
def test_equals_the_published_implementation(case):
    clean = np.array([CLEAN[row] for row in case["rows"]], dtype=case["dtype"])
    y = make(case["defense"], **case["params"])(clean, None)
    assert y.dtype == case["dtype"]
    expected = np.array(case["out"], dtype=case["dtype"])
    tolerance = VECTORS["tolerance"][case["dtype"]][case["defense"]]
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


def equation(p, beta, gamma, nu=None, lee=False):
    """The published equations, one float at a time; no gate without nu."""
    gate = 1.0
    if nu is not None:
        exponent = nu * (max(p) - beta)
        gate = 0.0 if exponent > 700 else 1 / (1 + math.exp(exponent))
    q = []
    for value in p:
        if lee:
            clipped = min(max(value, 1e-9), 1 - 1e-9)
            odds = clipped / (1 - clipped)
        else:
            odds = math.inf if value == 1 else value / (1 - value)
            odds = min(max(odds, 1e-12), 1 - 1e-12)
        r = beta * (1 / (1 + math.exp(-gamma * math.log(odds))) - 1 / 2)
        q.append(max(value - gate * r, 0.0))
    return [value / math.fsum(q) for value in q]


@pytest.mark.parametrize("lee", [False, True], ids=["clamped", "lee2018"])
@settings(max_examples=50)
@given(p=probs(min_k=2, max_k=20, max_n=8), beta=betas, gamma=gammas)
def test_equals_the_equations(lee, p, beta, gamma):
    assume(p.max() <= 1)  # a float32 row may be a bit above, where the odds are negative
    tolerance = {
        name: VECTORS["tolerance"][p.dtype.name][name] for name in ("dcp", "reverse_sigmoid")
    }
    gated = make("dcp", beta=beta, gamma=gamma, mode="lee2018" if lee else "reference")
    plain = make("reverse_sigmoid", beta=beta, gamma=gamma, odds="lee2018" if lee else "clamped")
    for row in p:
        values = row.tolist()
        np.testing.assert_allclose(
            gated(row[None], None)[0],
            equation(values, beta, gamma, 1000, lee),
            rtol=0,
            atol=tolerance["dcp"],
        )
        np.testing.assert_allclose(
            plain(row[None], None)[0],
            equation(values, beta, gamma, None, lee),
            rtol=0,
            atol=tolerance["reverse_sigmoid"],
        )


@pytest.mark.parametrize(
    ("odds", "p", "beta", "expected"),
    [
        ("lee2018", (1, 0, 0), 1.28, (0.2345, 0.3827, 0.3827)),
        ("clamped", (1, 0, 0), 1.28, (0.4406, 0.2797, 0.2797)),
        ("lee2018", (0.99, 0.01, 1e-6), 1, (0.538, 0.156, 0.306)),
        ("clamped", (0.99, 0.01, 1e-6), 1, (0.598, 0.136, 0.266)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_forms_of_the_odds(odds, p, beta, expected, dtype):
    y = make("reverse_sigmoid", beta=beta, gamma=0.2, odds=odds)(np.array([p], dtype), None)
    digits = 1e-4 if len(str(expected[0])) == 6 else 1e-3
    np.testing.assert_allclose(y[0], expected, rtol=0, atol=digits)


@pytest.mark.parametrize(
    ("classes", "top", "tail", "l1"),
    [(10, 0.292, 0.079, 1.36), (100, 0.0284, 0.0098, 1.88), (200, 0.0136, 0.0050, 1.91)],
)
def test_at_beta_1_distance_grows_with_the_classes(classes, top, tail, l1):
    p = np.full(classes, 0.03 / (classes - 1))
    p[0] = 0.97
    y = answer("dcp", p, beta=1.0)
    np.testing.assert_allclose([y[0], y[1], abs(y - p).sum()], [top, tail, l1], rtol=0.02)


def test_gate_is_half_open_at_beta():
    # At m = beta a is 1/2, so the answer is that of an open gate at half the strength.
    p = np.array([[0.5, 0.3, 0.2]])
    y = make("dcp", beta=0.5)(p, None)
    np.testing.assert_allclose(y, make("reverse_sigmoid", beta=0.25)(p, None), rtol=1e-15)


@pytest.mark.parametrize("mode", ["reference", "lee2018"])
@given(p=probs(min_k=2), beta=betas)
def test_confident_rows_pass_clean(mode, p, beta):
    p = p[p.max(axis=1) > beta + 0.05]
    y = make("dcp", beta=beta, mode=mode)(p, None)
    np.testing.assert_array_equal(y, p / p.sum(axis=1, keepdims=True))


@given(p=probs(), beta=betas, gamma=gammas)
def test_equal_entries_stay_equal_and_classes_have_no_order(p, beta, gamma):
    defense = make("dcp", beta=beta, gamma=gamma)
    y = defense(p, None)
    for clean, sent in zip(p, y, strict=True):
        values, first = np.unique(clean, return_index=True)
        np.testing.assert_array_equal(sent, sent[first][np.searchsorted(values, clean)])
    order = np.random.default_rng(1).permutation(p.shape[1])
    permuted = defense(np.ascontiguousarray(p[:, order]), None)
    np.testing.assert_allclose(permuted, y[:, order], rtol=32 * np.finfo(p.dtype).eps)


@settings(max_examples=100)
@given(p=probs(), beta=betas, gamma=gammas)
def test_top1_is_kept_above_the_proven_bound(p, beta, gamma):
    bound = beta * (1 / 2 - 1 / (1 + math.exp(-gamma * math.log(1e-12))))
    p = p[p.max(axis=1) >= bound]
    y = make("dcp", beta=beta, gamma=gamma)(p, None)
    top = y[np.arange(len(p)), p.argmax(axis=1)]
    assert (top >= y.max(axis=1) * (1 - 16 * np.finfo(p.dtype).eps)).all()


def test_top1_can_change_below_the_bound():
    y = answer("dcp", [0.6, 0.4, 0.0], beta=1.5, gamma=0.2)
    np.testing.assert_allclose(y, [0.338, 0.243, 0.419], atol=5e-4)


def test_guard_stops_at_the_tie():
    y = answer("dcp", [0.6, 0.4, 0.0], beta=1.5, gamma=0.2, keep_top1=True)
    assert y.argmax() == 0
    assert y[0] == pytest.approx(y[2], abs=1e-14)


@given(p=probs(), decimals=st.integers(1, 8))
def test_round_gives_multiples_in_order(p, decimals):
    y = make("round", decimals=decimals)(p, None)
    units = y.astype(np.float64) * 10**decimals
    counts = np.rint(units)
    slack = 10**decimals * np.finfo(p.dtype).eps
    np.testing.assert_allclose(units, counts, rtol=0, atol=max(slack, 1e-7))
    if slack < 0.1:  # the float still tells the whole number
        assert (counts.sum(axis=1) == 10**decimals).all()
    for clean, sent in zip(p, y, strict=True):
        ascending = np.lexsort((-np.arange(len(clean)), clean))
        assert (np.diff(sent[ascending]) >= 0).all()


def test_round_gives_the_missing_units_to_the_largest_remainders():
    np.testing.assert_array_equal(
        answer("round", [1 / 3, 1 / 3, 1 / 3], decimals=2), [0.34, 0.33, 0.33]
    )
    np.testing.assert_array_equal(
        answer("round", [0.126, 0.127, 0.747], decimals=2), [0.12, 0.13, 0.75]
    )


def test_top_k_prefers_the_lower_index():
    row = [0.125, 0.25, 0.25, 0.25, 0.125]
    np.testing.assert_array_equal(answer("top_k", row, k=2), [0, 0.5, 0.5, 0, 0])


def test_label_takes_the_first_maximum():
    np.testing.assert_array_equal(answer("label", [0.2, 0.4, 0.4]), [0, 1, 0])


def test_chain_is_its_steps_in_order():
    p = np.array([[0.6, 0.3, 0.1]])
    chain = make("chain", steps=[["dcp", {"beta": 1.0}], ["round", {"decimals": 2}]])
    expected = make("round", decimals=2)(make("dcp", beta=1.0)(p, None), None)
    np.testing.assert_array_equal(chain(p, None), expected)
