"""Chooses recipes on a validation victim, which no defended cell uses.

    python -m scumble.evaluation.search cifar10 --out docs/results/records/search

The validation victim has the architecture of the included one, another seed, and half of the
training images. Every candidate gets the same number of image passes and a student as large as the
victim. First transfer sets and fits are compared from labels; then the best fit with the losses
that read probabilities, from the clean answers. `OUT/<victim>.json` has all of them, in the order
in which they were tried. `recipes.toml` takes the best of each kind.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from scumble.attacker import students, transfer
from scumble.attacker.pool import Pool, pool
from scumble.attacker.students import Fitting, fit, predict
from scumble.attacker.transports import Probs
from scumble.data.image_sets import Dataset, load
from scumble.machine import processor
from scumble.training import train
from scumble.training.auxiliary import TRANSFER

TEST = 2_000
SEED = 1000  # of the validation victim
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "gtsrb": (3, 32, 32)}
ADAMW = Fitting(loss="ce")
SGD = Fitting(loss="ce", optimizer="sgd", lr=0.1)
# victim -> (augmentation that changes little, one that changes more, another one)
AUGMENTS = {
    "mnist": ("none", "scaled_upright", "digits"),
    "cifar10": ("flips", "scaled", "objects"),
    "gtsrb": ("crops", "scaled_upright", "signs"),
}
# victim -> transfer set that is not the published one
OTHER = {"mnist": "cifar100", "cifar10": "gtsrb", "gtsrb": "cifar100"}


def sources(victim: str, queries: int) -> dict[str, str]:
    """Transfer sets of `queries` images."""
    public, half = TRANSFER[victim], queries // 2
    halves = {
        "outlines": f"{public}@outlines[{half}:{queries}]",
        "blended": f"{public}@blended[{half}:{queries}]",
        "texture": f"texture[:{half}]",
        OTHER[victim]: f"{OTHER[victim]}[:{half}]",
    }
    mixed = {f"half {name}": f"{public}[:{half}],{term}" for name, term in halves.items()}
    # Digits are strokes, as outlines are.
    strokes = {"outlines": f"{public}@outlines[:{queries}]"} if victim == "mnist" else {}
    return {"published": f"{public}[:{queries}]"} | mixed | strokes


def fits(victim: str) -> dict[str, Fitting]:
    """How the copy is fitted to labels."""
    little, more, other = AUGMENTS[victim]
    return {
        f"AdamW, {little}": replace(ADAMW, augment=little),
        f"SGD, {little}": replace(SGD, augment=little),
        f"AdamW, {more}": replace(ADAMW, augment=more),
        f"AdamW, {other}": replace(ADAMW, augment=other),
        f"SGD, {more}, smoothing": replace(SGD, augment=more, smoothing=0.1),
        f"AdamW, {little}, smoothing": replace(ADAMW, augment=little, smoothing=0.1),
        f"AdamW, {little}, mixup": replace(ADAMW, augment=little, mixup=0.2),
    }


Trial = tuple[str, str, str, Fitting]


class Search:
    """All candidates against one validation victim.

    Args:
        victim: name of the included one.
        net: the validation victim.
        root: folder with data sets by name.
        queries: per candidate.
        epochs: per candidate.
    """

    def __init__(
        self, victim: str, net: torch.nn.Module, root: Path | None, queries: int, epochs: int
    ) -> None:
        self._victim, self._net, self._root = victim, net, root
        self._queries, self._epochs = queries, epochs
        test = load(victim, "test", root=root)
        self._test = pool(test.subset(np.arange(min(TEST, len(test)))), SHAPES[victim])
        self._truth = predict(net, self._test.images)
        self.accuracy = float((self._truth.argmax(1) == self._test.labels).mean())
        self.log: list[dict[str, Any]] = []

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Try them one after another; yields the log's last entry after each."""
        sets, ways = sources(self._victim, self._queries), fits(self._victim)
        yield from self._tried([("labels", "published", name, how) for name, how in ways.items()])
        how = Fitting(**self._best("labels")["fit"])
        yield from self._tried([("labels", name, "best fit", how) for name in [*sets][1:]])
        pooled = self._best("labels")["transfer set"]
        probabilities = {
            "soft": replace(how, loss="soft", smoothing=0.0),
            "centred": replace(how, loss="centred", smoothing=0.0),
        }
        yield from self._tried(
            [("soft", pooled, name, each) for name, each in probabilities.items()]
        )

    def _best(self, kind: str) -> dict[str, Any]:
        return max(
            (row for row in self.log if row["kind"] == kind), key=lambda row: row["agreement"]
        )

    def _tried(self, trials: list[Trial]) -> Iterator[dict[str, Any]]:
        for kind, source, name, how in trials:
            terms = sources(self._victim, self._queries)[source]
            asked = pool(transfer.data(terms, "train", self._root), SHAPES[self._victim])
            answers = predict(self._net, asked.images)
            self.log.append({"kind": kind, "transfer set": source, "candidate": name})
            self.log[-1] |= {"queries": terms}
            self.log[-1] |= self._copied(asked, answers, replace(how, epochs=self._epochs))
            yield self.log[-1]

    def _copied(self, asked: Pool, answers: Probs, how: Fitting) -> dict[str, Any]:
        """One candidate: its settings, what it cost, and the agreement of its copy."""
        start = time.perf_counter()
        copy = students.make("auto", SHAPES[self._victim], answers.shape[1], seed=0)
        fit(copy, asked.images, answers, how)
        agreement = (predict(copy, self._test.images).argmax(1) == self._truth.argmax(1)).mean()
        return {
            "fit": asdict(how),
            "image_passes": how.epochs * len(asked),
            "seconds": time.perf_counter() - start,
            "agreement": float(agreement),
        }


def validation_victim(victim: str, data: Dataset, epochs: int) -> torch.nn.Module:
    """A network like the included one, from other randomness and other images."""
    half, _ = data.split(0.5, SEED)
    recipe = replace(train.RECIPES[victim], seed=SEED, epochs=epochs)
    return train.train(recipe, half, progress=False)


@click.command()
@click.argument("victim", type=click.Choice(list(SHAPES)))
@click.option("--data", "root", type=click.Path(file_okay=False, path_type=Path))
@click.option("--victim-epochs", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--queries", type=click.IntRange(min=2), default=10_000, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=6, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/records/search"),
    show_default=True,
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(
    victim: str,
    root: Path | None,
    victim_epochs: int,
    queries: int,
    epochs: int,
    out: Path,
    threads: int,
) -> None:
    """Fit copies of a validation victim with every candidate."""
    torch.set_num_threads(threads)
    net = validation_victim(victim, load(victim, "train", root=root), victim_epochs)
    search = Search(victim, net, root, queries, epochs)
    out.mkdir(parents=True, exist_ok=True)
    head = {
        "command": shlex.join(["python", "-m", "scumble.evaluation.search", *sys.argv[1:]]),
        "processor": processor(),
        "victim": {"accuracy": search.accuracy, "epochs": victim_epochs, "seed": SEED},
    }
    for row in search():
        click.echo(
            f"{row['kind']}, {row['transfer set']}, {row['candidate']}: "
            f"{row['agreement']:.1%}, {row['seconds']:.0f} s"
        )
        document = head | {"candidates": search.log}
        (out / f"{victim}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
