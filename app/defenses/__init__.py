"""Defenses: clean probabilities in, the ones that are sent out back. numpy is all they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from app.defenses.base import Defense, DefenseError, Inputs, Probs
from app.defenses.chain import Chain
from app.defenses.dcp import DCP
from app.defenses.keep_top1 import KeepTop1
from app.defenses.label import Label
from app.defenses.none import NoDefense
from app.defenses.random import Random
from app.defenses.reverse_sigmoid import ReverseSigmoid
from app.defenses.round import Round
from app.defenses.top_k import TopK

TABLE: dict[str, type[Defense]] = {
    "none": NoDefense,
    "dcp": DCP,
    "reverse_sigmoid": ReverseSigmoid,
    "random": Random,
    "round": Round,
    "top_k": TopK,
    "label": Label,
    "chain": Chain,
}

__all__ = [
    "TABLE",
    "Defense",
    "DefenseError",
    "Inputs",
    "KeepTop1",
    "Probs",
    "available",
    "configure",
    "make",
]


def available() -> tuple[str, ...]:
    """The names `make` knows, in the order of the table."""
    return tuple(TABLE)


def make(name: str, /, *, bundle: Any = None, secret: bytes = b"", **params: Any) -> Defense:
    """A defense by its name: `make("dcp", beta=0.7)`; see `configure`."""
    return configure(name, params, bundle=bundle, secret=secret)


def configure(
    name: str, params: Mapping[str, Any], *, bundle: Any = None, secret: bytes = b""
) -> Defense:
    """A defense by its name and a parsed JSON object of parameters.

    Args:
        name: one of `available()`.
        params: the defense's own parameters, and `keep_top1: true` to put the guard around it.
        bundle: the model bundle, for defenses with auxiliary models.
        secret: the server's key, for defenses that draw.

    Raises:
        DefenseError: unknown defense or parameter, one missing, or a value that is not allowed.
    """
    if not isinstance(name, str) or name not in TABLE:
        raise DefenseError(f"unknown defense {name!r}; allowed: {', '.join(TABLE)}")
    kind = TABLE[name]
    own = kind.parameters()
    for given in params:
        if given not in (*own, "keep_top1"):
            allowed = ", ".join((*own, "keep_top1"))
            raise DefenseError(f"{name} has no parameter {given!r}; allowed: {allowed}")
    for field in fields(kind):
        if field.name in own and field.name not in params and field.default is MISSING:
            raise DefenseError(f"{name} needs the parameter {field.name!r}")
    guarded = params.get("keep_top1", False)
    if not isinstance(guarded, bool):
        raise DefenseError(f"{name}: keep_top1 must be true or false, got {guarded!r}")
    values = {given: value for given, value in params.items() if given != "keep_top1"}
    if kind.keyed:
        values["secret"] = secret
    defense = kind.build(bundle, **values)
    return KeepTop1(defense) if guarded else defense
