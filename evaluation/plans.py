"""The comparisons that can be asked for by name, each a list of cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from evaluation.cells import Cell, Defended
from training.auxiliary import TRANSFER

NONE = Defended()
GAMMA = 0.2


def dcp(beta: float) -> Defended:
    """The paper's defense."""
    return Defended("dcp", {"beta": beta, "gamma": GAMMA})


# one strength of each, near the same L1 on the transfer set, as the table of the frontier shows
COMPARED = [
    NONE,
    dcp(1.0),
    dcp(1.2),
    Defended("reverse_sigmoid", {"beta": 0.64, "gamma": GAMMA}),
    Defended("adaptive_misinformation", {"tau": 0.9}),
    Defended("random", {"epsilon": 1.0}),
    Defended("mad", {"epsilon": 1.0}),
    Defended("grad2", {"epsilon": 1.0}),
]
LABEL = Defended("label")

# attack -> what a cell needs of it
STEAL: dict[str, Callable[[Cell], Cell]] = {
    "knockoff": lambda cell: replace(
        cell,
        attack="knockoff",
        budget=20_000,
        queries=TRANSFER[cell.victim],
        changes=("attack.curve=[]", "fit.epochs=10", "fit.loss=soft"),
    ),
    "dfme": lambda cell: replace(cell, attack="dfme", budget=400_000, transport="tensor"),
    "maze": lambda cell: replace(cell, attack="maze", budget=400_000, transport="tensor"),
}


def adapted(cell: Cell, defense: Defended) -> Iterator[Cell]:
    """A cell under every adaptive attacker that makes sense against the defense."""
    for adapt, changes in (
        (("argmax",), ()),
        (("top_k",), ()),
        (("average",), ()),
        (("recover",), ("fit.loss=centred",)),
    ):
        yield replace(cell, adapt=adapt, changes=(*cell.changes, *changes))
    if defense.name in ("dcp", "reverse_sigmoid"):
        known = tuple(f"invert.{key}={value}" for key, value in defense.params.items())
        own = (f"invert.defense={defense.name}", *known, "fit.loss=centred")
        yield replace(cell, adapt=("invert",), changes=(*cell.changes, *own))
    if defense.name == "dcp":
        known = (f"confidence_filter.beta={defense.params['beta']}",)
        yield replace(cell, adapt=("confidence_filter",), changes=(*cell.changes, *known))


def ci() -> Iterator[Cell]:
    """A small table that anybody can make again."""
    small = Cell(
        "mnist",
        budget=1300,
        queries="digits",
        test="digits:test",
        precision="int8",
        changes=("attack.curve=[]", "fit.epochs=8"),
    )
    for defense in (NONE, dcp(1.0), dcp(1.5), LABEL):
        cell = replace(small, defense=defense)
        yield cell
        if defense.name == "dcp":
            yield from (c for c in adapted(cell, defense) if c.adapt[0] in ("argmax", "invert"))


def matrix() -> Iterator[Cell]:
    """The paper's matrix on mnist, float and int8."""
    for precision in ("float32", "int8"):
        for defense in (*COMPARED, LABEL):
            for attack in STEAL:
                yield STEAL[attack](Cell("mnist", defense, precision))


def adaptive() -> Iterator[Cell]:
    """Knockoff on mnist under adaptive attackers."""
    for defense in COMPARED:
        yield from adapted(STEAL["knockoff"](Cell("mnist", defense)), defense)


def colour() -> Iterator[Cell]:
    """Knockoff on cifar10 and gtsrb, float and int8, 3 seeds for the headline."""
    headline = (NONE, dcp(1.0), dcp(1.5))
    others = [d for d in COMPARED if d.name in ("reverse_sigmoid", "mad", "grad2")]
    for victim in ("cifar10", "gtsrb"):
        for precision in ("float32", "int8"):
            for defense in (*headline, *others, LABEL):
                cell = STEAL["knockoff"](Cell(victim, defense, precision))
                flips = ("fit.augment=flips",) if victim == "cifar10" else ()
                cell = replace(cell, changes=(*cell.changes, *flips))
                seeds = 3 if defense in headline and precision == "float32" else 1
                yield from (replace(cell, seed=seed) for seed in range(seeds))


def frontier() -> Iterator[Cell]:
    """Stolen accuracy against L1 on mnist, several strengths of each defense."""
    grid = [
        *(dcp(beta) for beta in (0.5, 0.9, 1.0, 1.1, 1.2, 1.5)),
        *(
            Defended("reverse_sigmoid", {"beta": beta, "gamma": GAMMA})
            for beta in (0.04, 0.16, 0.64, 1.28)
        ),
        *(Defended("adaptive_misinformation", {"tau": tau}) for tau in (0.5, 0.9, 1.0)),
        *(
            Defended(name, {"epsilon": epsilon})
            for name in ("random", "mad", "grad2")
            for epsilon in (0.2, 0.6, 1.0, 1.4)
        ),
    ]
    for precision in ("float32", "int8"):
        for defense in (NONE, *grid, LABEL):
            cell = STEAL["knockoff"](Cell("mnist", defense, precision))
            yield cell
            yield from adapted(cell, defense)


PLANS: dict[str, Callable[[], Iterator[Cell]]] = {
    "ci": ci,
    "matrix": matrix,
    "adaptive": adaptive,
    "colour": colour,
    "frontier": frontier,
}
