"""Attacks: from an oracle and a budget to a trained copy.

An attack is a frozen value. Called, it asks the oracle until the budget is used or its plan is
done, trains `student` in place, and shows it to `watch` now and then. All randomness comes from its
`seed`, so that a run can be resumed and repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Protocol

from torch import nn

from scumble.attacker import third_party
from scumble.attacker.attacks import (
    copycat,
    coverage,
    dfme,
    disguide,
    fixmatch,
    ideal,
    jbda,
    knockoff,
    mask_seeking,
    maze,
)
from scumble.attacker.errors import AttackError
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool


class Attack(Protocol):
    """One way to steal."""

    def check(self, budget: int, *, images: bool) -> None:
        """Check before anything is asked whether the attack can be run.

        Args:
            budget: queries.
            images: whether there are images of the attacker's own.

        Raises:
            AttackError: the budget is too small, or images are missing.
        """
        ...

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """Spend the budget and train the copy.

        Args:
            oracle: the victim; its `remaining` is the budget.
            student: float32 (N, C, H, W) in [0, 1] -> logits (N, K); trained in place.
            pool: the attacker's own images; data-free attacks leave it alone.
            watch: called with the queries asked so far and the copy that they gave.

        Raises:
            AttackError: the attack cannot be run with these arguments.
        """
        ...


# attack -> profile -> seed -> the attack: `paper` as published, `cpu` for minutes on two cores
ATTACKS: dict[str, Mapping[str, Callable[[int], Attack]]] = {
    "knockoff": knockoff.PROFILES,
    "dfme": dfme.PROFILES,
    "maze": maze.PROFILES,
    "jbda": jbda.PROFILES,
    "copycat": copycat.PROFILES,
    "mask_seeking": mask_seeking.PROFILES,
    "coverage": coverage.PROFILES,
    "fixmatch": fixmatch.PROFILES,
    "ideal": ideal.PROFILES,
    "disguide": disguide.PROFILES,
}

DATA_FREE = frozenset({"dfme", "maze", "ideal", "disguide"})  # these make their own images


def make(name: str, profile: str = "cpu", *, seed: int = 0) -> Attack:
    """The attack `name` as `profile` has it.

    Args:
        name: key of `ATTACKS`, or `FILE.py:Class`: a frozen dataclass with a field `seed`.
        profile: one of those of the attack; that of a file has "cpu" alone.
        seed: of everything random.

    Raises:
        AttackError: no such attack or profile.
    """
    if third_party.is_file(name):
        if profile != "cpu":
            raise AttackError(f"profile is {profile!r}; allowed with an attack of a file: cpu")
        return from_file(name, seed)
    if name not in ATTACKS:
        allowed = f"{', '.join(ATTACKS)}, or FILE.py:Class"
        raise AttackError(f"attack is {name!r}; allowed: {allowed}")
    if profile not in ATTACKS[name]:
        raise AttackError(f"profile is {profile!r}; allowed: {', '.join(ATTACKS[name])}")
    return ATTACKS[name][profile](seed)


def from_file(name: str, seed: int) -> Attack:
    """The attack `FILE.py:Class`.

    Raises:
        AttackError: no such file, or the class is not an attack.
    """
    kind = third_party.load(name)
    fields = {field.name for field in dataclasses.fields(kind)} if is_dataclass(kind) else set()
    if "seed" not in fields or not third_party.has(kind, "check", "__call__"):
        raise AttackError(
            f"{name} is not an attack; needed: a dataclass with the field seed and the methods "
            "check and __call__, as scumble.attacker.attacks.Attack has them"
        )
    attack: Attack = third_party.make(kind, name, seed=seed)
    return attack
