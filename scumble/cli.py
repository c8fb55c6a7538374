"""The command `scumble`: a table of subcommands, each loaded only when it is run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        target: `module:attribute` of the click command.
        help: one line.
        extra: the extra of the distribution that brings what the module imports.
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
    """The subcommand needs a package that is not installed."""

    exit_code = 2


class Later(click.Command):
    """Stands in a group's listing for a command that is not imported yet."""

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
        """The context of the real command, which thereby takes over."""
        return self.row.load().make_context(info_name, args, parent, **extra)


class Table(click.Group):
    """A group whose subcommands are the rows of a table, in its order."""

    def __init__(self, *args: Any, table: Mapping[str, Row], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table
        self.commands = {name: Later(name, row) for name, row in table.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the table's order; click would sort them."""
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
                raise  # a fault of this project, for which nothing can be installed
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
    "reload": Row("app.commands.serve:reload", "Let a server take its model anew.", "serve"),
    "check": Row(
        "app.commands.serve:check", "Show the settings a server would start with.", "serve"
    ),
    "keys": Row("app.commands.keys:keys", "Make, list and revoke API keys.", "serve"),
    "audit": Row("app.commands.audit:audit", "Check audit logs.", "serve"),
    "predict": Row(
        "scumble.client.commands:predict", "Classify image files with a running server.", "client"
    ),
    "attack": Row(
        "scumble.attacker.commands:attack", "Steal a served model, to know its worth.", "attack"
    ),
    "evaluate": Row(
        "scumble.evaluation.commands:evaluate", "Judge defenses with attacks.", "evaluate"
    ),
    "bench": Row("scumble.evaluation.bench:bench", "Measure what defenses cost.", "evaluate"),
    "train": Row("scumble.training.commands:train", "Train a victim.", "train"),
    "quantize": Row(
        "scumble.training.commands:quantize", "Make a trained victim's int8 form.", "train"
    ),
    "calibrate": Row("scumble.training.calibrate:calibrate", "Fit what a bundle serves.", "train"),
    "export": Row(
        "scumble.training.exporting:export", "Make a bundle, or a defended ONNX file.", "train"
    ),
}


@click.group("scumble", cls=Table, table=COMMANDS)
@click.version_option(package_name="scumble")
def main() -> None:
    """Serve an image classifier that defends itself against model stealing."""


if __name__ == "__main__":
    main()
