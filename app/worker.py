"""One worker process: loads the service and serves the public port until told to drain."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import signal
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import uvicorn

from app import logs
from app.errors import ConfigError
from app.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("scumble")


class WorkerServer(uvicorn.Server):
    """Says when it is ready, and drains in order: not ready, pause, stop listening, finish.

    It drains on SIGTERM, and when the supervisor is gone, which closes the other end of the pipe.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: Settings, pipe: Connection):
        super().__init__(config)
        self._app = app
        self._delay_s = settings.drain_delay_s
        self._pipe = pipe
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then tell the supervisor."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        loop.add_reader(self._pipe.fileno(), self._supervisor_gone)
        self._pipe.send("ready")

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """A terminal's Ctrl-C reaches all processes; only the supervisor acts on it."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        yield

    def _supervisor_gone(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._drain()

    def _drain(self) -> None:
        async def drain() -> None:
            self._app.state.service.state.draining = True
            await asyncio.sleep(self._delay_s)
            self.should_exit = True

        if self._draining is None:
            self._draining = asyncio.create_task(drain())


def config_for(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Uvicorn with its fast parts, without access log and without naming itself."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
    )


def run(settings: Settings, listener: socket.socket, pipe: Connection) -> None:
    """Entry point of the process; exits 0 after draining, 1 when the settings cannot be served."""
    logs.configure(settings.log_level)
    # Imported here: the supervisor imports this module too, and starts faster without the service.
    from app.main import create_app

    try:
        app = create_app(settings)
    except ConfigError as exc:
        log.error("%s", exc)  # a sentence for a person, not a traceback
        sys.exit(1)
    _give_back()
    WorkerServer(config_for(app, settings), app, settings, pipe).run([listener])


def _give_back() -> None:
    """Return to the system what compiling the model needed and nobody uses any more."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc has it, musl does not
        libc.malloc_trim(0)
