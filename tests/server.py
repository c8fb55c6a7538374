"""`scumble serve` as a process of its own, on free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2

READY_S = 60


@dataclass
class Server:
    """A running server: its public and admin URLs and everything that it logged."""

    process: subprocess.Popen[str]
    log: list[dict] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    admin: str = ""

    def metrics(self) -> dict[str, float]:
        """Samples of the admin port by name with labels."""
        text = httpx2.get(f"{self.admin}/metrics").text
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Signal it and wait; gives the exit code."""
        self.process.send_signal(how)
        return self.process.wait(30)

    def read_log(self) -> None:
        """Collect its log lines until it ends."""
        for line in self.process.stderr:
            entry = json.loads(line) if line.startswith("{") else {"event": line.rstrip("\n")}
            self.log.append(entry)
            if entry["event"] == "ready":
                self.url, self.admin = entry["url"], entry["admin"]
                self.ready.set()
        self.ready.set()


def start(environment: dict[str, str]) -> Server:
    """Start `scumble serve` with SCUMBLE_* variables; does not wait."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scumble.cli", "serve"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    server = Server(process)
    threading.Thread(target=server.read_log, daemon=True).start()
    return server


def variables(settings: dict[str, object]) -> dict[str, str]:
    """Settings as the environment carries them."""
    return {
        f"SCUMBLE_{name.upper()}": json.dumps(value) if isinstance(value, dict) else str(value)
        for name, value in settings.items()
    }


@contextmanager
def serving(**settings: object) -> Iterator[Server]:
    """A ready server; stopped at the end."""
    server = start(variables({"port": 0, "admin_port": 0, "workers": 1, **settings}))
    try:
        assert server.ready.wait(READY_S), "not ready in time"
        assert server.url, f"the server did not start: {server.log}"
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
        server.process.stderr.close()
