"""`--set attack.batch=64 --set fit.epochs=5`: overrides of fields of frozen dataclasses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from scumble.attacker.errors import AttackError

T = TypeVar("T")
SEEDED = ("attack", "fit")  # their seeds are those of the run, which its record states


def parse(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`["fit.epochs=5"]` -> `{"fit": {"epochs": 5}}`; values are JSON, or else text.

    Raises:
        AttackError: a text does not have the form `name.field=value`, or a field is set twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        name, dot, field = target.strip().partition(".")
        if not (equals and dot and name and field):
            raise AttackError(f"setting is {text!r}; allowed: name.field=value, e.g. fit.epochs=5")
        fields = found.setdefault(name, {})
        if field in fields:
            raise AttackError(f"{name}.{field} is set twice; allowed: once")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return found


def replace(value: T, name: str, changes: Mapping[str, Any]) -> T:
    """A copy of the dataclass `value` with other fields, each checked against its type.

    Raises:
        AttackError: no such field, or a value that it does not take.
    """
    # All at once, as a field may be allowed with another one only.
    return dataclasses.replace(value, **checked(type(value), name, changes))  # type: ignore[type-var] # T is a dataclass


def checked(kind: type, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values that fields of the dataclass `kind` take for `changes`.

    Raises:
        AttackError: no such field, or a value that it does not take.
    """
    hints: dict[str, Any] = {}
    with suppress(NameError):  # of a third party, whose module imports types for checkers only
        hints = get_type_hints(kind)
    allowed = [field.name for field in dataclasses.fields(kind)]
    found: dict[str, Any] = {}
    for field, new in changes.items():
        if field == "seed" and name in SEEDED:
            raise AttackError(f"{name}.seed is set by --seed alone")
        if field not in allowed:
            raise AttackError(f"{name} has no {field!r}; allowed: {', '.join(allowed)}")
        try:
            found[field] = TypeAdapter(hints.get(field, Any)).validate_python(new)
        except ValidationError as exc:
            reason = exc.errors()[0]["msg"].partition(", unable")[0]
            needed = reason.removeprefix("Input should be ")
            raise AttackError(f"{name}.{field} is {new!r}; allowed: {needed}") from exc
    return found
