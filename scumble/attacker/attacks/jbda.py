"""JBDA: a few images, and steps from them in the directions in which the copy changes its mind.

Source: Papernot, McDaniel, Goodfellow, Jha, Celik, Swami, "Practical Black-Box Attacks against
Machine Learning" (ASIA CCS 2017, arXiv 1602.02697), section 4.2, with the settings that MAZE
compares itself to. After each fit the set doubles: x' = x + λ sign(∂S_v(x)/∂x), v being the
victim's label of x and S the copy's logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from scumble.attacker import device, ranges
from scumble.attacker.adapt.base import again
from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import Fitting, fit
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class Jbda:
    """Jacobian-based dataset augmentation.

    Attributes:
        seeds: images of the pool to begin with.
        lam: λ, in [0, 1] for images in [0, 1].
        fitting: of the student after each doubling, each time from where it started.
        rounds: how often, after each doubling, the answers are mapped again by the modifiers, with
            the copy fitted so far, and a new copy is fitted to them.
        seed: of the choice of images.
    """

    seeds: int = 150
    lam: float = 0.1
    fitting: Fitting = field(default_factory=Fitting)
    rounds: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self)

    def check(self, budget: int, *, images: bool) -> None:
        """See `Attack`."""
        del budget
        if not images:
            raise AttackError("jbda needs images to query: give a data set with --queries")

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """See `Attack`.

        Raises:
            AttackError: no pool, or no answers that can be used.
        """
        self.check(oracle.remaining, images=pool is not None)
        assert pool is not None  # noqa: S101  # checked above
        rng = np.random.default_rng(self.seed)
        start = copy.deepcopy(student.state_dict())
        new = pool.images[rng.permutation(len(pool))[: self.seeds]]
        x, y = new[:0], np.empty((0, oracle.labels), np.float32)
        while True:
            new = new[rng.permutation(len(new))[: oracle.remaining]]
            try:
                y = np.concatenate([y, oracle(new)])
            except BudgetExhausted:  # what a crash had lost is gone from it
                break
            x = np.concatenate([x, new])
            student.load_state_dict(start)
            fit(student, x, y, self.fitting)
            for _ in range(self.rounds):
                y = again(oracle, x)
                student.load_state_dict(start)
                fit(student, x, y, self.fitting)
            watch(len(x), student)
            if not oracle.remaining:
                break
            new = self._steps(student, x, y)

    def _steps(self, student: nn.Module, x: Images, y: Probs) -> Images:
        """One step from each image, back into [0, 1]; thrown-away answers give no direction."""
        kept = np.isfinite(y).all(1)
        where = device.of(student)
        parts = []
        for i in range(0, int(kept.sum()), 500):
            batch = torch.from_numpy(x[kept][i : i + 500]).to(where).requires_grad_()
            labels = torch.from_numpy(y[kept][i : i + 500].argmax(1)).to(where)
            student(batch).gather(1, labels[:, None]).sum().backward()
            assert batch.grad is not None  # noqa: S101 it has just been computed
            moved = (batch + self.lam * batch.grad.sign()).clamp(0, 1)
            parts.append(moved.detach().cpu().numpy())
        return np.concatenate(parts)


def paper(seed: int) -> Jbda:
    """As MAZE runs it, with SGD."""
    how = Fitting(epochs=10, lr=0.1, optimizer="sgd", warmup=0, ema=0, seed=seed)
    return Jbda(fitting=how, seed=seed)


def cpu(seed: int) -> Jbda:
    """More seeds, a longer and averaged fit: a few minutes for some thousand queries."""
    return Jbda(
        seeds=500,
        fitting=Fitting(epochs=20, loss="centred", batch=64, ema=0.99, seed=seed),
        seed=seed,
    )


PROFILES: dict[str, Callable[[int], Jbda]] = {"paper": paper, "cpu": cpu}
