"""MAZE: the data-free game with the KL loss, more directions, and a memory of past answers.

Source: Kariyappa, Prakash, Qureshi, "MAZE: Data-Free Model Stealing Attack Using Zeroth-Order
Gradient Estimation" (CVPR 2021, arXiv 2005.03161), algorithm 1. The generator maximises the KL
divergence of the copy from the victim, the copy minimises it; probabilities are all it needs. The
first of the copy's steps uses the answers that the generator's step paid for, and after each
iteration the copy practises on remembered answers ("experience replay", section 4.4).

An iteration of N images costs N (m + 1 + s_steps − 1) queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scumble.attacker import device, ranges
from scumble.attacker.adapt.base import again
from scumble.attacker.attacks.data_free import check_budget, make_generator, moments, repeat
from scumble.attacker.attacks.zeroth import ask, default_step, estimate
from scumble.attacker.generators import Generator, images, noise
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import falling, forward, usable


@dataclass(frozen=True)
class Maze:
    """Data-free, with the KL loss.

    Attributes:
        batch: N, images per step.
        s_steps: of the student in an iteration.
        replays: steps on remembered answers in an iteration.
        directions: m, of the gradient estimate.
        step: ε of the forward differences before the tanh; 0 for the transport's default.
        lr_s: of the student, SGD with momentum 0.9, to zero as a cosine.
        lr_g: of the generator; to zero as a cosine.
        adam: whether the generator learns with Adam in place of SGD with momentum 0.9.
        weight_decay: of the student.
        width: of the generator.
        nz: size of its noise.
        memory: answers that are remembered at most; older ones are forgotten.
        rounds: how often the remembered answers are mapped again by the modifiers, with the copy of
            then.
        views: how often the copy is shown while it is made.
        seed: of generator, noise, directions and memory.
    """

    batch: int = 128
    s_steps: int = 5
    replays: int = 10
    directions: int = 10
    step: float = 0.0
    lr_s: float = 0.1
    lr_g: float = 1e-4
    adam: bool = False
    weight_decay: float = 5e-4
    width: int = 64
    nz: int = 100
    memory: int = 100_000
    rounds: int = 0
    views: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def cost(self) -> int:
        """Queries of one iteration."""
        return self.batch * (self.directions + self.s_steps)

    def check(self, budget: int, *, images: bool) -> None:
        """See `Attack`."""
        del images
        check_budget("maze", budget, self.cost)

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """See `Attack`; `pool` is not used."""
        del pool
        budget = oracle.remaining
        self.check(budget, images=False)
        rng = torch.Generator().manual_seed(self.seed)
        generator = make_generator(oracle, self.seed, nz=self.nz, width=self.width, affine=True)
        clone = torch.optim.SGD(
            student.parameters(), self.lr_s, momentum=0.9, weight_decay=self.weight_decay
        )
        game: torch.optim.Optimizer = (
            torch.optim.Adam(generator.parameters(), self.lr_g)
            if self.adam
            else torch.optim.SGD(generator.parameters(), self.lr_g, momentum=0.9)
        )
        rounds = budget // self.cost
        schedules = [falling(optimizer, rounds) for optimizer in (clone, game)]
        memory = Memory(self.memory, oracle.shape, oracle.labels, exact=self.rounds > 0)
        revised = moments(self.rounds, rounds)

        def iterate() -> None:
            self._iterate(oracle, student, generator, clone, game, memory, rng)
            if next(revised):
                memory.revise(oracle)

        repeat(iterate, rounds, schedules, oracle, student, watch, self.views)

    def _iterate(
        self,
        oracle: Oracle,
        student: nn.Module,
        generator: Generator,
        clone: torch.optim.Optimizer,
        game: torch.optim.Optimizer,
        memory: Memory,
        rng: torch.Generator,
    ) -> None:
        # The generator's step: towards images on which copy and victim disagree.
        student.eval()
        x_hat = generator(noise(self.batch, self.nz, rng))
        g, x, y = estimate(
            lambda x, y: -divergence(student(x), y),
            oracle,
            x_hat,
            directions=self.directions,
            step=self.step or default_step(oracle),
            rng=rng,
        )
        game.zero_grad()
        x_hat.backward(g / self.batch)
        game.step()
        # The copy's steps: the first on what has just been paid for, the others on new images.
        student.train()
        for i in range(self.s_steps):
            if i:
                with torch.no_grad():
                    x = images(generator(noise(self.batch, self.nz, rng)))
                y = ask(oracle, x)
            imitate(student, clone, x, y)
            memory.add(x, y)
        for _ in range(self.replays):
            _, x, y = memory.draw(self.batch, rng)
            imitate(student, clone, x, y)


class Memory:
    """The last answers, in a ring; images as float16, whose step of 1/2048 near 1 loses nothing.

    Args:
        size: how many answers.
        shape: (C, H, W) of the images.
        labels: K.
        exact: keep images as float32, as they were sent, so that `revise` knows them.
    """

    def __init__(
        self, size: int, shape: tuple[int, int, int], labels: int, *, exact: bool = False
    ) -> None:
        kept = torch.float32 if exact else torch.float16
        self._x = torch.empty(size, *shape, dtype=kept, device=device.best())
        self._y = torch.empty(size, labels, device=device.best())
        self._seen = 0

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Remember images (N, C, H, W) and their answers (N, K); return their places."""
        places = (self._seen + torch.arange(len(x))) % len(self._x)
        self._x[places], self._y[places] = x.to(self._x), y.to(self._y)
        self._seen += len(x)
        return places

    def revise(self, oracle: Oracle) -> None:
        """Map the answers again by the modifiers, with the copy of now; discarded ones stay.

        Raises:
            AttackError: no modifier keeps its answers.
        """
        count = min(self._seen, len(self._x))
        if not count:  # all answers were discarded so far
            return
        y = torch.from_numpy(again(oracle, self._x[:count].cpu().numpy())).to(self._y)
        kept = torch.isfinite(y).all(1)
        self._y[:count][kept] = y[kept]

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`n` places in the ring, their images and answers, with replacement."""
        rows = torch.randint(min(self._seen, len(self._x)), (n,), generator=rng)
        return rows, self._x[rows].float(), self._y[rows]


def imitate(student: nn.Module, clone: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of the copy towards answers `y`; rows of NaN are ignored."""
    kept = torch.isfinite(y).all(1)
    if kept.sum() < 2:  # batch norm needs two
        return
    loss = divergence(forward(student, x[kept]), y[kept]).mean()
    clone.zero_grad()
    loss.backward()
    clone.step()


def divergence(logits: Tensor, y: Tensor) -> Tensor:
    """KL(V ‖ S) per row, (N,)."""
    y = usable(y)
    return F.kl_div(logits.log_softmax(1), y, reduction="none").sum(1)


def paper(seed: int) -> Maze:
    """The paper's, for 5 to 20 M queries on a GPU."""
    return Maze(seed=seed)


def cpu(seed: int) -> Maze:
    """For 2 M queries on two cores."""
    return Maze(seed=seed, adam=True, width=32, directions=4, lr_g=1e-3)


PROFILES: dict[str, Callable[[int], Maze]] = {"paper": paper, "cpu": cpu}
