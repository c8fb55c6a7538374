"""Writes `docs/reference/cli.md`: the `--help` text of every command of `scumble`.

python -m docs.generators.cli         writes it
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from scumble.cli import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
WIDTH = 100
HEAD = """# Commands

What `scumble COMMAND --help` says, of every command; written by `python -m docs.generators.cli`,
and a test compares. Those that need an extra name it when it is missing:
`pip install 'scumble[train]'`, `[attack]`, `[evaluate]`.

Options of `serve` and `check` stand above `SCUMBLE_*` variables, and these above the file of
`--config`; all settings are in [settings.md](settings.md).
"""


def page() -> str:
    """The whole text."""
    return HEAD + "".join(
        f"\n## `{path}`\n\n```text\n{text}\n```\n"
        for name, row in COMMANDS.items()
        for path, text in helps(row.load(), name, click.Context(click.Group("scumble")))
    )


def helps(command: click.Command, name: str, parent: click.Context) -> Iterator[tuple[str, str]]:
    """The path of a command, and of those under it, with what they say."""
    parent.info_name = parent.info_name or "scumble"
    with click.Context(
        command, parent=parent, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH
    ) as ctx:
        yield ctx.command_path, command.get_help(ctx)
        if isinstance(command, click.Group):
            for below in command.list_commands(ctx):
                found = command.get_command(ctx, below)
                assert found  # noqa: S101  # it was listed
                yield from helps(found, below, ctx)


if __name__ == "__main__":
    PAGE.write_text(page())
