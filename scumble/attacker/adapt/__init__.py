"""Attackers that adapt to a defense: modifiers that stand between any attack and its oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn

from scumble.attacker import settings, third_party
from scumble.attacker.adapt.abstention_filter import AbstentionFilter
from scumble.attacker.adapt.argmax import Argmax
from scumble.attacker.adapt.average import Average
from scumble.attacker.adapt.base import REVISED, Mapped, Modifier
from scumble.attacker.adapt.confidence_filter import ConfidenceFilter
from scumble.attacker.adapt.consistency_filter import ConsistencyFilter
from scumble.attacker.adapt.diluted import Diluted
from scumble.attacker.adapt.invert import Invert
from scumble.attacker.adapt.margin_filter import MarginFilter
from scumble.attacker.adapt.modelguard import Modelguard
from scumble.attacker.adapt.oracle_mask import OracleMask
from scumble.attacker.adapt.paced import Paced
from scumble.attacker.adapt.recover import Recover
from scumble.attacker.adapt.top_k import TopK
from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import Oracle

MODIFIERS: dict[str, Callable[..., Modifier]] = {
    "argmax": Argmax,
    "top_k": TopK,
    "confidence_filter": ConfidenceFilter,
    "average": Average,
    "invert": Invert,
    "recover": Recover,
    "margin_filter": MarginFilter,
    "modelguard": Modelguard,
    "consistency_filter": ConsistencyFilter,
    "answered": AbstentionFilter,
    "oracle_mask": OracleMask,
    "diluted": Diluted,
    "paced": Paced,
}

KEEP = ("invert", "modelguard")
ASK = ("average", "consistency_filter", "diluted")
"""Modifiers that can give their answers again, and those that would have to ask again."""

__all__ = ["MODIFIERS", "Diluted", "Mapped", "Modifier", "apply", "check_again", "make"]


def make(name: str, /, **params: Any) -> Modifier:
    """A modifier by its name: `make("top_k", k=5)`, or from a file, `FILE.py:Class`.

    Raises:
        AttackError: unknown modifier or parameter, or a value that is not allowed.
    """
    if name not in MODIFIERS and not third_party.is_file(name):
        allowed = f"{', '.join(MODIFIERS)}, or FILE.py:Class"
        raise AttackError(f"unknown modifier {name!r}; allowed: {allowed}")
    kind: Any = third_party.load(name) if third_party.is_file(name) else MODIFIERS[name]
    own = tuple(signature(kind).parameters)
    for given in params:
        if given not in own:
            allowed = ", ".join(own) or "none"
            raise AttackError(f"{name} has no parameter {given!r}; allowed: {allowed}")
    if third_party.is_file(name):
        return _from_file(kind, name, params)
    modifier: Modifier = kind(**params)
    return modifier


def _from_file(kind: Any, name: str, params: Mapping[str, Any]) -> Modifier:
    if not third_party.has(kind, "__call__"):
        raise AttackError(
            f"{name} is not a modifier; needed: a dataclass with the method __call__, as "
            "scumble.attacker.adapt.Modifier has it"
        )
    checked = settings.checked(kind, third_party.short(name), params)
    modifier: Modifier = third_party.make(kind, name, **checked)
    return modifier


def check_again(names: Sequence[str]) -> None:
    """Check that an attack with `rounds` can have its answers mapped again.

    Args:
        names: of the modifiers, the first nearest to the service. Those of files are not judged.

    Raises:
        AttackError: none of them keeps its answers, or one after that asks again.
    """
    if any(map(third_party.is_file, names)):
        return
    kept = [at for at, name in enumerate(names) if name in KEEP]
    if not kept:
        raise AttackError(f"{REVISED}; allowed without them: 0")
    if after := [name for name in names[kept[-1] :] if name in ASK]:
        raise AttackError(f"{REVISED}; {after[0]} comes after them; allowed: before them")


def apply(modifiers: Sequence[Modifier | str], oracle: Oracle, student: nn.Module) -> Oracle:
    """The oracle behind all modifiers, the first of them nearest to the service.

    Args:
        modifiers: modifiers, or names of those that need no parameter; none is allowed.
        oracle: what is asked in the end.
        student: the copy in training.

    Raises:
        AttackError: unknown modifier, or one that does not fit the oracle.
    """
    for modifier in modifiers:
        chosen = make(modifier) if isinstance(modifier, str) else modifier
        oracle = chosen(oracle, student)
    return oracle
