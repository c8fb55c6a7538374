"""FixMatch: a copy that also learns from images that nobody was asked about.

Source: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and
Confidence" (NeurIPS 2020, arXiv 2001.07685). Where the copy is sure of a slightly changed image, a
strongly changed one must get the same label. The rest of the pool is unlabelled; it may be of the
victim's own kind or not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scumble.attacker import ranges
from scumble.attacker.adapt.base import again
from scumble.attacker.attacks.knockoff import Rows, Shuffled
from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.losses import LOSSES
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import OPTIMIZERS, Fitting, falling, forward, targets
from scumble.attacker.transports import Probs
from scumble.progress import bar
from scumble.training.train import AUGMENTS, chain, cutout, follow, light


@dataclass(frozen=True)
class FixMatch:
    """Answers to images drawn at random, and the images that were not asked about.

    Attributes:
        fitting: `augment` is the slight change; `epochs` count the answers. `mixup`,
            `holdout` and `patience` are 0.
        mu: unlabelled images for each answer of a batch.
        threshold: probability from which a label of the copy counts.
        weight: of the unlabelled part.
        rounds: how often the answers are mapped again by the modifiers, with the copy fitted so
            far, and a new copy is fitted to them.
        ask: images asked about at a time.
        seed: of the choice of images.
    """

    fitting: Fitting = field(default_factory=lambda: Fitting(loss="ce"))
    mu: int = 3
    threshold: float = 0.95
    weight: float = 1.0
    rounds: int = 0
    ask: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self)
        for name in ("mixup", "holdout", "patience"):
            if value := getattr(self.fitting, name):
                raise AttackError(f"{name} is {value}; allowed in fixmatch: 0")

    def check(self, budget: int, *, images: bool) -> None:
        """See `Attack`."""
        del budget
        if not images:
            raise AttackError("the attack needs images to query: give a data set with --queries")

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """See `Attack`.

        Raises:
            AttackError: no pool, or fewer than two answers that can be used.
        """
        self.check(oracle.remaining, images=pool is not None)
        assert pool is not None  # noqa: S101  # checked above
        rows, answers = self._ask(oracle, pool)
        start = copy.deepcopy(student.state_dict())
        self._learn(student, pool, rows, answers)
        for _ in range(self.rounds):
            answers = again(oracle, pool.images[rows])
            student.load_state_dict(start)
            self._learn(student, pool, rows, answers)
        watch(len(rows), student)

    def _learn(self, student: nn.Module, pool: Pool, rows: Rows, answers: Probs) -> None:
        """Fit the copy to the answers, and to the images of the pool without one."""
        kept = np.isfinite(answers).all(1)
        if kept.sum() < 2:
            raise AttackError(f"{kept.sum()} of {len(rows)} answers can be used; at least 2 needed")
        rest = np.setdiff1d(np.arange(len(pool)), rows[kept])
        labelled = torch.from_numpy(pool.images[rows[kept]])
        # Without images to spare, the answered ones serve as unlabelled ones too.
        others = torch.from_numpy(pool.images[rest]) if len(rest) else labelled
        self._fit(student, labelled, targets(answers[kept], self.fitting), others)

    def _ask(self, oracle: Oracle, pool: Pool) -> tuple[Rows, Probs]:
        asked: list[Rows] = []
        answers = [np.empty((0, oracle.labels), np.float32)]
        for part in Shuffled(len(pool), self.ask, self.seed):
            rows = part[: oracle.remaining]
            try:
                answers.append(oracle(pool.images[rows]))
            except BudgetExhausted:  # what a crash had lost is gone from it
                break
            asked.append(rows)
            if not oracle.remaining:
                break
        return np.concatenate([np.empty(0, np.int64), *asked]), np.concatenate(answers)

    def _fit(self, net: nn.Module, x: Tensor, y: Tensor, others: Tensor) -> None:
        how = self.fitting
        rng = torch.Generator().manual_seed(how.seed)
        batch = min(how.batch, len(x))
        steps = how.epochs * -(-len(x) // batch)
        optimizer = OPTIMIZERS[how.optimizer](net, how)
        schedule = falling(optimizer, steps, how.warmup)
        slight = AUGMENTS[how.augment]
        loss_of = LOSSES[how.loss](len(x), y.shape[1], how.noise)
        strong = chain(slight, light(0.5), cutout(x.shape[-1] // 2))
        average = copy.deepcopy(net).requires_grad_(False)
        shown = bar(steps, "fit", "step", shown=False)
        net.train()
        for step in range(steps):
            rows = torch.randint(len(x), (batch,), generator=rng)
            more = torch.randint(len(others), (self.mu * batch,), generator=rng)
            views = [slight(x[rows], rng), slight(others[more], rng), strong(others[more], rng)]
            logits, weak, hard = forward(net, torch.cat(views)).split([len(view) for view in views])
            sure, label = weak.detach().softmax(1).max(1)
            unlabelled = F.cross_entropy(hard, label, reduction="none") * (sure >= self.threshold)
            loss = loss_of(logits, y[rows].to(logits.device), rows, step / steps)
            loss = loss + self.weight * unlabelled.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            follow(average, net, min(how.ema, (1 + step) / (10 + step)))
            shown.update()
        shown.close()
        net.load_state_dict(average.state_dict())
        net.eval()


def paper(seed: int) -> FixMatch:
    """SGD, seven unlabelled images for each answer, many passes."""
    how = Fitting(
        epochs=200, lr=0.03, optimizer="sgd", loss="ce", batch=64, warmup=0, ema=0.999, seed=seed
    )
    return FixMatch(fitting=how, mu=7, seed=seed)


def cpu(seed: int) -> FixMatch:
    """For two cores."""
    how = Fitting(epochs=10, lr=0.05, optimizer="sgd", loss="ce", batch=64, ema=0.99, seed=seed)
    return FixMatch(fitting=how, mu=2, seed=seed)


PROFILES: dict[str, Callable[[int], FixMatch]] = {"paper": paper, "cpu": cpu}
