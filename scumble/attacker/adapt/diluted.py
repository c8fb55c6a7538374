"""Queries hidden among those of an ordinary client.

Source: the dilution that limits every detector which tolerates a share of odd queries from honest
clients: an attacker whose share stays below it is not seen, and pays for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from scumble.attacker import transfer
from scumble.attacker.adapt.base import ModifierParameters
from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import pool
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class Diluted(ModifierParameters):
    """Of all images that are sent, `share` are the attack's; the others are of `benign`.

    The answers to the others are paid for and discarded.

    Attributes:
        benign: data set of what honest clients send; drawn with replacement.
        share: above 0 to 1.
        root: folder with data sets by name; `--data` by default.
        seed: of the draw and the order.

    Raises:
        AttackError: a parameter is out of range.
    """

    benign: str = ""
    share: float = 0.1
    root: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("benign", "root"):
            if not isinstance(getattr(self, name), str | None):
                raise self._refusal(name, "must be text")
        self._check_number("share", 0.001, 1)
        self._check_integer("seed", 0, 2**63 - 1)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle that is asked among other things.

        Raises:
            AttackError: no benign images.
            DatasetError: they cannot be read.
        """
        del student
        self.require_data()
        benign = pool(transfer.data(self.benign, "test", self._folder), oracle.shape).images
        return DilutedOracle(oracle, benign, self.share, self.seed)

    def require_data(self) -> None:
        """Check that the benign images are there.

        Raises:
            AttackError: none are named.
            DatasetError: they are not there.
        """
        if not self.benign:
            raise AttackError("diluted needs what honest clients send: --set diluted.benign=SET")
        transfer.require_data(self.benign, "test", self._folder)

    @property
    def _folder(self) -> Path | None:
        return Path(self.root) if self.root else None


class DilutedOracle:
    """An oracle that asks about other images too.

    Args:
        inner: the oracle that is asked.
        benign: images (M, C, H, W).
        share: of the attack's images among all.
        seed: of the draw and the order.
    """

    def __init__(self, inner: Oracle, benign: Images, share: float, seed: int) -> None:
        self.labels, self.shape, self.step = inner.labels, inner.shape, inner.step
        self._inner = inner
        self._benign = benign
        self._share = share
        self._rng = np.random.default_rng(seed)

    @property
    def remaining(self) -> int:
        """Images that may still be asked, with what hides them."""
        return int(self._inner.remaining * self._share + 1e-9)

    def __call__(self, images: Images) -> Probs:
        """See `Oracle`."""
        if len(images) > self.remaining:
            raise BudgetExhausted(
                f"{len(images)} images asked for, hidden among others; {self.remaining} are left"
            )
        total = min(self._inner.remaining, round(len(images) / self._share))
        others = self._benign[self._rng.integers(0, len(self._benign), total - len(images))]
        order = self._rng.permutation(total)
        answers = self._inner(np.concatenate([images, others])[order])
        found = np.empty_like(answers)
        found[order] = answers
        return found[: len(images)]
