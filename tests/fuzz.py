"""Broken requests by the thousand, in process: `python -m tests.fuzz --requests 100000`.

Each is a seed of `tests/corpus/` with some random damage, and goes to two applications: one open,
one with keys, budgets, an audit log and traceparent. None may end in a crash, nor in a 5xx but the
documented 503 and 504, and every refusal must be a problem document. A request that breaks this is
written down; `python -m tests.fuzz FILE` asks it again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import orjson
from fastapi import FastAPI

from app.access.keys import Key, KeyFile, digest, write_keys
from app.main import create_app
from app.settings import Settings
from tests.seeds import Asked, corpus, read
from tests.tiny import make_bundle

KEY = "fuzz"
DOCUMENTED = (503, 504)
FOUND = Path("runs/fuzz")
NUMBERS = (b"0", b"-1", b"1e9", b"1e400", b"4294967296", b"99999999999999999999", b"NaN", b"null")
PIECES = (
    b"\x00",
    b"\xff" * 4,
    b"\r\n",
    b"--b--",
    b"{",
    b"]" * 50,
    b"[" * 200,
    b'"',
    b"\\ud800",
    b"\xed\xa0\x80",
    b"IHDR",
    b"IDAT",
    b"iCCP",
    b"acTL",
    b"\xff\xc2",
    b"\xff\xd9",
    b"RIFF",
    b"VP8X",
    b"%s",
    b"../",
)
HEADERS = (
    (b"content-type", b"application/json"),
    (b"content-type", b"image/webp"),
    (b"content-type", b"\xff"),
    (b"content-type", b"multipart/form-data"),
    (b"content-type", b"multipart/form-data; boundary=\xe9"),
    (b"content-length", b"0"),
    (b"content-length", b"-1"),
    (b"content-length", b"99999999999999999999"),
    (b"content-encoding", b"gzip"),
    (b"inference-header-content-length", b"1"),
    (b"inference-header-content-length", b"\xb2"),
    (b"inference-header-content-length", b"0"),
    (b"x-api-key", b"\xff"),
    (b"authorization", b"Bearer "),
    (b"authorization", b"Bearer nobody"),
    (b"traceparent", b"00-" + b"1" * 32),
    (b"x-request-id", b"\x80" * 70),
    (b"accept", b"*" * 9000),
)
TARGETS = (
    "/v1/predict?top_k=\u00b2",
    "/v1/predict?top_k=" + "9" * 5000,
    "/v1/predict?top_k=%ff&top_k=1",
    "/v2//",
    "/v2/models/%00/infer",
    "/v2/models/tiny/versions/1/infer/",
    "/v2/models/\u00e9/infer",
    "/",
    "/v1/predict/",
)


class Broken(AssertionError):
    """An answer that must not be."""


def damaged(seed: Asked, others: list[Asked], draw: random.Random) -> Asked:
    """The seed with one to four changes."""
    method, target, headers, body = seed.method, seed.target, list(seed.headers), seed.body
    if draw.random() < 0.9:
        headers.append((b"content-length", str(len(body)).encode()))
    for _ in range(draw.randint(1, 4)):
        kind = draw.random()
        if kind < 0.75:
            body = _damaged_bytes(body, others, draw)
        elif kind < 0.85:
            headers.insert(draw.randint(0, len(headers)), draw.choice(HEADERS))
        elif kind < 0.9 and headers:
            at = draw.randrange(len(headers))
            name, value = headers[at]
            headers[at] = (name, _damaged_bytes(value, others, draw)[:8000])
        elif kind < 0.93 and headers:
            del headers[draw.randrange(len(headers))]
        elif kind < 0.97:
            target = draw.choice((*TARGETS, *(other.target for other in others)))
        else:
            method = draw.choice(("GET", "PUT", "HEAD", "OPTIONS", "POST", "X"))
    return Asked(method, target, tuple(headers), body)


def _damaged_bytes(body: bytes, others: list[Asked], draw: random.Random) -> bytes:
    at = draw.randint(0, len(body))
    to = min(len(body), at + draw.choice((1, 2, 4, 16, 200)))
    match draw.randrange(7):
        case 0:  # bits
            changed = bytearray(body)
            for _ in range(draw.randint(1, 8)):
                if changed:
                    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            return bytes(changed)
        case 1:
            return body[:at] + body[to:]
        case 2:
            return body[:at]
        case 3:
            return body[:to] + body[at:]
        case 4:
            return body[:at] + draw.choice((*PIECES, draw.randbytes(8))) + body[to:]
        case 5:
            other = draw.choice(others).body
            return body[:at] + other[draw.randint(0, len(other)) :]
    digits = [i for i, byte in enumerate(body) if 48 <= byte <= 57]
    if not digits:
        return body
    at = draw.choice(digits)
    return body[:at] + draw.choice(NUMBERS) + body[at + 1 :]


async def ask(app: FastAPI, asked: Asked, draw: random.Random) -> int:
    """One request to an application, its body in pieces; gives the status.

    Raises:
        Broken: a crash, no answer, or one that must not be.
    """
    path, _, query = asked.target.partition("?")
    pieces = [asked.body]
    if draw.random() < 0.3:
        middle = draw.randint(0, len(asked.body))
        pieces = [asked.body[:middle], asked.body[middle:]]
    messages = [{"type": "http.request", "body": body, "more_body": True} for body in pieces]
    messages[-1]["more_body"] = False
    if draw.random() < 0.02:
        messages[-1] = {"type": "http.disconnect"}
    coming = iter(messages)
    sent: list = []

    async def receive() -> dict:
        return next(coming, {"type": "http.disconnect"})

    async def send(message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": list(asked.headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    try:
        await app(scope, receive, send)
    except Exception as exc:
        raise Broken(f"a crash: {exc!r}") from exc
    starts = [message for message in sent if message["type"] == "http.response.start"]
    if len(starts) != 1:
        raise Broken(f"{len(starts)} answers")
    status = int(starts[0]["status"])
    body = b"".join(message.get("body", b"") for message in sent)
    if status >= 500 and status not in DOCUMENTED:
        raise Broken(f"{status}: {body!r}")
    if status >= 400 and asked.method != "HEAD":
        _check_problem(status, body, dict(starts[0]["headers"]))
    return status


def _check_problem(status: int, body: bytes, headers: dict[bytes, bytes]) -> None:
    if headers.get(b"content-type") == b"application/json":
        return  # /readyz
    problem = orjson.loads(body)
    if problem["status"] != status or headers[b"content-type"] != b"application/problem+json":
        raise Broken(f"{status} without a problem document: {body!r}")


def applications(folder: Path) -> list[FastAPI]:
    """An open one, and one with everything on."""
    if not (folder / "tiny").exists():
        make_bundle(folder)
    keys = Key(
        id="a",
        sha256=digest(KEY.encode()).hex(),
        client="fuzzer",
        created="",
        limits={"window_images": 20, "window_s": 1, "total_images": 10**9},
    )
    write_keys(folder / "keys.json", KeyFile(keys=(keys,)))
    common = {"model_dir": folder, "model": "tiny", "workers": 1, "batch": {"execution": "inline"}}
    guarded = {
        "keys_file": folder / "keys.json",
        "audit_file": folder / "audit",
        "defense": "dcp",
        "defense_params": {"beta": 1.2},
        "limits": {"max_body_bytes": 4000, "max_images": 3, "max_pixels": 200},
    }
    return [create_app(Settings(**common)), create_app(Settings(**common, **guarded))]


def keyed(asked: Asked) -> Asked:
    """The same with the key, unless it brings one."""
    key = ((b"x-api-key", KEY.encode()),)
    return Asked(asked.method, asked.target, asked.headers + key, asked.body)


async def fuzz(folder: Path, requests: int, seed: int, found: Path | None = None) -> Counter[int]:
    """So many broken requests; how many of each status.

    Raises:
        Broken: with the request, which also is in a file of `found`.
    """
    draw = random.Random(seed)  # noqa: S311  # no secret
    seeds = corpus()
    open_, guarded = applications(folder)
    statuses: Counter[int] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        for app in (open_, guarded):
            await stack.enter_async_context(app.router.lifespan_context(app))
        for number in range(requests):
            asked = damaged(draw.choice(seeds), seeds, draw)
            app = draw.choice((open_, guarded))
            asked = keyed(asked) if app is guarded and draw.random() < 0.95 else asked
            try:
                statuses[await ask(app, asked, draw)] += 1
            except Broken as exc:
                if found is not None:
                    _write(found / f"{seed}-{number}.http", asked)
                raise Broken(f"request {number} of seed {seed}: {exc}\n{asked}") from exc
    return statuses


def _write(file: Path, asked: Asked) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(asked.written())


async def again(folder: Path, files: Iterable[Path]) -> None:
    """Ask what is written down.

    Raises:
        Broken: it is not mended yet.
    """
    draw = random.Random(0)  # noqa: S311  # no secret
    for app in applications(folder):
        async with app.router.lifespan_context(app):
            for file in files:
                sys.stdout.write(f"{file}: {await ask(app, read(file), draw)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="ask these once more")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="[default: the time]")
    parser.add_argument("--out", type=Path, help="where the counts go, as JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    seed = int(time.time()) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory() as folder:
        if options.files:
            asyncio.run(again(Path(folder), options.files))
            return
        start = time.monotonic()
        statuses = asyncio.run(fuzz(Path(folder), options.requests, seed, FOUND))
    counts = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    seconds = time.monotonic() - start
    sys.stdout.write(f"{options.requests} requests of seed {seed} in {seconds:.0f} s: {counts}\n")
    if options.out is not None:
        report = {
            "command": f"python -m tests.fuzz --requests {options.requests} --seed {seed}",
            "requests": options.requests,
            "seconds": round(seconds),
            "answers": {str(status): count for status, count in sorted(statuses.items())},
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
