"""What the data-free attacks share: a seeded generator, and iterations until the budget is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from scumble.attacker import device
from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.generators import Generator
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle


def check_budget(attack: str, budget: int, cost: int) -> None:
    """Refuse a budget that is smaller than the cost of one iteration.

    Raises:
        AttackError: the message has both.
    """
    if budget < cost:
        raise AttackError(f"the budget is {budget}; one iteration of {attack} costs {cost} queries")


def make_generator(
    oracle: Oracle, seed: int, *, nz: int, width: int, affine: bool = False
) -> Generator:
    """A generator of the victim's images on the best device, with weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(oracle.shape, nz=nz, width=width, affine=affine)
    return generator.to(device.best())


def moments(times: int, iterations: int) -> Iterator[bool]:
    """For each iteration, whether it is one of `times` evenly spaced ones, the last not among them.

    >>> list(moments(1, 4))
    [False, True, False, False]

    Raises:
        AttackError: there are too few iterations.
    """
    if times >= iterations:
        raise AttackError(
            f"rounds is {times}; allowed with the {iterations} iterations of this budget: "
            f"0 to {iterations - 1}"
        )
    chosen = {round((i + 1) * iterations / (times + 1)) for i in range(times)}
    return (iteration in chosen for iteration in range(1, iterations + 1))


def repeat(
    iterate: Callable[[], None],
    rounds: int,
    schedules: Iterable[torch.optim.lr_scheduler.LRScheduler],
    oracle: Oracle,
    student: nn.Module,
    watch: Watch,
    views: int,
) -> None:
    """Call `iterate` until `rounds` are done or the budget is used.

    Args:
        iterate: one iteration.
        rounds: how many iterations the budget allows.
        schedules: learning rates, which advance after each iteration.
        oracle: its budget counts.
        student: the copy.
        watch: shown the copy.
        views: how often it is shown the copy.
    """
    budget = oracle.remaining
    shown = {round((i + 1) * rounds / views) for i in range(views)}
    for iteration in range(1, rounds + 1):
        try:
            iterate()
        except BudgetExhausted:  # lost answers are missing from it, or the service has ended it
            if iteration - 1 not in shown:
                watch(budget - oracle.remaining, student)
            break
        with warnings.catch_warnings():
            # Where all answers so far were discarded, the rate falls before the first step.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for schedule in schedules:
                schedule.step()
        if iteration in shown:
            watch(budget - oracle.remaining, student)
    student.eval()
