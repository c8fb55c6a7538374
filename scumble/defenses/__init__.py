"""Defenses map clean probabilities to the ones that are sent out. They need numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from scumble.defenses import user_file
from scumble.defenses.adaptive_misinformation import AdaptiveMisinformation
from scumble.defenses.base import Defense, DefenseError, Inputs, Probs, canonical
from scumble.defenses.chain import Chain
from scumble.defenses.codebook import Codebook
from scumble.defenses.dcp import DCP
from scumble.defenses.grad2 import Grad2
from scumble.defenses.keep_top1 import KeepTop1
from scumble.defenses.label import Label
from scumble.defenses.mad import MAD
from scumble.defenses.modelguard_w import ModelGuardW
from scumble.defenses.none import NoDefense
from scumble.defenses.random import Random
from scumble.defenses.reverse_sigmoid import ReverseSigmoid
from scumble.defenses.round import Round
from scumble.defenses.top_k import TopK
from scumble.defenses.withhold import Withhold

TABLE: dict[str, type[Defense]] = {
    "none": NoDefense,
    "dcp": DCP,
    "reverse_sigmoid": ReverseSigmoid,
    "adaptive_misinformation": AdaptiveMisinformation,
    "random": Random,
    "mad": MAD,
    "grad2": Grad2,
    "modelguard_w": ModelGuardW,
    "round": Round,
    "top_k": TopK,
    "label": Label,
    "codebook": Codebook,
    "withhold": Withhold,
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
    """The names that `make` accepts, in the order of the table."""
    return tuple(TABLE)


def make(name: str, /, *, bundle: Any = None, secret: bytes = b"", **params: Any) -> Defense:
    """Make a defense by name: `make("dcp", beta=0.7)`; see `configure`."""
    return configure(name, params, bundle=bundle, secret=secret)


def configure(
    name: str, params: Mapping[str, Any], *, bundle: Any = None, secret: bytes = b""
) -> Defense:
    """Make a defense by name, from a parsed JSON object of parameters.

    Args:
        name: one of `available()`, or `FILE.py:Class` for your own defense.
        params: the defense's parameters, and `keep_top1: true` to wrap it in `KeepTop1`.
        bundle: the source of auxiliary networks, codebook and thresholds: an
            `app.inference.defense_artifacts.DefenseArtifacts`, or any object with its methods.
        secret: the server's key, for defenses that draw at random.

    Raises:
        DefenseError: the defense or a parameter is unknown, a parameter is missing, or a value is
            not allowed.
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
    """Load the class of `FILE.py:Class`, a user's own defense. The file may import its neighbours.

    Raises:
        DefenseError: the name has another form, or there is no such file or defense.
    """
    file, _, attribute = str(name).rpartition(":")
    if not file.endswith(".py"):
        raise DefenseError(
            f"unknown defense {name!r}; allowed: {', '.join(TABLE)}, or FILE.py:Class"
        )
    try:
        module = user_file.load(file).module
    except (Exception, SystemExit) as exc:
        raise DefenseError(f"{file} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    kind = getattr(module, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Defense)):
        raise DefenseError(f"{file} has no subclass of Defense named {attribute!r}")
    return kind
