"""Images per second of the attacker's oracle, against the engine alone, in one run.

The engine alone: as many processes as there are cores, one thread each, no HTTP, at batches of 32
and of 256; the faster of the two counts. The oracle: a server with as many workers, asked over
`pixels` with requests of 256 images on several connections; client and server share the cores.
Rounds take turns.

    python -m loadtest.oracle_throughput            writes loadtest/oracle_throughput.json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from app.precision import Precision
from app.settings import default_model_dir
from loadtest.limits import Limits
from scumble.attacker.oracle import HttpOracle
from scumble.evaluation.local_server import serving
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
CASES: list[tuple[str, Precision]] = [
    ("mnist", "int8"),
    ("cifar10", "int8"),
    ("cifar10", "float32"),
]
BATCH = 256
SECONDS = 2.0  # of the engine alone, each time


def compare(
    model: str, precision: Precision, rounds: int, images: int, connections: int
) -> dict[str, Any]:
    """One case."""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, list[float]] = {"32": [], "256": [], "oracle": []}
    alone = Limits(default_model_dir(), model, precision, cores)
    with (
        serving(model=model, precision=precision, workers=cores) as server,
        HttpOracle(
            server.url,
            budget=images * (rounds + 1),
            transport="pixels",
            batch=BATCH,
            connections=connections,
        ) as oracle,
    ):
        pictures = np.random.default_rng(0).random((images, *oracle.shape), np.float32)
        oracle(pictures)  # warm-up
        for _ in range(rounds):
            for batch in (32, BATCH):
                found[str(batch)].append(alone.model(batch, SECONDS))
            start = time.perf_counter()
            oracle(pictures)
            found["oracle"].append(images / (time.perf_counter() - start))
        counted = sum(
            v for k, v in server.metrics().items() if k.startswith("scumble_images_total")
        )
        if counted != oracle.ledger.spent:
            raise RuntimeError(f"ledgers differ: {oracle.ledger.spent} asked, {counted} counted")
    alone.close()
    best = [max(pair) for pair in zip(found["32"], found["256"], strict=True)]
    return {
        "model": model,
        "precision": precision,
        "model_only_per_s": {
            batch: round(statistics.median(found[batch])) for batch in ("32", "256")
        },
        "oracle_per_s": round(statistics.median(found["oracle"])),
        "oracle_over_model_only": round(
            statistics.median(o / b for o, b in zip(found["oracle"], best, strict=True)), 3
        ),
        "queries": oracle.ledger.spent,
        "counted_by_server": int(counted),
    }


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--images", default=10_240, show_default=True, help="In each round.")
@click.option("--connections", default=8, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(rounds: int, images: int, connections: int, out: Path) -> None:
    """Measure, print, and write JSON."""
    cases = []
    for model, precision in CASES:
        cases.append(compare(model, precision, rounds, images, connections))
        click.echo(json.dumps(cases[-1]))
    document = {
        "command": f"python -m loadtest.oracle_throughput --rounds {rounds} --images {images} "
        f"--connections {connections}",
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("openvino", "fastapi", "uvicorn", "httpx2")},
        "cases": cases,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
