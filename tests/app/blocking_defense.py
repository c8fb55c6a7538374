"""A defense that sleeps, waits, hangs or raises for pictures of certain colours."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from scumble.defenses.base import Defense
from tests.pictures import encoded

NAME = f"{Path(__file__)}:Blocking"
SLOW, HUNG, FAILING, HELD = 200, 201, 202, 203
SLOW_S = 0.8
GATE = "BLOCKING_GATE"  # environment variable with the path of a file that ends the wait for HELD


@dataclass(frozen=True, kw_only=True)
class Blocking(Defense):
    """Gives what it gets, sooner or later."""

    def __call__(self, probs, inputs):
        for value, seconds in ((SLOW, SLOW_S), (HUNG, 3600)):
            if (inputs == value).all(axis=(1, 2, 3)).any():
                time.sleep(seconds)
        if (inputs == HELD).all(axis=(1, 2, 3)).any():
            gate = Path(os.environ[GATE])
            begun(gate).touch()
            while not gate.exists():
                time.sleep(0.01)
        if (inputs == FAILING).all(axis=(1, 2, 3)).any():
            raise ZeroDivisionError
        return probs


def begun(gate: Path) -> Path:
    """The file that says that a picture of the colour HELD has arrived."""
    return gate.with_suffix(".begun")


def plain(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((8, 8, 3), value, np.uint8)))
