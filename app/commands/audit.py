"""`scumble audit`: verify audit logs, and print seals to keep elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from app.audit.hash_chain import SEAL_TEXT, Fault, Part, verify
from scumble.help_option import HELP

BROKEN = 1
CUT = 3  # click exits with 2 for usage errors
files_argument = click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
archived_option = click.option(
    "--archived-through",
    "archived",
    multiple=True,
    metavar="SEAL",
    help="Seal of the last line of an archived file; the given files may continue it.",
)


@click.group(context_settings=HELP)
def audit() -> None:
    """Verify audit logs, and print seals to keep elsewhere."""


@audit.command("verify", context_settings=HELP)
@files_argument
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="SEAL",
    help="A seal that `scumble audit head` printed before; its line must still exist.",
)
@archived_option
@click.pass_context
def verify_(
    ctx: click.Context, files: tuple[Path, ...], heads: tuple[str, ...], archived: tuple[str, ...]
) -> None:
    """Verify files of audit logs, including rotated ones, in any order.

    Exits with 1 if lines were edited, deleted or reordered, and with 3 if the only fault is an
    incomplete last line, as after a crash.
    """
    parts, faults = _verified(files, heads, archived)
    for part in parts:
        if part.fault is None:
            click.echo(f"ok: {_about(part)}")
    for fault in faults:
        click.echo(_sentence(fault))
    if faults:
        ctx.exit(BROKEN if any(fault.kind == "broken" for fault in faults) else CUT)


@audit.command("head", context_settings=HELP)
@files_argument
@archived_option
@click.pass_context
def head_(ctx: click.Context, files: tuple[Path, ...], archived: tuple[str, ...]) -> None:
    """Print the seal of each file's last line; keep it where the server cannot write.

    Damaged files have no seal.
    """
    parts, faults = _verified(files, (), archived)
    broken = {fault.file for fault in faults if fault.kind == "broken"}
    for part in parts:
        if part.last is not None and part.file not in broken:
            click.echo(f"{part.last.seal}  {part.file}:{len(part.seals)}")
    for fault in faults:
        click.echo(_sentence(fault), err=True)
    if broken:
        ctx.exit(BROKEN)


def _verified(
    files: tuple[Path, ...], heads: tuple[str, ...], archived: tuple[str, ...]
) -> tuple[list[Part], list[Fault]]:
    for option, seals in (("--head", heads), ("--archived-through", archived)):
        for seal in seals:
            if not SEAL_TEXT.fullmatch(seal):
                raise click.BadParameter(
                    f"{seal!r} is not a seal; allowed: 64 hexadecimal digits", param_hint=option
                )
    try:
        return verify(files, heads, archived)
    except OSError as exc:
        raise click.ClickException(str(exc)) from exc


def _about(part: Part) -> str:
    if part.last is None:
        return f"{part.file}: empty"
    first = part.last.seq - len(part.seals) + 1
    return f"{part.file}: lines {first} to {part.last.seq} of chain {part.last.chain}"


def _sentence(fault: Fault) -> str:
    what = "CUT SHORT" if fault.kind == "cut" else "BROKEN"
    return f"{what}: {fault.file}:{fault.line}: {fault.why}"
