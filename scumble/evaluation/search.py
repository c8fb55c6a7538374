"""Chooses recipes on a validation victim, which no defended cell uses.

    python -m scumble.evaluation.search mnist --out docs/results/records/search

The validation victim has the architecture of the included one, another seed, and half of the
training images. Every kind of answer gets the same candidates and the same number of image passes;
`OUT/<victim>.json` has all of them. The best of each kind is what `recipes.toml` is made of.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
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
from scumble.training import train
from scumble.training.auxiliary import TRANSFER

QUERIES, TEST = 6_000, 2_000
SEED = 1000  # of the validation victim
BASE = Fitting(optimizer="sgd", lr=0.1, epochs=4, ema=0.98)
SCALED = {"mnist": "scaled_upright", "gtsrb": "scaled_upright", "cifar10": "scaled"}


def candidates(victim: str) -> dict[str, dict[str, tuple[str, Fitting]]]:
    """Kind of answer -> name -> (transfer set, fit)."""
    public, half = TRANSFER[victim], QUERIES // 2
    pools = {
        "plain": f"{public}[:{QUERIES}]",
        "outlines": f"{public}[:{half}],{public}@outlines[{half}:{QUERIES}]",
    }
    loss = {"soft": "soft", "labels": "ce"}
    found: dict[str, dict[str, tuple[str, Fitting]]] = {}
    for kind in loss:
        how = replace(BASE, loss=loss[kind])
        scaled = replace(how, augment=SCALED[victim])
        fits = {
            "plain, not augmented": how,
            "outlines, not augmented": how,
            "outlines, scaled": scaled,
            "outlines, scaled, smoothing": replace(scaled, smoothing=0.1),
            "outlines, scaled, adamw": replace(scaled, optimizer="adamw", lr=3e-3),
        }
        if kind == "soft":
            fits["outlines, centred"] = replace(how, loss="centred", lr=0.05)
        found[kind] = {name: (pools[name.partition(",")[0]], fit) for name, fit in fits.items()}
    return found


def validation_victim(victim: str, data: Dataset, epochs: int) -> torch.nn.Module:
    """A network like the included one, from other randomness and other images."""
    half, _ = data.split(0.5, SEED)
    return train.train(
        replace(train.RECIPES[victim], seed=SEED, epochs=epochs), half, progress=False
    )


@click.command()
@click.argument("victim", type=click.Choice(list(SCALED)))
@click.option("--data", "root", type=click.Path(file_okay=False, path_type=Path))
@click.option("--epochs", type=click.IntRange(min=1), default=2, help="Of the validation victim.")
@click.option("--kind", "kinds", multiple=True, help="Kinds of answers.  [default: all]")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/records/search"),
    show_default=True,
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(
    victim: str, root: Path | None, epochs: int, kinds: tuple[str, ...], out: Path, threads: int
) -> None:
    """Fit copies of a validation victim with every candidate."""
    torch.set_num_threads(threads)
    net = validation_victim(victim, load(victim, "train", root=root), epochs)
    shape = (1, 28, 28) if victim == "mnist" else (3, 32, 32)
    test = pool(load(victim, "test", root=root).subset(np.arange(TEST)), shape)
    truth = predict(net, test.images)
    out.mkdir(parents=True, exist_ok=True)
    log: list[dict[str, Any]] = []
    accuracy = float((truth.argmax(1) == test.labels).mean())
    for kind, named in candidates(victim).items():
        if kinds and kind not in kinds:
            continue
        for name, (queries, how) in named.items():
            asked = pool(transfer.data(queries, "train", root), shape)
            log.append({"kind": kind, "candidate": name, "queries": queries})
            log[-1].update(tried(asked, predict(net, asked.images), kind, how, test, truth))
            click.echo(f"{kind}, {name}: {log[-1]['agreement']:.1%}, {log[-1]['seconds']:.0f} s")
            document = {
                "command": shlex.join(["python", "-m", "scumble.evaluation.search", *sys.argv[1:]]),
                "victim": {"accuracy": accuracy, "epochs": epochs, "seed": SEED},
                "candidates": log,
            }
            (out / f"{victim}.json").write_text(json.dumps(document, indent=1) + "\n")


def tried(
    asked: Pool, answers: Probs, kind: str, how: Fitting, test: Pool, truth: Probs
) -> dict[str, Any]:
    """One candidate: its settings, what it cost, and the agreement of its copy."""
    if kind == "labels":
        answers = np.eye(answers.shape[1], dtype=np.float32)[answers.argmax(1)]
    start = time.perf_counter()
    copy = students.make("auto", test.images.shape[1:], answers.shape[1], seed=0)
    fit(copy, asked.images, answers, how)
    agreement = (predict(copy, test.images).argmax(1) == truth.argmax(1)).mean()
    return {
        "fit": asdict(how),
        "image_passes": how.epochs * len(asked),
        "seconds": time.perf_counter() - start,
        "agreement": float(agreement),
    }


if __name__ == "__main__":
    main()
