"""The same image several times: noise that is drawn per answer averages out.

Source: the multiple-query attackers of Tang et al., "ModelGuard: Information-Theoretic Defense
Against Model Extraction Attacks" (USENIX Security 2024). Noise keyed to the image does not change
when it is asked again, so the repeats are changed a little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker.adapt.base import ModifierParameters
from scumble.attacker.errors import BudgetExhausted
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class Average(ModifierParameters):
    """The mean of `repeats` answers per image; each repeat costs a query.

    Attributes:
        repeats: 1 to 1000.
        augment: shift the repeats after the first by up to a pixel and move every value by a step.
        seed: of shifts and steps.

    Raises:
        AttackError: a parameter is out of range.
    """

    repeats: int = 4
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_integer("repeats", 1, 1000)
        self._check_choice("augment", False, True)
        self._check_integer("seed", 0, 2**63 - 1)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with averaged answers."""
        del student
        return Averaged(oracle, self)


class Averaged:
    """Asks every image several times."""

    def __init__(self, inner: Oracle, average: Average) -> None:
        self.labels = inner.labels
        self.shape = inner.shape
        self.step = inner.step
        self._inner = inner
        self._average = average
        self._rng = np.random.default_rng(average.seed)

    @property
    def remaining(self) -> int:
        """Images that may still be asked, each with its repeats."""
        return self._inner.remaining // self._average.repeats

    def __call__(self, images: Images) -> Probs:
        """See `Oracle`."""
        return self._combined(self._repeated(images))

    def _repeated(self, images: Images) -> Probs:
        """All answers (repeats, N, K); an image itself is asked about first."""
        n, repeats = len(images), self._average.repeats
        if n > self.remaining:
            raise BudgetExhausted(
                f"{n} images asked for, {repeats} times each; {self.remaining} are left"
            )
        copies = np.stack([images, *(self._copy(images) for _ in range(repeats - 1))], axis=1)
        # One call, so that requests stay full; image by image, so that a budget of the service that
        # ends it cuts few of them.
        answers = self._inner(copies.reshape(n * repeats, *images.shape[1:]))
        return answers.reshape(n, repeats, self.labels).transpose(1, 0, 2)

    def _combined(self, answers: Probs) -> Probs:
        """One row for each image (N, K)."""
        thrown = np.isnan(answers).any(axis=2, keepdims=True)
        total = np.where(thrown, 0, answers.astype(np.float64)).sum(axis=0)
        mass = total.sum(axis=1, keepdims=True)
        mean: Probs = (total / np.where(mass > 0, mass, np.nan)).astype(np.float32)
        return mean

    def _copy(self, images: Images) -> Images:
        if not self._average.augment:
            return images
        n, _, height, width = images.shape
        down, right = self._rng.integers(-1, 2, (2, n, 1))
        # An edge that moves inwards leaves its last line behind.
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        shifted = images[
            np.arange(n)[:, None, None, None],
            np.arange(images.shape[1])[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        # At least a step, or the service would not see it.
        size = np.float32(max(self.step, 1 / 255))
        signs = self._rng.integers(0, 2, images.shape).astype(np.float32) * 2 - 1
        copy: Images = (shifted + size * signs).clip(0, 1)
        return copy
