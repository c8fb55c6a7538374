"""Chooses recipes on a validation victim, which no defended cell uses.

    python -m scumble.evaluation.search cifar10 --out docs/results/records/search

The validation victim has the architecture of the included one, another seed, and half of the
training images. Every candidate gets the same number of image passes and a student as large as the
victim. From labels, transfer sets are compared with one fit, then the other fits on the best set;
at last the best fit with the losses that read probabilities, from the clean answers and from those
of a codebook, whose levels are not those of the network: the kind `mixed`.
`OUT/<victim>.json` has all of them, in the order in which they were tried. `recipes.toml` takes the
best of each kind.
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
from scumble.defenses.codebook import Codebook
from scumble.machine import keep_freed_memory, processor
from scumble.training import codebook, train
from scumble.training.auxiliary import TRANSFER
from scumble.training.command_options import plain_errors

TEST = 2_000
CELLS = 4  # of the codebook
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
# victim -> what a program draws that looks more like its images than any other drawn set
DRAWN = {"mnist": "strokes", "gtsrb": "shapes"}


def sources(victim: str, queries: int) -> dict[str, str]:
    """Transfer sets of `queries` images."""
    public, half = TRANSFER[victim], queries // 2
    halves = {
        "outlines": f"{public}@outlines[{half}:{queries}]",
        "blended": f"{public}@blended[{half}:{queries}]",
        "texture": f"texture[:{half}]",
        OTHER[victim]: f"{OTHER[victim]}[:{half}]",
    }
    wholes: dict[str, str] = {}
    # No program here draws anything like the images of cifar10.
    if victim in DRAWN:
        halves[DRAWN[victim]] = f"{DRAWN[victim]}[:{half}]"
        wholes = {
            "outlines": f"{public}@outlines[:{queries}]",
            DRAWN[victim]: f"{DRAWN[victim]}[:{queries}]",
        }
    mixed = {f"half {name}": f"{public}[:{half}],{term}" for name, term in halves.items()}
    return {"published": f"{public}[:{queries}]"} | mixed | wholes


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

    Attributes:
        accuracy: share of the test images on which the victim is right.
        log: a row for each candidate that was tried.
        known: rows of a search that was interrupted; their candidates are not tried again.
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
        self.known: list[dict[str, Any]] = []

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Try them one after another; yields the log's last entry after each."""
        ways = fits(self._victim)
        first, *others = ways
        sets = sources(self._victim, self._queries)
        yield from self._tried([("labels", each, first, ways[first]) for each in sets])
        best = self._best("labels")["transfer set"]
        yield from self._tried([("labels", best, each, ways[each]) for each in others])
        how = Fitting(**self._best("labels")["fit"])
        losses = {name: replace(how, loss=name, smoothing=0.0) for name in ("soft", "centred")}
        for kind in ("soft", "mixed"):
            yield from self._tried([(kind, best, each, losses[each]) for each in losses])

    def _best(self, kind: str) -> dict[str, Any]:
        return max(
            (row for row in self.log if row["kind"] == kind), key=lambda row: row["agreement"]
        )

    def _tried(self, trials: list[Trial]) -> Iterator[dict[str, Any]]:
        for kind, source, name, how in trials:
            terms = sources(self._victim, self._queries)[source]
            how = replace(how, epochs=self._epochs)
            row: dict[str, Any] = {"kind": kind, "transfer set": source, "candidate": name}
            row |= {"queries": terms, "fit": asdict(how)}
            known = (each for each in self.known if row.items() <= each.items())
            if (found := next(known, None)) is None:
                asked = pool(transfer.data(terms, "train", self._root), SHAPES[self._victim])
                answers = predict(self._net, asked.images)
                answers = self._coarse(answers) if kind == "mixed" else answers
                found = row | self._copied(asked, answers, how)
            self.log.append(found)
            yield found

    def _coarse(self, answers: Probs) -> Probs:
        """Answers (N, K) as a codebook gives them that is fitted to those on the test images."""
        truth = self._truth.astype(np.float64)
        cells = codebook.classwise(truth, CELLS) or codebook.pooled(truth, CELLS)
        return Codebook(cells=CELLS, stored=cells)(answers, None)

    def _copied(self, asked: Pool, answers: Probs, how: Fitting) -> dict[str, Any]:
        """What one candidate cost, and the agreement of its copy."""
        start = time.perf_counter()
        copy = students.make("auto", SHAPES[self._victim], answers.shape[1], seed=0)
        fit(copy, asked.images, answers, how)
        agreement = (predict(copy, self._test.images).argmax(1) == self._truth.argmax(1)).mean()
        return {
            "image_passes": how.epochs * len(asked),
            "seconds": time.perf_counter() - start,
            "agreement": float(agreement),
        }


def validation_victim(victim: str, data: Dataset, epochs: int) -> torch.nn.Module:
    """A network like the included one, from other randomness and other images."""
    half, _ = data.split(0.5, SEED)
    recipe = train.RECIPES[victim]
    # The included ones have five times as many epochs; at their rates a short training diverges.
    recipe = replace(recipe, seed=SEED, epochs=epochs, lr=recipe.lr / 4)
    return train.train(recipe, half, progress=False)


@click.command()
@click.argument("victim", type=click.Choice(list(SHAPES)))
@click.option("--data", "root", type=click.Path(file_okay=False, path_type=Path))
@click.option("--victim-epochs", type=click.IntRange(min=1), default=8, show_default=True)
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
    """Fit copies of a validation victim with every candidate.

    A search that was interrupted goes on where it was.
    """
    with plain_errors():
        keep_freed_memory()
        torch.set_num_threads(threads)
        net = validation_victim(victim, load(victim, "train", root=root), victim_epochs)
        file = out / f"{victim}.json"
        past = json.loads(file.read_text()) if file.exists() else {"candidates": []}
        search = Search(victim, net, root, queries, epochs)
        head = {
            "command": shlex.join(["python", "-m", "scumble.evaluation.search", *sys.argv[1:]]),
            "processor": processor(),
            "victim": {"accuracy": search.accuracy, "epochs": victim_epochs, "seed": SEED},
        }
        if all(past.get(key) == value for key, value in head.items()):
            search.known = past["candidates"]
        out.mkdir(parents=True, exist_ok=True)
        for row in search():
            click.echo(
                f"{row['kind']}, {row['transfer set']}, {row['candidate']}: "
                f"{row['agreement']:.1%}, {row['seconds']:.0f} s"
            )
            file.write_text(json.dumps(head | {"candidates": search.log}, indent=1) + "\n")


if __name__ == "__main__":
    main()
