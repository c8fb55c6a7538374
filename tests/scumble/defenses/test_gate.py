"""Thresholds: what is read from a bundle, what is refused, and how many images they lose."""

from functools import cache

import numpy as np
import orjson
import pytest

from scumble.defenses import DefenseError
from scumble.defenses.evidence import Evidence
from scumble.defenses.gate import MEASURES, NEEDS, Gate, read_gate
from scumble.training.gate import Ranked, caught, document, fit_gate, fit_whitener


def seen(n=4000, seed=0, shift=0.0, residual=True):
    """Evidence of made-up images, and logits; a shift makes them more foreign."""
    rng = np.random.default_rng(seed)
    top = 1 - rng.random(n).astype(np.float32) ** 4 - shift / 10
    energy = (rng.normal(10, 2, n) - shift).astype(np.float32)
    far = (rng.gamma(9, 1, n) + shift).astype(np.float32)
    return Evidence(top, energy, far if residual else None), energy[:, None]


@cache
def some_gate(residual=True):
    own, logits = seen(residual=residual)
    whitener = fit_whitener(np.random.default_rng(0).standard_normal((50, 6)), np.arange(50) % 3)
    shifted = [seen(seed=s, shift=0.5, residual=residual)[0] for s in (1, 2)]
    return fit_gate(own, shifted, whitener if residual else None, logits), own, shifted


@pytest.mark.parametrize("loss", [0.001, 0.01, 0.02, 0.05, 0.2])
@pytest.mark.parametrize(
    "measures", [*((m,) for m in MEASURES), ("vim", "top"), ("energy", "top"), ("residual", "top")]
)
def test_the_loss_is_the_share_of_own_images_half_of_them_shifted(measures, loss):
    gate, own, shifted = some_gate()
    lost = caught(gate, measures, loss, own) / 2 + sum(
        caught(gate, measures, loss, part) for part in shifted
    ) / (2 * len(shifted))
    assert lost == pytest.approx(loss, abs=0.001)


def test_no_loss_withholds_nothing():
    gate, own, _ = some_gate()
    assert caught(gate, ("vim", "top"), 0, own) == 0


def test_more_loss_catches_more():
    gate, _, _ = some_gate()
    foreign, _ = seen(seed=9, shift=4)
    found = [caught(gate, ("vim",), loss, foreign) for loss in (0.001, 0.004, 0.01, 0.04, 0.2)]
    assert found == sorted(found)
    assert found[-1] > 0.8


def test_what_is_written_is_read():
    gate, own, _ = some_gate()
    again = read_gate(orjson.loads(orjson.dumps(document(gate, {"pooled": {"1": [[1]]}}))))
    assert again.weight == pytest.approx(gate.weight)
    np.testing.assert_array_equal(again.whitener.matrix, gate.whitener.matrix)
    np.testing.assert_array_equal(again.whitener.mean, gate.whitener.mean)
    assert again.shares["pooled"]["1"].tolist() == [[1]]
    for measures in ((m,) for m in MEASURES):
        assert caught(again, measures, 0.02, own) == pytest.approx(
            caught(gate, measures, 0.02, own), abs=1e-3
        )


def test_a_network_without_features_has_no_residual():
    gate, _, _ = some_gate(residual=False)
    assert gate.best == "energy"
    assert set(gate.thresholds) == {"top", "energy", "energy+top"}
    with pytest.raises(DefenseError, match=r"no thresholds for vim; there: top, energy, energy\+"):
        gate.at(("vim",), 0.01)
    assert read_gate(document(gate, {})).whitener is None


@pytest.mark.parametrize("loss", [0.0001, 0.3])
def test_a_loss_beyond_those_that_were_fitted_is_refused(loss):
    with pytest.raises(DefenseError, match=r"allowed by the bundle: 0, or 0\.001 to 0\.2"):
        some_gate()[0].at(("top",), loss)


@pytest.mark.parametrize("measure", ["energy", "residual", "vim"])
def test_evidence_without_the_score_is_refused(measure):
    with pytest.raises(ValueError, match=f"{measure} needs the score {min(NEEDS[measure])}"):
        some_gate()[0].measure(measure, Evidence(np.ones(1)))


@pytest.mark.parametrize(
    "change",
    [
        {"losses": None},
        {"losses": []},
        {"losses": [0.1, 0.1]},
        {"losses": "x"},
        {"thresholds": {"top": [1, 2, 3]}},
        {"thresholds": 7},
        {"weight": "much"},
        {"whitener": {"mean": "!"}},
        {"whitener": {"mean": "AAAA", "matrix": "AAAA"}},
        {"shares": []},
    ],
)
def test_a_malformed_file_is_refused(change):
    content = {**document(some_gate()[0], {}), **change}
    with pytest.raises(DefenseError, match="the thresholds are malformed"):
        read_gate({key: value for key, value in content.items() if value is not None})


def test_the_quantile_lies_between_two_values():
    values, even = np.array([3.0, 1.0, 2.0, 4.0]), np.full(4, 0.25)
    ranked = Ranked(values, even)
    assert [ranked.cut(share) for share in (0.25, 0.5, 0.75)] == [1.5, 2.5, 3.5]
    assert ranked.cut(0.1) < 1
    assert Ranked(np.ones(4), even).cut(0.5) <= 1  # no image of several equal ones is lost


def test_the_whitener_forgets_the_class_and_sees_what_no_class_has():
    rng = np.random.default_rng(0)
    means = 20 * rng.standard_normal((4, 30))
    classes = np.repeat(np.arange(4), 100)
    spread = rng.standard_normal((6, 30))

    def images(rows, noise):
        return (
            rows
            + rng.standard_normal((len(rows), 6)) @ spread
            + noise * rng.standard_normal((len(rows), 30))
        )

    whitener = fit_whitener(images(means[classes], 0.1), classes)
    own = whitener.residual(images(means[classes], 0.1))
    between = whitener.residual(images((means[classes] + means[classes[::-1]]) / 2, 0.1))
    foreign = whitener.residual(images(means[classes], 3))
    assert np.median(between) < np.quantile(own, 0.95)  # halfway from class to class is not foreign
    assert np.quantile(foreign, 0.05) > np.quantile(own, 0.99)


def test_a_gate_has_all_measures_of_its_network():
    gate: Gate = some_gate()[0]
    assert gate.best == "vim"
    assert set(gate.thresholds) == {*MEASURES, "energy+top", "residual+top", "vim+top"}
