"""Writes the table of policies into the README and `docs/index.md`.

It is made from the cards, the records of cells, that of the demo, and that of 1,000 classes.

python -m docs.generators.policies
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from app.inference.bundle import Card, open_bundle
from docs.generators.marks import between
from scumble.defenses import make
from scumble.evaluation.claims import tie
from scumble.evaluation.summary import Line, best, load, summarise
from scumble.evaluation.tables import markdown

ROOT = Path(__file__).parents[2]
README, INDEX = ROOT / "README.md", ROOT / "docs" / "index.md"
CELLS = ROOT / "docs" / "results" / "records" / "cells"
DEMO = CELLS.parent / "demo.json"
IMAGENET = ROOT / "loadtest" / "imagenet.json"
MODELS = ROOT / "models"
BUNDLES = ("mnist", "cifar10", "gtsrb", "cifar100")
BEGIN = "<!-- policies: python -m docs.generators.policies -->\n\n"
END = "\n\n<!-- end of policies -->\n"
HEAD = ("threat", "users need", "classes", "policy", "measured cost", "it does not stop")
PAGE = "docs/reference/defenses.md"


def table(
    cards: Mapping[str, Card],
    lines: Iterable[Line],
    demo: Mapping[str, Any],
    imagenet: Mapping[str, Any],
) -> str:
    """Policies by threat, with what each costs and what it does not stop.

    Args:
        cards: of `BUNDLES`.
        lines: of all cells.
        demo: the record of `make demo`.
        imagenet: the record of `python -m loadtest.imagenet`.
    """
    confidence, label = "the label and a confidence", "the label only"
    lines = list(lines)
    many = imagenet["defenses"]
    copies = {line["name"]: f"{line['stolen']['mnist']:.1%}" for line in demo["attacks"]}
    near = cards["cifar10"].auxiliary["gate"]["float32"]["vim+top"]["0.05"]["cifar100_train"]
    rows = [
        (
            "copies trained on probabilities",
            confidence,
            "10 to 1,000",
            f"[`codebook`]({PAGE}#codebook)",
            f"labels unchanged; L1 {named(cards, 'classwise 4', 'l1')}; "
            + "; ".join(
                f"{figure.upper()} {listed(cards, 'classwise 4', figure)} "
                f"(clean {listed(cards, 'none', figure)})"
                for figure in ("ece", "auc")
            )
            + f"; 1,000 classes: {changed(many['codebook'])}, L1 {short(many['codebook']['l1'])}",
            "training on the labels; an answer adds at most log2(m) bits to them, m = 4 levels",
        ),
        (
            "copies trained on probabilities",
            label,
            "10 to 1,000",
            f"[`label`]({PAGE}#label)",
            f"labels unchanged; L1 {listed(cards, 'label', 'l1')}; no confidence; "
            f"1,000 classes: {changed(many['label'])}, L1 {short(many['label']['l1'])}",
            "training on the labels",
        ),
        (
            "KnockoffNets with answers used as they are; comparison with the paper (DFME: not "
            "measured)",
            label,
            "10 to 43",
            f"[`dcp`]({PAGE}#dcp) with beta 1.2",
            f"L1 {demo['servers']['defended']['l1']['mnist']:.2f} `mnist`: the confidence is "
            f"useless; the copy falls from {copies['undefended, soft loss']} to "
            f"{copies['defended, soft loss']} with the paper's loss",
            "[attackers who adapt](docs/explanation/demo.md): labels only "
            f"{copies['defended, labels only']}, inverted {copies['defended, inverted']}",
        ),
        (
            "the same",
            label,
            "100 and more",
            f"`dcp` with [`keep_top1`]({PAGE}#keep_top1)",
            f"1,000 classes: {changed(many['dcp, keep_top1'])}, "
            f"L1 {short(many['dcp, keep_top1']['l1'])}; without `keep_top1` "
            f"{changed(many['dcp'])}; copies not measured; `cifar100` without `keep_top1`: "
            f"{hundred(lines)}",
            "attackers who adapt, training on the labels",
        ),
        (
            "copies trained on labels, by attackers without images of your own kind",
            confidence,
            "10 to 43 (1,000: its cost only)",
            f"[`withhold`]({PAGE}#withhold)",
            f"{withheld(lines)}; 1,000 classes: {many['withhold']['withheld']:.0%} of "
            f"images get no answer, {changed(many['withhold'])}, "
            f"L1 {short(many['withhold']['l1'])}; copies not measured",
            "own images as queries, or drawings like them, such as strokes for digits; sets near "
            f"your own: `cifar10` catches {near:.0%} of CIFAR-100 at a loss of 5%",
        ),
        (
            "any attacker, by number of answers",
            "any of these",
            "any",
            "[budgets](docs/reference/keys.md) per key, beside a defense",
            "answers unchanged; one count per request, in SQLite or Redis",
            "copies made within the budget; one attacker with several keys, except by the budget "
            "for all clients together",
        ),
    ]
    return markdown(HEAD, rows)


def hundred(lines: Iterable[Line]) -> str:
    """What `dcp` leaves users of `cifar100`."""
    one = next(line for line in lines if (line.victim, line.defense.name) == ("cifar100", "dcp"))
    return (
        f"{one.top1_changed.mean:.0%} of the labels change, {one.served.mean:.1%} are right in "
        f"place of {one.clean.mean:.1%}"
    )


def withheld(lines: Iterable[Line]) -> str:
    """What users lose, and what the best attackers get, from each model that was attacked."""
    strongest = sorted(best(lines), key=lambda line: line.stolen.mean, reverse=True)
    served = [line for line in strongest if line.precision == "float32"]
    labels = {line.victim: line for line in served if line.defense.name == "label"}
    # of several losses the one that leaves the worst copy, which the card recommends
    gated = {line.victim: line for line in served if line.defense.name == "withhold"}
    gated = {name: gated[name] for name in sorted(gated.keys() & labels)}
    lost = sorted(1 - line.answered for line in gated.values())
    copies = (
        f"`{name}` {labels[name].stolen} and {line.stolen}{tie(line, labels[name])}"
        for name, line in gated.items()
    )
    return (
        f"{lost[0]:.1%} to {lost[-1]:.1%} of own images get no answer; copies from labels only and "
        f"from these answers: {'; '.join(copies)}"
    )


def named(cards: Mapping[str, Card], answers: str, figure: str) -> str:
    """A figure of each bundle, with its name."""
    pairs = zip(BUNDLES, figures(cards, answers, figure), strict=True)
    return ", ".join(f"{value} `{name}`" for name, value in pairs)


def listed(cards: Mapping[str, Card], answers: str, figure: str) -> str:
    """A figure of each bundle, in the order of `BUNDLES`."""
    return ", ".join(figures(cards, answers, figure))


def figures(cards: Mapping[str, Card], answers: str, figure: str) -> list[str]:
    """Of the codebooks in float32; `gtsrb` has no classwise codebook."""
    made = [cards[name].auxiliary["codebook"]["float32"] for name in BUNDLES]
    return [short(each.get(answers, each["pooled 4"])[figure]) for each in made]


def short(value: float) -> str:
    """As `.012`."""
    return f"{value:.3f}".removeprefix("0")


def changed(row: Mapping[str, float]) -> str:
    """Which share of the labels a defense changes."""
    return f"{row['changed']:.0%} of the labels change" if row["changed"] else "labels unchanged"


def notes(imagenet: Mapping[str, Any]) -> str:
    """What the figures are, and of which images."""
    crops = imagenet["crops"]
    clean = np.array([[0.97, *[0.03 / 99] * 99]])
    answer = make("dcp", beta=1.2)(clean, None)
    return (
        "L1 is the mean distance to the clean answer (0 to 2), ECE the expected calibration error, "
        "and AUC the\nprobability that a right answer is more confident than a wrong one.\n"
        f"1,000 classes: EfficientNet-Lite0 int8, {crops['images']} parts of {crops['pictures']} "
        "photos ([performance](docs/explanation/performance.md#defenses-of-1000-classes)).\n"
        f"100 classes: by its formula, `dcp` sends a confidence of 97% as {answer[0, 0]:.1%} "
        f"(L1 {np.abs(answer - clean).sum():.2f})."
    )


def committed() -> str:
    """The table of the committed cards and records with its notes, as the README has them."""
    cards = {name: open_bundle(MODELS, name).card for name in BUNDLES}
    demo, imagenet = (json.loads(path.read_text()) for path in (DEMO, IMAGENET))
    made = table(cards, summarise(load(CELLS)), demo, imagenet)
    return f"{made}\n\n{notes(imagenet)}"


def pages() -> dict[Path, str]:
    """README and first page of the documentation, each with the table of now."""
    made = committed()
    parts = {README: made, INDEX: made.replace("](docs/", "](")}
    return {path: within(path.read_text(), part) for path, part in parts.items()}


def within(text: str, made: str) -> str:
    """A page with another table."""
    return between(text, BEGIN, made, END)


def write() -> None:
    """Write the table into both pages."""
    for path, text in pages().items():
        path.write_text(text)


@click.command()
def main() -> None:
    """Write the table into README.md and docs/index.md."""
    write()


if __name__ == "__main__":
    main()
