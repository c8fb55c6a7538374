"""IDEAL: data-free, from labels, with one query for each image that is made.

Source: Zhang, Chen, Lyu, "IDEAL: Query-Efficient Data-Free Learning from Black-Box Models" (ICLR
2023, arXiv 2205.11158). No gradient of the service is estimated: the generator learns from the copy
alone to make images that it sorts into all classes with confidence; the service names them, and the
copy learns from all that was named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scumble.attacker import ranges
from scumble.attacker.attacks.data_free import check_budget, make_generator, moments, repeat
from scumble.attacker.attacks.maze import Memory
from scumble.attacker.attacks.zeroth import ask
from scumble.attacker.errors import AttackError
from scumble.attacker.generators import Generator, images, noise
from scumble.attacker.losses import LABELS_ALONE, LOSSES, Elr, Loss
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import falling, forward


@dataclass(frozen=True)
class Ideal:
    """A generator that learns from the copy, a copy that learns from labels.

    Attributes:
        batch: images per step, and per round of queries.
        g_steps: of the generator before each round.
        s_steps: of the copy after it, on all images that were named.
        spread: weight of the mean label's entropy in the generator's loss.
        difference: weight of the distance between the images of a batch.
        lr_g: of the generator, Adam.
        lr_s: of the copy, SGD with momentum 0.9; to zero as a cosine.
        width: of the generator.
        nz: size of its noise.
        memory: answers that are remembered at most.
        loss: of the copy, key of `LOSSES`: "ce", or one of those that tolerate wrong labels.
        noise: share of wrong labels that `small_loss` expects.
        rounds: how often the remembered answers are mapped again by the modifiers, with the copy of
            then.
        views: how often the copy is shown while it is made.
        seed: of everything random.
    """

    batch: int = 128
    g_steps: int = 5
    s_steps: int = 10
    spread: float = 5.0
    difference: float = 1.0
    lr_g: float = 1e-3
    lr_s: float = 0.02
    width: int = 32
    nz: int = 100
    memory: int = 50_000
    loss: str = "ce"
    noise: float = 0.1
    rounds: int = 0
    views: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self)

    def check(self, budget: int, *, images: bool) -> None:
        """See `Attack`."""
        del images
        check_budget(type(self).__name__.lower(), budget, self.batch)
        if self.loss not in LABELS_ALONE:
            raise AttackError(f"loss is {self.loss!r}; allowed: {', '.join(LABELS_ALONE)}")

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """See `Attack`; `pool` is not used."""
        del pool
        budget = oracle.remaining
        self.check(budget, images=False)
        rng = torch.Generator().manual_seed(self.seed)
        generator = make_generator(oracle, self.seed, nz=self.nz, width=self.width)
        adam = torch.optim.Adam(generator.parameters(), self.lr_g)
        copies = self._copies(student)
        learned = [weight for each in copies for weight in each.parameters()]
        sgd = torch.optim.SGD(learned, self.lr_s, momentum=0.9, weight_decay=5e-4)
        rounds = budget // self.batch
        memory = Memory(self.memory, oracle.shape, oracle.labels, exact=self.rounds > 0)
        losses = [LOSSES[self.loss](self.memory, oracle.labels, self.noise) for _ in copies]
        revised = moments(self.rounds, rounds)
        done = 0

        def iterate() -> None:
            nonlocal done
            for _ in range(self.g_steps):
                self._invent(copies, generator, adam, rng)
            with torch.no_grad():
                x = images(generator(noise(self.batch, self.nz, rng)))
            y = ask(oracle, x)
            kept = torch.isfinite(y).all(1)
            if kept.any():
                places = memory.add(x[kept], y[kept])
                for each in losses:
                    if isinstance(each, Elr):
                        each.forget(places)
                self._imitate(copies, losses, sgd, memory, done / rounds, rng)
            done += 1
            if next(revised):
                memory.revise(oracle)

        repeat(iterate, rounds, [falling(sgd, rounds)], oracle, student, watch, self.views)

    def _copies(self, student: nn.Module) -> list[nn.Module]:
        """What learns from the labels; the first is the copy."""
        return [student]

    def _wanted(self, copies: list[nn.Module], x: Tensor) -> Tensor:
        """What the generator makes small: sure of each image, all classes, images that differ."""
        logits = forward(copies[0], x)
        sure = F.cross_entropy(logits, logits.argmax(1))
        alike = -(x - x.roll(1, 0)).abs().mean()
        loss: Tensor = sure - self.spread * entropy(logits.softmax(1).mean(0))
        return loss + self.difference * alike

    def _invent(
        self,
        copies: list[nn.Module],
        generator: Generator,
        adam: torch.optim.Optimizer,
        rng: torch.Generator,
    ) -> None:
        """One step of the generator."""
        generator.train()
        for each in copies:
            each.eval()
        loss = self._wanted(copies, images(generator(noise(self.batch, self.nz, rng))))
        adam.zero_grad()
        loss.backward()
        adam.step()

    def _imitate(
        self,
        copies: list[nn.Module],
        losses: list[Loss],
        sgd: torch.optim.Optimizer,
        memory: Memory,
        progress: float,
        rng: torch.Generator,
    ) -> None:
        """Steps of the copies on labels that are remembered."""
        for each in copies:
            each.train()
        for _ in range(self.s_steps):
            rows, x, y = memory.draw(self.batch, rng)
            labels = F.one_hot(y.argmax(1), y.shape[1]).float()
            parts = [
                loss_of(forward(each, x), labels, rows, progress)
                for each, loss_of in zip(copies, losses, strict=True)
            ]
            sgd.zero_grad()
            torch.stack(parts).sum().backward()
            sgd.step()


def entropy(probabilities: Tensor) -> Tensor:
    """Of (K,), in nats."""
    return -(probabilities * probabilities.clamp_min(1e-8).log()).sum()


def paper(seed: int) -> Ideal:
    """A wider generator with more steps, for a GPU."""
    return Ideal(batch=256, g_steps=50, s_steps=50, width=64, memory=250_000, seed=seed)


def cpu(seed: int) -> Ideal:
    """For two cores."""
    return Ideal(seed=seed)


PROFILES: dict[str, Callable[[int], Ideal]] = {"paper": paper, "cpu": cpu}
