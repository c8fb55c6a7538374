"""Repeats attacks that failed on their own, with another rate or step, before their figure stands.

An attack that failed (`failures.py`) says nothing about the defense until other settings were
tried. Each repeat is a cell of its own, with its own record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from scumble.attacker.attacks.zeroth import PAPER_STEP
from scumble.attacker.run import configure
from scumble.evaluation.experiment import Cell
from scumble.evaluation.failures import REPEATED
from scumble.evaluation.record import Record
from scumble.evaluation.referee import job

SLOWER, LARGER = 0.1, 10.0
"""Factors of the copy's learning rate, and of the step by which slopes are measured."""

ANYWHERE = "http://localhost"  # settings do not depend on the address


def others(cell: Cell) -> Iterator[Cell]:
    """The cell with one other setting each, in the order in which they are tried.

    First a tenth of the copy's learning rate; then, where floats arrive and slopes are measured,
    ten times the step. A setting that the cell has chosen itself is left alone.
    """
    attack: Any = configure(job(cell, ANYWHERE, None, None, 1))[0]
    chosen = {change.partition("=")[0] for change in cell.changes}
    values: dict[str, float] = {}
    if hasattr(attack, "fitting"):
        values["fit.lr"] = SLOWER * attack.fitting.lr
    if hasattr(attack, "lr_s"):
        values["attack.lr_s"] = SLOWER * attack.lr_s
    if hasattr(attack, "step") and cell.transport == "tensor":
        values["attack.step"] = LARGER * (attack.step or PAPER_STEP)
    for name in REPEATED:
        if name in values and name not in chosen:
            yield replace(cell, changes=(*cell.changes, f"{name}={values[name]:g}"))


def missing(cells: Iterable[Cell], found: Callable[[Cell], Record | None]) -> list[Cell]:
    """The next repeat of each cell whose attack failed, as long as its repeats failed too.

    Args:
        cells: none of them a repeat.
        found: the record of a cell, None where there is none.
    """
    needed: list[Cell] = []
    for cell in cells:
        record, left = found(cell), others(cell)
        while record is not None and record.attack_failed and (other := next(left, None)):
            record = found(other)
            if record is None:
                needed.append(other)
    return needed
