"""`scumble import`: an ONNX classifier of any tool as a bundle."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
import onnx
from click.core import ParameterSource

from app.commands.picture_options import Size, picture_options, taken_preprocessing
from app.inference.bundle import ONNX_FILE, Preprocessing, checked_card
from app.inference.normalisation import PRESETS, Normalisation
from scumble.help_option import HELP
from scumble.training.command_options import (
    elapsed,
    file,
    models_option,
    plain_errors,
    require_writable,
    typed,
    version_option,
)
from scumble.training.errors import ExportError
from scumble.training.labels import distinct, read_labels
from scumble.training.onnx_import import (
    Answers,
    Decision,
    Imported,
    Layout,
    Unsaid,
    convert,
    decide,
    read_network,
)
from scumble.training.policy_table import images_option, settings_of, show_folder
from scumble.training.sanity_checks import check_normalisation
from scumble.training.staging import remove_derived, staged

MANY_LABELS = 8  # of which no more are shown


def normalisation_of(
    preset: str | None, mean: str | None, std: str | None, bgr: bool
) -> Normalisation:
    """What the options say.

    Raises:
        Unsaid: they say nothing.
        ExportError: they are no numbers.
    """
    if preset is None and mean is None and std is None:
        raise Unsaid(
            "an ONNX file does not say how its input is normalised; give "
            f"--normalize {'|'.join(PRESETS)}, or --mean and --std",
            "preset",
            tuple(PRESETS),
        )
    found = PRESETS[preset] if preset else Normalisation()
    if mean or std:
        found = Normalisation(_numbers(mean or "0"), _numbers(std or "1"))
    check_normalisation(found.mean, found.std)
    return replace(found, bgr=found.bgr or bgr)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as exc:
        raise ExportError(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5") from exc


@click.command("import", context_settings=HELP)
@click.argument("source", metavar="MODEL.onnx", type=file)
@click.argument("name", required=False)
@click.option(
    "--normalize",
    "preset",
    type=click.Choice(list(PRESETS)),
    help="What the network takes: imagenet (0..1 less the mean, by the deviation of ImageNet), tf "
    "(-1..1), 0..1, 0..255, or caffe (BGR, 0..255 less the mean).",
)
@click.option("--mean", help="Of pixels in 0..1, per channel of the network, as 0.485,0.456,0.406.")
@click.option("--std", help="Of pixels in 0..1, per channel of the network.")
@click.option("--bgr", is_flag=True, help="The network takes blue first.")
@click.option(
    "--layout",
    type=click.Choice(get_args(Layout)),
    help="Where the channels are, if the shape of the input does not say.",
)
@click.option("--size", type=Size(), help="HEIGHTxWIDTH, if the network takes any.")
@click.option("--output", help="Name of the output, if there are several.")
@click.option(
    "--answers",
    type=click.Choice(get_args(Answers)),
    help="What the output is, where its values and its last operator do not say.",
)
@click.option(
    "--labels", type=file, help="A label a line, or JSON; without it classes are numbered."
)
@picture_options
@click.option("--licence", default="", help="Of the training data, for the card.")
@version_option
@models_option
@images_option
@click.pass_context
def import_onnx(
    ctx: click.Context,
    /,
    source: Path,
    name: str | None,
    preset: str | None,
    mean: str | None,
    std: str | None,
    bgr: bool,
    layout: Layout | None,
    size: tuple[int, int] | None,
    output: str | None,
    answers: Answers | None,
    labels: Path | None,
    licence: str,
    version: str,
    models: Path,
    images: Path | None,
    **options: Any,
) -> None:
    """Write an ONNX classifier as the float bundle NAME, by default that of the file.

    Shows how the file is read, and compares the bundle's answers with the file's.
    """
    name = name or source.stem
    with plain_errors():
        require_writable(models / name)
        settings = None if images is None else settings_of(models, name, precision="float32")
        network = read_network(source)
        ask = partial(prompted, ctx) if sys.stdin.isatty() else None
        try:
            normalisation = normalisation_of(preset, mean, std, bgr)
        except Unsaid as missing:
            if ask is None:
                raise
            normalisation = normalisation_of(ask(missing), None, None, bgr)
        wishes = {"layout": layout, "size": size, "output": output, "answers": answers}
        decision = settled(network, normalisation, wishes, ask)
        click.echo(decision.sentence(normalisation))
        names = _labels(labels, decision)
        card = {
            "name": name,
            "version": version,
            "labels": names,
            "input": decision.shape.model_dump(),
            "preprocessing": taken_preprocessing(options),
            "training": {
                "command": typed(ctx),
                "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
                "producer": f"{network.producer_name} {network.producer_version}".strip(),
                "decision": decision.sentence(normalisation),
            },
            "data_licence": licence,
        }
        checked_card(card)
        with elapsed(f"converting {source.name}"):
            made = convert(network, decision, normalisation)
        for note in made.notes:
            click.echo(f"note: {note}")
        with elapsed(f"writing {name} and testing it; a large network takes minutes"):
            written = _write(models / name, made, card)
        click.echo(written)
        if settings and images:
            show_folder(settings, images)


def settled(
    network: onnx.ModelProto,
    normalisation: Normalisation,
    wishes: Mapping[str, Any],
    ask: Callable[[Unsaid], Any] | None,
) -> Decision:
    """How a file is read, after somebody was asked for what neither it nor the options say.

    Args:
        network: the file.
        normalisation: of its input.
        wishes: what the options say.
        ask: gives the value of an option; None if nobody is there.

    Raises:
        ExportError: it is not an image classifier, or nobody says what it leaves open.
    """
    while True:
        try:
            return decide(network, normalisation, **wishes)
        except Unsaid as missing:
            if ask is None:
                raise
            wishes = {**wishes, missing.option: ask(missing)}


def prompted(ctx: click.Context, missing: Unsaid) -> Any:
    """What the person at the terminal says; it becomes a part of the command of `ctx`."""
    choices = click.Choice(missing.choices) if missing.choices else Size()
    said = ctx.params[missing.option] = click.prompt(str(missing), type=choices)
    ctx.set_parameter_source(missing.option, ParameterSource.PROMPT)
    return said


def _labels(path: Path | None, decision: Decision) -> list[str]:
    count = decision.classes
    if path is None:
        return [str(k) for k in range(count)]
    names, double = distinct(read_labels(path))
    if len(names) != count:
        raise ExportError(f"the network has {count} classes, but there are {len(names)} labels")
    if double:
        shown = ", ".join(double[:MANY_LABELS])
        click.echo(f"note: labels that appear more than once get their number: {shown}")
    return names


def _write(folder: Path, made: Imported, card: dict[str, Any]) -> str:
    from scumble.training.bundle_export import finish  # here: it imports torch, which takes long

    onnx.checker.check_model(made.model, full_check=True)
    with staged(folder) as work:
        remove_derived(work)
        (work / ONNX_FILE["float32"]).write_bytes(made.model.SerializeToString())
        done = finish(work, card)
    size = (folder / ONNX_FILE["float32"]).stat().st_size
    first = Preprocessing.model_validate(card["preprocessing"])
    return (
        f"{folder}: {len(done.labels)} classes, {size:,} bytes; pictures of other sizes: "
        f"{first.fit}; answers equal the file's"
    )
