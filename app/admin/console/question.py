"""What the page asks the preview process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    """One preview.

    Attributes:
        defense: a name that `scumble.defenses.configure` knows.
        params: its parameters.
        golden: which of the bundle's golden inputs, from 1; None: an image follows.
    """

    defense: str
    params: dict[str, Any] = field(default_factory=dict)
    golden: int | None = None
