"""Measures how many charges per second one Redis counts; all replicas share it.

    python -m loadtest.charges          writes loadtest/charges.json

A real Redis writes each charge to disk before it answers, as docs/reference/keys.md requires. One
process per core charges single images of 10,000 clients in two budgets each, on as many connections
as a worker has, or on one. Redis and the clients share the cores, so Redis alone does more.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import platform
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

from app.access.keys import KeyLimits
from app.access.quotas import client_buckets
from app.access.stores.redis import CONNECTIONS, RedisStore
from loadtest.bench import CORES
from loadtest.chaos import redis_in
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
CLIENTS = 10_000
# No charge is refused, as a refusal is not written to the disk.
LIMITS = KeyLimits(window_images=10**9, total_images=10**9)


async def charging(url: str, connections: int, seconds: float) -> list[float]:
    """Milliseconds of each charge of a process."""
    store = RedisStore.at(url)
    spent: list[float] = []
    end = time.perf_counter() + seconds

    async def one_after_another() -> None:
        while (start := time.perf_counter()) < end:
            client = str(random.randrange(CLIENTS))  # noqa: S311  # nothing secret
            charge = await store.charge(client_buckets(client, LIMITS), 1)
            assert charge.granted  # noqa: S101  # a refusal would be faster
            spent.append(1000 * (time.perf_counter() - start))

    await asyncio.gather(*(one_after_another() for _ in range(connections)))
    await store.close()
    return spent


def ask(url: str, connections: int, seconds: float) -> list[float]:
    """The same in a separate process."""
    return asyncio.run(charging(url, connections, seconds))


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@click.option("--processes", default=CORES, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(rounds: int, seconds: float, processes: int, out: Path) -> None:
    """Measure, print and write JSON."""
    counts = (1, CONNECTIONS)
    found: dict[int, list[list[float]]] = {count: [] for count in counts}
    with (
        tempfile.TemporaryDirectory() as folder,
        redis_in(Path(folder)) as redis,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        url = f"redis://127.0.0.1:{redis.port}/0"
        list(pool.map(partial(ask, url, 1), [0.1] * processes))  # imports, scripts
        for _ in range(rounds):
            for count in counts:
                parts = pool.map(partial(ask, url, count), [seconds] * processes)
                found[count].append(sorted(value for part in parts for value in part))
    document = {
        "command": f"python -m loadtest.charges --rounds {rounds} --seconds {seconds:g} "
        f"--processes {processes}",
        "cores": CORES,
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {"redis": version("redis")},
        "clients": CLIENTS,
        "appendfsync": "always",
        "connections": {
            str(processes * count): {
                "per_second": round(statistics.median(len(ms) / seconds for ms in runs)),
                "p50_ms": round(statistics.median(ms[len(ms) // 2] for ms in runs), 3),
                "p99_ms": round(statistics.median(ms[len(ms) * 99 // 100] for ms in runs), 3),
            }
            for count, runs in found.items()
        },
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document["connections"]))


if __name__ == "__main__":
    main()
