"""Tables of docs/how-to/training.md and docs/reference/defenses.md, from the cards.

python -m docs.generators.bundles [MODELS]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.inference.bundle import Bundle, Card
from scumble.data.shifts import SHIFTS

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "docs" / "results" / "records" / "bench.json"
IMAGENET = ROOT / "loadtest" / "imagenet.json"
FORMS = ("classwise 4", "pooled 4", "calibrated 4")
# Goals of codebook, withhold and of training with outliers.
MOST_L1, MOST_ECE, LEAST_AUC, MOST_LOST = 0.15, 0.005, 0.03, 0.002
MOST_ADDED = {1: 0.05, 32: 0.01}  # of inference, by batch
MEASURES_SHOWN = ("top", "energy", "residual", "vim", "energy+top", "vim+top")


def tables(models: Path) -> str:
    """Three tables, of all bundles in `models` that have an int8 file."""
    cards = [Bundle(path.parent).card for path in sorted(models.glob("*/card.json"))]
    cards = [card for card in cards if card.quantization]
    return f"{_candidates(cards)}\n\n{_commands(cards)}\n\n{_auxiliary(cards)}"


def _candidates(cards: list[Card]) -> str:
    lines = [
        "| bundle | file | held-out images | test images | L1 to float | bytes | of float |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in cards:
        found = card.quantization
        whole = found["float32"]
        lines.append(
            f"| {card.name} | float32 | {whole['validation']:.2%} | {whole['test']:.2%} | "
            f"| {whole['bytes']:,} | |"
        )
        for name, c in found["candidates"].items():
            label = f"**{name}**" if name == f"{found['method']}-{found['preset']}" else name
            lines.append(
                f"| {card.name} | {label} | {c['validation']:.2%} | {c['test']:.2%} | "
                f"{c['test_l1']:.4f} | {c['bytes']:,} | {c['bytes'] / whole['bytes']:.3f} |"
            )
    return "\n".join(lines)


def _commands(cards: list[Card]) -> str:
    lines = ["| bundle | held out | test | commands |", "|---|---|---|---|"]
    for card in cards:
        found = card.quantization
        lines.append(
            f"| {card.name} | {found['validation_data']['images']:,} "
            f"| {card.accuracy['int8'].images:,} "
            f"| `{card.training['command']}`, `{found['command']}` |"
        )
    return "\n".join(lines)


def _auxiliary(cards: list[Card]) -> str:
    lines = [
        "| bundle | auxiliary file | images | agrees with the victim | right | L1 to the victim "
        "| bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in cards:
        for part in ("surrogate", "misinformation"):
            if not (found := card.auxiliary.get(part)):
                continue
            source = found["data"].partition(" ")[0]
            lines.append(
                f"| {card.name} | {part} | {found['images']:,} of `{source}` "
                f"| {found['agreement']:.2%} | {found['test']:.2%} | {found['test_l1']:.2f} "
                f"| {found['bytes']:,} |"
            )
    return "\n".join(lines)


def codebooks(models: Path) -> str:
    """The table of docs/reference/defenses.md: what clients get from a codebook, by the cards."""
    lines = [
        "| bundle | answers | float32: L1 | ECE | AUC | int8: L1 | ECE | AUC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(models.glob("*/card.json")):
        card = Bundle(path.parent).card
        made = card.auxiliary.get("codebook", {})
        for served in ("none", "label", *FORMS):
            rows = [made.get(precision, {}).get(served) for precision in ("float32", "int8")]
            if all(rows):
                cells = [f"{row['l1']:.3f} | {row['ece']:.3f} | {row['auc']:.3f}" for row in rows]
                lines.append(f"| {card.name} | {served} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gates(models: Path) -> str:
    """The table of docs/reference/defenses.md: which images `withhold` withholds, by the cards."""
    lines = [
        "| bundle | images | score | float32: at 1 % | at 2 % | at 5 % "
        "| int8: at 1 % | at 2 % | at 5 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(models.glob("*/card.json")):
        card = Bundle(path.parent).card
        made = card.auxiliary.get("gate", {})
        for images in ("own", "own, shifted", *made.get("foreign", {})):
            for measure in MEASURES_SHOWN:
                found = [made.get(precision, {}).get(measure) for precision in ("float32", "int8")]
                if all(found):
                    cells = [_share(row, images) for losses in found for row in losses.values()]
                    lines.append(f"| {card.name} | {images} | {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def exposures(models: Path) -> str:
    """The table of docs/reference/defenses.md: gates of bundles without and with outliers."""
    lines = [
        "| bundle | images | float32: at 1 % | at 2 % | at 5 % | int8: at 1 % | at 2 % | at 5 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cards = [Bundle(path.parent).card for path in sorted(models.glob("*/card.json"))]
    exposed = {card.training["set"] for card in cards if "outliers" in card.training}
    for card in cards:
        if card.training.get("set", card.name) not in exposed:
            continue
        gate = card.auxiliary["gate"]
        kind = (
            "vim+top" if "vim+top" in gate["float32"] else "energy+top"
        )  # too few images for a whitener
        found = [gate[precision][kind] for precision in ("float32", "int8")]
        for images in ("own", "own, shifted", *gate["foreign"]):
            cells = [_share(row, images) for losses in found for row in losses.values()]
            lines.append(f"| {card.name} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)


def missed(models: Path) -> str:
    """The table of docs/reference/defenses.md: where cards and records miss a goal."""
    cards = {path.parent.name: Bundle(path.parent).card for path in models.glob("*/card.json")}
    bench, imagenet = (json.loads(path.read_text()) for path in (BENCH, IMAGENET))
    rows = [
        *(row for name in sorted(cards) for row in _missed_answers(cards[name])),
        *_missed_at_1000(imagenet["defenses"]),
        *_missed_latency(bench["cases"]),
        *(row for name in sorted(cards) for row in _missed_accuracy(cards[name], cards)),
    ]
    head = ["| goal | where | figure |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _missed_answers(card: Card) -> Iterator[tuple[str, str, str]]:
    for precision in ("float32", "int8"):
        made = card.auxiliary.get("codebook", {}).get(precision, {})
        for form in FORMS:
            if not (row := made.get(form)):
                continue
            where, clean = f"`{card.name}` {precision}, {form}", made["none"]
            if row["l1"] > MOST_L1:
                yield f"L1 at most {MOST_L1}", where, f"{row['l1']:.3f}"
            more = 0.0 if form.startswith("calibrated") else MOST_ECE
            if row["ece"] > clean["ece"] + more:
                goal = "ECE at most the clean one" + (f" and {more}" if more else "")
                yield goal, where, f"{row['ece']:.4f}, clean {clean['ece']:.4f}"
            if row["auc"] < clean["auc"] - LEAST_AUC:
                goal = f"AUC at least the clean one less {LEAST_AUC}"
                yield goal, where, f"{row['auc']:.3f}, clean {clean['auc']:.3f}"


def _missed_at_1000(defenses: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    row, label = defenses["codebook"], defenses["label"]
    where = "EfficientNet-Lite0 int8, 1,000 classes, pooled 4"
    if row["l1"] > MOST_L1:
        figure = f"{row['l1']:.3f}, labels only {label['l1']:.3f}"
        yield f"L1 at most {MOST_L1}", where, figure
    if row["changed"]:
        yield "labels unchanged", where, f"{row['changed']:.1%} changed"


def _missed_latency(cases: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for case in cases:
        defense, _, _ = case["defense"].partition("_in_graph")
        most = MOST_ADDED[case["batch"]]
        if case["defense"] in {"codebook_in_graph", "withhold_in_graph"} and (
            case["over_inference"] > most
        ):
            goal = f"at most {most:.0%} of inference at batch {case['batch']}, in the graph"
            where = f"`{case['model']}` {case['precision']}, `{defense}`"
            yield goal, where, f"{case['over_inference']:.1%}"


def _missed_accuracy(card: Card, cards: Mapping[str, Card]) -> Iterator[tuple[str, str, str]]:
    plain = cards.get(card.training.get("set", ""))
    if plain is None or "outliers" not in card.training:
        return
    for precision, found in card.accuracy.items():
        before = plain.accuracy[precision].value
        if found.value < before - MOST_LOST:
            goal = f"with outliers at most {100 * MOST_LOST:g} points less accurate"
            figure = f"{found.value:.2%}, `{plain.name}` {before:.2%}"
            yield goal, f"`{card.name}` {precision}", figure


def _share(row: dict[str, float], images: str) -> str:
    shifted = sum(row[name] for name in SHIFTS) / len(SHIFTS)
    return f"{100 * (shifted if images == 'own, shifted' else row[images]):.1f}"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
    sys.stdout.write(
        "\n\n".join(
            [
                tables(folder),
                codebooks(folder),
                gates(folder),
                exposures(folder),
                missed(folder),
                "",
            ]
        )
    )
