"""How strong the attacks are: each against a real, undefended server.

    python -m scumble.evaluation.steal            all cells that have no result yet
    python -m scumble.evaluation.steal dfme       those whose name begins so

Writes `docs/results/records/steal/<cell>.json`.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import click

from scumble.attacker.run import Job, run
from scumble.evaluation.local_server import serving

RESULTS = Path("docs/results/records/steal")
RUNS = Path("runs/steal")


@dataclass(frozen=True)
class Cell:
    """One attack on one server.

    Attributes:
        victim: name of its bundle.
        attack: key of `ATTACKS`.
        budget: queries.
        queries: data set to ask about.
        changes: `name.field=value`.
        transport: key of `TRANSPORTS`.
    """

    victim: str
    attack: str
    budget: int
    queries: str | None = None
    changes: tuple[str, ...] = ()
    transport: str = "pixels"


OBJECTS = ("fit.epochs=12", "fit.augment=flips")
CELLS: dict[str, Cell] = {
    "knockoff-mnist": Cell("mnist", "knockoff", 20_000, "fashion_mnist"),
    "knockoff-mnist-soft": Cell(
        "mnist", "knockoff", 20_000, "fashion_mnist", changes=("fit.loss=soft",)
    ),
    "knockoff-mnist-adaptive": Cell(
        "mnist", "knockoff", 20_000, "fashion_mnist", changes=("attack.strategy=adaptive",)
    ),
    "knockoff-cifar10": Cell("cifar10", "knockoff", 20_000, "cifar100", changes=OBJECTS),
    "knockoff-gtsrb": Cell(
        "gtsrb", "knockoff", 20_000, "cifar10", changes=("fit.epochs=12", "attack.curve=[]")
    ),
    "jbda-mnist": Cell("mnist", "jbda", 8_000, "fashion_mnist"),
    "dfme-mnist-tensor": Cell("mnist", "dfme", 500_000, transport="tensor"),
    "dfme-mnist-pixels": Cell("mnist", "dfme", 300_000),
    "dfme-mnist-pixels-papers-step": Cell("mnist", "dfme", 300_000, changes=("attack.step=1e-3",)),
    "maze-mnist-tensor": Cell("mnist", "maze", 900_000, transport="tensor"),
    "maze-mnist-pixels": Cell("mnist", "maze", 150_000),
    "maze-mnist-pixels-papers-step": Cell("mnist", "maze", 150_000, changes=("attack.step=1e-3",)),
}  # fmt: skip


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
def main(names: tuple[str, ...], data: Path, threads: int) -> None:
    """Run the cells whose names begin with one of NAMES; all by default."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, cell in CELLS.items():
        if (RESULTS / f"{name}.json").exists() or not name.startswith(names or ("",)):
            continue
        click.echo(name)
        measure(name, cell, data, threads)


def measure(name: str, cell: Cell, data: Path, threads: int) -> None:
    """Start the server, attack it, keep the result."""
    with serving(model=cell.victim, precision="float32", workers=1) as server:
        job = Job(
            server.url,
            cell.attack,
            cell.budget,
            test=cell.victim,
            queries=cell.queries,
            changes=cell.changes,
            transport=cell.transport,
            threads=threads,
            root=data,
            admin=server.admin,
        )
        folder = RUNS / name
        shutil.rmtree(folder, ignore_errors=True)  # of a cut-off run, whose server is gone
        command = shlex.join(["python", "-m", "scumble.evaluation.steal", name])
        result = run(job, folder, command=command)
    click.echo(f"  {result.scores!r}, ledgers {result.ledger!r}, {result.timing.wall_s:.0f} s")
    shutil.copyfile(folder / "result.json", RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
