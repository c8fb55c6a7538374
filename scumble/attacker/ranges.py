"""Which numbers the fields of attacks and fits may hold: one range for a name, wherever it is."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from scumble.attacker.errors import AttackError


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds.

    Attributes:
        low: the least.
        high: the largest.
        above: whether `low` itself is not allowed.
        below: whether `high` itself is not allowed.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.low < value if self.above else self.low <= value)
            and (value < self.high if self.below else value <= self.high)
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"more than {self.low:g}" if self.above else f"{self.low:g} and more"
        first = f"above {self.low:g}" if self.above else f"{self.low:g}"
        return f"{first} to {'less than ' if self.below else ''}{self.high:g}"


COUNT, PAIR = Range(1), Range(2)
NOT_NEGATIVE, POSITIVE = Range(0), Range(0, above=True)
SHARE, PART, REST = Range(0, 1), Range(0, 1, above=True), Range(0, 1, below=True)
RANGES: dict[str, Range] = {
    # Batch norm needs two images.
    **dict.fromkeys(("batch", "seeds"), PAIR),
    **dict.fromkeys(("epochs", "ask", "steps", "candidates", "mu", "views"), COUNT),
    **dict.fromkeys(("g_steps", "s_steps", "directions", "width", "nz", "memory"), COUNT),
    **dict.fromkeys(("rounds", "replays", "patience"), NOT_NEGATIVE),
    **dict.fromkeys(("lr", "lr_s", "lr_g"), POSITIVE),
    **dict.fromkeys(
        ("step", "weight_decay", "weight", "spread", "difference", "mixup"), NOT_NEGATIVE
    ),
    **dict.fromkeys(("warmup", "lam", "milestones"), SHARE),
    **dict.fromkeys(("first", "early", "curve", "decay"), PART),
    **dict.fromkeys(("ema", "smoothing", "noise", "holdout"), REST),
    "threshold": Range(0, 1, above=True, below=True),
    "seed": Range(0, 2**63, below=True),
}


def check(value: Any) -> None:
    """Check each field of a dataclass that has a name of `RANGES`; in a tuple, each number.

    Raises:
        AttackError: one is out of range.
    """
    for field in dataclasses.fields(value):
        if (allowed := RANGES.get(field.name)) is None:
            continue
        found = getattr(value, field.name)
        for number in found if isinstance(found, tuple) else (found,):
            if number not in allowed:
                raise AttackError(f"{field.name} is {number}; allowed: {allowed}")
