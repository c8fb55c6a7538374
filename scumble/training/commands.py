"""The commands `scumble train` and `scumble quantize`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from app.inference.bundle import Bundle, InputShape, checked_card, open_bundle
from scumble.data.image_sets import load
from scumble.help_option import HELP
from scumble.machine import keep_freed_memory
from scumble.training.bundle_export import export_bundle, finish
from scumble.training.checkpoint import Checkpoint
from scumble.training.command_options import (
    models_option,
    plain_errors,
    require_writable,
    typed,
    version_option,
)
from scumble.training.exposure import Exposure
from scumble.training.measure import (
    answers,
    as_input,
    card_accuracy,
    describe,
    open_set,
    own_set,
    share_right,
    threads,
)
from scumble.training.qat import Tuning
from scumble.training.quantize import (
    METHODS,
    PRESETS,
    Candidate,
    Judge,
    Skipped,
    candidates,
    ship,
)
from scumble.training.staging import staged
from scumble.training.train import AUGMENTS, RECIPES
from scumble.training.train import train as fit

data_option = click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with NAME_train.parquet and NAME_test.parquet. Without it the images are "
    "downloaded by torchvision into ~/.cache/scumble; digits come with scikit-learn.",
)

OWN_HOLDOUT = 0.2  # of images of one's own, where nothing else is there to compare the files on

# What the sources state; see docs/how-to/training.md. Only weights are shipped, never an image.
DATA_LICENCE = {
    "mnist": "MNIST: copyright Y. LeCun and C. Cortes, CC BY-SA 3.0 as the Keras documentation "
    "states; no image is shipped",
    "cifar10": "CIFAR-10 (Krizhevsky 2009): no licence stated, research data; no image is shipped",
    "cifar100-split": "CIFAR-100 (Krizhevsky 2009): no licence stated, research data; no image is "
    "shipped",
    "gtsrb": "GTSRB (Stallkamp et al. 2012): no licence stated, research data; no image is shipped",
    "digits": "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), CC BY 4.0 as "
    "the UCI repository states; no image is shipped",
}


@click.command(context_settings=HELP)
@click.argument("name", type=click.Choice(list(RECIPES)))
@data_option
@models_option
@version_option
@click.option("--epochs", type=click.IntRange(1), help="Instead of the recipe's.")
@click.option("--seed", type=int, help="Instead of the recipe's.")
@click.option("--bundle", help="Name of the bundle.  [default: NAME]")
@click.option(
    "--outliers",
    help="Images that show none of the classes, of which the network should be unsure: a .parquet "
    "file, a folder of class folders or a set.",
)
@click.option(
    "--outlier-weight",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="Of their loss.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the network learns.",
)
@click.pass_context
def train(
    ctx: click.Context,
    name: str,
    data: Path | None,
    models: Path,
    version: str,
    epochs: int | None,
    seed: int | None,
    bundle: str | None,
    outliers: str | None,
    outlier_weight: float,
    device: str,
) -> None:
    """Train the victim NAME by its recipe and write it as a float bundle.

    An interrupted training continues when it is started again with the same options: it keeps how
    far it was in MODELS/.training-BUNDLE.pt, which is written once a minute.
    """
    recipe, place = RECIPES[name], models / (bundle or name)
    source = recipe.data or name
    recipe = replace(
        recipe,
        epochs=recipe.epochs if epochs is None else epochs,
        seed=recipe.seed if seed is None else seed,
    )
    keep_freed_memory()
    with plain_errors():
        require_writable(place)
        images = load(source, "train", root=data)
        test = load(source, "test", root=data)
        rest, held_out = images.split(recipe.holdout, recipe.seed)
        height, width, channels = images.images.shape[1:]
        shape = InputShape(height=height, width=width, channels=channels)
        card: dict[str, Any] = {
            "name": place.name,
            "version": version,
            "labels": list(images.classes),
            "input": shape.model_dump(),
            "data_licence": DATA_LICENCE.get(source, ""),
        }
        checked_card(card)
        exposure, exposed = None, {}
        if outliers is not None:
            found_outliers = load(outliers, "train", root=data)
            pixels = as_input(found_outliers, shape, len(found_outliers))
            exposure = Exposure(pixels, outlier_weight, recipe.seed)
            exposed = {"outliers": describe(found_outliers), "outlier_weight": outlier_weight}
        on = torch.device(device)
        checkpoint = Checkpoint(
            place.with_name(f".training-{place.name}.pt"),
            json.dumps(
                [asdict(recipe), describe(rest), exposed, threads(), torch.__version__, device]
            ),
        )
        if checkpoint.read() is not None:
            click.echo(f"continues the interrupted training in {checkpoint.path}")
        try:
            network = fit(recipe, rest, exposure=exposure, checkpoint=checkpoint, device=on)
        except KeyboardInterrupt:
            if checkpoint.read() is None:
                raise
            raise KeyboardInterrupt(
                f"{checkpoint.path} keeps how far it was: the same command continues"
            ) from None
        card["training"] = {
            "command": typed(ctx),
            "set": source,
            "recipe": asdict(recipe),
            "images": len(rest),
            "held_out": len(held_out),
            **exposed,
            "threads": threads(),
            "torch": torch.__version__,
        }
        with staged(place) as folder:
            export_bundle(network, folder, shape, card, threads=threads())
            model = Bundle(folder).onnx("float32")
            found = card_accuracy(answers(model, test.images, "float32"), test)
            validation = share_right(answers(model, held_out.images, "float32"), held_out)
            card["training"]["validation"] = round(validation, 6)
            accuracy = {"float32": found.model_dump()}
            finish(folder, {**card, "accuracy": accuracy}, threads=threads())
        checkpoint.remove()
    click.echo(
        f"{place}: accuracy {found.value:.2%} on {len(test):,} test images "
        f"and {validation:.2%} on {len(held_out):,} held-out images"
    )


@click.command(context_settings=HELP)
@click.argument("name")
@data_option
@click.option(
    "--train",
    "train_source",
    help="A .parquet file, a folder of class folders, or a folder of images without labels.",
)
@click.option(
    "--test",
    "test_source",
    help="The same, for the reported figures. Without it, where --train is given, they are those "
    "of the held-out images.",
)
@click.option("--method", type=click.Choice([*METHODS, "both"]), default="both", show_default=True)
@click.option("--preset", type=click.Choice([*PRESETS, "both"]), default="both", show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=Tuning.epochs, show_default=True)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=Tuning.lr,
    show_default=True,
    help="Of qat.",
)
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
        require_writable(bundle.folder)
        recipe = bundle.card.training.get("recipe", {})
        source = train_source or own_set(bundle.card, "train", data, "--train")
        images = open_set(source, "train", data, bundle.card, unlabelled=True)
        share = recipe.get("holdout", 0.05) if test_source or not train_source else OWN_HOLDOUT
        rest, held_out = images.split(share, recipe.get("seed", 0))
        test = held_out
        if test_source or not train_source:
            source = test_source or own_set(bundle.card, "test", data, "--test")
            test = open_set(source, "test", data, bundle.card, unlabelled=True)
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
    best = chosen["candidates"][f"{chosen['method']}-{chosen['preset']}"]
    click.echo(
        f"{bundle.folder}: {chosen['method']}-{chosen['preset']} shipped, accuracy "
        f"{best['test']:.2%} (float {chosen['float32']['test']:.2%}), "
        f"{chosen['ratio']:.2f} times the size of the float file"
    )
    if not judge.labelled:
        click.echo("the images have no labels: right is what the float network says")


def _line(candidate: Candidate | Skipped) -> str:
    if isinstance(candidate, Skipped):
        return f"{candidate.name:11} skipped: {candidate.reason}"
    return (
        f"{candidate.name:11} validation {candidate.validation:.2%}  test {candidate.test:.2%}  "
        f"L1 to float {candidate.test_l1:.4f}  {len(candidate.file):,} bytes"
    )
