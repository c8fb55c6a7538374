"""Options of the commands that make bundles: how pictures become the input of a network."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import click

from app.inference.bundle import Preprocessing


class Size(click.ParamType[tuple[int, int]]):
    """`224` or `HEIGHTxWIDTH`."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Parse the text."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", str(value))
        if found is None:
            message = f"{value!r} is not a size; allowed: 224 or HEIGHTxWIDTH such as 240x320"
            self.fail(message, param, ctx)
        return int(found[1]), int(found[2] or found[1])


def _choice(name: str) -> click.Choice[str]:
    """The values of a member of the card."""
    return click.Choice(get_args(Preprocessing.model_fields[name].annotation))


OPTIONS = (
    click.option(
        "--fit",
        type=_choice("fit"),
        help="How pictures of another size are brought to size; as published weights say, else "
        "stretch.",
    ),
    click.option(
        "--ratio",
        type=click.FloatRange(0, 1, min_open=True),
        help="Central share that crop keeps; as published weights say, else 1.",
    ),
    click.option("--shorter", type=click.IntRange(1), help="Side that resize_crop resizes to."),
    click.option("--fill", type=click.IntRange(0, 255), help="Level around letterbox, else 0."),
    click.option(
        "--interpolation",
        type=_choice("interpolation"),
        help="Filter of the resizing; as published weights say, else bilinear.",
    ),
    click.option(
        "--orientation/--no-orientation",
        default=None,
        help="Whether pictures are turned as their metadata say.  [default: orientation]",
    ),
    click.option(
        "--alpha",
        type=_choice("alpha"),
        help="What transparent pictures are laid on; drop takes the colours under the "
        "transparency.  [default: white]",
    ),
    click.option(
        "--profile",
        type=_choice("profile"),
        help="Whether colours with an ICC profile are converted to sRGB.  [default: ignore]",
    ),
    click.option(
        "--reduce-jpeg/--no-reduce-jpeg",
        default=None,
        help="Whether a large JPEG is decoded at a reduced size where the input needs no more.  "
        "[default: reduce-jpeg]",
    ),
)


def picture_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each member of a card's `preprocessing`."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def taken_preprocessing(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `picture_options` added out of a command's options; without what was not given."""
    given = {name: options.pop(name) for name in Preprocessing.model_fields}
    return {name: value for name, value in given.items() if value is not None}
