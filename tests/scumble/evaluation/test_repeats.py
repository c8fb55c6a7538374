"""Attacks that failed are repeated with other settings, one after another."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from docs.generators.results import CELLS
from scumble.cli import main
from scumble.evaluation import commands
from scumble.evaluation.experiment import Cell, Defended
from scumble.evaluation.failures import REPEATED
from scumble.evaluation.plans import PLANS
from scumble.evaluation.record import read
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


CHANCE = {"label": 0.098, "dcp": 0.098, "codebook": 0.098, "mad": 0.7}


@pytest.mark.parametrize(
    ("defenses", "repeated"),
    [
        (["label", "dcp", "codebook", "mad"], ["label", "dcp", "codebook"]),
        (["label", "dcp", "mad"], []),
    ],
)
def test_copies_at_chance_level_that_are_equal_over_defenses_are_repeated(
    defenses, repeated, tmp_path
):
    one = read(next(CELLS.glob("mnist-float32-dcp-b1.2-g0.2-knockoff-s0-*.json")))
    cells = [replace(CELL, defense=Defended(name)) for name in defenses]
    for cell in cells:
        scores = one.attack.scores.model_copy(update={"accuracy": CHANCE[cell.defense.name]})
        attack = one.attack.model_copy(update={"scores": scores})
        new = one.model_copy(update={"cell": cell.described(), "attack": attack})
        (tmp_path / f"{cell.key}.json").write_text(new.model_dump_json())
    found = missing(cells, commands.compared_record(tmp_path, cells))
    assert [cell.defense.name for cell in found] == repeated
    assert {cell.changes for cell in found} <= {("fit.lr=0.0003",)}


@pytest.mark.parametrize("plan", PLANS)
def test_no_cell_of_a_plan_looks_like_a_repeat(plan):
    changes = [change for cell in PLANS[plan]() for change in cell.changes]
    assert not [change for change in changes if change.partition("=")[0] in REPEATED]


@pytest.mark.parametrize(
    ("learned", "words", "tried"),
    [
        ("", [], ["", "attack.lr_s=0.01", "attack.step=0.01"]),
        ("attack.lr_s=0.01", [], ["", "attack.lr_s=0.01"]),
        ("", ["--no-repeat"], [""]),
    ],
)
def test_evaluate_goes_on_until_an_attack_learns(learned, words, tried, tmp_path, monkeypatch):
    one = next(CELLS.glob("mnist-float32-dcp-b1.2-g0.2-dfme-s0-*.json"))
    asked = []

    def run(cells, out, *args, **options):
        for cell in cells:
            change = (*cell.changes, "")[0]
            asked.append(change)
            reason = None if change and change == learned else "one class"
            record = read(one)
            # The curve of one that failed stays at chance level.
            curve = record.attack.curve if reason else ()
            attack = record.attack.model_copy(update={"curve": curve})
            new = record.model_copy(
                update={"cell": cell.described(), "attack": attack, "attack_failed": reason}
            )
            (out / f"{cell.key}.json").write_text(new.model_dump_json())
        return 0

    monkeypatch.setattr(commands, "run_cells", run)
    command = ["evaluate", "--defense", "dcp", "--attack", "dfme", "--transport", "tensor"]
    command += ["--test", "digits:test", "--no-beside", "--out", str(tmp_path), *words]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert asked == tried
    asked.clear()
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0, again.output
    assert asked == []  # all of them have records
