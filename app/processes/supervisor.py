"""The parent process: binds the ports, keeps N workers alive, serves the admin port.

It runs no model. Workers are not forked from it, so each starts clean (`worker_fork_server.py`).
Metrics live in files that outlast a worker, so counters never go down.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import signal
import socket
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from app.admin.application import AdminServer, create_admin
from app.admin.console.helper import Helper
from app.errors import ConfigError, Unavailable
from app.http.connections import refusal
from app.processes import worker
from app.processes.connection_dispatcher import ConnectionDispatcher
from app.processes.last_good import Chunk, Failing, LastGoodFiles
from app.processes.snapshot import take
from app.processes.watchdog import Watchdog
from app.processes.worker_fork_server import Child, WorkerForkServer
from app.settings import Settings
from app.system.background import Backoff, repeat, start
from app.system.descriptors import connections_within, raise_limit
from app.system.file_watcher import FileName
from app.system.threads import run_in_daemon_thread
from app.telemetry.incidents import End, Incidents

RESTART_S = 0.5
RESTART_CAP_S = 15.0  # for a worker that ends again and again
WELL_S = 10.0  # one that has served for so long is started again at once
LOAD_S = 300  # for a worker to load
POLL_S = 0.05
GRACE_S = 5  # beyond what a worker allows itself
FULL = "the server has as many connections as it may"
log = logging.getLogger("scumble")


@dataclass
class _Worker:
    process: Child
    pipe: Connection
    begun: float
    loaded: bool = False
    loaded_at: float = 0.0
    ready: bool = False
    leaving: bool = False
    end: End = "ended"


class Supervisor:
    """Starts, watches, restarts, replaces and drains the workers.

    Workers have numbers; those of two generations do not overlap, so that a reload can start new
    ones beside the old.

    Args:
        settings: as given.
        served: the same with a copy of the bundle, which is what workers load.
        public: socket of the public port.
        admin: of the admin port.
        metrics_dir: where workers keep their metrics.
        copies: where copies of bundles go.
        fork_server: where worker processes come from.
    """

    def __init__(
        self,
        settings: Settings,
        served: Settings,
        public: socket.socket,
        admin: socket.socket,
        metrics_dir: str,
        copies: Path,
        fork_server: WorkerForkServer,
    ) -> None:
        self._settings = settings
        self._served = served
        self._copies = copies
        self._fork_server = fork_server
        self._public = public
        self._watchdog = Watchdog(2 * settings.worker_count, settings.watchdog_s)
        self._incidents = Incidents()
        within = connections_within(raise_limit())
        self._dispatcher = ConnectionDispatcher(
            public,
            2 * settings.worker_count,
            self._watchdog.late,
            max_connections=settings.http.max_connections or within,
            max_held=within,
            refusals=self._incidents.connections,
            answer=b"" if settings.tls_cert else refusal(Unavailable(FULL)),
        )
        self._serving = range(settings.worker_count)
        self._arrived: asyncio.Future[bool] | None = None
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[object]] = set()
        self._next_reload: asyncio.Task[object] | None = None
        self._backoff = defaultdict[int, Backoff](lambda: Backoff(RESTART_S, RESTART_CAP_S))
        self._helper = Helper(served) if settings.console else None
        self._files = LastGoodFiles()
        self._admin = admin
        self._metrics_dir = metrics_dir
        self._workers: dict[int, _Worker] = {}
        self._forking: dict[int, asyncio.Task[object]] = {}
        self._unwanted: set[int] = set()  # of those: the numbers that shall end once they are there
        self._tasks: set[asyncio.Task[object]] = set()
        self._stopping = asyncio.Event()
        self._said_ready = False
        self._exit_code = 0

    def ready(self) -> bool:
        """Every worker is ready and nobody is draining."""
        return not self._stopping.is_set() and all(map(self._well, self._serving))

    def pids(self) -> dict[int, int]:
        """Process id by worker number."""
        return {number: child.process.pid for number, child in sorted(self._workers.items())}

    def connections(self) -> dict[int, int]:
        """Open connections by worker number."""
        return self._dispatcher.open_connections()

    def model_dir(self) -> Path:
        """Where the bundle is that is served."""
        return self._served.model_dir

    def stale(self) -> list[FileName]:
        """Files that some worker could not read anew for longer than the settings allow."""
        return self._files.stale(self._settings.reload_failure_s)

    async def run(self) -> int:
        """Serve until a signal or a worker that cannot start; gives the exit code."""
        loop = asyncio.get_running_loop()
        for stop in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(stop, self._stopping.set)
        # On a terminal this signal says that the terminal is gone.
        on_hangup = self._stopping.set if os.isatty(2) else self._reload_soon
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        server = AdminServer(
            create_admin(self, self._metrics_dir, self._settings, self._incidents, self._helper),
            self._settings,
            self._incidents,
        )
        for number in self._serving:
            self._start(number, self._served)
        serving = asyncio.create_task(server.serve([self._admin]))
        serving.add_done_callback(self._admin_ended)
        every_s = min(1.0, self._watchdog.allowed_s / 4)
        watching = asyncio.create_task(repeat("watching workers", self._watch, every_s))
        await self._stopping.wait()
        for task in (watching, *self._reloads):
            task.cancel()
        await self._stop()
        if self._helper is not None:
            self._helper.close()
        server.should_exit = True
        await asyncio.wait({serving})
        return self._exit_code

    async def reload(self) -> bool:
        """Replace all workers by ones that serve the bundle as it is now, or keep the old ones.

        Gives whether they were replaced. Old ones go on until all new ones are ready, and then
        finish what they have. At most one reload runs and one waits for it: whoever asks meanwhile
        gets the result of the one that waits, which has not looked at the bundle yet.
        """
        task = self._reload_soon()
        await asyncio.wait({task})
        return not task.cancelled() and task.result() is True

    def _reload_soon(self) -> asyncio.Task[object]:
        if self._next_reload is None:
            self._next_reload = start("reload", self._reload(), self._reloads)
        return self._next_reload

    async def _reload(self) -> bool:
        async with self._reloading:
            self._next_reload = None
            while (self._workers.keys() | self._forking.keys()) - set(self._serving):  # noqa: ASYNC110  # _ended removes them
                await asyncio.sleep(POLL_S)
            done = self._said_ready and await self._replace()
        self._incidents.reloads["done" if done else "failed"].inc()
        if done:
            log.info("reloaded", extra={"workers": len(self._serving)})
        else:
            log.error("reload failed, all goes on as before")
        return done

    async def _replace(self) -> bool:
        old = self._serving
        new = range(len(old)) if old.start else range(len(old), 2 * len(old))
        served = await self._prepare(new)
        if served is None:
            return False
        replaced = self._served.model_dir
        self._served, self._serving = served, new
        self._backoff.clear()
        if self._helper is not None:
            self._helper.use(served)
        for number in new:
            self._activate_or_start(number)
        for number in old:
            self._retire(number)
        await run_in_daemon_thread(shutil.rmtree, replaced, True)
        return True

    async def _prepare(self, numbers: range) -> Settings | None:
        """Settings of workers that are ready to serve, or None, which leaves nothing behind."""
        copy = self._copies / secrets.token_hex(8)
        try:
            # A disk that hangs must not keep this process from ending.
            served = await run_in_daemon_thread(take, self._settings, copy)
            if await self._load(numbers, served):
                return served
        except ConfigError as exc:
            log.error("%s", exc)
        except Exception:
            log.exception("the new workers cannot be started")
        await run_in_daemon_thread(shutil.rmtree, copy, True)
        return None

    async def _load(self, numbers: range, served: Settings) -> bool:
        """Start workers beside those that serve; whether all could load."""
        self._arrived = asyncio.get_running_loop().create_future()
        for number in numbers:
            self._start(number, served)
        try:
            done = await asyncio.wait_for(self._arrived, LOAD_S)
        except TimeoutError:
            log.error("the new workers are not ready after %d s", LOAD_S)
            done = False
        finally:
            self._arrived = None
        if not done:
            for number in numbers:
                self._discard(number)
        return done

    def _discard(self, number: int) -> None:
        """End a worker that serves nobody yet, as soon as there is one."""
        if number in self._forking:
            self._unwanted.add(number)
        elif number in self._workers:
            self._workers[number].process.send(signal.SIGKILL)

    def _start(self, number: int, served: Settings) -> None:
        if self._stopping.is_set():
            return
        self._forking[number] = start("forking", self._fork(number, served), self._tasks)

    async def _fork(self, number: int, served: Settings) -> None:
        ours: Connection | None = None
        try:
            ours, theirs = Pipe()
            with theirs:
                channel = self._dispatcher.channel(number)
                pulse = self._watchdog.pulse(number)
                with channel.channel:
                    process = await self._fork_server.fork(
                        f"worker-{number}",
                        worker.run,
                        served,
                        channel,
                        pulse,
                        theirs,
                        self._files.given(),
                    )
        except Exception as exc:  # noqa: BLE001  # whatever it is, it must be tried again
            if ours is not None:
                ours.close()
            self._dispatcher.gone(number)
            self._unwanted.discard(number)
            if not self._stopping.is_set():
                log.error("a worker cannot be forked: %r", exc, extra={"worker": number})
            self._lost(number, loaded=False)
            return
        finally:
            del self._forking[number]
        loop = asyncio.get_running_loop()
        self._workers[number] = _Worker(process, ours, loop.time())
        loop.add_reader(ours.fileno(), self._heard, number)
        loop.add_reader(process.sentinel, self._ended, number)
        if number in self._unwanted or self._stopping.is_set():
            process.send(signal.SIGKILL)
        self._unwanted.discard(number)

    def _heard(self, number: int) -> None:
        child = self._workers[number]
        try:
            said = child.pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(child.pipe.fileno())
            return
        if isinstance(said, Chunk | Failing):
            self._files.heard(number, said)
            return
        if said == "draining":
            if not self._stopping.is_set():  # somebody wants this one to end
                self._leave(number, child)
            return
        child.ready = said == "ready"
        if not child.loaded:
            child.loaded = True
            child.loaded_at = asyncio.get_running_loop().time()
            if number in self._serving:
                self._activate(number)
            else:
                self._arrive()
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
        self._dispatcher.gone(number)
        self._files.gone(number)
        loop = asyncio.get_running_loop()
        loop.remove_reader(child.process.sentinel)
        loop.remove_reader(child.pipe.fileno())
        child.pipe.close()
        child.process.close()
        with suppress(OSError):  # its gauges stay a while: no reason not to start another
            mark_process_dead(child.process.pid, self._metrics_dir)  # type: ignore[no-untyped-call]  # no hints there
        if child.loaded and loop.time() - child.loaded_at >= WELL_S:
            self._backoff[number].reset()
        delay_s = self._lost(number, loaded=child.loaded)
        if delay_s is not None:
            self._incidents.restarts[child.end].inc()
            start("logging an end", self._say_ended(number, child, delay_s), self._tasks)

    async def _say_ended(self, number: int, child: _Worker, delay_s: float) -> None:
        exit_code = await child.process.exit_code()
        log.error(
            "worker %s, starting another",
            child.end,
            extra={"worker": number, "exit_code": exit_code, "after_s": delay_s},
        )

    def _lost(self, number: int, *, loaded: bool) -> float | None:
        """A worker is not there; in how many seconds another will be started, if it will."""
        if self._stopping.is_set():
            return None
        if number not in self._serving:
            if self._arrived is not None and not self._arrived.done():
                self._arrived.set_result(False)
            return None
        if not self._said_ready and not loaded:
            # None ever was: the settings are at fault, and starting it again would fail as well.
            self._exit_code = 1
            self._stopping.set()
            return None
        delay_s = self._backoff[number]()
        asyncio.get_running_loop().call_later(delay_s, self._restart, number)
        return delay_s

    def _restart(self, number: int) -> None:
        if number in self._serving:  # no reload has replaced it meanwhile
            self._start(number, self._served)

    def _well(self, number: int) -> bool:
        child = self._workers.get(number)
        return (
            child is not None
            and child.ready
            and not child.leaving
            and not self._watchdog.late(number)
        )

    def _activate(self, number: int) -> None:
        self._watchdog.start(number)
        self._dispatcher.activate(number)

    def _arrive(self) -> None:
        """One of the new workers is loaded."""
        new = [child for number, child in self._workers.items() if number not in self._serving]
        if (
            self._arrived is not None
            and not self._arrived.done()
            and len(new) == len(self._serving)
            and all(child.loaded for child in new)
        ):
            self._arrived.set_result(True)

    def _activate_or_start(self, number: int) -> None:
        if number in self._workers:
            self._activate(number)
        else:  # it ended in the moment between
            self._start(number, self._served)

    def _retire(self, number: int) -> None:
        """No more connections: the worker finishes what it has, and ends."""
        child = self._workers.get(number)
        if child is None:
            self._discard(number)
        else:
            self._leave(number, child)

    def _leave(self, number: int, child: _Worker) -> None:
        child.leaving = True
        self._dispatcher.leave(number)
        allowed = self._settings.http.keep_alive_s + self._settings.shutdown_timeout_s + GRACE_S
        asyncio.get_running_loop().call_later(allowed, child.process.send, signal.SIGKILL)

    async def _watch(self) -> None:
        """Kill workers that hang or never load; they are replaced like any that ends."""
        loop = asyncio.get_running_loop()
        for number, child in self._workers.items():
            if child.loaded:
                hung = not child.leaving and self._watchdog.hung(number)
            elif hung := loop.time() - child.begun > LOAD_S:
                log.error(
                    "worker has not loaded for %d s, killing it",
                    LOAD_S,
                    extra={"worker": number},
                )
            if hung:
                child.end = "hung"
                child.process.send(signal.SIGKILL)

    def _admin_ended(self, serving: asyncio.Task[None]) -> None:
        """Nobody can watch or reload a service without it: end, so that it is started again."""
        if not self._stopping.is_set():
            log.error("the admin port has ended", exc_info=serving.exception())
            self._exit_code = 1
            self._stopping.set()

    async def _stop(self) -> None:
        log.info("draining", extra={"workers": len(self._workers)})
        self._fork_server.close()
        for child in self._workers.values():
            child.process.send(signal.SIGTERM)
        await asyncio.sleep(self._settings.drain_delay_s)
        self._dispatcher.close()
        deadline = asyncio.get_running_loop().time() + self._settings.shutdown_timeout_s + GRACE_S
        while (self._workers or self._forking) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  # _ended empties it
            await asyncio.sleep(0.02)
        for number, child in self._workers.items():
            log.error("worker does not end, killing it", extra={"worker": number})
            child.process.send(signal.SIGKILL)
            self._exit_code = 1
        self._fork_server.end()  # or this process would wait at its end for what that one forked
        log.info("stopped")


def _url(listener: socket.socket, scheme: str = "http") -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
