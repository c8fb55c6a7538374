"""One worker process: loads the service and serves the public port until told to drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Any

import uvicorn

from app.errors import ConfigError
from app.http.connections import BodyMemory, Common, Connection, check_all
from app.http.tls import open_certificate
from app.processes.connection_dispatcher import WorkerChannel
from app.processes.last_good import Reporter
from app.processes.watchdog import Pulse
from app.settings import Settings
from app.system.background import repeat
from app.system.file_watcher import FileName, LastGood, WatchedFile
from app.system.heap import trim_heap
from app.telemetry import logs

if TYPE_CHECKING:
    from fastapi import FastAPI

    from app.http.prediction import Service

WATCH_S = 1.0
TICKS_PER_CHECK = 10
log = logging.getLogger("scumble")


class WorkerServer(uvicorn.Server):
    """Takes its connections from the supervisor; says when it is ready and when it wants no more.

    On SIGTERM it is no longer ready and says so; it goes on answering. When the supervisor sends no
    more connections, it finishes its requests and ends. Without SIGTERM others are there for its
    clients, and it lets each finish: an answer says that the connection closes, and a connection
    that waits for a request stays open as long as an idle one may. To close it at once could meet
    a request that is already on its way.
    """

    def __init__(
        self,
        settings: Settings,
        app: FastAPI,
        channel: WorkerChannel,
        pulse: Pulse,
        pipe: Pipe,
        certificate: WatchedFile[ssl.SSLContext] | None = None,
    ) -> None:
        super().__init__(config_for(app, settings))
        self._limits = settings.http
        self._certificate = certificate
        self._handshake_timeout_s = settings.tls_handshake_timeout_s
        self._app = app
        self._channel = channel
        self._pulse = pulse
        self._pipe = pipe
        service: Service = app.state.service
        self._common = Common(
            limits=settings.http,
            # One body of any allowed size always fits.
            memory=BodyMemory(
                max(settings.http.max_bodies_bytes, 2 * settings.limits.max_body_bytes)
            ),
            state=service.state,
            rejections=service.metrics.rejections,
            on_closed=channel.count_closed,
        )
        self._opening: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[Any] | None = None
        self._ready = False
        self._told = False
        self._end_by: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then tell the supervisor."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        self._channel.channel.setblocking(False)
        loop.add_reader(self._channel.channel.fileno(), self._take)
        service: Service = self._app.state.service
        ready = await service.not_ready_reason() is None
        self._pipe.send("ready" if ready else "not ready")
        if service.access is not None or service.audit is not None:
            self._ready = ready
            self._watching = loop.create_task(repeat("telling readiness", self._watch, WATCH_S))

    async def _watch(self) -> None:
        """Tell the supervisor, who speaks for all workers, whenever readiness changes."""
        service: Service = self._app.state.service
        if service.state.draining:
            return
        ready = await service.not_ready_reason() is None
        if ready != self._ready:
            with contextlib.suppress(OSError):  # the supervisor is gone: the channel says so
                self._pipe.send("ready" if ready else "not ready")
            self._ready = ready

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: show the supervisor that nothing hangs, look for slow clients."""
        self._pulse.beat(self._app.state.service.running_s())
        now = asyncio.get_running_loop().time()
        if self._end_by is not None:
            open_ones = self.server_state.connections or self._opening
            self.should_exit = self._told or not open_ones or now >= self._end_by
        if counter % TICKS_PER_CHECK == 0:
            check_all(self.server_state, now)
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """A worker acts on SIGTERM alone, see `startup`; the others are the supervisor's."""
        yield

    def _take(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (arrived := self._channel.take()) is not None:
                for connection in arrived:
                    task = loop.create_task(self._open(connection))
                    self._opening.add(task)  # or nobody would hold it
                    task.add_done_callback(self._opening.discard)
        except BlockingIOError:
            return
        loop.remove_reader(self._channel.channel.fileno())
        self._app.state.service.state.draining = True
        self._end_by = loop.time() + (0 if self._told else self._limits.keep_alive_s + 2 * WATCH_S)

    async def _open(self, connection: socket.socket) -> None:
        protocol = self._protocol()
        tls: dict[str, Any] = {}
        if self._certificate is not None:
            tls["ssl"] = self._certificate.value
            tls["ssl_handshake_timeout"] = self._handshake_timeout_s
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: protocol, connection, **tls)
        except Exception as exc:  # whatever it is, the connection must be counted
            foreseen = isinstance(exc, OSError)
            log.log(
                logging.DEBUG if foreseen else logging.ERROR,
                "a connection could not be opened: %r",
                exc,
                exc_info=None if foreseen else exc,
            )
        finally:
            if protocol.transport is None:  # it was never told of the connection, nor of its end
                connection.close()
                self._channel.count_closed()

    def _protocol(self) -> Connection:
        return Connection(self._common, self.config, self.server_state, self.lifespan.state)

    def _drain(self) -> None:
        self._told = True
        self._app.state.service.state.draining = True
        with contextlib.suppress(OSError):  # the supervisor is gone: the channel says so
            self._pipe.send("draining")


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
        proxy_headers=False,  # nobody asks for the client's address
        timeout_keep_alive=settings.http.keep_alive_s,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
    )


def run(
    settings: Settings,
    channel: WorkerChannel,
    pulse: Pulse,
    pipe: Pipe,
    last_good: Mapping[FileName, LastGood],
) -> None:
    """Entry point of the process; exits 0 after draining, 1 when the settings cannot be served."""
    logs.configure(settings.log_level)
    # Imported here: the supervisor imports this module too, and is smaller without the service.
    from app.main import create_app

    try:
        certificate = open_certificate(settings, last_good)
        app = create_app(settings, last_good=last_good, listener=Reporter(pipe))
    except ConfigError as exc:
        log.error("%s", exc)  # a sentence for a person, not a traceback
        sys.exit(1)
    if certificate is not None:
        app.state.service.files.add(certificate)
    gc.collect()
    gc.freeze()  # what is there now stays: no later collection looks through it
    trim_heap()
    WorkerServer(settings, app, channel, pulse, pipe, certificate).run([])
