"""`scumble calibrate`: fit a codebook, which a bundle serves instead of its probabilities.

The images are the owner's, none that the network was trained on and none that it is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from app.inference.bundle import CODEBOOK_FILE, Bundle, Card, open_bundle, write_card
from app.inference.engines import Probs
from app.precision import Precision
from scumble.data.image_sets import Dataset, load
from scumble.defenses.codebook import Codebook, Form, find
from scumble.machine import processor
from scumble.training.codebook import fit
from scumble.training.command_options import models_option, plain_errors, require_writable, typed
from scumble.training.commands import data_option
from scumble.training.confidence import calibration_error, ranking
from scumble.training.measure import answers, describe, fitted, gap, threads

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")


@dataclass(frozen=True)
class Figures:
    """What honest users get of one kind of answer, on test images.

    Attributes:
        kept: share of predicted classes that are the network's own.
        l1: mean L1 distance to the network's answers, 0 to 2.
        ece: expected calibration error.
        auc: probability that a right answer is more confident than a wrong one; None where all are
            right.
    """

    kept: float
    l1: float
    ece: float
    auc: float | None

    @classmethod
    def of(cls, served: Probs, clean: Probs, test: Dataset) -> Figures:
        """The figures of served rows."""
        auc = ranking(served, test.labels)
        return cls(
            kept=round(float((served.argmax(1) == clean.argmax(1)).mean()), 6),
            l1=round(gap(served, clean), 5),
            ece=round(calibration_error(served, test.labels), 5),
            auc=None if auc is None else round(auc, 5),
        )


def ship(bundle: Bundle, own: Dataset, test: Dataset, command: str) -> Card:
    """Fit a codebook for each precision, write it into the bundle, and complete its card."""
    made: dict[str, Any] = {
        "command": command,
        "threads": threads(),
        "processor": processor(),
        "own": {"images": len(own), "data": describe(own)},
        "test": {"images": len(test), "data": describe(test)},
    }
    for precision in PRECISIONS:
        if precision not in bundle.golden().probabilities:
            continue
        model = bundle.onnx(precision)
        forms = fit(answers(model, own.images, precision).astype(np.float64), own.labels)
        content = orjson.dumps({"format": "scumble-codebook/1", "forms": forms}) + b"\n"
        (bundle.folder / CODEBOOK_FILE[precision]).write_bytes(content)
        made[precision] = _figures(forms, answers(model, test.images, precision), test)
    card = bundle.card
    known = card.model_dump(exclude={"files", "format"})
    return write_card(bundle.folder, {**known, "auxiliary": {**card.auxiliary, "codebook": made}})


def _figures(forms: dict[str, Any], clean: Probs, test: Dataset) -> dict[str, Any]:
    label = np.eye(clean.shape[1], dtype=clean.dtype)[clean.argmax(1)]
    rows = {"none": clean, "label": label}
    form: Form
    for form, sizes in forms.items():  # type: ignore[assignment]  # the keys are forms
        for cells in sizes:
            stored = find(forms, form, int(cells))
            defense = Codebook(cells=int(cells), form=form, stored=stored)
            rows[f"{form} {cells}"] = defense(clean, None)
    return {name: vars(Figures.of(served, clean, test)) for name, served in rows.items()}


@click.command()
@click.argument("name")
@data_option
@click.option(
    "--own",
    "own_source",
    help="Labelled images of the owner's that the network was not trained on: a .parquet file, a "
    "folder of class folders or a set. Default: what `scumble train` held out of the set NAME.",
)
@click.option("--test", "test_source", help="Other such images, for the reported figures.")
@models_option
@click.pass_context
def calibrate(
    ctx: click.Context,
    name: str,
    data: Path | None,
    own_source: str | None,
    test_source: str | None,
    models: Path,
) -> None:
    """Give the bundle NAME a codebook: the few rows that the defense `codebook` answers with.

    Prints what honest users get of each kind of answer; see docs/reference/defenses.md.
    """
    with plain_errors():
        bundle = open_bundle(models, name)
        require_writable(bundle.folder)
        own = load(own_source or name, "train", root=data)
        test = fitted(load(test_source or name, "test", root=data), bundle.card)
        if own_source is None:
            recipe = bundle.card.training.get("recipe", {})
            _, own = own.split(recipe.get("holdout", 0.05), recipe.get("seed", 0))
        own = fitted(own, bundle.card)
        if describe(own) == describe(test):
            raise click.UsageError("--own and --test are the same images; allowed: two sets")
        card = ship(bundle, own, test, typed(ctx))
    made = card.auxiliary["codebook"]
    table = Table(title=f"{bundle.folder}: fitted on {len(own):,} images")
    for column in ("answers", "labels kept", "L1", "ECE", "AUC"):
        table.add_column(column, justify="left" if column == "answers" else "right")
    for precision in PRECISIONS:
        for served, row in made.get(precision, {}).items():
            auc = "-" if row["auc"] is None else f"{row['auc']:.3f}"
            table.add_row(
                f"{precision} {served}",
                f"{row['kept']:.2%}",
                f"{row['l1']:.4f}",
                f"{row['ece']:.4f}",
                auc,
            )
    Console().print(table)
