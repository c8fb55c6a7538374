"""Tests a budget and key comparison with a thief at two replicas and with thousands of wrong keys.

    python -m loadtest.abuse                    writes loadtest/abuse.json

Theft: two replicas with two workers each count in one real Redis. One key with a budget of 10,000
images is used on eight connections, with one to eight images per request, until each connection is
told that nothing is left. The images in answers with status 200 are counted.

Wrong keys: a server with one key gets requests whose keys are wrong in the first character, in the
last, or in all, in random order. If the comparison leaked information, keys that agree longest with
the right one would take a different time; a Mann-Whitney test checks this. The number of series on
the metrics page must not grow.

The exit code is 1 if the number of images served is not the budget, if a wrong key was accepted or
added a series, or if times differ (p < 0.001).
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import httpx2
import numpy as np
from scipy.stats import mannwhitneyu

from app.access.keys import Key, KeyFile, KeyLimits, digest, new_key, write_keys
from app.telemetry.metrics import FLUSH_S
from loadtest.chaos import DIGIT, redis_in
from scumble.evaluation.local_server import Server, serving
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
CONNECTIONS = 8
REPLICAS = 2
P_SUSPICIOUS = 0.001


def write_key(path: Path, key: str, limits: KeyLimits) -> None:
    """A file with one key."""
    row = Key(
        id="only",
        sha256=digest(key.encode()).hex(),
        client="only",
        created="2026-01-01T00:00:00+00:00",
        limits=limits,
    )
    write_keys(path, KeyFile(keys=(row,)))


def steal(server: Server, key: str, size: int) -> Counter[str]:
    """Send `size` images per request on one connection, fewer when less is left, until none is."""
    got: Counter[str] = Counter()
    with httpx2.Client(
        base_url=server.url, headers={"X-API-Key": key}, timeout=60, trust_env=False
    ) as client:
        while True:
            files = [("image", ("x.png", DIGIT, "image/png"))] * size
            answer = client.post("/v1/predict", files=files)
            got[str(answer.status_code)] += 1
            if answer.status_code == 200:
                got["images"] += len(answer.json()["predictions"])
            elif answer.status_code == 429:
                left = int(answer.headers["ratelimit"].split("r=")[1].split(";")[0])
                if left == 0:
                    return got
                size = min(size, left)


def theft(folder: Path, budget: int) -> dict[str, Any]:
    """Use the budget on all connections at all replicas; returns the sum of the answers."""
    key, file = new_key(), folder / "theft.json"
    write_key(file, key, KeyLimits(total_images=budget))
    with redis_in(folder) as redis:
        common = {"keys_file": file, "store": f"redis://127.0.0.1:{redis.port}/0", "workers": 2}
        with serving(**common) as one, serving(**common) as two:
            start = time.monotonic()
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                thieves = [
                    pool.submit(steal, (one, two)[number % REPLICAS], key, 1 + number)
                    for number in range(CONNECTIONS)
                ]
                got = sum((thief.result() for thief in thieves), Counter[str]())
            seconds = time.monotonic() - start
    served = got.pop("images")
    return {
        "replicas": REPLICAS,
        "workers_each": 2,
        "connections": CONNECTIONS,
        "budget": budget,
        "images_served": served,
        "answers": dict(got),
        "seconds": round(seconds, 1),
    }


def wrong_keys(folder: Path, count: int) -> dict[str, Any]:
    """Send `count` keys of each kind in random order; returns the times of the answers."""
    key, file = new_key(), folder / "known.json"
    write_key(file, key, KeyLimits())
    draw = random.Random(0)  # noqa: S311  # no secret
    kinds: dict[str, Callable[[], str]] = {
        "first character": lambda: other(key[0]) + key[1:],
        "last character": lambda: key[:-1] + other(key[-1]),
        "all": new_key,
    }
    order = [kind for kind in kinds for _ in range(count)]
    draw.shuffle(order)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    statuses: Counter[int] = Counter()
    with (
        serving(keys_file=file, workers=1) as server,
        httpx2.Client(base_url=server.url, trust_env=False) as client,
    ):
        for _ in range(100):  # warm; and the series of refused requests are there
            client.get("/v1/model", headers={"X-API-Key": new_key()})
        before = series(server)
        for kind in order:
            headers = {"X-API-Key": kinds[kind]()}
            start = time.perf_counter()
            answer = client.get("/v1/model", headers=headers)
            times[kind].append(time.perf_counter() - start)
            statuses[answer.status_code] += 1
        after = series(server)
    return {
        "of_each_kind": count,
        "answers": {str(status): n for status, n in statuses.items()},
        "p50_us": {kind: round(1e6 * float(np.median(found))) for kind, found in times.items()},
        "p_value": {
            kind: round(float(mannwhitneyu(times["all"], times[kind]).pvalue), 4)
            for kind in ("first character", "last character")
        },
        "series_added": after - before,
    }


def other(character: str) -> str:
    """A character that is not this one."""
    return "A" if character != "A" else "B"


def series(server: Server) -> int:
    """The number of series on the metrics page."""
    time.sleep(4 * FLUSH_S)
    return len(server.metrics())


def verdict(report: dict[str, Any]) -> list[str]:
    """Everything that went wrong; empty if nothing did."""
    theft, keys = report["theft"], report["wrong_keys"]
    faults = []
    if theft["images_served"] != theft["budget"]:
        faults.append(f"{theft['images_served']} images served, budget {theft['budget']}")
    if set(theft["answers"]) - {"200", "429"}:
        faults.append(f"other answers than 200 and 429: {theft['answers']}")
    if set(keys["answers"]) != {"401"}:
        faults.append(f"wrong keys were answered {keys['answers']}")
    if keys["series_added"]:
        faults.append(f"wrong keys added {keys['series_added']} series")
    if min(keys["p_value"].values()) < P_SUSPICIOUS:
        faults.append(f"times depend on the key: p = {keys['p_value']}")
    return faults


@click.command()
@click.option("--budget", default=10_000, show_default=True)
@click.option("--keys", default=1000, show_default=True, help="Number of wrong keys of each kind.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(budget: int, keys: int, out: Path) -> None:
    """Run both tests, print the report and write it as JSON."""
    if shutil.which("redis-server") is None:
        raise click.ClickException("redis-server is not installed")
    with tempfile.TemporaryDirectory(prefix="scumble-abuse-") as folder:
        report = {
            "command": f"python -m loadtest.abuse --budget {budget} --keys {keys}",
            "processor": processor(),
            "theft": theft(Path(folder), budget),
            "wrong_keys": wrong_keys(Path(folder), keys),
        }
    text = json.dumps(report, indent=1)
    click.echo(text)
    out.write_text(text + "\n")
    faults = verdict(report)
    click.echo("\n".join(faults) or "no faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
