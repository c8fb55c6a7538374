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

from scumble.attacker import device
from scumble.attacker.attacks.maze import Memory
from scumble.attacker.attacks.zeroth import ask
from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.generators import Generator, images, noise
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
    views: int = 20
    seed: int = 0

    def check(self, budget: int, *, images: bool) -> None:
        """See `Attack`."""
        del images
        if budget < self.batch:
            raise AttackError(
                f"the budget is {budget}; one iteration of ideal costs {self.batch} queries"
            )

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """See `Attack`; `pool` is not used."""
        del pool
        budget = oracle.remaining
        self.check(budget, images=False)
        rng = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            generator = Generator(oracle.shape, nz=self.nz, width=self.width).to(device.best())
        adam = torch.optim.Adam(generator.parameters(), self.lr_g)
        sgd = torch.optim.SGD(student.parameters(), self.lr_s, momentum=0.9, weight_decay=5e-4)
        rounds = budget // self.batch
        schedule = falling(sgd, rounds)
        shown = {round((i + 1) * rounds / self.views) for i in range(self.views)}
        memory = Memory(self.memory, oracle.shape, oracle.labels)
        for iteration in range(1, rounds + 1):
            for _ in range(self.g_steps):
                self._invent(student, generator, adam, rng)
            with torch.no_grad():
                x = images(generator(noise(self.batch, self.nz, rng)))
            try:
                y = ask(oracle, x)
            except BudgetExhausted:  # what a crash had lost is gone from it
                break
            kept = torch.isfinite(y).all(1)
            if kept.any():
                memory.add(x[kept], F.one_hot(y[kept].argmax(1), oracle.labels).float())
                self._imitate(student, sgd, memory, rng)
            schedule.step()
            if iteration in shown:
                watch(budget - oracle.remaining, student)
        student.eval()

    def _invent(
        self,
        student: nn.Module,
        generator: Generator,
        adam: torch.optim.Optimizer,
        rng: torch.Generator,
    ) -> None:
        """One step of the generator: sure of each image, all classes, images that differ."""
        generator.train()
        student.eval()
        x = images(generator(noise(self.batch, self.nz, rng)))
        logits = forward(student, x)
        mean = logits.softmax(1).mean(0)
        spread = (mean * mean.clamp_min(1e-8).log()).sum()
        sure = F.cross_entropy(logits, logits.argmax(1))
        alike = -(x - x.roll(1, 0)).abs().mean()
        loss: Tensor = sure + self.spread * spread + self.difference * alike
        adam.zero_grad()
        loss.backward()
        adam.step()

    def _imitate(
        self,
        student: nn.Module,
        sgd: torch.optim.Optimizer,
        memory: Memory,
        rng: torch.Generator,
    ) -> None:
        student.train()
        for _ in range(self.s_steps):
            x, y = memory.draw(self.batch, rng)
            loss = F.cross_entropy(forward(student, x), y)
            sgd.zero_grad()
            loss.backward()
            sgd.step()


def paper(seed: int) -> Ideal:
    """A wider generator with more steps, for a GPU."""
    return Ideal(batch=256, g_steps=50, s_steps=50, width=64, memory=250_000, seed=seed)


def cpu(seed: int) -> Ideal:
    """For two cores."""
    return Ideal(seed=seed)


PROFILES: dict[str, Callable[[int], Ideal]] = {"paper": paper, "cpu": cpu}
