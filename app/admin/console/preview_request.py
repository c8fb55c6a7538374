"""A request to the preview process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PreviewRequest:
    """One preview.

    Attributes:
        defense: a name that `scumble.defenses.configure` knows.
        params: its parameters.
        golden: number of a golden input of the bundle, from 1; None if an image follows.
    """

    defense: str
    params: dict[str, Any] = field(default_factory=dict)
    golden: int | None = None
