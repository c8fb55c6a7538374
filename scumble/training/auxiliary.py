"""The auxiliary models of the comparison defenses: `python -m scumble.training.auxiliary NAME`.

    surrogate.onnx        a stand-in for the attacker's copy: learns the victim's answers to images
                          of another set. `probabilities` for `mad`, `scores` for `grad2`.
    misinformation.onnx   learns on the victim's images to give the true class no
                          probability. `probabilities` for `adaptive_misinformation`.

Sources: the baselines of Khaled et al. (ICMLA 2023), there with networks of the victim's size.
Here they are small, as each answer pays for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from torch import Tensor, nn

from app.inference.bundle import Bundle, Card, open_bundle, write_card
from app.inference.graph import parse, single_output
from scumble.data.image_sets import Dataset, load
from scumble.training.bundle_export import to_onnx
from scumble.training.command_options import models_option, plain_errors, typed
from scumble.training.commands import data_option
from scumble.training.dual_numbers import WithScores, fused
from scumble.training.measure import (
    answers,
    decoder_of,
    describe,
    fitted,
    gap,
    open_set,
    own_set,
    share_right,
    threads,
)
from scumble.training.nets import Normalize, small_cnn
from scumble.training.staging import staged
from scumble.training.train import Recipe, train

SURROGATE, MISINFORMATION = "surrogate.onnx", "misinformation.onnx"
SCORES = "scores"
IMAGES = 20_000
# The sets that the papers' attackers query with: victim -> transfer set.
TRANSFER = {
    "mnist": "fashion_mnist",
    "cifar10": "cifar100",
    "gtsrb": "cifar10",
    "cifar100": "cifar10",
}
RECIPES = {
    SURROGATE: Recipe("small_cnn", epochs=10, lr=0.1, augment="none", batch=128, ema=0.99),
    MISINFORMATION: Recipe("small_cnn", epochs=5, lr=0.1, augment="none", batch=128, ema=0.99),
}


@dataclass(frozen=True)
class Sets:
    """Images of the bundle's input size.

    Attributes:
        transfer: what an attacker would query with; labels do not count.
        train: the victim's training images.
        test: the victim's test images, for the figures.
    """

    transfer: Dataset
    train: Dataset
    test: Dataset


def train_surrogate(
    recipe: Recipe, victim: bytes, transfer: Dataset, *, progress: bool = True
) -> nn.Sequential:
    """A network that learned the victim's clean posteriors on `transfer` by soft cross-entropy.

    Batch norms are folded into the convolutions: the all-ones direction of the scores is that of
    the folded weights and biases.
    """
    posteriors = torch.from_numpy(answers(victim, transfer.images, "float32"))
    return fused(train(recipe, transfer, targets=posteriors, progress=progress))


def train_misinformation(recipe: Recipe, data: Dataset, *, progress: bool = True) -> nn.Sequential:
    """A network that learned to answer anything but the truth."""
    return fused(train(recipe, data, loss=untruth, progress=progress))


def untruth(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log(1 - softmax_y + 1e-12): large where the true class y is likely."""
    likely = logits.softmax(1).gather(1, labels[:, None])
    return -(1 - likely + 1e-12).log().mean()


def surrogate_of(bundle: Bundle) -> nn.Sequential:
    """The surrogate of a bundle as a torch network in eval mode, from the weights in its file.

    Returns:
        float32 (N, C, H, W) in [0, 1] -> logits (N, K); its first layer normalises.

    Raises:
        BundleError: the bundle has none.
    """
    weights = {
        tensor.name.removeprefix("net."): torch.from_numpy(
            onnx.numpy_helper.to_array(tensor).copy()
        )
        for tensor in parse(bundle.read(SURROGATE)).graph.initializer
        if tensor.name.startswith("net.")
    }
    card = bundle.card
    channels = card.input.channels
    blank = nn.Sequential(
        Normalize([0.0] * channels, [1.0] * channels), small_cnn(channels, len(card.labels))
    )
    net = fused(blank.eval())
    net.load_state_dict(weights)
    return net


def ship(
    bundle: Bundle, sets: Sets, recipes: dict[str, Recipe], command: str, *, progress: bool = True
) -> Card:
    """Train both, write them into the bundle, and complete its card."""
    card, test = bundle.card, sets.test
    victim = bundle.read("float32.onnx")
    clean = answers(victim, test.images, "float32")

    def written(file: Path, model: onnx.ModelProto, data: Dataset) -> dict[str, Any]:
        content = model.SerializeToString()
        recipe = asdict(recipes[file.name])
        del recipe["holdout"]  # nothing is held out, as nothing is chosen
        file.write_bytes(content)
        probs = answers(single_output(content, "probabilities"), test.images, "float32")
        return {
            "recipe": recipe,
            "images": len(data),
            "data": describe(data),
            "bytes": len(content),
            "agreement": round(float((probs.argmax(1) == clean.argmax(1)).mean()), 6),
            "test": round(share_right(probs, test), 6),
            "test_l1": round(gap(probs, clean), 6),
        }

    surrogate = train_surrogate(recipes[SURROGATE], victim, sets.transfer, progress=progress)
    with_scores = to_onnx(WithScores(surrogate), card.input, [SCORES])
    liar = train_misinformation(recipes[MISINFORMATION], sets.train, progress=progress)
    with staged(bundle.folder) as folder:
        figures = {
            "command": command,
            "threads": threads(),
            "torch": torch.__version__,
            "test": {"images": len(test), "data": describe(test)},
            "surrogate": written(folder / SURROGATE, with_scores, sets.transfer),
            "misinformation": written(
                folder / MISINFORMATION, to_onnx(liar, card.input), sets.train
            ),
        }
        known = card.model_dump(exclude={"files", "format"})
        return write_card(folder, {**known, "auxiliary": {**card.auxiliary, **figures}})


@click.command()
@click.argument("name")
@data_option
@click.option("--transfer", help="Set, .parquet file or folder that the surrogate is asked about.")
@click.option("--train", "train_source", help="The victim's training images, if not the set NAME.")
@click.option("--test", "test_source", help="The same, for the figures.")
@click.option(
    "--images", type=click.IntRange(1), default=IMAGES, show_default=True, help="At most."
)
@click.option("--epochs", type=click.IntRange(1), help="Instead of 10 and 5.")
@click.option("--seed", type=int, default=0, show_default=True)
@models_option
@click.pass_context
def auxiliary(
    ctx: click.Context,
    name: str,
    data: Path | None,
    transfer: str | None,
    train_source: str | None,
    test_source: str | None,
    images: int,
    epochs: int | None,
    seed: int,
    models: Path,
) -> None:
    """Give the bundle NAME the auxiliary models that `adaptive_misinformation`, `mad`, `grad2` use.

    They run for every answer, so all are small; see docs/reference/defenses.md.
    """
    transfer = transfer or TRANSFER.get(name)
    if transfer is None:
        raise click.UsageError(f"give --transfer; only {', '.join(TRANSFER)} have one by default")
    recipes = {
        file: replace(recipe, epochs=epochs or recipe.epochs, seed=seed)
        for file, recipe in RECIPES.items()
    }
    with plain_errors():
        bundle = open_bundle(models, name)
        card = bundle.card
        own = train_source or own_set(card, "train", data, "--train")
        judged_by = test_source or own_set(card, "test", data, "--test")
        queries = load(transfer, "train", root=data, decoder=decoder_of(card))
        sets = Sets(
            _queries(queries, card, images, seed),
            _some(open_set(own, "train", data, card), images, seed),
            open_set(judged_by, "test", data, card),
        )
        command = typed(ctx, "python -m scumble.training.auxiliary")
        card = ship(bundle, sets, recipes, command)
    surrogate, liar = card.auxiliary["surrogate"], card.auxiliary["misinformation"]
    click.echo(
        f"{bundle.folder}: the surrogate agrees with the victim on {surrogate['agreement']:.2%} "
        f"of {len(sets.test):,} test images, the misinformation model is right on "
        f"{liar['test']:.2%}"
    )


def _some(data: Dataset, most: int, seed: int) -> Dataset:
    return data.subset(np.random.default_rng(seed).permutation(len(data))[:most])


def _queries(data: Dataset, card: Card, most: int, seed: int) -> Dataset:
    """Up to `most` images as the victim takes them, to be sorted into its classes."""
    unlabelled = replace(_some(data, most, seed), classes=())
    return replace(fitted(unlabelled, card), classes=tuple(card.labels))


if __name__ == "__main__":
    auxiliary()
