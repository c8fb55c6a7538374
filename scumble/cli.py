"""The command `scumble`: a table of subcommands, each imported only when it is run."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from scumble.help_option import HELP

HELP_OPTIONS = frozenset(HELP["help_option_names"])
OURS = frozenset({"app", "scumble"})
REPORTED = ("onnxruntime", "openvino", "torch", "uvicorn", "numpy")
INTERRUPTED = 130  # as shells report a process that Ctrl-C ended


@dataclass(frozen=True)
class Row:
    """A row of the table of subcommands.

    Attributes:
        target: `module:attribute` of the click command.
        help: one line.
        extra: extra of the distribution that the module needs.
    """

    target: str
    help: str
    extra: str | None = None

    def load(self) -> click.Command:
        """Import the command."""
        module, _, attribute = self.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


class MissingExtra(click.ClickException):
    """A subcommand needs a package that is not installed."""

    exit_code = 2


class LazyCommand(click.Command):
    """Represents a command that is not imported yet in the listing of a group."""

    def __init__(self, name: str, row: Row) -> None:
        super().__init__(name, short_help=row.help)
        self.row = row

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Import the command and make its context.

        Raises:
            UsageError: an option is unknown, or options or arguments are missing.
            MissingExtra: a package of its extra is not installed.
        """
        from scumble.command_outlines import outline

        known = outline(str(self.name), args)
        if known and not extra.get("resilient_parsing"):
            known.refuse(parent)
        try:
            command = self.row.load()
        except ImportError as exc:
            path = f"{parent.command_path if parent else ''} {info_name}".strip()
            missing = missing_extra(exc, self.row, path)
            if missing is None:
                raise  # a bug of this project; no installation would help
            if extra.get("resilient_parsing"):  # the shell completes the command
                return super().make_context(info_name, args, parent, **extra)
            if not HELP_OPTIONS.isdisjoint(args):
                text = known.help if known else f"Usage: {path} ...\n\n  {self.row.help}"
                click.echo(f"{text}\n\n{missing.message}")
                raise click.exceptions.Exit from None
            raise missing from exc
        return command.make_context(info_name, args, parent, **extra)


class Table(click.Group):
    """A group whose subcommands are the rows of a table, in order."""

    def __init__(self, *args: Any, table: Mapping[str, Row], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table
        self.commands = {name: LazyCommand(name, row) for name, row in table.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table; click would sort them."""
        del ctx
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand.

        Raises:
            MissingExtra: a package of its extra is not installed.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as exc:  # its message, if it has one, says how to continue
            click.echo(f"\n{exc}" if exc.args else "", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except ImportError as exc:
            row = self.table[ctx.invoked_subcommand or ""]
            missing = missing_extra(exc, row, f"{ctx.command_path} {ctx.invoked_subcommand}")
            if missing is None:
                raise  # a bug of this project; no installation would help
            raise missing from exc
        except BrokenPipeError:
            raise  # click ends quietly
        except OSError as exc:
            raise click.ClickException(str(exc)) from exc


def missing_extra(exc: ImportError, row: Row, path: str) -> MissingExtra | None:
    """The error for a package that is not installed; None if the module is this project's own."""
    if row.extra is None or _package(exc.name or "") in OURS | {_package(row.target)}:
        return None
    from app.system.installation import install_command

    return MissingExtra(
        f"{path} needs the extra {row.extra}: {exc}. Install it with: {install_command(row.extra)}"
    )


def _package(module: str) -> str:
    return module.partition(":")[0].partition(".")[0]


def show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the versions of this project, Python, the engines and the HTTP server, and exit."""
    del parameter
    if not value or ctx.resilient_parsing:
        return
    from app.system.installation import versions

    click.echo(f"scumble {versions(('scumble',))['scumble']}")
    found = {"python": platform.python_version(), **versions(REPORTED)}
    for name, version in found.items():
        click.echo(f"{name:12} {version}")
    ctx.exit()


COMMANDS = {
    "serve": Row("app.commands.serve:serve", "Serve a model over HTTP.", "serve"),
    "reload": Row("app.commands.serve:reload", "Reload the model of a running server.", "serve"),
    "check": Row("app.commands.serve:check", "Check the settings and show them.", "serve"),
    "connect": Row(
        "app.commands.connect:connect", "Describe the model of another server.", "upstream"
    ),
    "keys": Row("app.commands.keys:keys", "Create, list and revoke API keys.", "serve"),
    "audit": Row("app.commands.audit:audit", "Check audit logs.", "serve"),
    "predict": Row(
        "scumble.client.commands:predict", "Classify image files with a running server.", "client"
    ),
    "attack": Row("scumble.attacker.commands:attack", "Run model stealing attacks.", "attack"),
    "evaluate": Row(
        "scumble.evaluation.commands:evaluate", "Evaluate defenses with attacks.", "evaluate"
    ),
    "bench": Row("scumble.evaluation.bench:bench", "Measure the overhead of defenses.", "evaluate"),
    "train": Row("scumble.training.commands:train", "Train a model.", "train"),
    "quantize": Row(
        "scumble.training.commands:quantize", "Quantize a trained model to int8.", "train"
    ),
    "calibrate": Row(
        "scumble.training.calibrate:calibrate", "Calibrate the answers of a bundle.", "train"
    ),
    "import": Row(
        "scumble.training.import_command:import_onnx",
        "Import an ONNX classifier as a bundle.",
        "train",
    ),
    "export": Row(
        "scumble.training.export_command:export",
        "Export a bundle or a defended ONNX file.",
        "train",
    ),
}


@click.group(
    "scumble",
    cls=Table,
    table=COMMANDS,
    context_settings=HELP,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the versions of Scumble, Python and the engines, and exit.",
)
def main() -> None:
    """Serve an image classifier that defends itself against model stealing."""


if __name__ == "__main__":
    main()
