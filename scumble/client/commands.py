"""`scumble predict`: classify files and show the answers as a table or as JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import click
import httpx2
import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scumble.client.errors import ClientError, Refused
from scumble.client.http_client import Client
from scumble.client.wire import Answer, Choice, ModelInfo, shown
from scumble.help_option import HELP

TOP_K = 3
BAR = 10  # characters of a full bar
EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Outcome:
    """What became of one file: an answer, or an error with its HTTP status if it has one."""

    file: str
    answer: Answer | None = None
    error: str = ""
    status: int | None = None


@click.command(context_settings=HELP)
@click.argument("url")
@click.argument(
    "images",
    metavar="IMAGE...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="K",
    help=f"Show the K most probable classes.  [default: {TOP_K}; all with --json]",
)
@click.option(
    "--key-file",
    type=click.File(),
    help="File with the API key, - for standard input; a key in an option would show in `ps`.",
)
@click.option(
    "--ca-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="PEM file of the authorities that may vouch for an https server.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@click.pass_context
def predict(
    ctx: click.Context,
    url: str,
    images: tuple[Path, ...],
    top_k: int | None,
    key_file: TextIO | None,
    ca_file: Path | None,
    as_json: bool,
) -> None:
    """Classify image files with the server at URL.

    Each IMAGE (PNG, JPEG, WebP, AVIF or HEIC) is one request. The exit code is 1 if one of them got
    no answer.
    """
    key = key_file.read().strip() if key_file else None
    try:
        client = Client(url, key=key, ca_file=ca_file)
    except OSError as exc:  # the ssl module's own errors are such, too
        raise click.BadParameter(f"{ca_file}: {exc}", param_hint="--ca-file") from exc
    except ValueError as exc:
        if "proxy" in str(exc).lower():
            raise click.ClickException(str(exc)) from exc
        hint = "URL" if str(exc).startswith("url") else "--key-file"
        raise click.BadParameter(str(exc), param_hint=hint) from exc
    with client:
        failed = classify(client, url, images, top_k=top_k, as_json=as_json)
    ctx.exit(1 if failed else 0)


def classify(
    client: Client, url: str, images: tuple[Path, ...], *, top_k: int | None, as_json: bool
) -> bool:
    """Send the images and print the answers; true if one got no answer.

    Raises:
        click.ClickException: the server does not describe its model.
    """
    try:
        model = client.model()
    except ClientError as exc:
        raise click.ClickException(_plain(str(exc))) from exc
    if as_json:
        return _print_lines(_outcomes(client, images, top_k))
    top_k = top_k or min(TOP_K, len(model.labels))
    return _print_table(url, model, list(_outcomes(client, images, top_k)))


def _outcomes(client: Client, images: tuple[Path, ...], top_k: int | None) -> Iterator[Outcome]:
    for image in images:
        name = click.format_filename(image)
        try:
            yield Outcome(name, client.predict(image, top_k=top_k))
        except Refused as exc:
            yield Outcome(name, error=exc.detail, status=exc.status)
        except (ClientError, OSError) as exc:
            yield Outcome(name, error=str(exc))


def _print_lines(outcomes: Iterator[Outcome]) -> bool:
    """One JSON object per line as the answers come; true if one failed."""
    failed = False
    for outcome in outcomes:
        click.echo(orjson.dumps({"file": outcome.file} | _members(outcome)))
        failed |= outcome.answer is None
    return failed


def _members(outcome: Outcome) -> dict[str, Any]:
    if outcome.answer is None:
        return {"error": outcome.error, "status": outcome.status}
    answer = asdict(outcome.answer)
    (prediction,) = answer.pop("predictions")
    if not prediction["abstained"]:
        del prediction["abstained"]
    return answer | {name: value for name, value in prediction.items() if value is not None}


def _print_table(url: str, model: ModelInfo, outcomes: list[Outcome]) -> bool:
    """One row per file; true if one failed."""
    console = Console(highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(_plain(f"{model.name} {model.version} at {shown(httpx2.URL(url))}")),
        title_justify="left",
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    # Long paths are folded early, so that answers stay on one line in 80 columns.
    table.add_column("file", overflow="fold", max_width=console.width // 4)
    table.add_column("label", style="bold")
    table.add_column("probability", no_wrap=True)
    table.add_column("next")
    for outcome in outcomes:
        table.add_row(Text(_plain(outcome.file)), *_cells(outcome, console.options.ascii_only))
    console.print(table)
    return any(outcome.answer is None for outcome in outcomes)


def _cells(outcome: Outcome, ascii_only: bool) -> tuple[Text, Text, Text]:
    if outcome.answer is None:
        code = "" if outcome.status is None else f"{outcome.status}: "
        return Text(), Text(), Text(_plain(code + outcome.error), style="red")
    (prediction,) = outcome.answer.predictions
    if prediction.abstained:
        return Text(), Text(), Text("no answer: the service withholds it", style="dim")
    bar = _bar(prediction.probability, ascii_only)
    return (
        Text(_plain(prediction.label)),
        Text.assemble(f"{prediction.probability:.4f} ", (bar, "cyan")),
        Text(", ".join(map(_brief, (prediction.top or ())[1:])), style="dim"),
    )


def _brief(choice: Choice) -> str:
    return f"{_plain(choice.label)} {choice.probability:.4f}"


def _bar(share: float, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * round(share * BAR)
    full, rest = divmod(round(share * BAR * 8), 8)
    return (EIGHTHS[8] * full + EIGHTHS[rest]).rstrip()


def _plain(text: str) -> str:
    """`text` on one line; a server's control characters must not reach the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
