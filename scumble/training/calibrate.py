"""`scumble calibrate`: fit the codebook and the gate of a bundle, for each of its precisions.

The images are the owner's, none that the network was trained on and none that it is judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
from rich.table import Table

from app.errors import ConfigError
from app.inference.bundle import (
    CODEBOOK_FILE,
    GATE_FILE,
    Bundle,
    Card,
    golden_inputs,
    open_bundle,
    write_card,
)
from app.inference.engines import Probs
from app.precision import Precision
from app.settings import load_settings
from scumble.data.image_sets import Dataset, load
from scumble.defenses.codebook import Codebook, Form, find
from scumble.help_option import HELP
from scumble.machine import processor
from scumble.training.codebook import fit
from scumble.training.command_options import models_option, plain_errors, require_writable, typed
from scumble.training.commands import data_option
from scumble.training.confidence import calibration_error, ranking
from scumble.training.gate import document
from scumble.training.gate_report import (
    MOST,
    Ends,
    Images,
    Look,
    fitted_gate,
    looker,
    report,
    shares,
)
from scumble.training.measure import (
    answers,
    as_input,
    decoder_of,
    describe,
    gap,
    open_set,
    own_set,
    threads,
)
from scumble.training.policy_table import settings_of, show, show_policies
from scumble.training.staging import staged

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


def ship(
    bundle: Bundle, own: Dataset, test: Dataset, foreign: Mapping[str, Dataset], command: str
) -> Card:
    """Fit codebook and gate for each precision, write them into the bundle, complete its card.

    Args:
        bundle: changed on disk.
        own: what both are fitted to.
        test: own images for the figures.
        foreign: other images for the figures, by the name that the card gets.
        command: for the card.
    """
    common: dict[str, Any] = {
        "command": command,
        "threads": threads(),
        "processor": processor(),
        "own": {"images": len(own), "data": describe(own)},
        "test": {"images": len(test), "data": describe(test)},
    }
    codebook, gate = dict(common), dict(common)
    gate["foreign"] = {name: describe(data) for name, data in foreign.items()}
    card = bundle.card
    pictures = {
        name: as_input(data, card.input, MOST, card.preprocessing) for name, data in foreign.items()
    }
    with staged(bundle.folder) as folder:
        for precision in PRECISIONS:
            if precision not in bundle.golden().probabilities:
                continue
            ask, look_at = network_of(bundle, precision)
            rows = ask(own.images)
            forms = fit(rows.astype(np.float64), own.labels)
            shown = {"format": "scumble-codebook/1", "forms": forms}
            _write(folder / CODEBOOK_FILE[precision], shown)
            codebook[precision] = _figures(forms, ask(test.images), test)
            try:
                look = look_at()
            except ConfigError as error:
                gate[precision] = {"none": str(error)}
                (folder / GATE_FILE[precision]).unlink(missing_ok=True)
                continue
            found = fitted_gate(look, own.images)
            _write(folder / GATE_FILE[precision], document(found, shares(forms, rows)))
            gate[precision] = report(look, found, as_input(test, card.input, MOST), pictures)
        known = card.model_dump(exclude={"files", "format"})
        made = {**card.auxiliary, "codebook": codebook, "gate": gate}
        return write_card(folder, {**known, "auxiliary": made})


def network_of(
    bundle: Bundle, precision: Precision
) -> tuple[Callable[[Images], Probs], Callable[[], Look]]:
    """What gives clean rows of images, and what loads that which gives their logits as well.

    A bundle without a network is asked at the server that the settings name.

    Raises:
        ConfigError: the settings name none.
    """
    if bundle.card.upstream is None:
        model = bundle.onnx(precision)
        return (
            lambda images: answers(model, images, precision),
            lambda: looker(model, precision, len(bundle.card.labels)),
        )
    # Imported here: it needs an extra that training does not.
    from app.inference.upstream.engine import UpstreamEngine, joined

    engine = UpstreamEngine(load_settings(engine="upstream"), bundle)

    def look(images: Images) -> Ends:
        found = joined(engine.found(images))
        if found.logits is None:
            raise ConfigError(f"the server gives no logits; {engine.score_hint}")
        return Ends(found.rows, found.logits, found.features)

    def load_look() -> Look:
        look(golden_inputs(bundle.card.input))
        return look

    return engine, load_look


def _write(file: Path, content: Any) -> None:
    file.write_bytes(orjson.dumps(content) + b"\n")


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


@click.command(context_settings=HELP)
@click.argument("name")
@data_option
@click.option(
    "--own",
    "own_source",
    help="Labelled images of the owner's that the network was not trained on: a .parquet file, a "
    "folder of class folders or a set. Default: what `scumble train` held out of the set NAME.",
)
@click.option("--test", "test_source", help="Other such images, for the reported figures.")
@click.option(
    "--foreign",
    "foreign_sources",
    multiple=True,
    help="Images of another kind, to report how many are caught; repeatable.",
)
@models_option
@click.pass_context
def calibrate(
    ctx: click.Context,
    name: str,
    data: Path | None,
    own_source: str | None,
    test_source: str | None,
    foreign_sources: tuple[str, ...],
    models: Path,
) -> None:
    """Fit what the defenses `codebook` and `withhold` need to the bundle NAME.

    That is the few rows that `codebook` answers with, and the thresholds of `withhold`, from the
    images of --own and mild shifts of them. Prints what honest users get of each kind of answer,
    which share of which images is withheld, and which share of labels policies change; see
    docs/reference/defenses.md.
    """
    with plain_errors():
        bundle = open_bundle(models, name)
        require_writable(bundle.folder)
        engine = "auto" if bundle.card.upstream is None else "upstream"
        settings = {
            precision: settings_of(models, name, precision=precision, engine=engine)
            for precision in PRECISIONS
        }
        card = bundle.card
        own_images = own_source or own_set(card, "train", data, "--own and --test")
        test_images = test_source or own_set(card, "test", data, "--test")
        own = open_set(own_images, "train", data, card)
        test = open_set(test_images, "test", data, card)
        if own_source is None:
            recipe = bundle.card.training.get("recipe", {})
            _, own = own.split(recipe.get("holdout", 0.05), recipe.get("seed", 0))
        if describe(own) == describe(test):
            raise click.UsageError("--own and --test are the same images; allowed: two sets")
        decoder = decoder_of(bundle.card)
        foreign = {
            Path(name).stem: load(name, "test", root=data, decoder=decoder)
            for name in foreign_sources
        }
        card = ship(bundle, own, test, foreign, typed(ctx))
    show(_answers_table(card, f"{bundle.folder}: fitted to {len(own):,} images"))
    for precision in PRECISIONS:
        if found := card.auxiliary["gate"].get(precision):
            show(gate_table(found, f"{precision}: share withheld, by loss and measure"))
    pixels = as_input(test, card.input, MOST)
    for precision in PRECISIONS:
        if precision in card.auxiliary["codebook"]:
            show_policies(settings[precision], pixels, "of --test")


def _answers_table(card: Card, title: str) -> Table:
    made = card.auxiliary["codebook"]
    table = Table(title=title)
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
    return table


def gate_table(found: dict[str, Any], title: str) -> Table:
    """What a gate withholds, in 80 columns.

    Args:
        found: what `report` gave for it; or why there is none, as `none`.
        title: of the table.
    """
    table = Table(title=title)
    if "none" in found:
        table.add_column(found["none"])
        return table
    table.add_column("loss", justify="right")
    table.add_column("images", overflow="fold")
    for measure in found:
        table.add_column(measure, justify="right", no_wrap=True)
    for loss, sets in next(iter(found.values())).items():
        for each in sets:
            shares = (f"{losses[loss][each]:.1%}" for losses in found.values())
            table.add_row(f"{float(loss):.0%}", each, *shares)
        table.add_section()
    return table
