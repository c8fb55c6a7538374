"""What the commands say and take, known before they are imported.

`python -m docs.generators.cli` writes `command_outlines.json` from the commands themselves. Wrong
words are refused with it at once, as imports take seconds, and help is shown where a command cannot
be imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from scumble.help_option import HELP

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Outline:
    """A command without what it does.

    Attributes:
        name: such as `keys add`.
        words: that follow the name.
        help: text, for 80 columns.
        parameters: arguments of `click.Argument` and `click.Option`; None for a group.
    """

    name: str
    words: list[str]
    help: str
    parameters: list[dict[str, Any]] | None

    def refuse(self, parent: click.Context | None) -> None:
        """Refuse options that the command lacks, and name all that is missing.

        Raises:
            UsageError: the words are wrong.
        """
        if self.parameters is None or not set(HELP["help_option_names"]).isdisjoint(self.words):
            return
        params: list[click.Parameter] = [
            click.Option(**one) if one["param_decls"][0].startswith("-") else click.Argument(**one)
            for one in self.parameters
        ]
        command = click.Command(self.name, params=params, context_settings={**HELP})
        ctx = click.Context(command, info_name=self.name, parent=parent)
        given, _, _ = command.make_parser(ctx).parse_args(list(self.words))
        typed = {
            name
            for name, value in given.items()
            if isinstance(value, str) or (isinstance(value, Sequence) and value)
        }
        missing = [
            f"{param.param_type_name} {param.get_error_hint(ctx)}"
            for param in params
            if param.required and param.name not in typed
        ]
        if missing:
            raise click.UsageError(f"Missing {', '.join(missing)}.", ctx)


def outline(name: str, words: Sequence[str]) -> Outline | None:
    """The outline of the command that some words name; None if it has none.

    Args:
        name: of a command of the table.
        words: that follow it, which may name a subcommand.
    """
    known = json.loads(FILE.read_text(encoding="utf-8"))
    rest = list(words)
    while rest and f"{name} {rest[0]}" in known:
        name = f"{name} {rest.pop(0)}"
    return Outline(name, rest, **known[name]) if name in known else None


def outlined(command: click.Command, ctx: click.Context, text: str) -> dict[str, Any]:
    """What the file says of a command.

    Args:
        command: the command.
        ctx: its context.
        text: its help.
    """
    group = isinstance(command, click.Group)
    return {"help": text, "parameters": None if group else [_made(p, ctx) for p in command.params]}


def _made(param: click.Parameter, ctx: click.Context) -> dict[str, Any]:
    common = {"required": param.required, "nargs": param.nargs}
    if not isinstance(param, click.Option):
        return {"param_decls": [param.name], "metavar": param.make_metavar(ctx), **common}
    *first, last = param.opts
    names = [*first, "/".join([last, *param.secondary_opts])]
    flag = {"is_flag": True} if param.is_flag else {}  # False would make its value optional
    return {"param_decls": names, "multiple": param.multiple, **flag, **common}
