"""Attacks: from an oracle and a budget to a trained copy.

An attack is a frozen value. Called, it asks the oracle until the budget is used or its plan is
done, trains `student` in place, and shows it to `watch` now and then. All randomness comes from its
`seed`, so that a run can be resumed and repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

from scumble.attacker.attacks import dfme, jbda, knockoff, maze
from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.watch import Watch


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
}

DATA_FREE = frozenset({"dfme", "maze"})  # these make their own images


def make(name: str, profile: str = "cpu", *, seed: int = 0) -> Attack:
    """The attack `name` as `profile` has it.

    Raises:
        AttackError: no such attack or profile.
    """
    if name not in ATTACKS:
        raise AttackError(f"attack is {name!r}; allowed: {', '.join(ATTACKS)}")
    if profile not in ATTACKS[name]:
        raise AttackError(f"profile is {profile!r}; allowed: {', '.join(ATTACKS[name])}")
    return ATTACKS[name][profile](seed)
