"""ModelGuard-W: the solution of its linear program, and what is easily read from it."""

import numpy as np
import pytest
from scipy.optimize import linprog

from scumble.defenses import make
from scumble.defenses.modelguard_w import FLOOR, LEAD, solve


def by_linprog(row, epsilon):
    """The least objective, or None; variables: the answer, then its distance in each class."""
    k, top = len(row), int(row.argmax())
    eye = np.eye(k)
    lead = np.delete(eye - eye[top], top, axis=0)
    above = [np.hstack([eye, -eye]), np.hstack([-eye, -eye])]
    above += [np.append(np.zeros(k), np.ones(k))[None], np.hstack([lead, np.zeros((k - 1, k))])]
    limits = [*row, *-row, epsilon, *np.full(k - 1, -LEAD)]
    found = linprog(
        np.append(np.log(row + FLOOR), np.zeros(k)),
        np.vstack(above),
        limits,
        np.append(np.ones(k), np.zeros(k))[None],
        [1],
        method="highs",
    )
    return found.fun if found.status == 0 else None


def rows(n, k, sharpness, seed):
    logits = sharpness * np.random.default_rng(seed).standard_normal((n, k))
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1, 1.6])
@pytest.mark.parametrize("sharpness", [0.3, 2, 6])
@pytest.mark.parametrize("k", [2, 3, 6, 10])
def test_it_is_the_solution_of_the_linear_program(k, sharpness, epsilon):
    for row in rows(10, k, sharpness, seed=k):
        answer, expected = solve(row, epsilon), by_linprog(row, epsilon)
        if expected is None:
            assert (answer == row).all()
            continue
        assert np.log(row + FLOOR) @ answer == pytest.approx(expected, abs=1e-7)
        top = row.argmax()
        assert answer.sum() == pytest.approx(1, abs=1e-9)
        assert (answer >= -1e-12).all()
        assert np.abs(answer - row).sum() <= epsilon + 1e-9
        assert (answer[top] - np.delete(answer, top) >= LEAD - 1e-9).all()


@pytest.mark.parametrize("row", [[0.5, 0.5], [0.4384, 0.3247, 0.2369]])
def test_the_top_may_have_to_rise(row):
    """To be ahead at all, or because it bounds what the least likely classes may be given."""
    answer = solve(np.array(row), 1.0)
    assert answer[0] > row[0] + LEAD / 4
    assert np.log(np.array(row) + FLOOR) @ answer == pytest.approx(
        by_linprog(np.array(row), 1.0), abs=1e-9
    )


def test_the_predicted_class_leads_in_float32_too():
    p = rows(200, 10, 4, seed=1).astype(np.float32)
    y = make("modelguard_w", epsilon=1)(p, None)
    assert (y.argmax(1) == p.argmax(1)).all()


def test_a_thief_who_gives_the_mass_back_has_the_clean_row():
    """Entries as large as the top are receivers: the defense is exact, and broken."""
    p = rows(400, 10, 6, seed=2)
    p = p[p.max(1) > 0.9]
    y = make("modelguard_w", epsilon=1)(p, None)
    assert np.abs(y - p).sum(1).mean() > 0.9
    guess = y.copy()
    near = (y > y.max(1, keepdims=True) - 2 * LEAD) & (np.arange(10) != y.argmax(1)[:, None])
    guess[near] = 0
    guess[np.arange(len(y)), y.argmax(1)] += 1 - guess.sum(1)
    assert np.median(np.abs(guess - p).sum(1)) < 0.1
