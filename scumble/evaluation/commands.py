"""`scumble evaluate`: defenses against attacks, on real servers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import click
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app.errors import ScumbleError
from scumble.attacker import consent
from scumble.attacker.attacks import DATA_FREE
from scumble.attacker.command_options import profile_option, set_option
from scumble.attacker.errors import AttackError
from scumble.data.image_sets import DatasetError
from scumble.evaluation.checks import check
from scumble.evaluation.experiment import Cell, Defended
from scumble.evaluation.plans import PLANS, published
from scumble.evaluation.record import BadRecord, Record, read
from scumble.evaluation.referee import judge
from scumble.evaluation.summary import summarise
from scumble.evaluation.tables import ordered
from scumble.training.auxiliary import TRANSFER

RESULTS = Path("runs/records/cells")
RUNS = Path("runs/evaluate")


@click.command()
@click.option(
    "--plan",
    "plans",
    multiple=True,
    type=click.Choice(list(PLANS)),
    help="Run the cells of a plan instead of the one that the other options describe.",
)
@click.option(
    "--victim", default="mnist", show_default=True, help="Name of a bundle, or its folder."
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="Precision of the victim.",
)
@click.option(
    "--defense",
    default="none",
    show_default=True,
    help="Name of a defense, or FILE.py:Class of your own.",
)
@click.option("--params", default="{}", metavar="JSON", help="Parameters of the defense.")
@click.option("--url", help="A defended service that is already running, instead of --defense.")
@click.option("--attack", default="knockoff", show_default=True, help="The attack.")
@click.option("--adapt", default="", metavar="A,B", help="Modifiers of an adaptive attacker.")
@set_option
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    default=20_000,
    show_default=True,
    help="Number of images to query.",
)
@click.option("--queries", help="Data set of the attacker.  [default: the victim's in the paper]")
@click.option("--test", help="Data set to measure on.  [default: the victim's]")
@profile_option
@click.option("--transport", default="pixels", show_default=True, help="How images are sent.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Run each cell with the seeds 0, 1, ...",
)
@click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with data sets by name.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=len(os.sched_getaffinity(0)),
    help="Number of cells that run in parallel.  [default: one per core]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of torch threads per cell.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default=True,
    help="Folder of the records; cells that have a record are not run.",
)
@click.option(
    "--i-have-the-owners-consent",
    "consented",
    is_flag=True,
    help="Required, with --owner-token, for a --url on any host but this machine.",
)
@click.option(
    "--owner-token",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the token that the owner gave you.",
)
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    plans: tuple[str, ...],
    seeds: int,
    root: Path | None,
    jobs: int,
    threads: int,
    out: Path,
    consented: bool,
    owner_token: Path | None,
    **options: str,
) -> None:
    """Measure defenses: attack real servers, and record what attackers gain and users lose."""
    headers = None
    try:
        if options["url"]:
            headers = consent.check(options["url"], consent=consented, token=owner_token)
        cells = planned(ctx, plans, options) if plans else [single(**options)]
        cells = list({cell.key: cell for cell in seeded(cells, seeds)}.values())
        waiting = [cell for cell in cells if not done(out / f"{cell.key}.json")]
        check(waiting, root)
        out.mkdir(parents=True, exist_ok=True)
    except (ScumbleError, AttackError, ValueError) as exc:
        raise click.ClickException(" ".join(str(exc).split())) from exc
    console = Console(highlight=False)
    failed = run_cells(
        waiting, out, root, finished=len(cells) - len(waiting), jobs=jobs, threads=threads,
        headers=headers, console=console,
    )  # fmt: skip
    show([read(out / f"{c.key}.json") for c in cells if done(out / f"{c.key}.json")], console)
    if failed:
        raise click.ClickException(f"{failed} of {len(waiting)} cells failed")


def run_cells(
    cells: list[Cell],
    out: Path,
    root: Path | None,
    *,
    finished: int,
    jobs: int,
    threads: int,
    headers: dict[str, str] | None,
    console: Console,
) -> int:
    """Judge the cells and keep their records in `out`.

    Args:
        cells: the cells.
        out: an existing folder.
        root: folder with data sets by name.
        finished: how many cells of the same plan have a record already, for the progress bar.
        jobs: cells at a time.
        threads: of torch, per cell.
        headers: sent to the service at a cell's URL.
        console: where progress and failures are shown.

    Returns:
        The number of cells that failed.
    """
    command = shlex.join(["scumble", *sys.argv[1:]])
    failed = 0
    context = get_context("spawn")
    with (
        Progress(console=console) as progress,
        ProcessPoolExecutor(min(jobs, max(1, len(cells))), mp_context=context) as pool,
    ):
        bar = progress.add_task("cells", total=finished + len(cells), completed=finished)
        running: dict[Future[Record], Cell] = {
            pool.submit(
                judge, cell, RUNS / cell.key, root=root, command=command, threads=threads,
                headers=headers,
            ): cell
            for cell in cells
        }  # fmt: skip
        for future in as_completed(running):
            cell = running[future]
            try:
                future.result()
            except (AttackError, DatasetError, RuntimeError) as exc:
                failed += 1
                console.print(f"{cell.key}: {exc}", style="red", markup=False)
            else:
                shutil.copyfile(RUNS / cell.key / "record.json", out / f"{cell.key}.json")
            progress.advance(bar)
    return failed


def planned(ctx: click.Context, plans: tuple[str, ...], options: dict[str, str]) -> list[Cell]:
    """The cells of the plans, with the given profile.

    Raises:
        click.UsageError: another option of a cell was given, which would have no effect.
    """
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if (name := str(parameter.name)) in options.keys() - {"profile"}
        and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"--plan defines its own cells; remove {', '.join(given)}")
    cells = [cell for name in plans for cell in PLANS[name]()]
    return [published(cell) for cell in cells] if options["profile"] == "paper" else cells


def single(*, defense: str, params: str, url: str | None, adapt: str, **options: str) -> Cell:
    """The one cell that the options describe.

    Raises:
        ValueError: `params` is not a JSON object, or has a key twice.
    """
    try:
        given = json.loads(params, object_pairs_hook=distinct)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise ValueError(f"--params is {params[:99]!r}, which is not valid JSON: {exc}") from exc
    if not isinstance(given, dict):
        raise ValueError(f"--params is {params!r}; allowed: a JSON object")
    names = tuple(name.strip() for name in adapt.split(",") if name.strip())
    cell = Cell(defense=Defended(defense, given, url), adapt=names, **options)  # type: ignore[arg-type] # click has checked them
    queries = cell.queries or TRANSFER.get(cell.victim)
    return replace(cell, queries=None if cell.attack in DATA_FREE else queries)


def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError if a key is in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"params has {twice!r} twice; allowed: once")
    return found


def seeded(cells: list[Cell], seeds: int) -> list[Cell]:
    """Each cell with every seed."""
    return [replace(cell, seed=cell.seed + seed) for cell in cells for seed in range(seeds)]


def done(path: Path) -> bool:
    """Whether a complete record exists."""
    try:
        read(path)
    except BadRecord:
        return False
    return True


def show(records: list[Record], console: Console) -> None:
    """The records as a table, one row for all seeds of a cell; fits a terminal of 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("model", "defense", "attacker"):
        table.add_column(name, overflow="fold")
    for name in ("served", "stolen", "L1"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in ordered(summarise(records)):
        table.add_row(
            " ".join(line.model),
            line.defense.url or str(line.defense),
            f"{line.attacker} (attack failed)" if line.failed else line.attacker,
            f"{line.served.mean:.1%}",
            str(line.stolen),
            f"{line.l1_test.mean:.2f}",
        )
    console.print(table)
