"""Compares Scumble with other model servers: same weights, same images, same cores, same load.

One server runs at a time, with two workers if it supports them, and `wrk` loads it with several
numbers of connections. Each round measures all servers in turn, so that other load on the machine
affects all. A figure is the median over the rounds, a ratio the median of the rounds' ratios.
Before it is measured, every server must answer as the bundle does.

    python -m loadtest.peers.run            writes loadtest/peers.json

`stock` is each peer with the torch network, as in its documentation; `tuned` is each peer with
Scumble's int8 file and its engine in the peer's handler. Environments are created once in
runs/peers, 6 GB for torch and 1 GB for the rest.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import httpx2
import numpy as np
import numpy.typing as npt

from app.inference import engines
from app.inference.bundle import golden_inputs, open_bundle
from app.precision import Precision
from app.settings import default_model_dir
from loadtest.limits import Limits
from loadtest.peers.classifier import ROOT
from loadtest.peers.environments import HERE, RUNS, interpreter, versions
from loadtest.peers.figures import Story, Visit, entry
from loadtest.peers.processes import Running, running
from loadtest.wrk import Load, load
from scumble.client.wire import encode
from scumble.defenses import configure
from scumble.evaluation.local_server import variables, without_settings
from scumble.machine import processor

OUT = HERE.parent / "peers.json"
MODEL = "cifar10"
WORKERS = 2
DCP: dict[str, object] = {"beta": 1.2, "gamma": 0.2}
SCUMBLE: dict[str, dict[str, object]] = {
    "undefended": {"defense": "none"},
    "defended": {"defense": "dcp", "defense_params": DCP},
}
SETTINGS = ("stock", "tuned")
READY_S = 120.0
# Before the first figure: the worker that answers first may be the only one that is ready.
SETTLE_S = 4.0
# What a visit may fail with: the server, its environment, its answers, the load.
FAILURES = (
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    httpx2.HTTPError,
    subprocess.SubprocessError,
)

Pixels = npt.NDArray[np.uint8]
Probs = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Post:
    """What is sent to a server, again and again."""

    path: str
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


def raw(path: str, **headers: str) -> Callable[[bytes, str], Post]:
    """The image file as the body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda png, setting: Post(path, png, "image/png", named)


def form(path: str, name: str) -> Callable[[bytes, str], Post]:
    """The image file as a field of a multipart form."""
    head = (
        f'--mark\r\nContent-Disposition: form-data; name="{name}"; filename="image.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode()
    content_type = "multipart/form-data; boundary=mark"
    return lambda png, setting: Post(path, head + png + b"\r\n--mark--\r\n", content_type)


def v2(path: str) -> Callable[[bytes, str], Post]:
    """The image file in base64, in JSON of the V2 inference protocol."""

    def build(png: bytes, setting: str) -> Post:
        tensor = {
            "name": "image",
            "datatype": "BYTES",
            "shape": [1, 1],
            "parameters": {"content_type": "base64"},
            "data": [base64.b64encode(png).decode()],
        }
        return Post(path, json.dumps({"inputs": [tensor]}).encode(), "application/json")

    return build


def by_setting(**forms: Callable[[bytes, str], Post]) -> Callable[[bytes, str], Post]:
    """Another form of request in each setting."""
    return lambda png, setting: forms[setting](png, setting)


def member(*path: str | int) -> Callable[[bytes], list[float]]:
    """Probabilities at a place inside JSON."""

    def read(answer: bytes) -> list[float]:
        found = json.loads(answer)
        for step in path:
            found = found[step]
        return [float(value) for value in found]

    return read


def last_tensor(answer: bytes) -> list[float]:
    """Probabilities as the ten float32 at the end, as the V2 protocol's binary extension has it."""
    return [float(value) for value in np.frombuffer(answer[-40:], "<f4")]


@dataclass(frozen=True)
class Peer:
    """A model server of someone else; it lives in the folder of its name.

    Attributes:
        package: whose version is the peer's.
        post: an image file and a setting -> the request.
        read: an answer's body -> probabilities.
    """

    package: str
    post: Callable[[bytes, str], Post]
    read: Callable[[bytes], list[float]]


TRITON = raw(f"/v2/models/{MODEL}/infer", Inference_Header_Content_Length="0")
PEERS = {
    "plain": Peer(
        "fastapi",
        by_setting(stock=form("/predict", "file"), tuned=raw("/raw")),
        member("probabilities"),
    ),
    "litserve": Peer("litserve", form("/predict", "request"), member("probabilities")),
    "bentoml": Peer("bentoml", form("/predict", "images"), member(0)),
    "mlserver": Peer("mlserver", v2(f"/v2/models/{MODEL}/infer"), member("outputs", 0, "data")),
    "rayserve": Peer("ray", raw("/predict"), member("probabilities")),
    "triton": Peer("nvidia-pytriton", TRITON, last_tensor),
}


@dataclass(frozen=True, eq=False)
class Target:
    """A server to visit: a peer in one setting, or Scumble.

    Attributes:
        name: of the peer, or `scumble`.
        setting: `stock` or `tuned`, `undefended` or `defended`.
        command: starts it; called when its environment is needed first.
        environment: ports -> variables.
        posts: the request for each golden image.
        read: an answer's body -> probabilities.
        expected: what it should answer, (n, 10).
    """

    name: str
    setting: str
    command: Callable[[], list[str]]
    environment: Callable[[list[int]], dict[str, str]]
    posts: list[Post]
    read: Callable[[bytes], list[float]]
    expected: Probs


# Targets


def reference(precision: Precision, pixels: Pixels) -> Probs:
    """What the bundle answers with the engine that Scumble takes on this processor."""
    model = open_bundle(default_model_dir(), MODEL).onnx(precision)
    engine = engines.resolve("auto", precision)
    return engines.load(engine, model, threads=1, precision=precision)(pixels)


def targets(names: Iterable[str], settings: Iterable[str]) -> Iterator[Target]:
    """Scumble without and with its defense, then the peers."""
    pixels = golden_inputs(open_bundle(default_model_dir(), MODEL).card.input)
    images = [encode(image)[0] for image in pixels]
    clean = {
        "stock": reference("float32", pixels),
        "tuned": reference("int8", pixels),
    }
    for setting, defense in SCUMBLE.items():
        yield Target(
            "scumble",
            setting,
            scumble_command,
            partial(scumble_variables, defense),
            [raw("/v1/predict")(image, setting) for image in images],
            member("predictions", 0, "probabilities"),
            clean["tuned"] if setting == "undefended" else defended(clean["tuned"]),
        )
    for name in names:
        for setting in settings:
            yield Target(
                name,
                setting,
                partial(peer_command, name),
                partial(peer_variables, setting),
                [PEERS[name].post(image, setting) for image in images],
                PEERS[name].read,
                clean[setting],
            )


def defended(clean: Probs) -> Probs:
    """What the defense makes of clean probabilities."""
    return configure("dcp", DCP)(clean, None)


def scumble_command() -> list[str]:
    """Starts Scumble."""
    return [sys.executable, "-m", "scumble.cli", "serve"]


def scumble_variables(defense: Mapping[str, object], ports: Sequence[int]) -> dict[str, str]:
    """Settings of Scumble."""
    settings = {"model": MODEL, "precision": "int8", "workers": WORKERS, **defense}
    ours = variables({**settings, "port": ports[0], "admin_port": ports[1]})
    return without_settings(os.environ) | ours


def peer_command(name: str) -> list[str]:
    """Starts a peer; makes its environment first if it has to."""
    return [interpreter(name), str(HERE / name / "serve.py")]


def peer_variables(setting: str, ports: Sequence[int]) -> dict[str, str]:
    """What `serve.py` of a peer asks for; its handler comes from this repository.

    The engine is the one that Scumble takes for int8 on this processor: on some, OpenVINO's int8
    answers are others.
    """
    return without_settings(os.environ) | {
        "PYTHONPATH": str(ROOT),
        "PEER_ENGINE": engines.resolve("auto", "int8"),
        "PEER_SETTING": setting,
        "PEER_PORTS": ",".join(map(str, ports)),
        "OMP_NUM_THREADS": "1",
    }


def free_ports(count: int) -> list[int]:
    """Free ports on loopback."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


# One visit


def ask(url: str, post: Post) -> bytes:
    """The body of one answer.

    Raises:
        HTTPError: no answer, or not a good one.
    """
    headers = {"Content-Type": post.content_type, **post.headers}
    answer = httpx2.post(
        url + post.path, content=post.body, headers=headers, timeout=10, trust_env=False
    )
    return answer.raise_for_status().content


def wait_ready(server: Running, url: str, post: Post) -> float:
    """Seconds from its start to its first answer.

    Raises:
        RuntimeError: it ended, or took too long; the message has the end of its log.
    """
    while time.perf_counter() - server.started < READY_S:
        if server.leader.poll() is not None:
            raise RuntimeError(f"ended with {server.leader.returncode}: {server.last_words()}")
        try:
            ask(url, post)
        except httpx2.HTTPError:
            time.sleep(0.05)
        else:
            return time.perf_counter() - server.started
    raise RuntimeError(f"no answer within {READY_S:.0f} s: {server.last_words()}")


def largest_gap(target: Target, url: str) -> float:
    """How far its answers are from the bundle's: all images at once, so that batches form."""
    with ThreadPoolExecutor(len(target.posts)) as pool:
        answers = list(pool.map(lambda post: target.read(ask(url, post)), target.posts))
    return float(np.abs(np.array(answers) - target.expected).max())


def loaded(url: str, post: Post, connections: int, seconds: float, warmup: float) -> Load:
    """One load."""
    return load(
        url + post.path,
        body=post.body,
        content_type=post.content_type,
        headers=post.headers,
        connections=connections,
        seconds=seconds,
        warmup=warmup,
    )


def memory_under_load(server: Running, url: str, post: Post) -> float:
    """Its memory while it works; apart from the measured loads, as reading it takes time."""
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(loaded, url, post, 8, 1, 0)
        time.sleep(0.5)
        memory = server.memory_mb()
        busy.result()
    return memory


def visit(target: Target, connections: Sequence[int], seconds: float) -> Visit:
    """Start a server, check it, measure it, end it.

    Raises:
        RuntimeError: it did not start, or did not end.
    """
    ports = free_ports(3)
    url = f"http://127.0.0.1:{ports[0]}"
    post = target.posts[1]
    log = RUNS / "logs" / f"{target.name}-{target.setting}.log"
    with running(target.command(), target.environment(ports), log) as server:
        ready = wait_ready(server, url, post)
        gap = largest_gap(target, url)
        loads: dict[int, Load] = {}
        for count in connections:
            loads[count] = loaded(url, post, count, seconds, warmup=1 if loads else SETTLE_S)
        gap = max(gap, largest_gap(target, url))  # by now of all its workers
        memory = memory_under_load(server, url, post)
        processes = len(server.alive())
    return Visit(ready, gap, memory, processes, server.ended_by, loads)


# All visits


def model_alone(seconds: float) -> float:
    """Images per second of the int8 model in bare loops, one image at a time."""
    models = default_model_dir()
    image, _ = encode(golden_inputs(open_bundle(models, MODEL).card.input)[1])
    limits = Limits(models, MODEL, "int8", WORKERS, image=image)
    try:
        return limits.model(1, seconds)
    finally:
        limits.close()


def comma_separated(known: Iterable[str]) -> Callable[..., list[str]]:
    """A click callback: `a,b` -> ["a", "b"], each of them known."""

    def split(context: click.Context, option: click.Parameter, value: str) -> list[str]:
        words = [word for word in value.split(",") if word]
        if unknown := set(words) - set(known):
            raise click.BadParameter(f"{', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return words

    return split


def numbers(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    """A click callback: `1,8` -> [1, 8]."""
    try:
        return [int(word) for word in value.split(",")]
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


def told(found: Visit) -> str:
    """A visit for the terminal."""
    loads = "  ".join(
        f"c={count} {one.rps:.0f}/s p99 {one.p99_ms:.0f} ms"
        + (f" {one.errors} errors" if one.errors else "")
        for count, one in found.loads.items()
    )
    return (
        f"ready {found.ready_s:.1f} s, {found.memory_mb:.0f} MB, gap {found.gap:.0e}, "
        f"{found.ended_by}  {loads}"
    )


def all_versions(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What each server runs with; an environment that cannot be made has an error instead."""
    ours = ("scumble", "fastapi", "numpy", "openvino", "pillow", "uvicorn")
    found = {"scumble": {name: version(name) for name in ours}}
    for name in names:
        try:
            found[name] = versions(name, PEERS[name].package)
        except FAILURES as exc:  # told again where it is visited
            found[name] = {"error": str(exc)}
    return found


@click.command()
@click.option(
    "--peers", default=",".join(PEERS), callback=comma_separated(PEERS), show_default=True
)
@click.option(
    "--settings", default="stock,tuned", callback=comma_separated(SETTINGS), show_default=True
)
@click.option("--connections", default="1,8,32,64", callback=numbers, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="Of each load.")
@click.option("--rounds", default=3, show_default=True, help="Through all servers.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
def main(
    peers: list[str],
    settings: list[str],
    connections: list[int],
    seconds: float,
    rounds: int,
    out: Path,
) -> None:
    """Measure, print, and write JSON."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what ends the server
    document: dict[str, Any] = {
        "command": f"python -m loadtest.peers.run --peers {','.join(peers)} "
        f"--settings {','.join(settings)} --connections {','.join(map(str, connections))} "
        f"--seconds {seconds:g} --rounds {rounds}",
        "model": MODEL,
        "defense": DCP,
        "workers": WORKERS,
        "memory": "sum of PSS over all processes of a server, under load",
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "packages": all_versions(peers),
    }
    if "stock" in settings:
        # Another process: torch is not wanted in this one, nor in those that it spawns.
        command = [sys.executable, "-m", "loadtest.peers.weights"]
        subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603 - ours
    stories = {target: Story(target.name, target.setting) for target in targets(peers, settings)}
    ours = {one.setting: one for one in stories.values() if one.name == "scumble"}
    alone: list[float] = []
    for number in range(1, rounds + 1):
        alone.append(model_alone(seconds))
        click.echo(f"{number}/{rounds} model alone: {alone[-1]:.0f} images/s")
        for target, story in stories.items():
            try:
                found = visit(target, connections, seconds)
            except FAILURES as exc:
                story.failures.append(f"round {number}: {exc}")
                click.echo(f"{number}/{rounds} {target.name} {target.setting}: {exc}")
            else:
                story.visits[number] = found
                click.echo(f"{number}/{rounds} {target.name} {target.setting}: {told(found)}")
        # After each round: a later one that dies leaves the earlier ones.
        document["model_only_per_s"] = round(statistics.median(alone))
        document["servers"] = [entry(story, ours, connections) for story in stories.values()]
        out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
