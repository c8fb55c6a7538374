"""Networks of other tools: the committed figures, and the small ones measured again."""

import json
from dataclasses import replace

import pytest

from docs.generators.networks import NETWORKS, PAGE, RANDOM, RESULTS, measure, torchscript, written

FIGURES = json.loads(RESULTS.read_text())


def test_the_table_has_the_figures_of_the_json():
    page = PAGE.read_text()
    assert written(page, FIGURES) == page, "run python -m docs.generators.networks"
    assert list(FIGURES) == [name for name in NETWORKS if name in FIGURES]


def test_a_dozen_networks_of_many_tools_answer_as_their_tools_do():
    assert len(FIGURES) >= 12
    assert len({row["tool"] for row in FIGURES.values()}) >= 5
    for name, row in FIGURES.items():
        assert row["tool"] == NETWORKS[name].tool
        assert row["float32"]["largest"] < 1e-4, name
        assert row["float32"]["labels"] == row["pictures"], name
        assert row["answered_classes"] > 1, name
        if row["weights"] != RANDOM:  # int8 of random weights is rounding, magnified
            assert row["int8"]["labels"] >= 0.7 * row["pictures"], name


def test_nothing_of_the_measuring_machine_is_in_the_figures():
    assert "/" not in "".join(row["command"] for row in FIGURES.values()).replace("FILE.py", "")


SMALL = {
    "by-hand": NETWORKS["by-hand"].make,
    "digits-scripted": torchscript(traced=False, epochs=0),  # training takes a second
}


@pytest.mark.torch
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_are_measured_again(name, tmp_path):
    found = measure(replace(NETWORKS[name], make=SMALL[name]), tmp_path)
    shown = FIGURES[name]
    assert {key: found[key] for key in ("command", "input", "classes")} == {
        key: shown[key] for key in ("command", "input", "classes")
    }
    assert found["float32"]["largest"] < 1e-5
    assert found["int8"]["largest"] < 0.05
    assert found["float32"]["labels"] == found["pictures"]
