"""The parent process: binds the ports, keeps N workers alive, serves the admin port.

It runs no model. Workers are spawned, not forked, so each starts clean; metrics live in files that
outlast a worker, so counters never go down.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import uvicorn
from prometheus_client.multiprocess import mark_process_dead

from app import logs, worker
from app.dealer import Dealer
from app.errors import ConfigError
from app.incidents import End, Incidents
from app.settings import Settings
from app.tls import open_certificate
from app.watchdog import Watchdog

RESTART_S = 0.5
log = logging.getLogger("scumble")


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C; gives the exit code.

    Raises:
        ConfigError: a port cannot be bound, or the certificate cannot be used.
    """
    logs.configure(settings.log_level)
    open_certificate(settings)  # the workers open it themselves; a wrong one is better said once
    with tempfile.TemporaryDirectory(prefix="scumble-metrics-") as folder:
        # Workers inherit it; prometheus_client reads it when it is imported there.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        public = bind(settings.host, settings.port)
        admin = bind(settings.admin_host, settings.admin_port)
        return asyncio.run(Supervisor(settings, public, admin, folder).run())


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: connections are refused until a worker is ready.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Said to be TCP, or asyncio leaves Nagle's delay on: 40 ms for an answer in two writes.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot bind {host} port {port}: {exc.strerror or exc}") from exc
    return listener


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    seated: bool = False
    ready: bool = False
    leaving: bool = False
    end: End = "ended"


class AdminServer(uvicorn.Server):
    """uvicorn inside the supervisor's loop; signals are the supervisor's."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals alone."""
        yield


class Supervisor:
    """Starts, watches, restarts and drains the workers."""

    def __init__(
        self, settings: Settings, public: socket.socket, admin: socket.socket, metrics_dir: str
    ) -> None:
        self._settings = settings
        self._public = public
        self._watchdog = Watchdog(settings.worker_count, settings.watchdog_s)
        self._dealer = Dealer(public, settings.worker_count, self._watchdog.late)
        self._incidents = Incidents()
        self._admin = admin
        self._metrics_dir = metrics_dir
        self._workers: dict[int, _Worker] = {}
        self._stopping = asyncio.Event()
        self._said_ready = False
        self._exit_code = 0

    def ready(self) -> bool:
        """Every worker is ready and nobody is draining."""
        workers = self._workers.values()
        return (
            not self._stopping.is_set()
            and len(workers) == self._settings.worker_count
            and all(child.ready and not child.leaving for child in workers)
            and not any(map(self._watchdog.late, self._workers))
        )

    def pids(self) -> dict[int, int]:
        """Process id by worker number."""
        found = {number: child.process.pid for number, child in sorted(self._workers.items())}
        return {number: pid for number, pid in found.items() if pid is not None}

    def connections(self) -> dict[int, int]:
        """Open connections by worker number."""
        return self._dealer.open_connections()

    async def run(self) -> int:
        """Serve until a signal or a worker that cannot start; gives the exit code."""
        loop = asyncio.get_running_loop()
        for stop in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(stop, self._stopping.set)
        for number in range(self._settings.worker_count):
            self._start(number)
        from app.admin import create_admin  # here: the workers load meanwhile
        from app.console.helper import Helper

        helper = Helper(self._settings) if self._settings.console else None
        server = AdminServer(
            uvicorn.Config(
                create_admin(self, self._metrics_dir, self._settings, self._incidents, helper),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        serving = asyncio.create_task(server.serve([self._admin]))
        watching = asyncio.create_task(self._watch())
        await self._stopping.wait()
        watching.cancel()
        await self._stop()
        if helper is not None:
            helper.close()
        server.should_exit = True
        await serving
        return self._exit_code

    def _start(self, number: int) -> None:
        if self._stopping.is_set():
            return
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        hand = self._dealer.hand(number)
        process = context.Process(
            target=worker.run,
            args=(self._settings, hand, self._watchdog.pulse(number), theirs),
            name=f"worker-{number}",
        )
        process.start()
        theirs.close()
        hand.channel.close()
        self._workers[number] = _Worker(process, ours)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._heard, number)
        loop.add_reader(process.sentinel, self._ended, number)

    def _heard(self, number: int) -> None:
        child = self._workers[number]
        try:
            said = child.pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(child.pipe.fileno())
            return
        if said == "draining":
            if not self._stopping.is_set():  # somebody wants this one to end
                child.leaving = True
                self._dealer.leave(number)
            return
        child.ready = said == "ready"
        if not child.seated:
            child.seated = True
            self._watchdog.start(number)
            self._dealer.seat(number)
        if self.ready() and not self._said_ready:
            self._said_ready = True
            log.info(
                "ready",
                extra={
                    "url": _url(self._public, "https" if self._settings.tls_cert else "http"),
                    "admin": _url(self._admin),
                    "workers": len(self._workers),
                },
            )

    def _ended(self, number: int) -> None:
        child = self._workers.pop(number)
        self._dealer.leave(number)
        loop = asyncio.get_running_loop()
        loop.remove_reader(child.process.sentinel)
        loop.remove_reader(child.pipe.fileno())
        child.pipe.close()
        child.process.join()
        mark_process_dead(child.process.pid, self._metrics_dir)  # type: ignore[no-untyped-call]  # no hints there
        if self._stopping.is_set():
            return
        if not self._said_ready and not child.seated:
            # None ever was: the settings are at fault, and starting it again would fail as well.
            self._exit_code = 1
            self._stopping.set()
            return
        self._incidents.restarts[child.end].inc()
        log.error(
            "worker %s, starting another",
            child.end,
            extra={"worker": number, "exit_code": child.process.exitcode},
        )
        loop.call_later(RESTART_S, self._start, number)

    async def _watch(self) -> None:
        """Kill workers that hang; they are replaced like any that ends."""
        while True:
            await asyncio.sleep(min(1.0, self._watchdog.allowed_s / 4))
            for number, child in self._workers.items():
                if child.seated and not child.leaving and self._watchdog.hung(number):
                    child.end = "hung"
                    child.process.kill()

    async def _stop(self) -> None:
        log.info("draining", extra={"workers": len(self._workers)})
        for child in self._workers.values():
            child.process.terminate()
        await asyncio.sleep(self._settings.drain_delay_s)
        self._dealer.close()
        deadline = asyncio.get_running_loop().time() + self._settings.shutdown_timeout_s + 5
        while self._workers and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  # _ended empties it
            await asyncio.sleep(0.02)
        for number, child in self._workers.items():
            log.error("worker does not end, killing it", extra={"worker": number})
            child.process.kill()
            self._exit_code = 1
        log.info("stopped")


def _url(listener: socket.socket, scheme: str = "http") -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
