"""The command `scumble`: a table of subcommands, each imported only when it is run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

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
        """Import the command and make its context."""
        return self.row.load().make_context(info_name, args, parent, **extra)


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
        except KeyboardInterrupt:
            click.echo(err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except ImportError as exc:
            row = self.table[ctx.invoked_subcommand or ""]
            if row.extra is None or self._is_ours(exc.name):
                raise  # a bug of this project; no installation would help
            raise MissingExtra(
                f"{ctx.command_path} {ctx.invoked_subcommand}: {exc}. "
                f"Install it with: pip install 'scumble[{row.extra}]'"
            ) from exc

    def _is_ours(self, module: str | None) -> bool:
        roots = {_package(row.target.partition(":")[0]) for row in self.table.values()}
        return _package(module or "") in roots


def _package(module: str) -> str:
    return module.partition(".")[0]


COMMANDS = {
    "serve": Row("app.commands.serve:serve", "Serve a model over HTTP.", "serve"),
    "reload": Row("app.commands.serve:reload", "Reload the model of a running server.", "serve"),
    "check": Row("app.commands.serve:check", "Check the settings and show them.", "serve"),
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
    "export": Row(
        "scumble.training.export_command:export",
        "Export a bundle or a defended ONNX file.",
        "train",
    ),
}


@click.group("scumble", cls=Table, table=COMMANDS)
@click.version_option(package_name="scumble")
def main() -> None:
    """Serve an image classifier that defends itself against model stealing."""


if __name__ == "__main__":
    main()
