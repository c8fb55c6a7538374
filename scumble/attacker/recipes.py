"""Recipes: settings of a strong copy for each victim and kind of answer; see `recipes.toml`."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scumble.attacker.errors import AttackError

FILE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Recipe:
    """How a strong copy of one victim is made.

    Attributes:
        student: key of `STUDENTS`.
        fit: fields of `Fitting`.
    """

    student: str
    fit: dict[str, Any]


def recipes() -> dict[str, Recipe]:
    """All recipes, by name: `mnist-labels` is for `mnist` from labels."""
    found = tomllib.loads(FILE.read_text())
    return {name: Recipe(**fields) for name, fields in found.items()}


def recipe(name: str) -> Recipe:
    """The recipe `name`.

    Raises:
        AttackError: no such recipe.
    """
    known = recipes()
    if name not in known:
        raise AttackError(f"recipe is {name!r}; allowed: {', '.join(known)}")
    return known[name]


def hashes(name: str | None) -> dict[str, str]:
    """SHA-256 of the settings of a recipe, by what it is called in a cell; empty without one.

    Raises:
        AttackError: no such recipe.
    """
    if name is None:
        return {}
    text = json.dumps(asdict(recipe(name)), sort_keys=True)
    return {f"recipe {name}": hashlib.sha256(text.encode()).hexdigest()}
