"""`scumble serve` as a child process on free ports: for tests, benchmarks and demos."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx2

PREFIX = "SCUMBLE_"
READY_S = 60


@dataclass
class Server:
    """A server process.

    Attributes:
        process: the supervisor.
        started: `time.perf_counter()` when it was started.
        log: everything it logged, one dict per line.
        ready_s: seconds from its start until it said that it is ready; 0 before.
        url: of the public port, once ready.
        admin: of the admin port, once ready.
    """

    process: subprocess.Popen[str]
    started: float
    log: list[dict[str, Any]] = field(default_factory=list)
    ready_s: float = 0.0
    url: str = ""
    admin: str = ""
    _settled: threading.Event = field(default_factory=threading.Event)

    def wait_ready(self, seconds: float = READY_S) -> None:
        """Block until it is ready.

        Raises:
            RuntimeError: it ended, or took longer; the message has its log.
        """
        if not self._settled.wait(seconds) or not self.url:
            events = "; ".join(str(entry["event"]) for entry in self.log)
            raise RuntimeError(f"the server is not ready after {seconds} s: {events}")

    def wait(self, seconds: float = 30) -> int:
        """Its exit code, once it has ended and all its log is read."""
        code = self.process.wait(seconds)
        self._settled.wait(seconds)
        return code

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit code."""
        self.process.send_signal(how)
        return self.wait()

    def forkers(self) -> list[int]:
        """Process id of what its workers are forked from; none until it starts. Linux only."""
        found = []
        for child in children(self.process.pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
        return found

    def workers(self) -> list[int]:
        """Process ids of its workers, oldest first. Linux only."""
        return [worker for forker in self.forkers() for worker in children(forker)]

    def metrics(self) -> dict[str, float]:
        """Samples of the admin port, by name with labels."""
        text = httpx2.get(f"{self.admin}/metrics", trust_env=False).text
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def read_log(self, lines: IO[str]) -> None:
        """Collect log lines until the process ends."""
        with lines:
            for line in lines:
                entry = json.loads(line) if line.startswith("{") else {"event": line.rstrip("\n")}
                self.log.append(entry)
                if entry["event"] == "ready":
                    self.ready_s = time.perf_counter() - self.started
                    self.url, self.admin = entry["url"], entry["admin"]
                    self._settled.set()
        self._settled.set()


def children(pid: int) -> list[int]:
    """Process ids of what a process's main thread has started and not ended, oldest first.

    Empty for a process that has ended, and where there is no `/proc`.
    """
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in found.split()]


def variables(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings as environment variables: `{"port": 0}` -> `{"SCUMBLE_PORT": "0"}`."""
    return {
        f"{PREFIX}{name.upper()}": json.dumps(value) if isinstance(value, dict) else str(value)
        for name, value in settings.items()
    }


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without the `SCUMBLE_*` variables in it: a child gets what it is given."""
    return {name: value for name, value in environ.items() if not name.upper().startswith(PREFIX)}


def start(settings: Mapping[str, object], *, new_session: bool = False) -> Server:
    """Start `scumble serve` with these settings and no others; does not wait.

    Ports are free ones unless given. `SCUMBLE_*` variables of this process do not count: what is
    called undefended must not be defended because of an exported variable.
    """
    settings = {"port": 0, "admin_port": 0, **settings}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "scumble.cli", "serve"],
        env=without_settings(os.environ) | variables(settings),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=new_session,
    )
    server = Server(process, started)
    threading.Thread(target=server.read_log, args=(process.stderr,), daemon=True).start()
    return server


@contextmanager
def serving(**settings: object) -> Iterator[Server]:
    """A ready server; stopped at the end.

    Raises:
        RuntimeError: it did not start.
    """
    server = start(settings)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
