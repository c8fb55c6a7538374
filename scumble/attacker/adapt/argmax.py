"""Labels only: what no defense that keeps the top class can take from an attacker.

Source: the `argmaxed` attacker of Orekondy, Schiele, Fritz, "Knockoff Nets: Stealing Functionality
of Black-Box Models" (CVPR 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.base import Mapped
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class Argmax:
    """Every row becomes the one-hot row of its top class, the first one on ties."""

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with one-hot answers."""
        del student
        return Mapped(oracle, _one_hot)


def _one_hot(rows: Probs, images: Images) -> Probs:
    del images
    labels: Probs = np.eye(rows.shape[1], dtype=np.float32)[rows.argmax(axis=1)]
    return labels
