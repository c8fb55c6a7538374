"""A defense that sleeps, hangs or raises for pictures of certain colours."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from scumble.defenses.base import Defense
from tests.pictures import encoded

NAME = f"{Path(__file__)}:Stubborn"
SLOW, HUNG, FAILING = 200, 201, 202
SLOW_S = 0.8


@dataclass(frozen=True, kw_only=True)
class Stubborn(Defense):
    """Gives what it gets, sooner or later."""

    def __call__(self, probs, inputs):
        for value, seconds in ((SLOW, SLOW_S), (HUNG, 3600)):
            if (inputs == value).all(axis=(1, 2, 3)).any():
                time.sleep(seconds)
        if (inputs == FAILING).all(axis=(1, 2, 3)).any():
            raise ZeroDivisionError
        return probs


def plain(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((8, 8, 3), value, np.uint8)))
