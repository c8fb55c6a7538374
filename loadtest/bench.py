"""Measures how close the service comes to the machine's limit, and what the defense costs.

    python -m loadtest.bench                                writes loadtest/bench.json
    python -m loadtest.bench --baseline loadtest/bench.json --out runs/bench.json

Everything is measured in one run, in alternating rounds, so that other load on the machine affects
all figures alike. A figure is the median over the rounds, a ratio the median of each round's ratio.
The load comes from `wrk`, on the same cores as the service.

Limits, without HTTP, one process per core (`loadtest.limits`): the engine alone at batch 1, 32 and
256, and decode + infer + defend + encode one image at a time. Service: image files at several
numbers of connections, undefended and under dcp with every row perturbed; tensors of 256 images;
one worker against two; and, with `--soak`, minutes of load at 80 % of its capacity.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
from PIL import Image

from app.inference.bundle import Card, golden_inputs, open_bundle
from app.precision import Precision
from app.settings import LimitSettings, default_model_dir
from app.telemetry.metrics import FLUSH_S
from loadtest.limits import Limits
from loadtest.wrk import Load, load
from scumble.client.wire import encode
from scumble.evaluation.local_server import Server, serving
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
DCP: dict[str, Any] = {"beta": 1.2, "gamma": 0.2}  # at 1.2 every row is perturbed
DEFENSES: dict[str, dict[str, Any]] = {"none": {}, "dcp": DCP}
BATCH = 256
SOAK_SHARE = 0.8
SOAK_CONNECTIONS = 16
PAUSE_STEPS = 6
CORES = len(os.sched_getaffinity(0))


class Rounds:
    """Figures by name, one per round."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """Add the figure of a round."""
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.values[name])

    def ratio(self, one: str, other: str) -> float:
        """Median of one figure over another of the same round."""
        pairs = zip(self.values[one], self.values[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)


def compare(
    models: Path,
    model: str,
    precision: Precision,
    connections: list[int],
    rounds: int,
    seconds: int,
) -> dict[str, Any]:
    """Measure the limits and the service for one model, in turns."""
    card = open_bundle(models, model).card
    body, kind = picture(card)
    found = Rounds()
    errors = 0
    with ExitStack() as stack:
        limits = Limits(models, model, precision, CORES, image=body, defense=("dcp", DCP))
        stack.callback(limits.close)
        common = {"model": model, "model_dir": models, "precision": precision}
        servers = {
            name: stack.enter_context(
                serving(**common, workers=CORES, defense=name, defense_params=params)
            )
            for name, params in DEFENSES.items()
        }
        single = stack.enter_context(serving(**common, workers=1))
        for number in range(rounds):
            for batch in (1, 32, BATCH):
                found.add(f"model {batch}", limits.model(batch, seconds))
            found.add("whole", limits.whole(seconds))
            for count in connections:
                for name in list(servers)[:: 1 if number % 2 else -1]:
                    done = images(servers[name], body, kind, count, seconds)
                    errors += done.errors
                    found.add(f"{name} {count} rps", done.rps)
                    found.add(f"{name} {count} p50", done.p50_ms)
                    found.add(f"{name} {count} p99", done.p99_ms)
                    share = done.client_cpu_s / (CORES * done.seconds)
                    found.add(f"{name} {count} client", share)
            done = images(single, body, kind, 32, seconds)
            found.add("one worker", done.rps)
            for count in (32, 32 * CORES):
                done = images(servers["none"], body, kind, count, seconds)
                found.add(f"all workers {count}", done.rps)
            if batch_bytes(card) <= LimitSettings().max_body_bytes:
                done = tensors(servers["none"], card, seconds)
                errors += done.errors
                found.add("tensors", BATCH * done.rps)
            found.add("model best", max(found.values[f"model {b}"][-1] for b in (32, BATCH)))
            click.echo(f"{model} {precision}: round {number + 1} of {rounds}")
        found.add("memory one worker", memory_mb(single))
        found.add("memory all workers", memory_mb(servers["none"]))
        stages = {name: stage_us(server, body, kind, seconds) for name, server in servers.items()}
    return {
        "model": model,
        "precision": precision,
        "body": f"{kind}, {len(body)} bytes",
        "errors": errors,
        "per_second": {
            "model_only": {str(b): round(found.median(f"model {b}")) for b in (1, 32, BATCH)},
            "whole_without_http": round(found.median("whole")),
            "tensors_of_256": round(found.median("tensors")) if "tensors" in found.values else None,
            "one_worker_c32": round(found.median("one worker")),
        },
        "service": {
            name: {
                str(count): {
                    "rps": round(found.median(f"{name} {count} rps")),
                    "p50_ms": round(found.median(f"{name} {count} p50"), 3),
                    "p99_ms": round(found.median(f"{name} {count} p99"), 3),
                    "client_share": round(found.median(f"{name} {count} client"), 3),
                }
                for count in connections
            }
            for name in servers
        },
        "stage_us_c1": stages,
        "memory_mb": {
            "one_worker": round(found.median("memory one worker")),
            "each_more": round(
                (found.median("memory all workers") - found.median("memory one worker"))
                / max(1, CORES - 1)
            ),
        },
        "ratios": dict(ratios(found, connections)),
    }


def ratios(found: Rounds, connections: list[int]) -> Iterator[tuple[str, float]]:
    """The ratios that have targets; none depends on how fast the machine is."""
    for count in connections:
        yield f"c{count} over whole", found.ratio(f"dcp {count} rps", "whole")
        yield f"c{count} over model-only batch 1", found.ratio(f"dcp {count} rps", "model 1")
        yield f"c{count} over model-only batch 32", found.ratio(f"dcp {count} rps", "model 32")
        yield f"c{count} dcp over none rps", found.ratio(f"dcp {count} rps", f"none {count} rps")
        yield f"c{count} dcp over none p50", found.ratio(f"dcp {count} p50", f"none {count} p50")
    if "tensors" in found.values:
        yield "tensors over model-only", found.ratio("tensors", "model best")
    for count, words in ((32, "the same load"), (32 * CORES, "as much load for each")):
        yield f"all workers over one, {words}", found.ratio(f"all workers {count}", "one worker")


def picture(card: Card) -> tuple[bytes, str]:
    """One image file and its type: PNG, or JPEG if it is as large as a photo."""
    pixels = golden_inputs(card.input)[1]
    if card.input.height < 100:
        return encode(pixels)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=90)
    return encode(file.getvalue())


def images(server: Server, body: bytes, kind: str, connections: int, seconds: int) -> Load:
    """Image files, one per request."""
    url = f"{server.url}/v1/predict"
    return load(
        url, body=body, content_type=kind, connections=connections, seconds=seconds, warmup=1
    )  # fmt: skip


def batch_bytes(card: Card) -> int:
    """Size of a batch of pixels in bytes."""
    return BATCH * card.input.height * card.input.width * card.input.channels


def tensors(server: Server, card: Card, seconds: int) -> Load:
    """`pixels` requests of 256 images, as bytes in and out."""
    size = card.input
    shape = [BATCH, size.height, size.width, size.channels]
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8).tobytes()
    head = orjson.dumps(
        {
            "inputs": [
                {
                    "name": "pixels",
                    "datatype": "UINT8",
                    "shape": shape,
                    "parameters": {"binary_data_size": len(pixels)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    return load(
        f"{server.url}/v2/models/{card.name}/infer",
        body=head + pixels,
        content_type="application/octet-stream",
        headers={"Inference-Header-Content-Length": str(len(head))},
        connections=2 * CORES,
        seconds=seconds,
    )


def stage_us(server: Server, body: bytes, kind: str, seconds: int) -> dict[str, float]:
    """Mean microseconds of a request in each stage, one request at a time."""

    def read(what: str) -> dict[str, float]:
        start, end = f'scumble_stage_seconds_{what}{{stage="', '"}'
        return {
            key.removeprefix(start).removesuffix(end): value
            for key, value in server.metrics().items()
            if key.startswith(start)
        }

    time.sleep(4 * FLUSH_S)
    sums, counts = read("sum"), read("count")
    images(server, body, kind, 1, seconds)
    time.sleep(4 * FLUSH_S)
    return {
        stage: round(1e6 * (total - sums[stage]) / (read("count")[stage] - counts[stage]), 1)
        for stage, total in read("sum").items()
    }


def memory_mb(server: Server) -> float:
    """Of all its processes: the sum of PSS, in which shared pages count once."""
    pids, kib = [server.process.pid], 0
    for pid in pids:
        place = Path(f"/proc/{pid}")
        pids += map(int, (place / f"task/{pid}/children").read_text().split())
        lines = (place / "smaps_rollup").read_text().splitlines()
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


def soak(models: Path, model: str, precision: Precision, minutes: int) -> dict[str, Any]:
    """Load at `SOAK_SHARE` of capacity, a minute at a time: does anything drift?"""
    card = open_bundle(models, model).card
    body, kind = picture(card)
    common = {"model": model, "model_dir": models, "precision": precision}
    with serving(**common, workers=CORES, defense="dcp", defense_params=DCP) as server:
        ask = partial(
            load,
            f"{server.url}/v1/predict",
            body=body,
            content_type=kind,
            connections=SOAK_CONNECTIONS,
        )
        full = ask(seconds=5)
        pause_ms = 0.0

        def paced(seconds: int) -> Load:
            """Load, and the pause of the next one: answers come quicker when less is asked."""
            nonlocal pause_ms
            done = ask(seconds=seconds, pause_ms=pause_ms)
            longer_s = SOAK_CONNECTIONS * (1 / (SOAK_SHARE * full.rps) - 1 / done.rps)
            pause_ms = max(0.0, pause_ms + 1000 * longer_s)
            return done

        for _ in range(PAUSE_STEPS):
            paced(4)
        found, memory = [], []
        for minute in range(minutes):
            done = paced(60)
            found.append(done)
            memory.append(round(memory_mb(server)))
            click.echo(f"minute {minute + 1}: {done.rps:.0f}/s, p99 {done.p99_ms:.2f} ms")
        return {
            "model": model,
            "precision": precision,
            "minutes": minutes,
            "share_of_capacity": round(statistics.median(d.rps for d in found) / full.rps, 3),
            "errors": sum(done.errors for done in found),
            "p50_ms": [round(done.p50_ms, 3) for done in found],
            "p99_ms": [round(done.p99_ms, 3) for done in found],
            "memory_mb": memory,
        }


def worse(document: dict[str, Any], baseline: dict[str, Any], tolerance: float) -> list[str]:
    """Ratios that are worse than the baseline's by more than `tolerance`."""
    before = {(c["model"], c["precision"]): c["ratios"] for c in baseline["cases"]}
    found = []
    for case in document["cases"]:
        for name, value in case["ratios"].items():
            old = before.get((case["model"], case["precision"]), {}).get(name)
            better_is_less = name.endswith("p50")
            if old and (value / old - 1) * (1 if better_is_less else -1) > tolerance:
                found.append(f"{case['model']} {case['precision']}, {name}: {old} -> {value}")
    return found


@click.command()
@click.option(
    "--cases",
    default="cifar10:int8,mnist:int8,cifar10:float32",
    show_default=True,
    help="Names of bundles or folders of ones, with a precision each.",
)
@click.option("--connections", default="1,8,32,64", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2, show_default=True, help="Of each measurement.")
@click.option("--soak", "minutes", default=0, show_default=True, help="Minutes, of the first case.")
@click.option("--baseline", type=click.Path(exists=True, path_type=Path))
@click.option("--tolerance", default=0.15, show_default=True, help="Of a ratio to the baseline's.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(
    cases: str,
    connections: str,
    rounds: int,
    seconds: int,
    minutes: int,
    baseline: Path | None,
    tolerance: float,
    out: Path,
) -> None:
    """Measure, print, write JSON, and compare with a baseline if there is one."""
    counts = [int(count) for count in connections.split(",")]
    chosen: list[tuple[Path, str, Any]] = []
    for case in cases.split(","):
        where, _, precision = case.partition(":")
        # A name is a bundle of ours, anything longer the place of another.
        place = Path(where) if "/" in where else default_model_dir() / where
        chosen.append((place.parent, place.name, precision))
    measured = [compare(*case, counts, rounds, seconds) for case in chosen]
    document = {
        "command": f"python -m loadtest.bench --cases {cases} --connections {connections} "
        f"--rounds {rounds} --seconds {seconds} --soak {minutes}",
        "cores": CORES,
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("openvino", "fastapi", "uvicorn", "numpy")},
        "cases": measured,
    }
    if minutes:
        document["soak"] = soak(*chosen[0], minutes)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps([case["ratios"] for case in measured], indent=1))
    if baseline and (found := worse(document, json.loads(baseline.read_text()), tolerance)):
        raise click.ClickException("worse than the baseline:\n" + "\n".join(found))


if __name__ == "__main__":
    main()
