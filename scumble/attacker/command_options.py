"""Options that `scumble attack` and `scumble evaluate` share."""

from __future__ import annotations

import click

from scumble.attacker.recipes import recipes
from scumble.attacker.students import STUDENTS

SEED = click.IntRange(0, 2**31 - 1)
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
recipe_option = click.option(
    "--recipe",
    type=click.Choice(list(recipes())),
    metavar="NAME",
    help="Student and fit of a strong copy for a victim and a kind of answer; --set changes them. "
    f"Allowed: {', '.join(recipes())}.",
)
student_option = click.option(
    "--student",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", *STUDENTS]),
    metavar="NAME",
    help=f"Network of the copy. Allowed: auto, {', '.join(STUDENTS)}.",
)
