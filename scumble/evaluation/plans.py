"""The comparisons that can be asked for by name, each a list of cells.

`ci` is small. The others, several hours on two cores together, make `docs/explanation/results.md`.
A plan's budgets, students and fits are for two cores; `published` gives them the papers'.
Attackers on the way from naive to adaptive: the paper's loss (soft cross-entropy), the `centred`
loss, which reads more out of a clean answer, and the modifiers of `scumble.attacker.adapt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from scumble.evaluation.experiment import Cell, Defended
from scumble.training.auxiliary import TRANSFER

GAMMA = 0.2
GAMMA_MANY = 0.1  # the paper's for CIFAR-100
NONE, LABEL = Defended(), Defended("label")


def dcp(beta: float, gamma: float = GAMMA) -> Defended:
    """The paper's defense."""
    return Defended("dcp", {"beta": beta, "gamma": gamma})


MANY = dcp(1.2, GAMMA_MANY)


def sigmoid(beta: float) -> Defended:
    """Reverse sigmoid."""
    return Defended("reverse_sigmoid", {"beta": beta, "gamma": GAMMA})


def misinformed(tau: float) -> Defended:
    """Adaptive misinformation."""
    return Defended("adaptive_misinformation", {"tau": tau})


def within(name: str, epsilon: float) -> Defended:
    """A defense whose parameter is the L1 distance that it may use."""
    return Defended(name, {"epsilon": epsilon})


HEADLINE = (NONE, dcp(1.0), dcp(1.2))
# One strength of each beside the paper's; the page shows their L1. From an L1 of 1 on, half of the
# mass moves and a sure answer loses its top class: 0.9 is as strong as users can still bear.
COMPARED = (
    *HEADLINE,
    sigmoid(0.64),
    misinformed(0.9),
    within("random", 0.9),
    within("mad", 0.9),
    within("grad2", 0.9),
)
# further strengths, for the curves of mnist
CURVES = (
    *(dcp(beta) for beta in (0.5, 0.9, 1.5)),
    *(sigmoid(beta) for beta in (0.16, 1.28)),
    misinformed(0.5),
    *(within(name, 0.5) for name in ("random", "mad", "grad2")),
)
PRECISIONS = ("float32", "int8")
# attack -> queries as published
BUDGETS = {
    "knockoff": 50_000,  # the transfer set of the defenses' papers, the training part of CIFAR
    "mask_seeking": 50_000,
    "dfme": 20_000_000,  # on CIFAR-10
    "maze": 5_000_000,  # the default of its authors' code
    "disguide": 20_000_000,  # as DFME, which it is compared with
}
COLOUR = ("cifar10", "gtsrb")
# the test sets of bundles that are not named after one
SETS = {"cifar100": "cifar100-split", "mnist-outliers": "mnist", "gtsrb-outliers": "gtsrb"}


OUTLINED = "fashion_mnist[:10000],fashion_mnist@outlines[10000:20000]"
OUTLINED_OBJECTS = "cifar10[:10000],cifar10@outlines[10000:20000]"
LARGER = "fashion_mnist,fashion_mnist@outlines"
CODEBOOK = Defended("codebook", {"cells": 4})
MODELGUARD = within("modelguard_w", 1.0)
WITHHOLD = Defended("withhold", {"loss": 0.01, "answers": ["codebook", {"cells": 4}]})


def knockoff(cell: Cell, loss: str = "soft") -> Cell:
    """20,000 images of another data set; `soft` is the paper's loss."""
    changes = ["attack.curve=[]", f"fit.loss={loss}"]
    if cell.victim != "mnist":  # half the width: what two cores can train dozens of
        cell = replace(cell, student="resnet9_half", test_images=5000)
        changes += ["fit.epochs=6"]
        changes += [] if cell.victim == "gtsrb" else ["fit.augment=flips"]
    else:
        changes += ["fit.epochs=8"]
    return replace(cell, queries=TRANSFER[cell.victim], changes=tuple(changes))


def dfme(cell: Cell) -> Cell:
    """Data-free, over `tensor`, where its finite differences are exact."""
    return replace(cell, attack="dfme", budget=250_000, transport="tensor")


def maze(cell: Cell) -> Cell:
    """Data-free as well, and hungrier."""
    return replace(cell, attack="maze", budget=900_000, transport="tensor")


def published(cell: Cell) -> Cell:
    """The cell under the profile `paper`: its budget, student and fit in place of the plan's.

    The student is as large as the victim, and measured on the whole test set. Of the changes only
    those of modifiers stay, so cells that differ in the loss alone become the same. Digits and
    signs are not mirrored, as they would mean something else.
    """
    kept = [change for change in cell.changes if not change.startswith(("attack.", "fit."))]
    upright = not cell.victim.startswith("cifar") and cell.attack in ("knockoff", "mask_seeking")
    kept += ["fit.augment=crops"] if upright else []
    return replace(
        cell,
        profile="paper",
        budget=BUDGETS[cell.attack],
        student="auto",
        recipe=None,
        test_images=0,
        changes=tuple(kept),
    )


def adapted(cell: Cell, *modifiers: str) -> Iterator[Cell]:
    """A knockoff cell under those of `modifiers` that make sense against its defense."""
    for name in modifiers:
        if name == "invert" and cell.defense.name in ("dcp", "reverse_sigmoid"):
            known = tuple(f"invert.{key}={value}" for key, value in cell.defense.params.items())
            own: tuple[str, ...] = (f"invert.defense={cell.defense.name}", *known)
        elif name == "confidence_filter" and cell.defense.name == "dcp":
            own = (f"confidence_filter.beta={cell.defense.params['beta']}",)
        elif name not in ("invert", "confidence_filter"):
            own = ()
        else:
            continue
        yield replace(cell, adapt=(name,), changes=(*cell.changes, *own))


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
            yield from adapted(cell, "argmax")
            yield from adapted(replace(cell, changes=(*cell.changes, "fit.loss=centred")), "invert")


def colour() -> Iterator[Cell]:
    """Knockoff on cifar10 and gtsrb, float and int8; three seeds for the headline in float."""
    others = (sigmoid(0.64), within("mad", 0.9), within("grad2", 0.9), LABEL)
    for victim in COLOUR:
        for precision in PRECISIONS:
            for defense in (*HEADLINE, *others):
                yield knockoff(Cell(victim, defense, precision))
        for defense in (NONE, dcp(1.2)):
            yield knockoff(Cell(victim, defense), "centred")
            yield from (knockoff(Cell(victim, defense, seed=seed)) for seed in (1, 2))
        for defense in (dcp(1.0), dcp(1.2)):
            yield from adapted(knockoff(Cell(victim, defense)), "argmax")
            yield from adapted(knockoff(Cell(victim, defense), "centred"), "invert")


def headline() -> Iterator[Cell]:
    """Knockoff undefended, under dcp and from labels; what matters most comes first."""
    for victim in ("cifar10", "mnist", "gtsrb"):
        yield from (knockoff(Cell(victim, defense)) for defense in (NONE, dcp(1.2), LABEL))
    many = Cell("cifar100", test=SETS["cifar100"])
    yield from (knockoff(replace(many, defense=each)) for each in (NONE, MANY, LABEL))


def matrix() -> Iterator[Cell]:
    """The paper's matrix on mnist with knockoff; three seeds for the headline."""
    for precision in PRECISIONS:
        for defense in (*COMPARED, LABEL):
            yield knockoff(Cell("mnist", defense, precision))
            seeds = (1, 2) if defense in (NONE, dcp(1.2)) else ()
            yield from (knockoff(Cell("mnist", defense, precision, seed=s)) for s in seeds)


def datafree() -> Iterator[Cell]:
    """The paper's matrix on mnist with dfme, and those who learn where it does not.

    DFME under dcp learns as soon as it inverts the answers; disguide learns from labels.
    """
    yield from (dfme(Cell("mnist", defense)) for defense in (*COMPARED, LABEL))
    yield from (dfme(Cell("mnist", defense, "int8")) for defense in (*HEADLINE, LABEL))
    for precision in PRECISIONS:
        for defense in (dcp(1.2), dcp(1.0)):
            yield from adapted(dfme(Cell("mnist", defense, precision)), "invert")
    for defense in (LABEL, dcp(1.2), CODEBOOK):
        yield replace(dfme(Cell("mnist", defense)), attack="disguide", transport="pixels")


def hungry() -> Iterator[Cell]:
    """The paper's matrix on mnist with maze, where it tells something: twenty minutes a cell."""
    yield from (maze(Cell("mnist", defense)) for defense in (NONE, dcp(1.2), LABEL))


def adaptive() -> Iterator[Cell]:
    """Knockoff on mnist by attackers who know that there is a defense, or which one."""
    yield from strong("float32", COMPARED)
    yield from strong("int8", (*HEADLINE, sigmoid(0.64)))
    for defense in COMPARED[1:]:
        yield from adapted(knockoff(Cell("mnist", defense)), "argmax")
    for defense in (dcp(1.2), sigmoid(0.64), misinformed(0.9), within("mad", 0.9)):
        yield from adapted(knockoff(Cell("mnist", defense), "centred"), "recover")
    yield from adapted(knockoff(Cell("mnist", dcp(1.2))), "top_k", "average")
    yield from adapted(knockoff(Cell("mnist", within("random", 0.9))), "average")


def frontier() -> Iterator[Cell]:
    """Further strengths of each defense on mnist, for the curves."""
    yield from (knockoff(Cell("mnist", d, p)) for p in PRECISIONS for d in CURVES)
    invertible = [d for d in CURVES if d.name in ("dcp", "reverse_sigmoid")]
    yield from strong("float32", invertible)
    yield from strong("int8", (d for d in invertible if d.name == "dcp"))


def strong(precision: str, defenses: Iterable[Defended]) -> Iterator[Cell]:
    """The better loss, and the exact inverse where there is one, on mnist."""
    for defense in defenses:
        cell = knockoff(Cell("mnist", defense, precision), "centred")
        yield cell
        yield from adapted(cell, "invert")


# which withholds 1 % of the signs of the test part
STRICTER = Defended("withhold", {"loss": 0.005, "answers": ["codebook", {"cells": 4}]})

ITERATED = (
    *("invert.defense=dcp", "invert.beta=1.2", f"invert.gamma={GAMMA}"),
    *("invert.prior=student", "attack.rounds=2", "fit.epochs=8"),
)


# The best transfer set that the search for recipes found, by victim.
SEARCHED = {
    "mnist": "strokes",
    "cifar10": "cifar100",
    "gtsrb": "shapes",
}
# Three times as many images, or all there are, for attackers who choose which they ask about.
POOLED = {
    "mnist": "strokes[:60000]",
    "cifar10": "cifar100",
    "gtsrb": "shapes[:60000]",
}
# The policies that claims are about, and rivals beside them.
JUDGED = (NONE, LABEL, dcp(1.2), CODEBOOK, dcp(1.0))
RIVALS = (sigmoid(0.64), within("mad", 0.9))
# Models whose gate is attacked; those with outliers were trained for it.
GATED = {
    "mnist": (WITHHOLD,),
    "cifar10": (WITHHOLD,),
    "gtsrb": (STRICTER,),
    "mnist-outliers": (LABEL, WITHHOLD),
    "gtsrb-outliers": (LABEL, WITHHOLD),
}


def strongest() -> Iterator[Cell]:
    """Each headline policy against the best attackers, with a student as large as the victim.

    A seed comes after the other, so that every row is there once before any is there twice. What
    claims are about has three; rivals, a second gate of `gtsrb-outliers` and int8 have one.
    """
    for seed in (0, 1, 2):
        once = RIVALS if seed == 0 else ()
        for victim in SEARCHED:
            yield from rivals(Cell(victim, seed=seed), (*JUDGED, *once))
        for victim, policies in GATED.items():
            yield from rivals(Cell(victim, test=SETS.get(victim), seed=seed), policies)
    signs = Cell("gtsrb-outliers", test=SETS["gtsrb-outliers"])
    yield from rivals(signs, (STRICTER,))
    for victim in SEARCHED:
        yield from rivals(Cell(victim, precision="int8"), (NONE, LABEL, dcp(1.2), CODEBOOK))
    trained = Cell("mnist-outliers", test=SETS["mnist-outliers"], precision="int8")
    yield from rivals(trained, GATED["mnist-outliers"])


def rivals(cell: Cell, defenses: Iterable[Defended]) -> Iterator[Cell]:
    """The best attackers on each of `defenses`: labels, and what can be read beside them."""
    data = cell.victim.removesuffix("-outliers")

    def by(defense: Defended, kind: str) -> Cell:
        return replace(
            cell,
            defense=defense,
            queries=SEARCHED[data],
            changes=("attack.curve=[]",),
            recipe=f"{data}-{kind}",
            test_images=0 if data == "mnist" else 5000,
        )

    for defense in defenses:
        match defense.name:
            case "none":
                yield by(defense, "soft")
            case "label":
                yield by(defense, "labels")
            case "codebook":
                yield by(defense, "mixed")
            case "withhold":
                # Few answers are learned for more epochs.
                few = ("fit.epochs=60",) if data == "gtsrb" else ()
                row = by(defense, "mixed")
                yield replace(row, adapt=("answered",), changes=(*row.changes, *few))
                yield replace(row, attack="mask_seeking", queries=POOLED[data])
            case "dcp":
                yield from adapted(by(defense, "soft"), "invert")
                if defense.strength > 1:  # up to 1 next to no label changes
                    yield replace(by(defense, "labels"), adapt=("margin_filter", "argmax"))
            case "reverse_sigmoid":
                yield from adapted(by(defense, "soft"), "invert")
            case _:
                yield replace(by(defense, "labels"), adapt=("argmax",))


def tuned() -> Iterator[Cell]:
    """The best attackers: recipes, and for mnist a transfer set half of which is outlined.

    The victim that was trained with outliers is attacked where its gate decides.

    A seed comes after the other, so that every row is there once before any is there twice.
    """

    def against(
        defense: Defended,
        kind: str,
        *adapt: str,
        own: tuple[str, ...] = (),
        victim: str = "mnist",
    ) -> Cell:
        return Cell(
            victim,
            defense,
            queries=OUTLINED,
            test=SETS.get(victim),
            adapt=adapt,
            changes=("attack.curve=[]", *own),
            recipe=f"mnist-{kind}",
        )

    def gated(victim: str, *few: str) -> tuple[Cell, ...]:
        labels = against(WITHHOLD, "labels", "answered", victim=victim, own=few)
        seeking = replace(labels, attack="mask_seeking", queries=LARGER, adapt=())
        return (
            against(LABEL, "labels", victim=victim),
            labels,
            seeking,
            against(WITHHOLD, "mixed", "answered", victim=victim, own=few),
        )

    # Few answers are learned for more epochs.
    few = "fit.epochs=200"
    signs = replace(
        against(LABEL, "labels"), victim="gtsrb", recipe="gtsrb-labels",
        queries=OUTLINED_OBJECTS, test_images=5000,
    )  # fmt: skip
    stricter = replace(signs, defense=STRICTER)
    strict = (
        replace(stricter, adapt=("answered",), changes=(*stricter.changes, "fit.epochs=60")),
        replace(
            stricter,
            attack="mask_seeking",
            queries="cifar10,cifar10@outlines",
            changes=(*stricter.changes, "fit.epochs=24"),
        ),
    )
    exposed = (
        signs,
        *strict,
        *(replace(row, defense=WITHHOLD) for row in strict),
        # without a recipe, as every victim is attacked in the other plans
        *(knockoff(Cell("gtsrb", defense)) for defense in (LABEL, NONE)),
    )
    rows = (
        *gated("mnist"),
        against(CODEBOOK, "mixed"),
        *gated("mnist-outliers", few),
        against(WITHHOLD, "labels", "oracle_mask", victim="mnist-outliers", own=(few,)),
        *strict,
        *(replace(row, victim="gtsrb-outliers", test="gtsrb") for row in exposed),
        *(
            knockoff(Cell(victim, CODEBOOK, test=SETS.get(victim)))
            for victim in (*COLOUR, "cifar100")
        ),
        replace(against(WITHHOLD, "labels", "answered"), queries="mnist[:5000]", budget=5000),
        against(dcp(1.2), "labels", "margin_filter", "argmax"),
        against(MODELGUARD, "soft"),
        against(MODELGUARD, "soft", "modelguard"),
        against(dcp(1.2), "soft", "invert", own=ITERATED),
        against(NONE, "soft"),
    )
    for seed in (0, 1, 2):
        yield from (replace(row, seed=seed) for row in rows)
    yield from (replace(row, precision="int8") for row in gated("mnist-outliers", few))


PLANS: dict[str, Callable[[], Iterator[Cell]]] = {
    "ci": ci,
    "headline": headline,
    "colour": colour,
    "matrix": matrix,
    "datafree": datafree,
    "hungry": hungry,
    "adaptive": adaptive,
    "frontier": frontier,
    "strongest": strongest,
    "tuned": tuned,
}
