"""A gate is fitted to other images than its whitener, so that it loses what was asked."""

import numpy as np
import pytest
from rich.console import Console

from scumble.data.shifts import SHIFTS
from scumble.defenses.gate import MEASURES
from scumble.training.calibrate import gate_table
from scumble.training.gate import caught
from scumble.training.gate_report import LEAST, Ends, fitted_gate

CLASSES, WIDTH = 4, 300


def look(images):
    """Features that the pixels seed; more of them than can be learned from the images at hand."""
    seeds = images.astype(np.int64).sum(axis=(1, 2, 3))
    features = np.stack([np.random.default_rng(s).standard_normal(WIDTH) for s in seeds])
    logits = 4 * features[:, :CLASSES]
    odds = np.exp(logits)
    return Ends(odds / odds.sum(1, keepdims=True), logits, features.astype(np.float32))


def some(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 6, 1), np.uint8)


@pytest.mark.parametrize("measures", [("residual",), ("vim",), ("energy",), ("top",)])
def test_fresh_images_are_lost_as_often_as_was_asked(measures):
    gate = fitted_gate(look, some(LEAST))
    fresh = look(some(1500, seed=1)).evidence(gate.whitener)
    assert caught(gate, measures, 0.05, fresh) == pytest.approx(0.05, abs=0.025)


def test_few_images_give_no_whitener():
    gate = fitted_gate(look, some(LEAST - 1))
    assert gate.whitener is None
    assert set(gate.thresholds) == {"top", "energy", "energy+top"}


def test_the_table_of_a_gate_is_whole_in_80_columns(capsys):
    sets = ["own", *SHIFTS, "fashion_mnist_test", "a_folder_with_a_long_name_of_other_images"]
    kinds = [*MEASURES, "residual+top"]
    found = {kind: {loss: dict.fromkeys(sets, 1.0) for loss in ("0.01", "0.05")} for kind in kinds}
    Console(width=80).print(gate_table(found, "float32: share withheld"))
    shown = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert shown.count("100.0%") == len(kinds) * len(sets) * 2
    assert all(f" {name} " in shown for name in [*kinds, "own", *SHIFTS, "1%", "5%"])
    assert max(map(len, shown.splitlines())) <= 80
