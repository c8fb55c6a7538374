"""Tables of docs/how-to/training.md and docs/reference/defenses.md, from the cards.

python -m docs.generators.bundles [MODELS]
"""

from __future__ import annotations

import sys
from pathlib import Path

from app.inference.bundle import Bundle, Card
from scumble.data.shifts import SHIFTS

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
        for served in ("none", "label", "classwise 4", "pooled 4", "calibrated 4"):
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


def _share(row: dict[str, float], images: str) -> str:
    shifted = sum(row[name] for name in SHIFTS) / len(SHIFTS)
    return f"{100 * (shifted if images == 'own, shifted' else row[images]):.1f}"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
    sys.stdout.write(
        "\n\n".join([tables(folder), codebooks(folder), gates(folder), exposures(folder), ""])
    )
