"""Shared parts of the training commands: options, error messages, the command line as typed."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from app.errors import ConfigError, ScumbleError
from scumble.data.image_sets import DatasetError

file = click.Path(exists=True, dir_okay=False, path_type=Path)
models_option = click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models"),
    show_default=True,
    help="Folder of bundles.",
)
version_option = click.option(
    "--version", "version", default="1", show_default=True, help="Version of the bundle."
)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns expected errors into one-line messages, and has Ctrl-C say how to go on."""
    try:
        yield
    except (ScumbleError, DatasetError, OSError) as exc:
        raise click.ClickException(" ".join(str(exc).split())) from exc
    except KeyboardInterrupt as exc:
        if exc.args:  # says how to continue
            raise
        raise KeyboardInterrupt("interrupted: the same command starts again") from None


@contextlib.contextmanager
def elapsed(text: str) -> Iterator[None]:
    """Show on a terminal what takes long and since when; for work that cannot say how far it is."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    off = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=off) as progress:
        progress.add_task(text, total=None)
        yield


def require_writable(path: Path) -> None:
    """Check before long work that its result can be written.

    Raises:
        ConfigError: `path` cannot be written, or not be made.
    """
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise ConfigError(f"{str(path)!r} cannot be written: no permission for {str(there)!r}")


def typed(ctx: click.Context, program: str = "") -> str:
    """The command line, rebuilt from the parameters that were given, at a prompt or before.

    Args:
        ctx: of the command.
        program: how it is started, if not as a command of `scumble`.
    """
    words = (program or f"scumble {ctx.command.name}").split()
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.PROMPT):
            words += _words(parameter, ctx.params[name])
    return shlex.join(words)


def _words(parameter: click.Parameter, value: Any) -> list[str]:
    """What was typed for a parameter."""
    if not isinstance(parameter, click.Option):
        return [str(value)]
    if parameter.is_flag:
        return [parameter.opts[0] if value else parameter.secondary_opts[0]]
    if parameter.multiple:
        return [word for one in value for word in (parameter.opts[0], str(one))]
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [parameter.opts[0], text]
