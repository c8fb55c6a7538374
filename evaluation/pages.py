"""`docs/results.md` and `report.html`: both are made of the committed records, nothing is typed in.

python -m evaluation.pages            writes both, and the plots
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from evaluation.plots import AXES, frontier, save, svg
from evaluation.record import Record
from evaluation.scores import Spread
from evaluation.summary import Line, best, load, summarise

HERE = Path(__file__).parent
CELLS = HERE / "results" / "cells"
BENCH = HERE / "results" / "bench.json"
DOCS = HERE.parent / "docs"
VICTIMS = ("mnist", "cifar10", "gtsrb")

# what the reader sees and how it is said
COLUMNS: dict[str, Callable[[Line], str]] = {
    "victim": lambda line: f"`{line.victim}` {line.precision}",
    "defense": lambda line: str(line.defense),
    "attack": lambda line: line.attacker,
    "queries": lambda line: f"{line.budget:,}",
    "served": lambda line: str(line.served),
    "stolen": lambda line: str(line.stolen),
    "agreement": lambda line: str(line.agreement),
    "agreement, queries": lambda line: str(line.agreement_transfer),
    "L1, users": lambda line: _plain(line.l1_test),
    "L1, attacker": lambda line: _plain(line.l1_transfer),
    "labels changed": lambda line: f"{line.top1_changed.mean:.1%}",
    "seeds": lambda line: str(len(line.seeds)),
}


def table(lines: Iterable[Line]) -> str:
    """Lines as a Markdown table."""
    rows = [[cell(line) for cell in COLUMNS.values()] for line in lines]
    head = [list(COLUMNS), ["---"] * len(COLUMNS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def ordered(lines: Iterable[Line]) -> list[Line]:
    """By victim, precision, attacker, defense and strength, undefended first and labels last."""
    place = {"none": 0, "label": 2}
    return sorted(
        lines,
        key=lambda line: (
            VICTIMS.index(line.victim) if line.victim in VICTIMS else len(VICTIMS),
            line.precision,
            line.attacker,
            place.get(line.defense.name, 1),
            line.defense.name,
            line.defense.strength,
        ),
    )


def findings(lines: list[Line]) -> list[str]:
    """What held and what did not, as sentences with their figures, for each served model."""
    said = []
    for strongest in best(line for line in lines if line.defense.name == "dcp"):
        same = [
            line
            for line in lines
            if (line.victim, line.precision) == (strongest.victim, strongest.precision)
        ]
        of_defense = [line for line in same if line.defense == strongest.defense]
        naive = [line for line in of_defense if not line.adapt]
        bare = [line for line in same if line.defense.name == "none" and not line.adapt]
        if not naive or not bare:
            continue
        soft = max(naive, key=lambda line: line.stolen.mean)
        free = max(bare, key=lambda line: line.stolen.mean)
        lost = soft.clean.mean - soft.served.mean
        said.append(
            f"`{soft.victim}` {soft.precision}, {soft.defense}: the copy falls from "
            f"{free.stolen} to {soft.stolen} ({soft.attacker}); the best adaptive attacker "
            f"({strongest.attacker}) gets {strongest.stolen}. Honest users lose "
            f"{100 * lost:.2f} points of accuracy and see an L1 of {soft.l1_test.mean:.2f}."
        )
    return said


def results(records: list[Record], bench: dict[str, object] | None) -> str:
    """The whole page."""
    lines = ordered(summarise(records))
    naive = [line for line in lines if not line.adapt]
    adaptive = [line for line in lines if line.adapt]
    commands = sorted({record.command for record in records})
    parts = [
        (HERE / "results.head.md").read_text().rstrip(),
        "## What held, what did not",
        "\n".join(f"- {sentence}" for sentence in findings(lines)) or "No cell has been run yet.",
        "## Attackers who take the answers as they come",
        table(naive),
        "## Adaptive attackers",
        table(adaptive),
        "## Latency",
        latency(bench) if bench else "Not measured yet: `scumble bench defenses`.",
        "## Plots",
        "\n\n".join(
            f"![{victim}: stolen accuracy against {x}](results/{victim}-{x}.png)"
            for victim in VICTIMS
            if any(line.victim == victim for line in lines)
            for x in AXES
        ),
        "## Where the figures come from",
        "Each line is one or more files in `evaluation/results/cells/`, made by:",
        "\n".join(f"- `{command}`" for command in commands),
    ]
    return "\n\n".join(parts) + "\n"


def latency(bench: dict[str, object]) -> str:
    """The table of the latency bench."""
    rows = [
        "| model | batch | defense | ms per image | over `dcp` | over inference |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{case['model']}` {case['precision']} | {case['batch']} | {case['defense']} "
        f"| {case['ms_per_image']:.4f} | {case['over_dcp']:.1f} | {case['over_inference']:.1%} |"
        for case in bench["cases"]  # type: ignore[attr-defined] # JSON
    ]
    return f"`{bench['command']}`\n\n" + "\n".join(rows)


def report(records: list[Record]) -> str:
    """One page to look at: plots first, everything in it."""
    lines = ordered(summarise(records))
    figures = [
        f"<figure>{svg(frontier(lines, victim, x))}</figure>"
        for victim in VICTIMS
        if any(line.victim == victim for line in lines)
        for x in AXES
    ]
    sentences = "".join(f"<li>{html.escape(text)}</li>" for text in findings(lines))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell(line))}</td>" for cell in COLUMNS.values())
        + "</tr>"
        for line in lines
    )
    style = (HERE / "report.css").read_text()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'><title>Scumble: results</title>"
        f"<style>{style}</style><h1>What model stealing defenses are worth</h1>"
        f"<ul>{sentences}</ul>{''.join(figures)}"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        "</html>\n"
    )


def _plain(value: Spread) -> str:
    return f"{value.mean:.2f}"


@click.command()
@click.option("--cells", type=click.Path(file_okay=False, path_type=Path), default=CELLS)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=DOCS)
def main(cells: Path, out: Path) -> None:
    """Write results.md, report.html and the plots into OUT."""
    records = load(cells)
    bench = json.loads(BENCH.read_text()) if BENCH.exists() else None
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(results(records, bench))
    (out / "results" / "report.html").write_text(report(records))
    lines = summarise(records)
    for victim in sorted({line.victim for line in lines} & set(VICTIMS)):
        for x in AXES:
            save(frontier(lines, victim, x), out / "results" / f"{victim}-{x}.png")


if __name__ == "__main__":
    main()
