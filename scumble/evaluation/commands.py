"""`scumble evaluate`: defenses against attacks, on real servers."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from app.errors import ScumbleError
from scumble.attacker import consent
from scumble.attacker.attacks import DATA_FREE
from scumble.attacker.command_options import (
    SEED,
    profile_option,
    recipe_option,
    set_option,
    student_option,
)
from scumble.attacker.errors import AttackError
from scumble.attacker.run import make_folder
from scumble.data.image_sets import DatasetError, whole
from scumble.evaluation.checks import check_data, check_settings, model_sha256, own_set, with_hashes
from scumble.evaluation.experiment import Cell, Defended
from scumble.evaluation.local_server import children
from scumble.evaluation.plans import PLANS, published
from scumble.evaluation.record import BadRecord, Record, read
from scumble.evaluation.referee import PROGRESS, judge
from scumble.evaluation.repeats import missing
from scumble.evaluation.summary import marked, summarise
from scumble.evaluation.tables import ordered
from scumble.help_option import HELP
from scumble.progress import from_file
from scumble.training.auxiliary import TRANSFER

RESULTS = Path("runs/records/cells")
RUNS = Path("runs/evaluate")
POLL_S = 0.5
ENDED_S = 1.0
INTERRUPTED = 130
ENOUGH = 0.9  # of the budget; data-free attacks leave what is less than an iteration


@click.command(context_settings=HELP)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    type=click.Choice(list(PLANS)),
    metavar="NAME",
    help="Run the cells of a plan instead of the one that the other options describe. "
    f"Allowed: {', '.join(PLANS)}.",
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
@click.option(
    "--queries", help="Data set of the attacker.  [default: the published one for the victim]"
)
@click.option(
    "--test", help="Data set to measure on.  [default: the one that the victim was trained on]"
)
@profile_option
@recipe_option
@student_option
@click.option(
    "--test-images",
    type=click.IntRange(min=0),
    default=0,
    help="Number of test images to use.  [default: all]",
)
@click.option("--transport", default="pixels", show_default=True, help="How images are sent.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of all randomness.")
@click.option("--commands", is_flag=True, help="Print the command of each cell and run nothing.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Run each cell with so many seeds, its own and those that follow.",
)
@click.option(
    "--data",
    "--root",
    "root",
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
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="End after so long; cells that have not ended begin again the next time.",
)
@click.option(
    "--beside/--no-beside",
    default=True,
    show_default=True,
    help="Also attack the undefended and a label-only service; not for plans.",
)
@click.option(
    "--repeat/--no-repeat",
    default=True,
    show_default=True,
    help="Repeat an attack that failed on its own with another rate or step.",
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
    commands: bool,
    seeds: int,
    root: Path | None,
    jobs: int,
    threads: int,
    out: Path,
    minutes: float | None,
    beside: bool,
    repeat: bool,
    consented: bool,
    owner_token: Path | None,
    **options: str,
) -> None:
    """Measure defenses: attack real servers, and record what attackers gain and users lose."""
    if minutes is not None and math.isnan(minutes):
        raise click.UsageError("--minutes is nan; allowed: a number above 0")
    headers = None
    try:
        if options["url"]:
            headers = consent.check(options["url"], consent=consented, token=owner_token)
        cells = planned(ctx, plans, options) if plans else [single(**options)]
        if beside and not plans:
            cells = [*compared(cells[0]), *cells]
        cells = [with_hashes(cell) for cell in seeded(cells, seeds)]
        cells = list({cell.key: cell for cell in cells}.values())
        check_settings(cells)
        if commands:
            click.echo("\n".join(command_of(cell) for cell in cells))
            return
        waiting = [cell for cell in cells if recorded(out, cell) is None]
        check_data(waiting, root)
        make_folder(out)
    except (ScumbleError, AttackError, ValueError) as exc:
        raise click.ClickException(" ".join(str(exc).split())) from exc
    console = Console(highlight=False)
    until = time.monotonic() + (60 * minutes if minutes else math.inf)
    failed, asked, tried = 0, cells, len(waiting)
    while True:
        failed += run_cells(
            waiting, out, root, finished=len(cells) - len(waiting), jobs=jobs, threads=threads,
            headers=headers, console=console, seconds=until - time.monotonic(),
        )  # fmt: skip
        waiting = missing(asked, compared_record(out, cells)) if repeat else []
        if not waiting or failed or time.monotonic() >= until:
            break
        cells, tried = [*cells, *waiting], tried + len(waiting)
        console.print(f"{len(waiting)} attacks failed: once more with another rate or step")
    show([record for cell in cells if (record := recorded(out, cell)) is not None], console)
    if failed:
        raise click.ClickException(f"{failed} of {tried} cells failed")


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
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
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
        seconds: after which cells that have not ended are given up.
        clock: gives seconds.

    Returns:
        The number of cells that failed.
    """
    until = clock() + seconds
    command = shlex.join(["scumble", *sys.argv[1:]])
    failed = 0
    # Its processes share one import of torch, and of what its optimizers import when first made.
    context = get_context("forkserver")
    context.set_forkserver_preload(["scumble.evaluation.referee", "torch._dynamo"])
    progress = Progress(
        TextColumn("{task.description}", table_column=Column(width=34, no_wrap=True)),
        BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    pool = ProcessPoolExecutor(
        min(jobs, max(1, len(cells))), mp_context=context, initializer=end_when_told
    )
    try:
        with progress, pool, terminated_as_interrupted():
            bar = progress.add_task("cells", total=finished + len(cells), completed=finished)
            for cell in cells:
                (RUNS / cell.key / PROGRESS).unlink(missing_ok=True)
            running: dict[Future[Record], Cell] = {
                pool.submit(
                    judge_cell, cell, RUNS / cell.key, root=root, command=command,
                    threads=threads, headers=headers,
                ): cell
                for cell in cells
            }  # fmt: skip
            inside: dict[str, TaskID] = {}
            try:
                while running and clock() < until:
                    ended, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    show_inside(progress, inside, running.values())
                    for future in ended:
                        cell = running.pop(future)
                        failed += not kept(future, cell, out, console)
                        progress.advance(bar)
                        if cell.key in inside:
                            progress.remove_task(inside.pop(cell.key))
            finally:
                if running:
                    pool.shutdown(wait=False, cancel_futures=True)
                    end_processes(active_children())
        if running:
            console.print(f"the time is over; {continued(cells, out)}", markup=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {continued(cells, out)}") from None
    return failed


def continued(cells: list[Cell], out: Path) -> str:
    """How many cells are recorded, and how the others are."""
    there = sum(recorded(out, cell) is not None for cell in cells)
    return f"{there} of {len(cells)} cells are recorded in {out}: run the same command to continue"


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: without it, servers would outlive the evaluation."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def kept(future: Future[Record], cell: Cell, out: Path, console: Console) -> bool:
    """Keep the record of a cell that has ended; false if the cell failed."""
    try:
        record = future.result()
    except (Exception, SystemExit) as exc:  # noqa: BLE001  # a file of a third party may raise anything
        known = isinstance(exc, AttackError | DatasetError | RuntimeError)
        what = str(exc) if known else f"{type(exc).__name__}: {exc}"
        console.print(f"{cell.key}: {what}", style="red", markup=False)
        return False
    if (spent := record.attack.ledger.spent) < ENOUGH * cell.budget:
        console.print(f"{cell.key}: {spent:,} of {cell.budget:,} queries were used", markup=False)
    made, part = RUNS / cell.key / "record.json", out / f"{cell.key}.json.part"
    try:
        shutil.copyfile(made, part)
        part.replace(out / f"{cell.key}.json")
    except OSError as exc:
        part.unlink(missing_ok=True)
        console.print(f"{cell.key}: {exc}; the record is in {made}", style="red", markup=False)
        return False
    return True


def end_processes(processes: Iterable[BaseProcess]) -> None:
    """End processes, those that have not ended within a second by force; then their servers.

    One that ends while it starts a server leaves that server behind, as one that is killed does.
    """
    processes = list(processes)
    servers = [child for each in processes if each.pid for child in children(each.pid)]
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(ENDED_S)
        process.kill()
        process.join()
    for pid in servers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def show_inside(progress: Progress, inside: dict[str, TaskID], cells: Iterable[Cell]) -> None:
    """Show how far the running cells are.

    Args:
        progress: the bars.
        inside: the bar of each cell that has one, by its key; changed in place.
        cells: that may be running.
    """
    for cell in cells:
        found = from_file(RUNS / cell.key / PROGRESS)
        if found is None:
            continue
        what, count, total = found
        text = f"  {cell.defense.name}, seed {cell.seed}: {what}"
        if cell.key not in inside:
            inside[cell.key] = progress.add_task(text, total=total)
        task = inside[cell.key]
        if progress.tasks[progress.task_ids.index(task)].description != text:
            progress.reset(task, total=total, description=text)
        progress.update(task, completed=count, total=total)


class Judging:
    """Whether this process of the pool is judging a cell."""

    now = False


def judge_cell(cell: Cell, folder: Path, **options: Any) -> Record:
    """Judge a cell in a process of the pool, which ends when it is told to."""
    Judging.now = True
    try:
        return judge(cell, folder, **options)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)  # the pool would run the next cell
    finally:
        Judging.now = False


def end_when_told() -> None:
    """Let SIGTERM end a process of the pool, and the servers of its cell.

    Ctrl-C reaches all processes of the terminal; the parent alone decides.
    """

    def end(*_: object) -> None:
        if Judging.now:
            raise KeyboardInterrupt
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)


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
        ConfigError: no such model.
        ValueError: `params` is not a JSON object, or has a key twice; or a defense is given beside
            the URL of a service.
    """
    if url and (defense, params) != ("none", "{}"):
        raise ValueError(
            f"--url is {url!r}, a service with a defense of its own; remove --defense and --params"
        )
    try:
        given = json.loads(params, object_pairs_hook=distinct)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise ValueError(f"--params is {params[:99]!r}, which is not valid JSON: {exc}") from exc
    if not isinstance(given, dict):
        raise ValueError(f"--params is {params!r}; allowed: a JSON object")
    names = tuple(name.strip() for name in adapt.split(",") if name.strip())
    cell = Cell(defense=Defended(defense, given, url), adapt=names, **options)  # type: ignore[arg-type] # click has checked them
    own = own_set(cell.victim)
    if cell.test is None and own != cell.victim:
        cell = replace(cell, test=own)
    queries = cell.queries or TRANSFER.get(cell.victim) or TRANSFER.get(whole(own))
    return replace(cell, queries=None if cell.attack in DATA_FREE else queries)


def command_of(cell: Cell) -> str:
    """The command that runs this cell alone; options that have their default are left out."""
    blank, words = Cell(cell.victim), ["scumble", "evaluate", "--victim", cell.victim]
    if cell.defense.url:
        words += ["--url", cell.defense.url]
    elif cell.defense.name != "none":
        words += ["--defense", cell.defense.name]
    if cell.defense.params:
        words += ["--params", json.dumps(cell.defense.params)]
    for name in ("precision", "attack", "budget", "profile", "recipe", "student", "test_images",
                 "transport", "test", "seed"):  # fmt: skip
        if (value := getattr(cell, name)) != getattr(blank, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if cell.queries and cell.queries != TRANSFER.get(cell.victim):
        words += ["--queries", cell.queries]
    if cell.adapt:
        words += ["--adapt", ",".join(cell.adapt)]
    for change in cell.changes:
        words += ["--set", change]
    return shlex.join([*words, "--no-beside"])


def compared(cell: Cell) -> list[Cell]:
    """The same attack on the undefended service, and on one that answers with labels only."""
    return [replace(cell, defense=Defended(name)) for name in ("none", "label")]


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


def recorded(out: Path, cell: Cell) -> Record | None:
    """The record of a cell; None where there is none, a broken one, or one of another model."""
    try:
        record = read(out / f"{cell.key}.json")
    except BadRecord:
        return None
    return record if record.model_sha256 == model_sha256(cell) else None


def compared_record(out: Path, cells: Iterable[Cell]) -> Callable[[Cell], Record | None]:
    """Finds the record of a cell, as `recorded`.

    It counts as failed as well if copies of `cells` at chance level are equal whatever the defense.
    """
    records = {cell.key: found for cell in cells if (found := recorded(out, cell)) is not None}
    known = dict(zip(records, marked(list(records.values())), strict=True))
    return lambda cell: known.get(cell.key) or recorded(out, cell)


def show(records: list[Record], console: Console) -> None:
    """The records as a table, one row for all seeds of a cell; fits a terminal of 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("model", "defense", "attacker"):
        table.add_column(name, overflow="fold")
    for name in ("served", "stolen", "L1"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in ordered(summarise(records)):
        attacker = (
            f"{line.attacker} (attack failed: {line.failed})" if line.failed else line.attacker
        )
        table.add_row(
            *map(escape, (" ".join(line.model), line.defense.url or str(line.defense), attacker)),
            f"{line.served.mean:.1%}",
            str(line.stolen),
            f"{line.l1_test.mean:.2f}",
        )
    console.print(table)
