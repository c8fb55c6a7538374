"""The `wrk` program as a function: closed-loop load on one URL, with every error counted.

A connection sends its next request when the last one is answered, so a slow server gets fewer
requests, and percentiles are those of the requests that were sent. wrk and the server share the
cores.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

# The body's path, the pause and the headers are arguments, so the script needs no quoting.
SCRIPT = """
function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  file:close()
  local pause = tonumber(args[2])
  if pause > 0 then
    -- Whole milliseconds is what wrk waits: right on average.
    function delay() return math.floor(pause + math.random()) end
  end
  for i = 3, #args, 2 do wrk.headers[args[i]] = args[i + 1] end
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests": %d, "us": %d, "p50": %f, "p99": %f, "max": %f, "status": %d, "socket": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    latency.max, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """The result of a load.

    Attributes:
        rps: good answers per second.
        p50_ms: median time of all answers; so the next two.
        p99_ms: 99th percentile.
        max_ms: the longest.
        requests: answers, good or not.
        errors: answers with a status of 400 or more, and socket errors: connections refused or
            broken, answers later than the timeout.
        seconds: how long it took.
        client_cpu_s: processor time of wrk itself, which the server did not have.
    """

    rps: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    requests: int
    errors: int
    seconds: float
    client_cpu_s: float = 0.0


def load(
    url: str,
    *,
    body: bytes,
    content_type: str,
    connections: int,
    seconds: float,
    warmup: float = 1.0,
    timeout: float = 10.0,
    pause_ms: float = 0.0,
    threads: int = 1,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """POST `body` repeatedly over kept-alive connections.

    Args:
        url: where to.
        body: what to send.
        content_type: of the body.
        connections: how many at the same time.
        seconds: how long; wrk takes whole seconds, so this is rounded up, as are the other times.
        warmup: the same load before, whose figures do not count, save for its errors.
        timeout: an answer that takes longer is an error.
        pause_ms: how long a connection waits before each request; no part of the latencies.
        threads: of wrk.
        headers: more of them.

    Raises:
        RuntimeError: wrk is not installed, or could not connect.
    """
    program = shutil.which("wrk")
    if program is None:
        raise RuntimeError("wrk is not installed; on Debian, install the package `wrk`")
    named = {"Content-Type": content_type, **(headers or {})}
    with tempfile.TemporaryDirectory() as folder:
        script, payload = Path(folder, "post.lua"), Path(folder, "body")
        script.write_text(SCRIPT)
        payload.write_bytes(body)

        def once(duration: float) -> Load:
            options = [f"-t{threads}", f"-c{connections}", f"-d{math.ceil(duration)}s"]
            options += [f"--timeout={math.ceil(timeout)}s", f"--script={script}", url]
            words = [word for pair in named.items() for word in pair]
            before = children_s()
            done = subprocess.run(  # noqa: S603 - the program just found, and our own arguments
                [program, *options, "--", str(payload), str(pause_ms), *words],
                capture_output=True,
                text=True,
                check=False,
                timeout=duration + 2 * timeout + 30,
            )
            if done.returncode:
                raise RuntimeError(f"wrk: {(done.stderr or done.stdout).strip()}")
            return replace(parse(done.stdout), client_cpu_s=children_s() - before)

        before = once(warmup).errors if warmup > 0 else 0
        measured = once(seconds)
    return replace(measured, errors=measured.errors + before)


def children_s() -> float:
    """Processor time of all children of this process that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def parse(output: str) -> Load:
    """The figures that the script printed.

    Raises:
        RuntimeError: it printed none.
    """
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"wrk printed no figures: {output.strip()}")
    found = json.loads(lines[-1])
    seconds = found["us"] / 1e6
    return Load(
        rps=(found["requests"] - found["status"]) / seconds,
        p50_ms=found["p50"] / 1e3,
        p99_ms=found["p99"] / 1e3,
        max_ms=found["max"] / 1e3,
        requests=found["requests"],
        errors=found["status"] + found["socket"],
        seconds=seconds,
    )
