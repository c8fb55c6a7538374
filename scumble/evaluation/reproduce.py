"""Compares records made here with committed ones: the same cells, and scores that are near.

    python -m scumble.evaluation.reproduce runs/results-ci docs/results/records/ci

On another processor a copy comes out a little differently, so scores may differ by `--points`.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from scumble.evaluation.commands import show
from scumble.evaluation.record import Record
from scumble.evaluation.summary import load


@click.command()
@click.argument("made", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("committed", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--points", default=5.0, show_default=True, help="Allowed difference of a score.")
def main(made: Path, committed: Path, points: float) -> None:
    """Compare the records in MADE with those in COMMITTED; exit code 1 if they differ."""
    here = {cell_of(record): record for record in load(made)}
    there = {cell_of(record): record for record in load(committed)}
    if set(here) != set(there):
        missing = sorted(set(there) ^ set(here))
        raise click.ClickException(f"other cells than the committed: {missing[0]}")
    show(list(here.values()), Console(highlight=False))
    worst = max((abs(a - b), name) for key in here for name, a, b in pairs(here[key], there[key]))
    click.echo(f"{len(here)} cells; largest difference: {100 * worst[0]:.2f} points, {worst[1]}")
    if 100 * worst[0] > points:
        raise click.ClickException(f"that is more than {points} points")


def cell_of(record: Record) -> str:
    """What makes a cell the same as another."""
    return repr(sorted(record.cell.items()))


def pairs(one: Record, other: Record) -> list[tuple[str, float, float]]:
    """The scores of both."""
    name = f"{one.cell['defense']['name']} against {one.attack.attack.name}"
    return [
        (f"served accuracy of {name}", one.served.accuracy, other.served.accuracy),
        (f"stolen accuracy of {name}", one.attack.scores.accuracy, other.attack.scores.accuracy),
        (f"agreement of {name}", one.attack.scores.agreement, other.attack.scores.agreement),
    ]


if __name__ == "__main__":
    main()
