"""Writes the README's table of policies from the cards, the records of cells and the demo's.

python -m docs.generators.policies
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import click

from app.inference.bundle import Card, open_bundle
from docs.generators.results import CELLS, README
from scumble.evaluation.summary import Line, best, load, summarise
from scumble.evaluation.tables import markdown

BUNDLES = ("mnist", "cifar10", "gtsrb")
DEMO = CELLS.parent / "demo.json"
MODELS = README.parent / "models"
BEGIN = "<!-- policies: python -m docs.generators.policies -->\n\n"
HEAD = ("threat", "users need", "policy", "measured cost", "it does not stop")
PAGE = "docs/reference/defenses.md"


def table(cards: Mapping[str, Card], lines: Iterable[Line], demo: Mapping[str, Any]) -> str:
    """Policies by threat, with what each costs and what it does not stop.

    Args:
        cards: of `BUNDLES`.
        lines: of all cells.
        demo: the record of `make demo`.
    """
    confidence, label = "the label and a confidence", "the label only"
    copies = {line["name"]: f"{line['stolen']['mnist']:.1%}" for line in demo["attacks"]}
    near = cards["cifar10"].auxiliary["gate"]["float32"]["vim+top"]["0.05"]["cifar100_train"]
    rows = [
        (
            "copies trained on probabilities",
            confidence,
            f"[`codebook`]({PAGE}#codebook)",
            f"labels unchanged; L1 {named(cards, 'classwise 4', 'l1')}; "
            + "; ".join(
                f"{figure.upper()} {listed(cards, 'classwise 4', figure)} "
                f"(clean {listed(cards, 'none', figure)})"
                for figure in ("ece", "auc")
            ),
            "training on the labels; an answer adds at most log2(m) bits to them, m = 4 levels",
        ),
        (
            "copies trained on probabilities",
            label,
            f"[`label`]({PAGE}#label)",
            f"labels unchanged; L1 {listed(cards, 'label', 'l1')}; no confidence",
            "training on the labels",
        ),
        (
            "KnockoffNets and DFME as published, with answers used as they are; comparison with "
            "the paper",
            label,
            f"[`dcp`]({PAGE}#dcp) with beta 1.2",
            f"L1 {demo['servers']['defended']['l1']['mnist']:.2f} `mnist`: the confidence is "
            f"useless; the copy falls from {copies['undefended']} to {copies['defended']}",
            "[attackers who adapt](docs/explanation/results.md): labels only "
            f"{copies['defended, labels only']}, inverted {copies['defended, inverted']}",
        ),
        (
            "copies trained on labels, by attackers without images of your own kind",
            confidence,
            f"[`withhold`]({PAGE}#withhold)",
            "; ".join(withheld(lines)),
            f"own images as queries; sets near your own: `cifar10` catches {near:.0%} of "
            "CIFAR-100 at a loss of 5%",
        ),
        (
            "any attacker, by number of answers",
            "any of these",
            "[budgets](docs/reference/keys.md) per key, beside a defense",
            "answers unchanged; one count per request, in SQLite or Redis",
            "copies made within the budget; one attacker with several keys, except by the budget "
            "for all clients together",
        ),
    ]
    return markdown(HEAD, rows)


def withheld(lines: Iterable[Line]) -> list[str]:
    """What users lose, and what the best attackers get, from each model that was attacked."""
    strongest = best(lines)
    labels = {line.model: line for line in strongest if line.defense.name == "label"}
    return [
        f"`{line.victim}` {line.precision}: {1 - line.answered:.1%} of own images get no answer; "
        f"the copy falls from {labels[line.model].stolen} (labels only) to {line.stolen}"
        for line in strongest
        if line.defense.name == "withhold" and line.model in labels
    ]


def named(cards: Mapping[str, Card], answers: str, figure: str) -> str:
    """A figure of each bundle, with its name."""
    pairs = zip(BUNDLES, figures(cards, answers, figure), strict=True)
    return ", ".join(f"{value} `{name}`" for name, value in pairs)


def listed(cards: Mapping[str, Card], answers: str, figure: str) -> str:
    """A figure of each bundle, in the order of `BUNDLES`."""
    return ", ".join(figures(cards, answers, figure))


def figures(cards: Mapping[str, Card], answers: str, figure: str) -> list[str]:
    """Of the codebooks in float32, as `.012`; `gtsrb` has no classwise codebook."""
    made = [cards[name].auxiliary["codebook"]["float32"] for name in BUNDLES]
    return [f"{each.get(answers, each['pooled 4'])[figure]:.3f}".removeprefix("0") for each in made]


def committed() -> str:
    """The table of the committed cards and records."""
    cards = {name: open_bundle(MODELS, name).card for name in BUNDLES}
    return table(cards, summarise(load(CELLS)), json.loads(DEMO.read_text()))


def within(text: str, made: str) -> str:
    """The README with another table."""
    before, rest = text.split(BEGIN)
    after = rest.partition("|\n\n")[2]
    return f"{before}{BEGIN}{made}\n\n{after}"


@click.command()
def main() -> None:
    """Write the table into the README."""
    README.write_text(within(README.read_text(), committed()))


if __name__ == "__main__":
    main()
