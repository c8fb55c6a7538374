"""How far an interrupted training had come, in a file beside the bundle that is being made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

EVERY_S = 60.0


class Checkpoint:
    """A file with the state of one training, which only the same training continues.

    Args:
        path: of the file.
        training: what identifies the training; of another one, the file is not read.
        every: seconds from one writing to the next.
        clock: in seconds.
    """

    def __init__(
        self,
        path: Path,
        training: str,
        every: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._training = training
        self._every = every
        self._clock = clock
        self._written = -math.inf

    def read(self) -> dict[str, Any] | None:
        """The state that was written last; None without a readable one of this training."""
        try:
            found = torch.load(self.path, weights_only=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError):
            return None
        if not isinstance(found, dict) or found.get("training") != self._training:
            return None
        state: dict[str, Any] = found["state"]
        return state

    def write(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write a state, if it is the first one or time for the next."""
        if self._clock() - self._written < self._every:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        torch.save({"training": self._training, "state": state()}, part)
        part.replace(self.path)
        self._written = self._clock()

    def remove(self) -> None:
        """Remove the file: the training is done."""
        self.path.unlink(missing_ok=True)
