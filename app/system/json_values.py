"""Values of JSON files and settings that every part of the service can hold and write again.

Python reads integers of any length, `NaN` and any depth; the JSON that is written here has none of
them, and whoever meets one late fails late.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator

DEPTH = 16


def portable(value: Any, depth: int = DEPTH) -> Any:
    """The value as given.

    Raises:
        ValueError: a number that is not finite or an integer beyond 64 bits, text that is not
            Unicode, or lists and objects more than `depth` deep.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer does not fit into 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a number is {value}; allowed: finite numbers")
    if isinstance(value, str):
        value.encode()
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError(f"lists and objects are nested more than {DEPTH} deep")
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            portable(each, depth - 1)
    return value


Parameters = Annotated[dict[str, Any], AfterValidator(portable)]
"""Of a defense, as a JSON object."""
