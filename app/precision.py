"""Numbers that a network computes with; here, as settings must be read before numpy is."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bf16", "int8"]
