"""Runs each attack against an undefended server, to show how strong the attacks are.

    python -m scumble.evaluation.steal            all cells that have no result yet
    python -m scumble.evaluation.steal dfme       those whose name starts with "dfme"

Writes `OUT/<cell>.json`. The committed results were made with `--out docs/results/records/steal`.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click

from scumble.attacker.run import run
from scumble.evaluation.experiment import Cell
from scumble.evaluation.referee import job, server

RESULTS = Path("runs/records/steal")
RUNS = Path("runs/steal")


OBJECTS = ("fit.epochs=12", "fit.augment=flips")
FASHION = Cell("mnist", queries="fashion_mnist")
OWN_IMAGES = {
    "knockoff-mnist": FASHION,
    "knockoff-mnist-soft": replace(FASHION, changes=("fit.loss=soft",)),
    "knockoff-mnist-adaptive": replace(FASHION, changes=("attack.strategy=adaptive",)),
    "knockoff-cifar10": Cell("cifar10", queries="cifar100", changes=OBJECTS),
    "knockoff-gtsrb": Cell(
        "gtsrb", queries="cifar10", changes=("fit.epochs=12", "attack.curve=[]")
    ),
    "jbda-mnist": replace(FASHION, attack="jbda", budget=8_000),
}
DFME = Cell("mnist", attack="dfme", budget=300_000)
MAZE = Cell("mnist", attack="maze", budget=150_000)
DATA_FREE = {
    "dfme-mnist-tensor": replace(DFME, budget=500_000, transport="tensor"),
    "dfme-mnist-pixels": DFME,
    "dfme-mnist-pixels-papers-step": replace(DFME, changes=("attack.step=1e-3",)),
    "maze-mnist-tensor": replace(MAZE, budget=900_000, transport="tensor"),
    "maze-mnist-pixels": MAZE,
    "maze-mnist-pixels-papers-step": replace(MAZE, changes=("attack.step=1e-3",)),
}
CELLS: dict[str, Cell] = {**OWN_IMAGES, **DATA_FREE}


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("../shared/data"),
    show_default=True,
    help="Folder with the image sets.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Of torch; another number gives slightly other copies.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default=True,
    help="Folder of the results; cells that have one are not run.",
)
def main(names: tuple[str, ...], data: Path, threads: int, out: Path) -> None:
    """Run the cells whose names start with one of NAMES; all by default."""
    chosen = {name: cell for name, cell in CELLS.items() if name.startswith(names or ("",))}
    run_cells(chosen, data, threads, out)


def run_cells(cells: Mapping[str, Cell], data: Path, threads: int, out: Path) -> None:
    """Measure the cells that have no result yet."""
    out.mkdir(parents=True, exist_ok=True)
    for name, cell in cells.items():
        if (out / f"{name}.json").exists():
            continue
        click.echo(name)
        measure(name, cell, data, threads, out)


def measure(name: str, cell: Cell, data: Path, threads: int, out: Path) -> None:
    """Start the server, attack it, keep the result."""
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run, whose server is gone
    command = shlex.join(["python", "-m", "scumble.evaluation.steal", name])
    with server(cell, cell.defense) as victim:
        attack = job(cell, victim.url, victim.admin, data, threads)
        result = run(attack, folder, command=command)
    click.echo(f"  {result.scores!r}, ledgers {result.ledger!r}, {result.timing.wall_s:.0f} s")
    shutil.copyfile(folder / "result.json", out / f"{name}.json")


if __name__ == "__main__":
    main()
