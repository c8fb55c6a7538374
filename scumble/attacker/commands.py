"""`scumble attack`: try to steal the model behind a URL."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scumble.attacker import consent
from scumble.attacker.adapt import MODIFIERS
from scumble.attacker.attacks import ATTACKS
from scumble.attacker.command_options import (
    SEED,
    profile_option,
    recipe_option,
    set_option,
    student_option,
)
from scumble.attacker.errors import AttackError
from scumble.attacker.result import Result
from scumble.attacker.run import Job, run
from scumble.attacker.third_party import short
from scumble.attacker.transports import TRANSPORTS
from scumble.data.image_sets import DatasetError
from scumble.help_option import HELP

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings=HELP)
@click.argument("url")
@click.option(
    "--attack", required=True, help=f"The attack: {', '.join(ATTACKS)}, or FILE.py:Class."
)
@click.option(
    "--budget", required=True, type=click.IntRange(min=1), help="Number of images to query."
)
@click.option(
    "--test", required=True, metavar="DATASET", help="Labelled images to measure the copy on."
)
@click.option("--queries", metavar="DATASET", help="Images to query; data-free attacks need none.")
@profile_option
@click.option(
    "--adapt",
    metavar="A,B",
    default="",
    help=f"Modifiers of an adaptive attacker: {', '.join(MODIFIERS)}, or FILE.py:Class.",
)
@set_option
@recipe_option
@student_option
@click.option("--weights", type=FILE, help="State dict with the student's initial weights.")
@click.option(
    "--transport",
    type=click.Choice(list(TRANSPORTS)),
    default="png",
    show_default=True,
    help="How images are sent.",
)
@click.option("--template", type=FILE, help="TOML file that describes another API.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of all randomness.")
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="Number of torch threads.  [default: torch's own]",
)
@click.option(
    "--data",
    "--root",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with data sets by name; missing ones are downloaded.",
)
@click.option(
    "--test-images",
    type=click.IntRange(min=0),
    default=0,
    help="Number of test images to use.  [default: all]",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Largest number of images per request.",
)
@click.option(
    "--connections",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Number of connections.",
)
@click.option(
    "--admin",
    metavar="URL",
    help="Admin port of your own server, to compare its query count with the attacker's.",
)
@click.option(
    "--keys",
    type=FILE,
    help="File with API keys of accounts, one a line, used by turns until the budget of each is "
    "spent. The test images are asked about with --owner-token, where it is given.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run.  [default: runs/<attack>-<hash of the job>]",
)
@click.option(
    "--i-have-the-owners-consent",
    "consented",
    is_flag=True,
    help="Required, with --owner-token, for any host but this machine.",
)
@click.option("--owner-token", type=FILE, help="File with the token that the owner gave you.")
@click.option("--progress/--no-progress", default=True, help="Whether to show a progress bar.")
def attack(
    url: str,
    adapt: str,
    consented: bool,
    owner_token: Path | None,
    out: Path | None,
    progress: bool,
    **options: object,
) -> None:
    """Steal the model behind URL and measure the copy.

    A DATASET is a Parquet file, a folder of class folders, or a name (digits, mnist,
    fashion_mnist, cifar10, cifar100, gtsrb, svhn). An interrupted run continues when it is started
    again with the same options.
    """
    try:
        headers = consent.check(url, consent=consented, token=owner_token)
        names = tuple(name.strip() for name in adapt.split(",") if name.strip())
        job = Job(url=url, adapt=names, **options)  # type: ignore[arg-type] # click has checked the types
        out = (
            out
            or Path("runs")
            / f"{short(job.attack)}-{hashlib.sha256(repr(job).encode()).hexdigest()[:8]}"
        )
        command = shlex.join(["scumble", *sys.argv[1:]])
        result = run(job, out, command=command, headers=headers, progress=progress)
    except (AttackError, DatasetError) as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the answers so far are in {out}: run the same command to continue"
        ) from None
    show(result, out)


def show(result: Result, out: Path) -> None:
    """Print a summary of a result."""
    ledger, scores = result.ledger, result.scores
    rate = result.timing.queries_per_s
    table = Table.grid(padding=(0, 2))
    server = "not asked" if ledger.server is None else f"{ledger.server:,}"
    rows = {
        "victim": f"{result.victim.name} {result.victim.version} at {result.victim.url}",
        "attack": f"{result.attack.name} ({result.profile}) over {result.transport}"
        + "".join(f", {modifier.name}" for modifier in result.adapt),
        "queries": f"{ledger.spent:,} of {ledger.budget:,}; counted by the server: {server}"
        + (f"; {rate:,.0f}/s" if rate else ""),
        **({"ended": ledger.ended} if ledger.ended else {}),
        "served accuracy": f"{scores.victim_accuracy:.2%}",
        "stolen accuracy": f"{scores.accuracy:.2%}",
        "agreement": f"{scores.agreement:.2%}",
        "written": f"{out / 'result.json'}, {out / result.student.file}",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    Console(highlight=False).print(table)
