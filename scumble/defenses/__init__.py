"""Defenses: clean probabilities in, the ones that are sent out back. numpy is all they need."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from scumble.defenses.adaptive_misinformation import AdaptiveMisinformation
from scumble.defenses.base import Defense, DefenseError, Inputs, Probs, canonical
from scumble.defenses.chain import Chain
from scumble.defenses.codebook import Codebook
from scumble.defenses.dcp import DCP
from scumble.defenses.grad2 import Grad2
from scumble.defenses.keep_top1 import KeepTop1
from scumble.defenses.label import Label
from scumble.defenses.mad import MAD
from scumble.defenses.none import NoDefense
from scumble.defenses.random import Random
from scumble.defenses.reverse_sigmoid import ReverseSigmoid
from scumble.defenses.round import Round
from scumble.defenses.top_k import TopK

TABLE: dict[str, type[Defense]] = {
    "none": NoDefense,
    "dcp": DCP,
    "reverse_sigmoid": ReverseSigmoid,
    "adaptive_misinformation": AdaptiveMisinformation,
    "random": Random,
    "mad": MAD,
    "grad2": Grad2,
    "round": Round,
    "top_k": TopK,
    "label": Label,
    "codebook": Codebook,
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
    "canonical",
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
        name: one of `available()`, or `FILE.py:Class` for a defense of one's own.
        params: the defense's own parameters, and `keep_top1: true` to put the guard around it.
        bundle: where auxiliary networks come from: an `app.inference.auxiliary.Auxiliaries`, or
            anything with its methods.
        secret: the server's key, for defenses that draw.

    Raises:
        DefenseError: unknown defense or parameter, one missing, or a value that is not allowed.
    """
    kind = TABLE[name] if isinstance(name, str) and name in TABLE else from_file(name)
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


def from_file(name: str) -> type[Defense]:
    """The class of `FILE.py:Class`, a defense of one's own.

    Raises:
        DefenseError: the name has another form, or there is no such file or defense.
    """
    file, _, attribute = str(name).rpartition(":")
    if not file.endswith(".py"):
        raise DefenseError(
            f"unknown defense {name!r}; allowed: {', '.join(TABLE)}, or FILE.py:Class"
        )
    # Under its own path, so that each file is one module however often it is asked for.
    module = f"scumble_defense_{abs(hash(str(Path(file).resolve())))}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None  # noqa: S101  # its name ends in .py
        assert spec.loader is not None  # noqa: S101  # same
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded  # dataclasses look their module up while it is made
        try:
            spec.loader.exec_module(loaded)
        except Exception as exc:
            del sys.modules[module]
            raise DefenseError(f"{file} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    kind = getattr(sys.modules[module], attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Defense)):
        raise DefenseError(f"{file} has no defense {attribute!r}: a subclass of Defense is needed")
    return kind
