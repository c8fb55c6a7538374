"""The bundle of a cell's victim, and what its copies are measured on."""

from __future__ import annotations

from pathlib import Path

from app.inference.bundle import Bundle, open_bundle
from app.settings import default_model_dir
from scumble.evaluation.experiment import Cell
from scumble.training.measure import own_set


def folder_of(cell: Cell) -> Path:
    """The folder of the victim's bundle.

    Raises:
        ConfigError: no such model.
    """
    folder = Path(cell.victim)
    if folder.is_dir() and (folder / "card.json").is_file():
        return folder
    return open_bundle(default_model_dir(), cell.victim).folder


def measured_on(cell: Cell) -> str:
    """The cell's test set: by default the one that its victim was trained on.

    Raises:
        ConfigError: no such model.
    """
    return cell.test or own_set(Bundle(folder_of(cell)).card)
