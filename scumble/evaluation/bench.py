"""`scumble bench defenses`: what each defense adds to an image, in one run.

Engine and defenses take turns in the same process on one thread, in another order each round; a
round's figure is the time of one call, the result the median over the rounds, per image. One
strength each: what costs once per image is not divided by the number of strengths.
`mad_reference` and `grad2_reference` are the published forms, by backpropagation; `mad` and `grad2`
are the closed and the forward-mode forms that this service runs, on the same surrogate.
`dcp_in_graph` is what the service runs for `dcp`, and so for the others in `IN_GRAPH`: its figure
is what the defended network takes longer than the clean one, round by round, the median over
several freshly compiled pairs.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from app.errors import ConfigError
from app.inference import engines
from app.inference.bundle import Bundle, open_bundle
from app.inference.defense_artifacts import DefenseArtifacts
from app.inference.engines import Batch
from app.inference.graph import with_l1_output
from app.precision import Precision
from app.settings import default_model_dir
from scumble.defenses import configure
from scumble.evaluation.experiment import Defended
from scumble.evaluation.published_defenses import Reference, grad2_reference, mad_reference
from scumble.help_option import HELP
from scumble.machine import processor
from scumble.progress import bar, showing
from scumble.training.auxiliary import surrogate_of
from scumble.training.command_options import plain_errors

# Two engines of the very same graph differ by some percent: where their memory lies is chance.
PAIRS = 7
BATCHES = (1, 32)
OUT = Path("runs/records/bench.json")
EPSILON = 1.0
COMPARED = [
    Defended("dcp", {"beta": 1.2, "gamma": 0.2}),
    Defended("reverse_sigmoid", {"beta": 0.64, "gamma": 0.2}),
    Defended("random", {"epsilon": EPSILON}),
    Defended("adaptive_misinformation", {"tau": 0.9}),
    Defended("mad", {"epsilon": EPSILON}),
    Defended("grad2", {"epsilon": EPSILON}),
]
# Those that the service moves into the network's graph: the paper's, and the recommended ones.
IN_GRAPH = [
    COMPARED[0],
    Defended("codebook", {"cells": 4}),
    Defended("withhold", {"loss": 0.01, "answers": ["codebook", {"cells": 4}]}),
]
REFERENCES: dict[str, Reference] = {
    "mad_reference": mad_reference,
    "grad2_reference": grad2_reference,
}


@click.group(context_settings=HELP)
def bench() -> None:
    """Measure what defenses cost."""


@bench.command(context_settings=HELP)
@click.option("--models", default="mnist,cifar10", show_default=True)
@click.option("--precisions", default="float32,int8", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--slow-rounds",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Of the reference forms.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=OUT,
    show_default=True,
    help="File of the figures.",
)
def defenses(models: str, precisions: str, rounds: int, slow_rounds: int, out: Path) -> None:
    """Milliseconds per image that each defense adds, as ratios to dcp and to inference."""
    torch.set_num_threads(1)
    with plain_errors():
        compared = chosen(models.split(","), precisions.split(","))
        out.parent.mkdir(parents=True, exist_ok=True)
        cases = measure_all(compared, rounds, slow_rounds)
    document = {
        "command": f"scumble bench defenses --models {models} --precisions {precisions} "
        f"--rounds {rounds} --slow-rounds {slow_rounds}",
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("numpy", "openvino", "torch")},
        "cases": cases,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")


def measure_all(
    compared: Sequence[tuple[Bundle, Precision]], rounds: int, slow_rounds: int
) -> list[dict[str, Any]]:
    """All lines of all models, each printed when it is there."""
    cases = []
    with bar(len(compared) * len(BATCHES), "bench", "table", shown=True) as done, showing(True):
        for bundle, precision in compared:
            for batch in BATCHES:
                found = measure(bundle, precision, batch, rounds, slow_rounds)
                cases += found
                done.write(f"{bundle.card.name} {precision}, batch {batch}")
                for case in found:
                    done.write(line(case))
                done.update()
    return cases


def line(case: Mapping[str, Any]) -> str:
    """What a defense costs, in less than 80 columns."""
    return (
        f"  {case['defense']:24} {case['ms_per_image']:10.4f} ms {case['over_dcp']:8.1f} x dcp "
        f"{case['over_inference']:9.1%} of inference"
    )


def chosen(models: Sequence[str], precisions: Sequence[str]) -> list[tuple[Bundle, Precision]]:
    """The bundles, each with the precisions that are measured, checked before anything is.

    Raises:
        ConfigError: there is no such bundle or precision, or a bundle lacks a surrogate.
    """
    allowed = ("float32", "int8")
    found: list[tuple[Bundle, Precision]] = []
    for model in models:
        bundle = open_bundle(default_model_dir(), model)
        surrogate_of(bundle)
        for precision in precisions:
            if precision not in allowed:
                raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(allowed)}")
            bundle.onnx(precision)  # type: ignore[arg-type]  # checked above
            found.append((bundle, precision))  # type: ignore[arg-type]  # checked above
    return found


def measure(
    bundle: Bundle, precision: Precision, batch: int, rounds: int, slow_rounds: int
) -> list[dict[str, Any]]:
    """One model at one batch size: a line for inference and one for each defense."""
    name, size = bundle.card.name, bundle.card.input
    load = partial(
        engines.load, engines.resolve("auto", precision), threads=1, precision=precision
    )  # fmt: skip
    model = bundle.onnx(precision)
    engine = load(model)
    shape = (batch, size.height, size.width, size.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    clean = engine(images)
    calls: dict[str, Callable[[], object]] = {"inference": lambda: engine(images)}
    for compared in COMPARED:
        defense = configure(compared.name, compared.params, bundle=DefenseArtifacts(bundle))
        calls[compared.name] = lambda defense=defense: defense(clean, images)  # type: ignore[misc] # its default is the defense
    rounds_of = timed(calls, rounds)
    artifacts = DefenseArtifacts(bundle, precision=precision)
    for compared in IN_GRAPH:
        defense = configure(compared.name, compared.params, bundle=artifacts)
        graph = with_l1_output(model, defense)
        assert graph is not None  # noqa: S101  # all of these can be written as nodes
        rounds_of[f"{compared.name}_in_graph"] = [
            longer(load(model), load(graph), images, rounds) for _ in range(PAIRS)
        ]
    surrogate = surrogate_of(bundle)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    p = torch.from_numpy(clean)
    slow: dict[str, Callable[[], object]] = {
        reference: lambda form=form: form(surrogate, x, p, EPSILON)  # type: ignore[misc] # same
        for reference, form in REFERENCES.items()
    }
    rounds_of |= timed(slow, slow_rounds)
    found = {defense: statistics.median(seconds) for defense, seconds in rounds_of.items()}
    return [
        {
            "model": name,
            "precision": precision,
            "batch": batch,
            "defense": defense,
            "ms_per_image": 1000 * seconds / batch,
            "over_dcp": seconds / found["dcp"],
            "over_inference": seconds / found["inference"],
        }
        for defense, seconds in found.items()
    ]


def longer(engine: engines.Engine, other: engines.Engine, images: Batch, rounds: int) -> float:
    """Seconds that the other engine takes more."""
    calls = {"one": lambda: engine(images), "other": lambda: other(images)}
    seconds = timed(calls, rounds)
    return float(np.median(np.subtract(seconds["other"], seconds["one"])))


def timed(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after a warm-up; the order differs between rounds.

    What comes after the engine finds its caches cold, so nothing may always be what comes there.
    """
    rng = random.Random(0)  # noqa: S311  # an order, no secret
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    with bar(rounds + 3, "rounds", "round", shown=False) as done:
        for number in range(rounds + 3):
            rng.shuffle(names)
            for name in names:
                start = time.perf_counter()
                calls[name]()
                if number >= 3:
                    found[name].append(time.perf_counter() - start)
            done.update()
    return found
