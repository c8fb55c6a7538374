"""Injects many faults into a server on this machine for a few minutes: `make chaos`.

    python -m loadtest.chaos --minutes 3

Honest clients, a thief with a budget, broken bodies, image bombs, slow clients and floods
(`loadtest.floods`) send requests to a real server, while its workers are killed, its model is
reloaded (from good and bad files), the budget store is killed and restarted, and finally it gets
SIGTERM under load. The exit code is 1 unless

- no request is lost: a request whose connection died before a byte of its answer is repeated once,
  as any client may do, and is lost if that fails too;
- the thief gets no image beyond its budget;
- no answer is a 5xx other than the documented 503 and 504, and no broken body is accepted;
- the server closes each connection of a flood;
- no worker grows by more than 20 % after it is warm;
- the server exits with 0.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx2

from app.access.keys import Key, KeyFile, KeyLimits, digest, write_keys
from loadtest.bomb_files import FILES
from loadtest.floods import FLOODS, left_open
from scumble.evaluation.local_server import Server, serving

ROOT = Path(__file__).parents[1]
DIGIT = (ROOT / "docs" / "digits" / "3.png").read_bytes()
PNG = {"Content-Type": "image/png"}
BUDGET = 2000
PAGE = os.sysconf("SC_PAGE_SIZE")
HONEST = 4
GROWTH = 0.20
AGAIN_S = 0.1  # a client that was cut off does not come back at once
WARM_S = 40.0  # of a worker's life: it has seen each flood once
DOCUMENTED = {200, 429, 503, 504}
BROKEN: list[tuple[bytes, dict[str, str]]] = [
    (b"", PNG),
    (DIGIT[:60], PNG),
    (bytes(100_000), PNG),
    (b"[" * 10_000, {"Content-Type": "application/json"}),
    (b"--b\r\n\r\n", {"Content-Type": "multipart/form-data; boundary=b"}),
    (DIGIT, {"Content-Type": "text/plain"}),
    (DIGIT, {**PNG, "Content-Encoding": "gzip"}),
    (DIGIT, {**PNG, "X-Deadline-Ms": "soon"}),
]
BOMBS = (
    "png-ztxt-300-mib", "png-100000-x-100000", "jpeg-2500-scans", "jpeg-two-headers",
    "webp-huffman-groups-512",
)  # fmt: skip
SLOW = [
    b"POST /v1/pre",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-API-Key: honest\r\nContent-Length: 9\r\n\r\nabc",
    b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500,
]


@dataclass
class Tally:
    """What clients asked and got.

    Attributes:
        attempted: requests, without those asked again.
        answers: by status.
        again: requests whose connection died, asked once more.
        lost: of these, those that got no answer either.
        stolen: images that the thief got.
        wrong: answers that must not be, in words.
        floods: how many of each.
    """

    attempted: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    again: int = 0
    lost: int = 0
    stolen: int = 0
    wrong: list[str] = field(default_factory=list)
    floods: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, status: int, allowed: set[int], images: int = 0) -> None:
        """Count an answer."""
        with self.lock:
            self.answers[status] += 1
            self.stolen += images
            if status not in allowed:
                self.wrong.append(f"status {status}; allowed: {sorted(allowed)}")


def ask(client: httpx2.Client, tally: Tally, body: Any) -> httpx2.Response | None:
    """Send one request, and repeat it if its connection died; None if it is lost."""
    with tally.lock:
        tally.attempted += 1
    for attempt in range(2):
        try:
            return client.post("/v1/predict", **body)
        except httpx2.TransportError:
            with tally.lock:
                tally.again += attempt == 0
                tally.lost += attempt == 1
            time.sleep(AGAIN_S)
    return None


def honest(server: Server, tally: Tally, stop: threading.Event) -> None:
    """Send one picture after another, sometimes with a deadline."""
    headers = {**PNG, "X-API-Key": "honest"}
    body = {"content": DIGIT}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
        while not stop.is_set():
            hurry = {"X-Deadline-Ms": "500"} if random.random() < 0.2 else {}  # noqa: S311  # no secret
            answer = ask(client, tally, {**body, "headers": hurry})
            if answer is not None:
                tally.note(answer.status_code, {200, 503, 504})
            time.sleep(0.005)


def thief(server: Server, tally: Tally, stop: threading.Event) -> None:
    """Send eight pictures per request until nothing is left, and continue to try."""
    body = {"files": [("image", ("x.png", DIGIT, "image/png"))] * 8}
    with httpx2.Client(
        base_url=server.url, headers={"X-API-Key": "thief"}, timeout=60, trust_env=False
    ) as client:
        while not stop.is_set():
            answer = ask(client, tally, body)
            if answer is not None:
                good = answer.status_code == 200
                got = len(answer.json()["predictions"]) if good else 0
                tally.note(answer.status_code, DOCUMENTED, got)
            time.sleep(0.02 if answer is None or answer.status_code == 200 else 0.2)


def vandal(server: Server, tally: Tally, stop: threading.Event) -> None:
    """Send bodies and headers that are wrong in some way."""
    with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        while not stop.is_set():
            for content, headers in BROKEN:
                headers = {**headers, "X-API-Key": "honest"}
                answer = ask(client, tally, {"content": content, "headers": headers})
                if answer is not None:
                    tally.note(answer.status_code, {400, 413, 415, 422, 503})
            time.sleep(0.05)


def sloth(server: Server, tally: Tally, stop: threading.Event) -> None:
    """Connections that send half a request, or read nothing; the server must close each."""
    host, port = server.url.removeprefix("http://").split(":")
    while not stop.is_set():
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=20) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.sendall(random.choice(SLOW))  # noqa: S311  # no secret
            if stop.wait(8):
                return
            try:
                while line.recv(65536):
                    pass
            except TimeoutError:
                with tally.lock:
                    tally.wrong.append("a slow connection was left open")


def bomber(server: Server, tally: Tally, stop: threading.Event) -> None:
    """Send small files that cost much time or memory."""
    bombs = [
        {
            "content": FILES[name](),
            "headers": {"Content-Type": f"image/{name.partition('-')[0]}", "X-API-Key": "honest"},
        }
        for name in BOMBS
    ]
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        while not stop.is_set():
            for bomb in bombs:
                answer = ask(client, tally, bomb)
                if answer is not None:
                    tally.note(answer.status_code, {200, 413, 415, 422, 503, 504})
                stop.wait(0.2)


def flooder(server: Server, tally: Tally, stop: threading.Event) -> None:
    """Run one flood after another."""
    host, port = server.url.removeprefix("http://").split(":")
    while not stop.is_set():
        for flood in FLOODS:
            found = left_open(flood, lambda: socket.create_connection((host, int(port)), 20))
            with tally.lock:
                tally.floods[flood.__name__] += 1
                if found:
                    tally.wrong.append(f"flood of {flood.__name__}: {found} connections left open")
            if stop.wait(1):
                return


class Memory:
    """Resident memory of each worker over its life."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._born: dict[int, float] = {}
        self._warm: dict[int, int] = {}
        self.growth: dict[int, float] = {}
        self.peak_mb: dict[int, int] = {}

    def look(self, pids: list[int]) -> None:
        """Measure these now."""
        for pid in pids:
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                continue
            self.peak_mb[pid] = max(pages * PAGE // 2**20, self.peak_mb.get(pid, 0))
            age = self._clock() - self._born.setdefault(pid, self._clock())
            if age < WARM_S:
                self._warm[pid] = max(pages, self._warm.get(pid, 0))
            else:
                self.growth[pid] = pages / self._warm[pid] - 1


class Redis:
    """A real one that writes everything down before it answers."""

    def __init__(self, folder: Path, program: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly yes --appendfsync always"
        self._command = [program, *options.split(), "--dir", str(folder), "--save", ""]
        self.start()

    def start(self) -> None:
        """Run it; also what it wrote before it was killed is there again."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)  # noqa: S603  # our own arguments
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError("redis does not answer")

    def kill(self) -> None:
        """As a machine that fails would."""
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_in(folder: Path) -> Iterator[Redis]:
    """A Redis server of this run, which is stopped at the end."""
    program = shutil.which("redis-server")
    assert program is not None  # noqa: S101  # the caller has looked
    server = Redis(folder, program)
    try:
        yield server
    finally:
        server.kill()


def set_version(models: Path, version: str) -> None:
    """A new version of the bundle."""
    path = models / "mnist" / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))


def reload(server: Server) -> int:
    """Status of the answer."""
    return httpx2.post(f"{server.admin}/reload", timeout=120, trust_env=False).status_code


def good_reload(server: Server, models: Path, tally: Tally, version: str) -> None:
    """Reload a good bundle, which must be accepted."""
    set_version(models, version)
    if reload(server) != 200:
        tally.wrong.append("a good reload failed")


def bad_reload(server: Server, models: Path, tally: Tally) -> None:
    """Reload a tampered bundle, which must be refused."""
    path = models / "mnist" / "float32.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    if reload(server) != 500:
        tally.wrong.append("a tampered model was served")
    path.write_bytes(content)


def kill_worker(server: Server) -> None:
    """Kill the oldest worker."""
    with suppress(ProcessLookupError, IndexError):
        os.kill(server.workers()[0], signal.SIGKILL)


def plan(
    server: Server, models: Path, tally: Tally, redis: Redis | None
) -> list[tuple[float, str, Callable[[], object]]]:
    """(share of the time, name, fault); none in the last third, to see whether memory is stable."""
    faults: list[tuple[float, str, Callable[[], object]]] = [
        (0.08, "kill -9 a worker", lambda: kill_worker(server)),
        (0.16, "reload", lambda: good_reload(server, models, tally, "2")),
        (0.28, "reload a tampered model", lambda: bad_reload(server, models, tally)),
        (0.34, "kill -9 a worker", lambda: kill_worker(server)),
        (0.50, "reload", lambda: good_reload(server, models, tally, "3")),
        (0.58, "kill -9 a worker", lambda: kill_worker(server)),
    ]
    if redis is not None:
        faults += [(0.20, "kill -9 redis", redis.kill), (0.24, "start redis", redis.start)]
    return sorted(faults, key=lambda fault: fault[0])


def rampage(
    server: Server, seconds: float, faults: list[tuple[float, str, Callable[[], object]]]
) -> Memory:
    """Inject the faults on schedule, and record the workers' memory."""
    memory, start = Memory(), time.monotonic()
    waiting = list(faults)
    while (passed := time.monotonic() - start) < seconds:
        if waiting and passed >= waiting[0][0] * seconds:
            _, name, act = waiting.pop(0)
            click.echo(f"{passed:6.1f} s  {name}")
            act()
        memory.look(server.workers())
        time.sleep(0.5)
    return memory


def write_grants(path: Path) -> None:
    """An honest client without a budget, and a thief."""
    rows = tuple(
        Key(
            id=name,
            sha256=digest(name.encode()).hex(),
            client=name,
            created="2026-01-01T00:00:00+00:00",
            limits=limits,
        )
        for name, limits in (("honest", KeyLimits()), ("thief", KeyLimits(total_images=BUDGET)))
    )
    write_keys(path, KeyFile(keys=rows))


def end(server: Server, stop: threading.Event, crowd: list[threading.Thread]) -> int:
    """Send SIGTERM under load; clients stop when the server is not ready. Returns the exit code."""
    server.process.send_signal(signal.SIGTERM)
    while httpx2.get(f"{server.admin}/readyz", timeout=20, trust_env=False).status_code == 200:
        time.sleep(0.01)
    stop.set()
    for thread in crowd:
        thread.join(60)
    return server.wait(60)


def run(seconds: float, folder: Path) -> dict[str, Any]:
    """Run everything; returns the report."""
    models, keys = folder / "models", folder / "keys.json"
    shutil.copytree(ROOT / "models" / "mnist", models / "mnist")
    write_grants(keys)
    tally, stop = Tally(), threading.Event()
    has_redis = shutil.which("redis-server") is not None
    with redis_in(folder) if has_redis else nullcontext() as redis:
        store = f"redis://127.0.0.1:{redis.port}/0" if redis else f"sqlite:///{folder}/budgets"
        with serving(
            model_dir=models,
            workers=2,
            keys_file=keys,
            store=store,
            drain_delay_s=5,
            http__header_timeout_s=3,
            http__body_timeout_s=4,
            http__write_timeout_s=3,
            http__max_bodies_bytes=16 * 2**20,
            http__max_connections=64,
        ) as server:
            roles = [honest] * HONEST + [thief] * 2 + [vandal] + [sloth] * 4
            roles += [bomber, flooder]
            crowd = [threading.Thread(target=role, args=(server, tally, stop)) for role in roles]
            for thread in crowd:
                thread.start()
            try:
                memory = rampage(server, seconds, plan(server, models, tally, redis))
                rejections, refused = (
                    {
                        name.split('"')[1]: int(count)
                        for name, count in server.metrics().items()
                        if name.startswith(metric) and count
                    }
                    for metric in ("scumble_rejections_total", "scumble_connections_refused_total")
                )
                code = end(server, stop, crowd)
            finally:
                stop.set()
    return {
        "seconds": seconds,
        "store": "redis" if has_redis else "sqlite",
        "attempted": tally.attempted,
        "served": tally.answers[200],
        "answers": {str(status): n for status, n in sorted(tally.answers.items())},
        "rejections": rejections,
        "connections_refused": refused,
        "floods": dict(tally.floods),
        "asked_again": tally.again,
        "lost": tally.lost,
        "over_served": max(0, tally.stolen - BUDGET),
        "stolen": tally.stolen,
        "wrong": sorted(set(tally.wrong)),
        "growth": {str(pid): round(part, 3) for pid, part in memory.growth.items()},
        "peak_mb": max(memory.peak_mb.values()),
        "exit_code": code,
    }


def verdict(report: dict[str, Any]) -> list[str]:
    """Everything that went wrong; empty if nothing did."""
    faults = list(report["wrong"])
    if report["lost"]:
        faults.append(f"{report['lost']} requests lost")
    if report["over_served"]:
        faults.append(f"{report['over_served']} images over the budget")
    if not report["growth"] or max(report["growth"].values()) > GROWTH:
        faults.append(f"memory is not flat, or no worker lived long enough: {report['growth']}")
    if report["exit_code"]:
        faults.append(f"the server ended with {report['exit_code']}")
    return faults


@click.command()
@click.option("--minutes", type=click.FloatRange(0.5, 10), default=3.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file for the report.")
def main(minutes: float, out: Path | None) -> None:
    """Inject faults into a server for some minutes and report what happened."""
    with tempfile.TemporaryDirectory(prefix="scumble-chaos-") as folder:
        report = run(minutes * 60, Path(folder))
    text = json.dumps(report, indent=2)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")
    faults = verdict(report)
    click.echo("\n".join(faults) or "no faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
