"""Random: its invariants, its draw, and that repeats teach nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble.defenses import make
from tests.strategies import probs

CLASSES, IMAGES = 10, 9000


@pytest.fixture
def x():
    return np.random.default_rng(5).integers(0, 256, (IMAGES, 4, 4, 1), dtype=np.uint8)


@pytest.fixture
def p():
    rows = np.full((IMAGES, CLASSES), 0.05)
    rows[:, 3] = 0.55
    return rows


def drawn(y, p, epsilon):
    """The class of each row that got the mass."""
    return (y - (1 - epsilon / 2) * p).argmax(axis=1)


@given(p=probs(min_k=2), epsilon=st.sampled_from([0.0, 0.1, 1.0, 2.0]))
def test_moves_mass_to_one_class_other_than_the_top(p, epsilon):
    y = make("random", epsilon=epsilon, secret=b"a")(p, None)
    if epsilon == 0:
        np.testing.assert_array_equal(y, p)
        return
    eps = np.finfo(p.dtype).eps
    k = drawn(y, p, epsilon)
    assert (k != p.argmax(axis=1)).all()
    expected = (1 - epsilon / 2) * p
    expected[np.arange(len(p)), k] += epsilon / 2
    np.testing.assert_allclose(y, expected, rtol=4 * eps)
    l1 = abs(y - p).sum(axis=1)
    np.testing.assert_allclose(
        l1, epsilon * (1 - p[np.arange(len(p)), k]), rtol=1e-5, atol=64 * eps
    )


def test_draw_is_uniform(p, x):
    k = drawn(make("random", epsilon=0.5, secret=b"a")(p, x), p, 0.5)
    counts = np.bincount(k, minlength=CLASSES)
    assert counts[3] == 0
    expected = IMAGES / (CLASSES - 1)
    chi_square = ((np.delete(counts, 3) - expected) ** 2 / expected).sum()
    assert chi_square < 26.1  # 8 degrees of freedom, p = 0.001; the draw is fixed by the seed


def test_draw_depends_on_secret_and_image_alone(p, x):
    ours, theirs = make("random", epsilon=1, secret=b"a"), make("random", epsilon=1, secret=b"b")
    k = drawn(ours(p, x), p, 1)
    np.testing.assert_array_equal(drawn(make("random", epsilon=1, secret=b"a")(p, x), p, 1), k)
    np.testing.assert_array_equal(drawn(ours(p.astype(np.float32), x), p, 1), k)
    np.testing.assert_array_equal(drawn(ours(p, x[:, ::1]), p, 1), k)
    chance = 1 / (CLASSES - 1)
    assert (drawn(theirs(p, x), p, 1) == k).mean() == pytest.approx(chance, abs=0.02)
    assert (drawn(ours(p, x ^ 1), p, 1) == k).mean() == pytest.approx(chance, abs=0.02)


def test_secret_may_be_longer_than_a_hash_key(p, x):
    long, longer = (make("random", epsilon=1, secret=b"a" * n) for n in (100, 101))
    assert (long(p, x) != longer(p, x)).any()


def test_clean_row_stands_in_for_a_missing_image():
    p = np.random.default_rng(0).dirichlet(np.ones(5), 50)
    defense = make("random", epsilon=1, secret=b"a")
    k = drawn(defense(p, None), p, 1)
    assert len(set(k)) > 1
    p[:, 0] = 0
    k = drawn(defense(p, None), p, 1)
    for spelling in (np.where(p == 0, -p, p), np.asfortranarray(p)):
        np.testing.assert_array_equal(drawn(defense(spelling, None), p, 1), k)


def test_one_input_per_row(p, x):
    with pytest.raises(ValueError, match="9000 rows, but 3 inputs"):
        make("random", epsilon=1)(p, x[:3])
