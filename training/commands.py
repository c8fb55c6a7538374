"""The workshop's commands: `scumble train`, `scumble quantize`, `scumble export`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from app.bundle import Bundle, InputShape, open_bundle
from app.errors import ScumbleError
from scumble.data import DatasetError, load
from training.export import ExportError, classes_of, export_bundle, finish
from training.measure import answers, card_accuracy, fitted, share_right, threads
from training.qat import Tuning
from training.quantize import METHODS, PRESETS, Candidate, Judge, candidates, ship
from training.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_weights,
    normalized,
    own_module,
    pt2_module,
    torchvision_model,
)
from training.train import AUGMENTS, RECIPES
from training.train import train as fit

file = click.Path(exists=True, dir_okay=False, path_type=Path)
models_option = click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models"),
    show_default=True,
    help="Folder of bundles.",
)
data_option = click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with NAME_train.parquet and NAME_test.parquet. Without it the images are "
    "downloaded by torchvision into ~/.cache/scumble.",
)
version_option = click.option(
    "--version", "version", default="1", show_default=True, help="Version of the bundle."
)

# What the sources state; see docs/training.md. Only weights are shipped, never an image.
DATA_LICENCE = {
    "mnist": "MNIST: copyright Y. LeCun and C. Cortes, CC BY-SA 3.0 as the Keras documentation "
    "states; no image is shipped",
    "cifar10": "CIFAR-10 (Krizhevsky 2009): no licence stated, research data; no image is shipped",
    "gtsrb": "GTSRB (Stallkamp et al. 2012): no licence stated, research data; no image is shipped",
}


@click.command()
@click.argument("name", type=click.Choice(list(RECIPES)))
@data_option
@models_option
@version_option
@click.option("--epochs", type=click.IntRange(1), help="Instead of the recipe's.")
@click.option("--seed", type=int, help="Instead of the recipe's.")
@click.pass_context
def train(
    ctx: click.Context,
    name: str,
    data: Path | None,
    models: Path,
    version: str,
    epochs: int | None,
    seed: int | None,
) -> None:
    """Train the victim NAME by its recipe and write it as a float bundle."""
    recipe = RECIPES[name]
    recipe = replace(
        recipe,
        epochs=recipe.epochs if epochs is None else epochs,
        seed=recipe.seed if seed is None else seed,
    )
    with plain_errors():
        images = load(name, "train", root=data)
        test = load(name, "test", root=data)
        rest, held_out = images.split(recipe.holdout, recipe.seed)
        network = fit(recipe, rest)
        height, width, channels = images.images.shape[1:]
        card: dict[str, Any] = {
            "name": name,
            "version": version,
            "labels": list(images.classes),
            "data_licence": DATA_LICENCE.get(name, ""),
            "training": {
                "command": typed(ctx),
                "recipe": asdict(recipe),
                "images": len(rest),
                "held_out": len(held_out),
                "threads": threads(),
                "torch": torch.__version__,
            },
        }
        folder = models / name
        shape = InputShape(height=height, width=width, channels=channels)
        export_bundle(network, folder, shape, card, threads=threads())
        card["input"] = shape.model_dump()
        model = Bundle(folder).onnx("float32")
        found = card_accuracy(answers(model, test.images, "float32"), test)
        validation = share_right(answers(model, held_out.images, "float32"), held_out)
        card["training"]["validation"] = round(validation, 6)
        finish(folder, {**card, "accuracy": {"float32": found.model_dump()}}, threads=threads())
    click.echo(
        f"{folder}: right are {found.value:.2%} of {len(test):,} test images "
        f"and {validation:.2%} of {len(held_out):,} held-out images"
    )


@click.command()
@click.argument("name")
@data_option
@click.option("--train", "train_source", help="A .parquet file or a folder of class folders.")
@click.option("--test", "test_source", help="The same, for the reported figures.")
@click.option("--method", type=click.Choice([*METHODS, "both"]), default="both", show_default=True)
@click.option("--preset", type=click.Choice([*PRESETS, "both"]), default="both", show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=Tuning.epochs, show_default=True)
@click.option("--lr", type=float, default=Tuning.lr, show_default=True, help="Of qat.")
@click.option("--augment", type=click.Choice(list(AUGMENTS)), help="Of qat; default: as trained.")
@click.option("--seed", type=int, default=0, show_default=True)
@models_option
@click.pass_context
def quantize(
    ctx: click.Context,
    name: str,
    data: Path | None,
    train_source: str | None,
    test_source: str | None,
    method: str,
    preset: str,
    epochs: int,
    lr: float,
    augment: str | None,
    seed: int,
    models: Path,
) -> None:
    """Give the bundle NAME an int8 file: the best of the candidates on held-out images."""
    with plain_errors():
        bundle = open_bundle(models, name)
        recipe = bundle.card.training.get("recipe", {})
        images = load(train_source or name, "train", root=data)
        test = fitted(load(test_source or name, "test", root=data), bundle.card)
        rest, held_out = images.split(recipe.get("holdout", 0.05), recipe.get("seed", 0))
        rest, held_out = fitted(rest, bundle.card), fitted(held_out, bundle.card)
        augment = augment or recipe.get("augment", "none")
        tuning = Tuning(epochs=epochs, lr=lr, augment=augment, seed=seed)
        judge = Judge(bundle.read("float32.onnx"), held_out, test)
        found = []
        for candidate in candidates(
            bundle.read("float32.onnx"),
            rest,
            judge,
            tuning,
            [m for m in METHODS if method in (m, "both")],
            [p for p in PRESETS if preset in (p, "both")],
        ):
            found.append(candidate)
            click.echo(_line(candidate))
        card = ship(bundle, found, judge, tuning, typed(ctx))
    chosen = card.quantization
    click.echo(
        f"{bundle.folder}: {chosen['method']}-{chosen['preset']} shipped, "
        f"{card.accuracy['int8'].value:.2%} right (float {card.accuracy['float32'].value:.2%}), "
        f"file {chosen['ratio']:.2f} of the float file"
    )


@click.command()
@click.argument("name")
@click.option("--torchvision", help="A model of torchvision.models, such as mobilenet_v2.")
@click.option("--module", help="FILE.py:FUNCTION that returns a torch module. The file is run.")
@click.option(
    "--pt2",
    type=file,
    help="A torch.export file with a dynamic batch. Only your own: it may run code.",
)
@click.option(
    "--weights",
    type=file,
    help="State dict, read with weights_only=True; without it weights stay as the source has them.",
)
@click.option("--classes", type=click.IntRange(2), help="How many, where no labels are given.")
@click.option(
    "--labels", type=file, help="Text file, one label a line; without it classes are numbered."
)
@click.option("--size", type=click.IntRange(1), default=224, show_default=True, help="In pixels.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True)
@click.option("--mean", help="Per channel, as 0.485,0.456,0.406 (the default for torchvision).")
@click.option("--std", help="Per channel, as 0.229,0.224,0.225 (the default for torchvision).")
@click.option(
    "--fit",
    "fit_to",
    type=click.Choice(["stretch", "crop"]),
    help="How pictures of another size are brought to size; crop for torchvision, else stretch.",
)
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True),
    help="Central share that crop keeps; 0.875 for torchvision, else 1.",
)
@click.option("--licence", default="", help="Of the training data, for the card.")
@version_option
@models_option
@click.pass_context
def export(
    ctx: click.Context,
    name: str,
    torchvision: str | None,
    module: str | None,
    pt2: Path | None,
    weights: Path | None,
    classes: int | None,
    labels: Path | None,
    size: int,
    channels: str,
    mean: str | None,
    std: str | None,
    fit_to: str | None,
    ratio: float | None,
    licence: str,
    version: str,
    models: Path,
) -> None:
    """Write a network of your own as the float bundle NAME.

    It takes float32 (N, C, H, W) and returns logits (N, K); softmax is added.
    """
    if sum(source is not None for source in (torchvision, module, pt2)) != 1:
        raise click.UsageError("give one of --torchvision, --module and --pt2")
    names = labels.read_text().splitlines() if labels else []
    with plain_errors():
        if torchvision:
            network = torchvision_model(torchvision, classes or len(names) or 1000)
            mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
            fit_to, ratio = fit_to or "crop", ratio or 0.875
        elif module:
            network = own_module(module)
        else:
            network = pt2_module(Path(pt2 or ""))
        if weights:
            load_weights(network, weights)
        if mean or std:
            network = normalized(network, _numbers(mean or "0"), _numbers(std or "1"))
        shape = InputShape(height=size, width=size, channels=3 if channels == "3" else 1)
        count = classes_of(network, shape)
        names = names or [str(k) for k in range(classes or count)]
        card = {
            "name": name,
            "version": version,
            "labels": names,
            "preprocessing": {"fit": fit_to or "stretch", "ratio": ratio or 1.0},
            "training": {"command": typed(ctx), "torch": torch.__version__},
            "data_licence": licence,
        }
        export_bundle(network, models / name, shape, card, threads=threads())
    click.echo(f"{models / name}: {count} classes, {size}x{size} pixels, {channels} channels")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What a person can act on, in one line."""
    try:
        yield
    except (ScumbleError, DatasetError, OSError) as exc:
        raise click.ClickException(" ".join(str(exc).split())) from exc


def typed(ctx: click.Context, program: str = "") -> str:
    """The command line, rebuilt from the parameters that were given.

    Args:
        ctx: of the command.
        program: how it is started, if not as a command of `scumble`.
    """
    words = (program or f"scumble {ctx.command.name}").split()
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = [parameter.opts[0]] if isinstance(parameter, click.Option) else []
            words += [*option, str(ctx.params[name])]
    return shlex.join(words)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as exc:
        raise ExportError(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5") from exc


def _line(candidate: Candidate) -> str:
    return (
        f"{candidate.name:11} validation {candidate.validation:.2%}  test {candidate.test:.2%}  "
        f"L1 to float {candidate.test_l1:.4f}  {len(candidate.file):,} bytes"
    )
