"""DFME: a generator and the copy play against each other; the attacker needs no images.

Source: Truong, Maini, Walls, Papernot, "Data-Free Model Extraction" (CVPR 2021, arXiv 2011.14779).
The generator looks for images on which the copy S and the victim V disagree, the copy learns to
agree on them. Both losses are the l1 distance of logits (section 3.2); the victim's are recovered
from its probabilities as ln y less its mean, exact for undefended answers (section 3.4). The
generator's gradient is estimated by forward differences (section 3.3).

An iteration of N images costs N (g_steps (m + 1) + s_steps) queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scumble.attacker import ranges
from scumble.attacker.attacks.data_free import check_budget, make_generator, repeat
from scumble.attacker.attacks.zeroth import ask, default_step, estimate
from scumble.attacker.generators import Generator, images, noise
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import forward, usable


@dataclass(frozen=True)
class Dfme:
    """Data-free, with the l1 loss.

    Attributes:
        batch: N, images per step.
        g_steps: of the generator in an iteration.
        s_steps: of the student in an iteration.
        directions: m, of the gradient estimate.
        step: ε of the forward differences before the tanh; 0 for the transport's default.
        lr_s: of the student, SGD with momentum 0.9.
        lr_g: of the generator, Adam.
        milestones: shares of the budget at which both learning rates fall to `decay` times.
        decay: see `milestones`.
        weight_decay: of the student.
        width: of the generator.
        nz: size of its noise.
        views: how often the copy is shown while it is made.
        seed: of generator, noise and directions.
    """

    batch: int = 256
    g_steps: int = 1
    s_steps: int = 5
    directions: int = 1
    step: float = 0.0
    lr_s: float = 0.1
    lr_g: float = 1e-4
    milestones: tuple[float, ...] = (0.1, 0.3, 0.5)
    decay: float = 0.3
    weight_decay: float = 5e-4
    width: int = 64
    nz: int = 256
    views: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def cost(self) -> int:
        """Queries of one iteration."""
        return self.batch * (self.g_steps * (self.directions + 1) + self.s_steps)

    def check(self, budget: int, *, images: bool) -> None:
        """See `Attack`."""
        del images
        check_budget("dfme", budget, self.cost)

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """See `Attack`; `pool` is not used."""
        del pool
        budget = oracle.remaining
        self.check(budget, images=False)
        step = self.step or default_step(oracle)
        rng = torch.Generator().manual_seed(self.seed)
        generator = make_generator(oracle, self.seed, nz=self.nz, width=self.width)
        sgd = torch.optim.SGD(
            student.parameters(), self.lr_s, momentum=0.9, weight_decay=self.weight_decay
        )
        adam = torch.optim.Adam(generator.parameters(), self.lr_g)
        rounds = budget // self.cost
        falls = [int(share * rounds) for share in self.milestones]
        schedules = [
            torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, self.decay)
            for optimizer in (sgd, adam)
        ]

        def iterate() -> None:
            for _ in range(self.g_steps):
                self._challenge(oracle, student, generator, adam, step, rng)
            for _ in range(self.s_steps):
                self._imitate(oracle, student, generator, sgd, rng)

        repeat(iterate, rounds, schedules, oracle, student, watch, self.views)

    def _challenge(
        self,
        oracle: Oracle,
        student: nn.Module,
        generator: Generator,
        adam: torch.optim.Optimizer,
        step: float,
        rng: torch.Generator,
    ) -> None:
        """One step of the generator, towards images on which copy and victim disagree."""
        generator.train()
        student.eval()
        x = generator(noise(self.batch, self.nz, rng))

        def agreement(x: Tensor, y: Tensor) -> Tensor:
            return -distance(student(x), y)

        g, _, _ = estimate(agreement, oracle, x, directions=self.directions, step=step, rng=rng)
        adam.zero_grad()
        x.backward(g / self.batch)
        adam.step()

    def _imitate(
        self,
        oracle: Oracle,
        student: nn.Module,
        generator: Generator,
        sgd: torch.optim.Optimizer,
        rng: torch.Generator,
    ) -> None:
        """One step of the copy, towards the victim's answers on new images."""
        student.train()
        with torch.no_grad():
            x = images(generator(noise(self.batch, self.nz, rng)))
        y = ask(oracle, x)
        kept = torch.isfinite(y).all(1)
        if kept.sum() < 2:  # batch norm needs two
            return
        loss = distance(forward(student, x[kept]), y[kept]).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()


def distance(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the classes of |S − V| per row, (N,); V = ln y less its mean."""
    v = usable(y).log()
    return (logits - (v - v.mean(1, keepdim=True))).abs().mean(1)


def paper(seed: int) -> Dfme:
    """The paper's, for 20 M queries on a GPU."""
    return Dfme(seed=seed)


def cpu(seed: int) -> Dfme:
    """For up to 2 M queries on two cores; few queries need the high learning rate for longer."""
    return Dfme(seed=seed, batch=128, width=32, lr_g=5e-4, milestones=(0.4, 0.7, 0.9))


PROFILES: dict[str, Callable[[int], Dfme]] = {"paper": paper, "cpu": cpu}
