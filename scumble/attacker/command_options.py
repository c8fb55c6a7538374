"""Options that `scumble attack` and `scumble evaluate` share."""

from __future__ import annotations

import click

profile_option = click.option(
    "--profile",
    type=click.Choice(["cpu", "paper"]),
    default="cpu",
    show_default=True,
    help="Defaults of the attack: sized for two cores, or as published.",
)
set_option = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="NAME.FIELD=VALUE",
    help="Set a field of the attack, its fit or a modifier, e.g. fit.epochs=5; repeatable.",
)
