"""KnockoffNets: ask about images of your own, fit a student to the answers.

Source: Orekondy, Schiele, Fritz, "Knockoff Nets: Stealing Functionality of Black-Box Models" (CVPR
2019, arXiv 1812.02766). `random` asks about images drawn without replacement (section 4.1.1).
`adaptive` learns which classes of the pool are worth asking about (section 4.1.2): a gradient
bandit whose actions are the attacker's own classes and whose reward is high for answers that are
certain, spread over the victim's classes, and not what the student says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from scumble.attacker import ranges
from scumble.attacker.adapt.base import again
from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import Fitting, fit, forward, usable
from scumble.attacker.transports import Probs

STRATEGIES = ("random", "adaptive")
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Knockoff:
    """Natural images, each asked about once.

    Attributes:
        strategy: one of `STRATEGIES`.
        fitting: of the student, on all answers.
        rounds: how often the answers are mapped again by the modifiers, with the copy fitted so
            far, and a new copy is fitted to them.
        early: share of the epochs that each copy but the last gets.
        curve: shares of the answers to which copies are fitted only to be watched.
        ask: images asked about at a time; with `adaptive`, between two updates of the policy.
        lr: of the student while it learns along with the policy; SGD with momentum 0.5.
        seed: of the choice of images.
    """

    strategy: str = "random"
    fitting: Fitting = field(default_factory=Fitting)
    rounds: int = 0
    early: float = 0.5
    curve: tuple[float, ...] = ()
    ask: int = 1024
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise AttackError(f"strategy is {self.strategy!r}; allowed: {', '.join(STRATEGIES)}")
        ranges.check(self)

    def check(self, budget: int, *, images: bool) -> None:
        """See `Attack`."""
        del budget
        if not images:
            raise AttackError("the attack needs images to query: give a data set with --queries")

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """See `Attack`.

        Raises:
            AttackError: no pool, or no answers that can be used.
        """
        self.check(oracle.remaining, images=pool is not None)
        assert pool is not None  # noqa: S101  # checked above
        plan = self._plan(oracle, pool, student)
        asked: list[Rows] = []
        answers: list[Probs] = []
        for rows in plan:
            rows = rows[: oracle.remaining]
            try:
                answers.append(oracle(pool.images[rows]))
            except BudgetExhausted:  # what a crash had lost is gone from it
                break
            asked.append(rows)
            plan.learn(rows, answers[-1])
            if not oracle.remaining:
                break
        if not asked:
            raise AttackError(
                f"no image was asked about: {oracle.remaining} may be; needed: at least 1"
            )
        rows = np.concatenate(asked)
        found = np.concatenate(answers)
        if self.rounds:
            found = self._revised(oracle, pool, rows, found, student)
        self._fit(pool, rows, found, student, watch)

    def _revised(
        self, oracle: Oracle, pool: Pool, rows: Rows, answers: Probs, student: nn.Module
    ) -> Probs:
        """The answers after all rounds; the student is left as it was."""
        start = copy.deepcopy(student.state_dict())
        epochs = max(1, round(self.early * self.fitting.epochs))
        images = pool.images[rows]
        for _ in range(self.rounds):
            student.load_state_dict(start)
            chosen, learned = self._learned(rows, answers)
            fit(student, pool.images[chosen], learned, replace(self.fitting, epochs=epochs))
            answers = again(oracle, images)
        student.load_state_dict(start)
        return answers

    def _plan(self, oracle: Oracle, pool: Pool, student: nn.Module) -> Plan:
        """Which images are asked about."""
        del oracle
        if self.strategy == "random":
            return Shuffled(len(pool), self.ask, self.seed)
        return Bandit(self, pool, student)

    def _learned(self, rows: Rows, answers: Probs) -> tuple[Rows, Probs]:
        """What the copy is fitted to, of what was asked and answered."""
        return rows, answers

    def _fit(
        self, pool: Pool, rows: Rows, answers: Probs, student: nn.Module, watch: Watch
    ) -> None:
        for share in self.curve:
            n = int(share * len(rows))
            chosen, learned = self._learned(rows[:n], answers[:n])
            if np.isfinite(learned).all(1).sum() < 2:  # all refused or thrown away
                continue
            early = copy.deepcopy(student)
            fit(early, pool.images[chosen], learned, self.fitting)
            watch(n, early)
        chosen, learned = self._learned(rows, answers)
        fit(student, pool.images[chosen], learned, self.fitting)
        watch(len(rows), student)


class Plan(Protocol):
    """Which images of a pool are asked about."""

    def __iter__(self) -> Iterator[Rows]:
        """Row numbers, a part at a time."""
        ...

    def learn(self, rows: Rows, answers: Probs) -> None:
        """The answers (n, K) to the part that was given last, or to the beginning of it."""
        ...


class Shuffled:
    """All images, at random.

    Args:
        images: how many there are.
        ask: how many at a time.
        seed: of the order.
    """

    def __init__(self, images: int, ask: int, seed: int) -> None:
        self._order = np.random.default_rng(seed).permutation(images)
        self._ask = ask

    def __iter__(self) -> Iterator[Rows]:
        for i in range(0, len(self._order), self._ask):
            yield self._order[i : i + self._ask]

    def learn(self, rows: Rows, answers: Probs) -> None:
        """Nothing is learned."""


class Bandit:
    """The adaptive policy: π = softmax(H) over the classes z of the pool.

    After the action z with reward r and running mean reward r̄:
    H_z += α (r − r̄)(1 − π_z), H_z' −= α (r − r̄) π_z' for all others, α = 1 / (times z was taken).
    """

    def __init__(self, attack: Knockoff, pool: Pool, student: nn.Module) -> None:
        rng = np.random.default_rng(attack.seed)
        self._rng = rng
        self._pool = pool
        self._ask = attack.ask
        self._left = [
            list(rng.permutation(np.flatnonzero(pool.labels == z))) for z in range(pool.classes)
        ]
        self._student = copy.deepcopy(student)  # the copy itself is fitted afresh on all answers
        self._optimizer = torch.optim.SGD(self._student.parameters(), attack.lr, momentum=0.5)
        self.h = np.zeros(pool.classes)
        self._taken = np.zeros(pool.classes)
        self._seen = 0  # answers so far, their mean, and the mean of their rewards r̄
        self._mean_answer = np.zeros(1)
        self._mean_reward = 0.0

    def policy(self) -> npt.NDArray[np.float64]:
        """π over the classes; zero where no image is left."""
        weights = np.exp(self.h - self.h.max()) * [len(rows) > 0 for rows in self._left]
        policy: npt.NDArray[np.float64] = weights / weights.sum()
        return policy

    def __iter__(self) -> Iterator[Rows]:
        while any(self._left):
            rows: list[int] = []
            while len(rows) < self._ask and any(self._left):
                drawn = self._rng.choice(len(self.h), self._ask - len(rows), p=self.policy())
                rows.extend(self._left[z].pop() for z in drawn if self._left[z])
            yield np.array(rows)

    def learn(self, rows: Rows, answers: Probs) -> None:
        """Update H by the rewards of these answers, then the student by the answers."""
        kept = np.isfinite(answers).all(1)
        if kept.sum() < 2:  # batch norm needs two
            return
        y, actions = usable(torch.from_numpy(answers[kept])), self._pool.labels[rows[kept]]
        x = torch.from_numpy(self._pool.images[rows[kept]])
        self._student.train()
        logits = forward(self._student, x)
        losses = F.cross_entropy(logits, y.to(logits.device), reduction="none")
        rewards = self._reward(y.numpy(), losses.detach().cpu().numpy())
        for z, reward in zip(actions, rewards, strict=True):
            self._taken[z] += 1
            policy = self.policy() if any(self._left) else np.full(len(self.h), 1 / len(self.h))
            step = reward / self._taken[z]
            self.h -= step * policy
            self.h[z] += step
        self._optimizer.zero_grad()
        losses.mean().backward()
        self._optimizer.step()

    def _reward(
        self, y: npt.NDArray[np.float32], losses: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        """Rewards less their mean, r − r̄: certainty, diversity and loss, each scaled to [0, 1]."""
        before, self._seen = self._seen, self._seen + len(y)
        self._mean_answer = (self._mean_answer * before + y.sum(0)) / self._seen
        ordered = np.sort(y, axis=1)
        certain = ordered[:, -1] - ordered[:, -2]
        diverse = np.maximum(0, y - self._mean_answer).sum(1)
        parts = [
            (part - part.min()) / (np.ptp(part) + 1e-12) for part in (certain, diverse, losses)
        ]
        reward: npt.NDArray[np.float64] = np.asarray(np.mean(parts, axis=0), np.float64)
        self._mean_reward = (self._mean_reward * before + float(reward.sum())) / self._seen
        return reward - self._mean_reward


def paper(seed: int) -> Knockoff:
    """As the defense's paper attacks: 50 epochs of SGD at batch 64, cosine, flips and crops."""
    how = Fitting(
        epochs=50,
        lr=0.1,
        optimizer="sgd",
        loss="soft",
        augment="flips",
        batch=64,
        warmup=0,
        ema=0,
        seed=seed,
    )
    return Knockoff(fitting=how, seed=seed)


def cpu(seed: int) -> Knockoff:
    """For two cores: few epochs of Adam, an averaged copy, the loss that clean answers reward."""
    return Knockoff(fitting=Fitting(loss="centred", seed=seed), curve=(0.1, 0.3), seed=seed)


PROFILES: dict[str, Callable[[int], Knockoff]] = {"paper": paper, "cpu": cpu}
