"""What pydantic refused, in the words of this project's messages."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MOST = 3  # sentences about one document
WHOLE = ("model_type", "model_attributes_type")  # of a document that is none

SHORTER = (
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
    ("a valid dictionary", "a JSON object"),
    ("a valid list", "a JSON list"),
    ("a valid boolean", "true or false"),
    ("a valid", "a"),
    ("match pattern", "text that matches"),
    ("a integer", "an integer"),
)
SHORT = reprlib.Repr()  # a value may be a document
SHORT.maxstring = SHORT.maxother = 200
SHORT.maxlist = SHORT.maxdict = 20


def allowed(errors: Iterable[ErrorDetails]) -> str:
    """What is allowed, where all of `errors` refused one value: alternatives are joined by `or`."""
    return " or ".join(dict.fromkeys(map(_phrase, errors)))


def sentence(name: str, error: ErrorDetails) -> str:
    """A sentence about one value; without the value if `error` has none."""
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "extra_forbidden":
        return f"{name} is unknown"
    if error["type"] in ("value_error", "json_invalid"):  # these say what is wrong
        return f"{name}: {allowed([error])}"
    value = f"is {SHORT.repr(error['input'])}" if "input" in error else "is not valid"
    return f"{name} {value}; allowed: {allowed([error])}"


def sentences(refusal: ValidationError) -> str:
    """What a document has that is not allowed, by its place; the first few of it."""
    errors = refusal.errors(include_url=False)
    found = [_placed(error) for error in errors[:MOST]]
    if len(errors) > MOST:
        found.append(f"and {len(errors) - MOST} more")
    return "; ".join(found)


def _placed(error: ErrorDetails) -> str:
    place = ".".join(map(str, error["loc"]))
    if place or error["type"] in WHOLE:
        return sentence(place or "it", error).removesuffix("; in TOML, a table")
    return allowed([error])


def _phrase(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).removeprefix("allowed: ")
    if error["type"] == "model_type":
        return "an object; in TOML, a table"
    if error["type"] == "too_short":
        return f"at least {error['ctx']['min_length']} characters"
    text = re.sub(r"^(Input|Value|String) should (be |have )?", "", error["msg"])
    text = text.partition(", unable")[0].partition(" or instance of")[0]
    for long, short in SHORTER:
        text = text.replace(long, short)
    return text
