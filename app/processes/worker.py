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
from typing import TYPE_CHECKING, Any

import uvicorn

from app.admin.api_description import leave_description
from app.errors import ConfigError
from app.http.connections import BodyMemory, Common, Connection, check_all
from app.http.tls import open_certificate
from app.processes.connection_dispatcher import WorkerChannel
from app.processes.messages import Sender
from app.processes.watchdog import Heartbeat
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
    """Receives its connections from the supervisor and tells it when it is ready or draining.

    On SIGTERM it reports that it is draining and continues to answer. When the supervisor sends no
    more connections, it finishes its requests and ends.

    Without SIGTERM the worker is being replaced, and it lets its clients finish: answers carry
    `Connection: close`, and an idle connection stays open for its usual time, because a request
    may already be on its way.
    """

    def __init__(
        self,
        settings: Settings,
        app: FastAPI,
        channel: WorkerChannel,
        heartbeat: Heartbeat,
        supervisor: Sender,
        certificate: WatchedFile[ssl.SSLContext] | None = None,
    ) -> None:
        super().__init__(config_for(app, settings))
        self._limits = settings.http
        self._certificate = certificate
        self._handshake_timeout_s = settings.tls_handshake_timeout_s
        self._app = app
        self._channel = channel
        self._heartbeat = heartbeat
        self._supervisor = supervisor
        service: Service = app.state.service
        self._common = Common(
            limits=settings.http,
            # A body of the largest allowed size always fits.
            memory=BodyMemory(
                max(settings.http.max_bodies_bytes, 2 * settings.limits.max_body_bytes)
            ),
            state=service.state,
            rejections=service.metrics.rejections,
            on_closed=channel.count_closed,
            direct=getattr(app.state, "direct", None),
        )
        self._opening: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[Any] | None = None
        self._ready = False
        self._terminated = False  # by SIGTERM
        self._end_by: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then report to the supervisor."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        self._channel.sock.setblocking(False)
        loop.add_reader(self._channel.sock.fileno(), self._receive)
        service: Service = self._app.state.service
        ready = await service.not_ready_reason() is None
        self._supervisor.status("ready" if ready else "not ready")
        if (service.access, service.audit, service.upstream) != (None, None, None):
            self._ready = ready
            self._watching = loop.create_task(repeat("reporting readiness", self._watch, WATCH_S))

    async def _watch(self) -> None:
        """Report changes of readiness to the supervisor, whose `/readyz` covers all workers."""
        service: Service = self._app.state.service
        if service.state.draining:
            return
        ready = await service.not_ready_reason() is None
        if ready != self._ready:
            self._supervisor.status("ready" if ready else "not ready")
            self._ready = ready

    async def on_tick(self, counter: int) -> bool:
        """Send a heartbeat ten times a second, and check for slow clients once a second."""
        self._heartbeat.beat(self._app.state.service.running_s())
        now = asyncio.get_running_loop().time()
        if self._end_by is not None:
            connections = self.server_state.connections or self._opening
            self.should_exit = self._terminated or not connections or now >= self._end_by
        if counter % TICKS_PER_CHECK == 0:
            check_all(self.server_state, now)
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave other signals to the supervisor; `startup` handles SIGTERM."""
        yield

    def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (received := self._channel.receive()) is not None:
                for connection in received:
                    task = loop.create_task(self._open(connection))
                    self._opening.add(task)  # the loop itself holds tasks weakly
                    task.add_done_callback(self._opening.discard)
        except BlockingIOError:
            return
        loop.remove_reader(self._channel.sock.fileno())
        self._app.state.service.state.draining = True
        idle_s = 0 if self._terminated else self._limits.keep_alive_s + 2 * WATCH_S
        self._end_by = loop.time() + idle_s

    async def _open(self, connection: socket.socket) -> None:
        protocol = self._protocol()
        tls: dict[str, Any] = {}
        if self._certificate is not None:
            tls["ssl"] = self._certificate.value
            tls["ssl_handshake_timeout"] = self._handshake_timeout_s
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: protocol, connection, **tls)
        except Exception as exc:  # of any kind: the connection must be counted as closed
            expected = isinstance(exc, OSError)
            log.log(
                logging.DEBUG if expected else logging.ERROR,
                "connection could not be opened: %r",
                exc,
                exc_info=None if expected else exc,
            )
        finally:
            if protocol.transport is None:  # `connection_made` was not called
                connection.close()
                self._channel.count_closed()

    def _protocol(self) -> Connection:
        return Connection(self._common, self.config, self.server_state, self.lifespan.state)

    def _drain(self) -> None:
        self._terminated = True
        self._app.state.service.state.draining = True
        self._supervisor.status("draining")


def config_for(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Uvicorn on uvloop and httptools, without access log and `Server` header."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the client address is not used
        timeout_keep_alive=settings.http.keep_alive_s,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
    )


def run(
    settings: Settings,
    channel: WorkerChannel,
    heartbeat: Heartbeat,
    messages: socket.socket,
    last_good: Mapping[FileName, LastGood],
) -> None:
    """Entry point of the process; exits 0 after draining, 1 if the settings cannot be served."""
    logs.configure(settings.log_level, settings.log_format)
    # Imported here: the supervisor imports this module too, but does not need the service.
    from app.main import create_app

    supervisor = Sender(messages)
    try:
        certificate = open_certificate(settings, last_good)
        app = create_app(settings, last_good=last_good, listener=supervisor)
    except ConfigError as exc:
        log.error("%s", exc)  # without a traceback: the settings are wrong, not the program
        sys.exit(1)
    if certificate is not None:
        app.state.service.files.add(certificate)
    if settings.console:
        with contextlib.suppress(OSError):  # a full disk: the console says that there is none
            leave_description(settings.model_dir, app.openapi)
    gc.collect()
    gc.freeze()  # later collections need not scan what stays for good
    trim_heap()
    WorkerServer(settings, app, channel, heartbeat, supervisor, certificate).run([])
