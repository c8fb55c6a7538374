"""Attacks that failed are repeated with other settings, one after another."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from scumble.evaluation.experiment import Cell, Defended
from scumble.evaluation.failures import REPEATED
from scumble.evaluation.plans import PLANS
from scumble.evaluation.repeats import missing, others
from scumble.evaluation.summary import same_but_one_change

CELL = Cell("mnist", Defended("dcp"))
DATA_FREE = replace(CELL, attack="dfme", transport="tensor")


@pytest.mark.parametrize(
    ("cell", "settings"),
    [
        (replace(CELL, changes=("fit.epochs=2",)), ["fit.lr=0.0003"]),
        (replace(CELL, recipe="cifar10-labels", changes=("fit.optimizer=sgd", "fit.lr=0.2")), []),
        (DATA_FREE, ["attack.lr_s=0.01", "attack.step=0.01"]),
        (replace(DATA_FREE, attack="maze"), ["attack.lr_s=0.01", "attack.step=0.01"]),
        (replace(DATA_FREE, transport="pixels"), ["attack.lr_s=0.01"]),
        (replace(DATA_FREE, changes=("attack.lr_s=0.02",)), ["attack.step=0.01"]),
        (replace(DATA_FREE, attack="disguide"), ["attack.lr_s=0.002"]),
    ],
    ids=str,
)
def test_what_is_tried_instead(cell, settings):
    tried = list(others(cell))
    assert [other.changes[-1] for other in tried] == settings
    for other in tried:
        assert replace(other, changes=cell.changes) == cell
        assert same_but_one_change(other.described(), cell.described())


FAILED, LEARNED = SimpleNamespace(attack_failed="one class"), SimpleNamespace(attack_failed=None)
SLOWER, STEPPED = others(DATA_FREE)


@pytest.mark.parametrize(
    ("records", "next_ones"),
    [
        ({}, []),
        ({DATA_FREE.key: LEARNED}, []),
        ({DATA_FREE.key: FAILED}, [SLOWER]),
        ({DATA_FREE.key: FAILED, SLOWER.key: LEARNED}, []),
        ({DATA_FREE.key: FAILED, SLOWER.key: FAILED}, [STEPPED]),
        ({DATA_FREE.key: FAILED, SLOWER.key: FAILED, STEPPED.key: FAILED}, []),
    ],
)
def test_the_next_repeat_is_run_until_one_learns(records, next_ones):
    assert missing([DATA_FREE], lambda cell: records.get(cell.key)) == next_ones


@pytest.mark.parametrize("plan", PLANS)
def test_no_cell_of_a_plan_looks_like_a_repeat(plan):
    changes = [change for cell in PLANS[plan]() for change in cell.changes]
    assert not [change for change in changes if change.partition("=")[0] in REPEATED]
