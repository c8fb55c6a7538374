"""One experiment, a cell of a comparison: victim, defense, attack and seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from scumble.attacker import third_party

LATER = ("recipe", "files")
"""Fields that cells had not when the first records were made; their keys stay as they were."""


@dataclass(frozen=True)
class Defended:
    """A defense, its parameters, and the name it has in tables.

    Attributes:
        name: key of `scumble.defenses.TABLE`, or `FILE.py:Class` of a third party.
        params: its parameters.
        url: of a running service instead; then nothing is started.
    """

    name: str = "none"
    params: dict[str, Any] = field(default_factory=dict)
    url: str | None = None

    @property
    def strength(self) -> float:
        """The parameter that the defense is scaled by; 0 where it has none."""
        return float(next((v for v in self.params.values() if isinstance(v, int | float)), 0.0))

    def __str__(self) -> str:
        given = ", ".join(f"{key} {_said(value)}" for key, value in self.params.items())
        return f"{self.name} ({given})" if given else self.name


def _said(value: object) -> str:
    """A parameter, where that is a defense in the form of one."""
    match value:
        case [str(name), dict(params)]:
            return str(Defended(name, params))
    return str(value)


@dataclass(frozen=True)
class Cell:
    """Everything that determines one result.

    Attributes:
        victim: name of a bundle, or folder of one.
        precision: float32 or int8.
        defense: what stands between it and the attacker.
        attack: key of `ATTACKS`.
        budget: queries.
        queries: the attacker's data set; None for data-free attacks.
        test: data set to measure on; the victim's own by default.
        adapt: modifiers.
        changes: `name.field=value`.
        profile: `cpu` or `paper`.
        student: key of `STUDENTS`, or `auto`.
        recipe: name in `scumble/attacker/recipes.toml`; None for the profile's own settings.
        transport: key of `TRANSPORTS`.
        test_images: how many are used at most; 0 for all.
        seed: of everything random.
        files: SHA-256 of every file whose content decides the result and that no release fixes:
            those of third parties, and what the defense reads from the bundle.
    """

    victim: str
    defense: Defended = field(default_factory=Defended)
    precision: str = "float32"
    attack: str = "knockoff"
    budget: int = 20_000
    queries: str | None = None
    test: str | None = None
    adapt: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    profile: str = "cpu"
    student: str = "auto"
    transport: str = "pixels"
    test_images: int = 0
    seed: int = 0
    recipe: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """All of it for JSON. Fields that older cells lack are left out where they say nothing."""
        whole: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in whole.items() if value or name not in LATER}

    @property
    def key(self) -> str:
        """Name of its file: readable, and a hash of all of it."""
        text = json.dumps(self.described(), sort_keys=True)
        attack = third_party.short(self.attack)
        parts = [self.victim, self.precision, self.defense.name, *self.params(), attack]
        recipe = [self.recipe] if self.recipe else []
        name = "-".join([*parts, *recipe, *map(third_party.short, self.adapt), f"s{self.seed}"])
        name = "".join(c if c.isalnum() or c in "-._" else "_" for c in name)
        return f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def params(self) -> list[str]:
        """The defense's parameters as short words."""
        return [f"{key[0]}{value}" for key, value in self.defense.params.items()]
