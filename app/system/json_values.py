"""JSON values that every part of the service can store and write again.

Python reads integers of any length, `NaN` and any depth, which orjson cannot write. They are
refused where they are read, so that nothing fails later.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator

from app.errors import ConfigError

DEPTH = 16
SHOWN = 99


def parse(name: str, text: str) -> Any:
    """Parse JSON that a person wrote.

    Args:
        name: of the option or variable, for the message.
        text: its value.

    Raises:
        ConfigError: the text is not valid JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{name} is {text[:SHOWN]!r}, which is not valid JSON: {exc}") from exc


def portable(value: Any, depth: int = DEPTH) -> Any:
    """Return the value unchanged.

    Raises:
        ValueError: a number that is not finite or an integer beyond 64 bits, text that is not
            Unicode, or lists and objects more than `depth` deep.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("integer does not fit into 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"number is {value}; allowed: finite numbers")
    if isinstance(value, str):
        value.encode()
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError(f"lists and objects are nested more than {DEPTH} deep")
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            portable(each, depth - 1)
    return value


Parameters = Annotated[dict[str, Any], AfterValidator(portable)]
"""Parameters of a defense, a JSON object."""
