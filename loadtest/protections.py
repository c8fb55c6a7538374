"""What keys, budgets, the audit log, TLS and withheld answers cost, one at a time and together.

    python -m loadtest.protections          writes loadtest/protections.json

One worker with each protection serves the same image by turns, and a ratio is the median of each
round's ratio to the service with none. The client shares the cores. Budgets never run out. SQLite
and Redis write each charge to disk; the audit log has its default settings.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import trustme

from app.access.keys import Key, KeyFile, KeyLimits, digest
from app.inference.bundle import open_bundle
from app.settings import default_model_dir
from loadtest.bench import picture
from loadtest.chaos import redis_in
from loadtest.overhead import spent
from scumble.evaluation.local_server import serving
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
KEY = "scumble_of_a_benchmark"
LIMITS = KeyLimits(window_images=10**9, total_images=10**9)


@dataclass(frozen=True)
class Protected:
    """A service.

    Attributes:
        settings: of it.
        headers: that its clients send.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


def services(folder: Path, redis: str) -> Iterator[tuple[str, Protected]]:
    """Every service that is measured, by name; the first has no protection.

    Args:
        folder: for their files.
        redis: its URL.
    """
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    tls = {"tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem"}
    withhold = {"defense": "withhold"}

    def keys(name: str, limits: KeyLimits, store: str = "memory://", **more: object) -> Protected:
        sha256 = digest(KEY.encode()).hex()
        key = Key(id="k", sha256=sha256, client="c", created="2026-01-01", limits=limits)
        path = folder / f"{name}.keys.json"
        path.write_text(KeyFile(keys=(key,)).model_dump_json())
        path.chmod(0o600)
        return Protected({"keys_file": path, "store": store, **more}, {"X-API-Key": KEY})

    def sqlite(name: str) -> str:
        return f"sqlite:///{folder}/{name}.db"

    def audit(name: str) -> dict[str, object]:
        return {"audit_file": folder / f"{name}.audit"}

    yield "none", Protected()
    yield "keys", keys("keys", KeyLimits())
    yield "budgets in memory", keys("memory", LIMITS)
    yield "budgets in SQLite", keys("sqlite", LIMITS, sqlite("one"))
    yield "budgets in Redis", keys("redis", LIMITS, redis)
    yield "audit log", Protected(audit("audit"))
    yield "TLS", Protected(tls)
    yield "`withhold`", Protected(withhold)
    together = {**audit("all"), **withhold}
    yield "keys, SQLite, audit log, `withhold`", keys("all", LIMITS, sqlite("all"), **together)
    together = {**audit("tls"), **withhold, **tls}
    yield "the same with TLS", keys("tls", LIMITS, sqlite("tls"), **together)


@click.command()
@click.option("--model", default="mnist", show_default=True)
@click.option("--connections", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2, show_default=True, help="Of each measurement.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(model: str, connections: int, rounds: int, seconds: int, out: Path) -> None:
    """Measure, print and write JSON."""
    body, kind = picture(open_bundle(default_model_dir(), model).card)
    found: dict[str, list[tuple[float, float]]] = {}
    errors = 0
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        redis = stack.enter_context(redis_in(Path(place)))
        running = {}
        for name, one in services(Path(place), f"redis://127.0.0.1:{redis.port}/0"):
            settings = {"model": model, "model_dir": default_model_dir(), **one.settings}
            running[name] = stack.enter_context(serving(workers=1, **settings)), one
        for number in range(rounds + 1):  # the first one warms up
            for name, (server, one) in running.items():
                done, us = spent(
                    server.process.pid,
                    f"{server.url}/v1/predict",
                    body=body,
                    content_type=kind,
                    connections=connections,
                    seconds=seconds if number else 1,
                    warmup=0,
                    headers=one.headers,
                )
                errors += done.errors
                if number:
                    found.setdefault(name, []).append((us, done.rps))
            click.echo(f"round {number} of {rounds}")
    document = {
        "command": f"python -m loadtest.protections --model {model} --connections {connections} "
        f"--rounds {rounds} --seconds {seconds}",
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "model": model,
        "connections": connections,
        "errors": errors,
        "services": {name: dict(figures(runs, found["none"])) for name, runs in found.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document["services"], indent=1))


def figures(
    runs: list[tuple[float, float]], bare: list[tuple[float, float]]
) -> Iterator[tuple[str, Any]]:
    """Medians of a service, and of its rounds' ratios to the one without protection."""
    pairs = list(zip(runs, bare, strict=True))
    yield "us", round(statistics.median(us for us, _ in runs), 1)
    yield "rps", round(statistics.median(rps for _, rps in runs))
    yield "more_us", round(statistics.median(one[0] - none[0] for one, none in pairs), 1)
    yield "rps_over_none", round(statistics.median(one[1] / none[1] for one, none in pairs), 3)


if __name__ == "__main__":
    main()
