"""What breaks first with more workers and replicas, from costs that are measured on one machine.

    python -m loadtest.simulation          writes loadtest/simulation.json

The metrics of one worker with 100 clients are copied for others, and the admin port's code merges
them. The real dispatcher accepts connections for workers that do nothing else. A real Redis, which
writes each call to disk, counts charges one by one and 32 at once; its own processor time counts.
What a request costs a worker is the committed figure of a network of one layer, so that all else is
asked for as often as it can be. Requests over many workers are simulated with recorded times of
decoding, and reported over their mean.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from app.access.keys import KeyLimits
from app.inference.bundle import Card, open_bundle
from app.inference.decode import decode
from app.settings import default_model_dir
from loadtest.bench import picture
from loadtest.chaos import redis_in
from loadtest.overhead import processor_s
from loadtest.pages import read
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
WORKERS = (1, 8, 64)
REPLICAS = (1, 10, 100, 1000)
USE = 0.7  # of a worker's time
EVERY_S = 15.0  # between two scrapes
PER_CONNECTION = 100  # requests on one connection
SERIES = 10_000_000  # that one Prometheus holds: 3 KB each in 32 GB
CONNECTIONS = 32  # for each worker
TOGETHER = 32  # charges in one call of Redis
LIMITS = KeyLimits(window_images=10**9, total_images=10**9)
REQUESTS = 2_000  # simulated for each worker
# A worker that has answered every kind of request once; its files stay.
WORKER = """
import asyncio
from app.telemetry.metrics import STAGES, Metrics
from prometheus_client import CollectorRegistry

async def main():
    metrics = Metrics(CollectorRegistry())
    for route in ("/v1/predict", "/v2/models/{model}/infer", "other"):
        metrics.request_seconds(route).observe(0.001)
        for code in ("200", "422", "429", "503"):
            metrics.requests.labels(route, code).inc()
    for stage in STAGES:
        metrics.stage[stage].observe(0.001)
    metrics.images.labels("m", "int8").inc()
    metrics.model_info.labels("m", "1", "int8", "openvino", "dcp", "0" * 64).set(1)
    for number in range(100):
        metrics.clients.answered(f"client-{number}", 1)
        metrics.clients.budget(f"client-{number}", "total", limit=2, left=1)
    metrics.flush()

asyncio.run(main())
"""
Document = dict[str, Any]


def scrape(folder: Path, workers: int) -> tuple[float, int]:
    """Seconds that merging the metrics of some workers takes, and their series."""
    from prometheus_client import CollectorRegistry, generate_latest

    from app.admin.application import WorkerMetrics

    files = folder / str(workers)
    files.mkdir()
    for file in (folder / "one").iterdir():
        kind = file.stem.rpartition("_")[0]
        for number in range(workers):
            shutil.copy(file, files / f"{kind}_{number + 1}.db")
    registry = CollectorRegistry()
    WorkerMetrics(registry, path=str(files))  # type: ignore[no-untyped-call]  # no hints there
    spent, text = [], b""
    for _ in range(3):
        start = time.process_time()
        text = generate_latest(registry)
        spent.append(time.process_time() - start)
    return min(spent), sum(not line.startswith(b"#") for line in text.splitlines())


async def dispatch(workers: int, connections: int = 300) -> float:
    """Processor seconds of the dispatcher for one connection."""
    from app.processes.connection_dispatcher import ConnectionDispatcher

    with socket.create_server(("127.0.0.1", 0)) as listener:
        dispatcher = ConnectionDispatcher(listener, workers, refusals={})
        channels = [dispatcher.add(number) for number in range(workers)]
        for number in range(workers):
            dispatcher.activate(number)
        clients = []
        spent = 0.0
        for _ in range(connections):
            clients.append(socket.create_connection(listener.getsockname()))
            start = time.process_time()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            spent += time.process_time() - start
        for channel in channels:
            channel.sock.close()
        for client in clients:
            client.close()
        sent = sum(dispatcher.open_connections().values())
        dispatcher.close()
        for number in range(workers):
            dispatcher.remove(number)
    return spent / max(1, sent)


async def charges(url: str, pid: int, together: int, count: int = 3000) -> float:
    """Processor seconds of Redis for one charge of two budgets; some are sent together."""
    from app.access.quotas import client_buckets
    from app.access.stores.redis import RedisStore

    store = RedisStore.at(url)
    buckets = client_buckets("c", LIMITS)
    await store.charge(buckets, 1)
    before = processor_s(pid)
    for _ in range(count // together):
        await asyncio.gather(*(store.charge(buckets, 1) for _ in range(together)))
    spent = (processor_s(pid) - before) / (count // together * together)
    await store.close()
    return spent


def decode_times(card: Card, count: int) -> list[float]:
    """Seconds of decoding the benchmark's picture."""
    body, _ = picture(card)
    found = []
    for _ in range(count):
        start = time.thread_time()
        decode(body, card.input, card.preprocessing, 10**6)
        found.append(time.thread_time() - start)
    return found


def least(connections: int, workers: int, draw: random.Random) -> list[int]:
    """Connections of each worker where each goes to the one with the fewest."""
    del draw
    return [connections // workers + (i < connections % workers) for i in range(workers)]


def hashed(connections: int, workers: int, draw: random.Random) -> list[int]:
    """Connections of each worker where the kernel hashes them (SO_REUSEPORT)."""
    found = [0] * workers
    for _ in range(connections):
        found[draw.randrange(workers)] += 1
    return found


def waits(
    connections: int, times: Sequence[float], think_s: float, requests: int, draw: random.Random
) -> list[float]:
    """Seconds from request to answer on the connections of one worker.

    Each connection sends a request, gets its answer and thinks; the worker answers one after
    another.
    """
    due = [(draw.expovariate(1 / think_s), number) for number in range(connections)]
    heapq.heapify(due)
    free = 0.0
    found: list[float] = []
    while due and len(found) < requests:
        asked, number = heapq.heappop(due)
        free = max(free, asked) + draw.choice(times)
        found.append(free - asked)
        heapq.heappush(due, (free + draw.expovariate(1 / think_s), number))
    return found


def balance(
    spread: Callable[[int, int, random.Random], list[int]],
    workers: int,
    times: Sequence[float],
    seed: int,
    requests: int = REQUESTS,
) -> Document:
    """Most connections of a worker over the mean, and how long requests take."""
    draw = random.Random(seed)  # noqa: S311  # nothing secret
    service_s = statistics.fmean(times)
    think_s = service_s * (CONNECTIONS / USE - 1)
    counts = spread(CONNECTIONS * workers, workers, draw)
    found = sorted(
        wait for count in counts for wait in waits(count, times, think_s, requests, draw)
    )
    return {
        "most_over_mean": round(max(counts) / CONNECTIONS, 3),
        "p50_over_service": round(found[len(found) // 2] / service_s, 2),
        "p99_over_service": round(found[len(found) * 99 // 100] / service_s, 2),
    }


def shares(costs: Document, workers: int, replicas: int) -> dict[str, float]:
    """How much of its limit each part needs, where every worker is busy for `USE` of its time.

    Args:
        costs: as `measured` gives them.
        workers: of a replica.
        replicas: of the service.
    """
    a_replica = workers * USE * 1e6 / costs["request_us"]
    at = str(workers)
    return {
        "dispatcher": a_replica / PER_CONNECTION * costs["dispatch_us"][at] / 1e6,
        "scrape": costs["scrape_ms"][at] / 1000 / EVERY_S,
        "Redis": a_replica * replicas * costs["redis_us"][str(TOGETHER)] / 1e6,
        "Prometheus": costs["series"][at] * replicas / SERIES,
    }


def rows(costs: Document) -> Iterator[Document]:
    """Every size, and what breaks first there."""
    for workers in WORKERS:
        for replicas in REPLICAS:
            found = shares(costs, workers, replicas)
            first = max(found, key=lambda name: found[name])
            yield {
                "workers": workers,
                "replicas": replicas,
                "shares": {name: float(f"{share:.3g}") for name, share in found.items()},
                "first": first if found[first] > 1 else None,
            }


def limits(costs: Document) -> dict[str, int | None]:
    """Most workers in all for which each part is enough; None for what each replica has of its own.

    Replicas have `WORKERS[-1]` workers each.
    """
    one, two = (shares(costs, WORKERS[-1], replicas) for replicas in (1, 2))
    return {
        name: int(WORKERS[-1] / one[name]) if two[name] > one[name] else None for name in one
    }  # fmt: skip


def measured() -> Document:
    """Costs on this machine, and the committed ones of Redis and of a request."""
    overhead = read("overhead.json")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "one").mkdir()
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder / "one")}
        subprocess.run([sys.executable, "-c", WORKER], env=environment, check=True)  # noqa: S603
        scrapes = {str(n): scrape(folder, n) for n in WORKERS}
        with redis_in(folder) as redis:
            url, pid = f"redis://127.0.0.1:{redis.port}/0", redis.process.pid
            redis_s = {n: asyncio.run(charges(url, pid, n)) for n in (1, TOGETHER)}
    return {
        "request_us": overhead["cases"][0]["connections"]["64"]["whole_us"],
        "redis_us": {str(n): round(1e6 * seconds, 1) for n, seconds in redis_s.items()},
        "scrape_ms": {n: round(1000 * seconds, 1) for n, (seconds, _) in scrapes.items()},
        "series": {n: series for n, (_, series) in scrapes.items()},
        "dispatch_us": {str(n): round(1e6 * asyncio.run(dispatch(n)), 1) for n in WORKERS},
    }


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(seed: int, out: Path) -> None:
    """Measure, simulate, print and write JSON."""
    costs = measured()
    times = decode_times(open_bundle(default_model_dir(), "mnist").card, 2000)
    document = {
        "command": f"python -m loadtest.simulation --seed {seed}",
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "costs": costs,
        "limits": limits(costs),
        "rows": list(rows(costs)),
        "balance": {
            name: {str(n): balance(spread, n, times, seed) for n in WORKERS}
            for name, spread in (("dispatcher", least), ("SO_REUSEPORT", hashed))
        },
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
