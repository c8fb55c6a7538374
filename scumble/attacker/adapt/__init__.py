"""Attackers that adapt to a defense: modifiers that stand between any attack and its oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from torch import nn

from scumble.attacker import third_party
from scumble.attacker.adapt.abstention_filter import AbstentionFilter
from scumble.attacker.adapt.argmax import Argmax
from scumble.attacker.adapt.average import Average
from scumble.attacker.adapt.base import Mapped, Modifier
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

__all__ = ["MODIFIERS", "Mapped", "Modifier", "apply", "make"]


def make(name: str, /, **params: Any) -> Modifier:
    """A modifier by its name: `make("top_k", k=5)`, or from a file, `FILE.py:Class`.

    Raises:
        AttackError: unknown modifier or parameter, or a value that is not allowed.
    """
    if name not in MODIFIERS and not third_party.is_file(name):
        allowed = f"{', '.join(MODIFIERS)}, or FILE.py:Class"
        raise AttackError(f"unknown modifier {name!r}; allowed: {allowed}")
    kind = third_party.load(name) if third_party.is_file(name) else MODIFIERS[name]
    own = tuple(signature(kind).parameters)
    for given in params:
        if given not in own:
            allowed = ", ".join(own) or "none"
            raise AttackError(f"{name} has no parameter {given!r}; allowed: {allowed}")
    modifier: Modifier = kind(**params)
    return modifier


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
