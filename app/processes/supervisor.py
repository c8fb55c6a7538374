"""The parent process: keeps N workers alive and serves the admin port.

It runs no model, and workers are not forked from it (see `worker_fork_server.py`). Metrics are in
files that outlive a worker, so counters never go down.
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
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from app.admin.application import AdminServer, create_admin
from app.admin.console.preview_process import PreviewProcess
from app.errors import ConfigError, Unavailable
from app.http.connections import refusal
from app.processes import worker
from app.processes.connection_dispatcher import ConnectionDispatcher
from app.processes.last_good_files import LastGoodFiles
from app.processes.messages import Message, Receiver, Status, message_pair
from app.processes.snapshot import copy_bundle
from app.processes.watchdog import Watchdog
from app.processes.worker_fork_server import Child, WorkerForkServer
from app.settings import Settings
from app.system.background import Backoff, repeat, start
from app.system.descriptors import connections_within, raise_limit
from app.system.file_watcher import FileName
from app.system.threads import run_in_daemon_thread
from app.telemetry.incidents import End, Incidents

RESTART_S = 0.5
RESTART_CAP_S = 15.0  # for a worker that ends repeatedly
STABLE_S = 10.0  # a worker that has served this long is restarted without further delay
POLL_S = 0.05
GRACE_S = 5  # beyond the time limits of the worker itself
FULL = "server has reached its connection limit"
log = logging.getLogger("scumble")


@dataclass
class _Worker:
    process: Child
    messages: Receiver
    started_at: float
    loaded: bool = False
    loaded_at: float = 0.0
    ready: bool = False
    retiring: bool = False
    end: End = "ended"


class Supervisor:
    """Starts, watches, restarts, replaces and drains the workers.

    Each worker has a number. The numbers of two generations do not overlap, so that a reload can
    start new workers beside the old ones.

    Args:
        settings: original settings.
        served: the same settings with a copy of the bundle, which workers load.
        public: socket of the public port.
        admin: socket of the admin port.
        metrics_dir: folder for the workers' metrics.
        copies: folder for copies of bundles.
        fork_server: starts worker processes.
        load_s: limit for a worker to load.
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
        load_s: float,
    ) -> None:
        self._settings = settings
        self._load_s = load_s
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
            self._watchdog.slow,
            max_connections=settings.http.max_connections or within,
            max_held=within,
            refusals=self._incidents.connections,
            answer=b"" if settings.tls_cert else refusal(Unavailable(FULL)),
        )
        self._serving = range(settings.worker_count)
        self._new_loaded: asyncio.Future[bool] | None = None  # result of the running reload
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[object]] = set()
        self._next_reload: asyncio.Task[object] | None = None
        self._backoff = defaultdict[int, Backoff](lambda: Backoff(RESTART_S, RESTART_CAP_S))
        self._preview = PreviewProcess(served) if settings.console else None
        self._files = LastGoodFiles()
        self._admin = admin
        self._metrics_dir = metrics_dir
        self._workers: dict[int, _Worker] = {}
        self._forking: dict[int, asyncio.Task[object]] = {}
        self._unwanted: set[int] = set()  # those of `_forking` to kill as soon as they exist
        self._tasks: set[asyncio.Task[object]] = set()
        self._stopping = asyncio.Event()
        self._was_ready = False
        self._exit_code = 0

    def ready(self) -> bool:
        """Whether every worker is ready and the service is not draining."""
        return not self._stopping.is_set() and all(map(self._is_ready, self._serving))

    def pids(self) -> dict[int, int]:
        """Process ids by worker number."""
        return {number: child.process.pid for number, child in sorted(self._workers.items())}

    def connections(self) -> dict[int, int]:
        """Open connections by worker number."""
        return self._dispatcher.open_connections()

    def model_dir(self) -> Path:
        """Folder of the served bundle."""
        return self._served.model_dir

    def stale(self) -> list[FileName]:
        """Files that some worker has failed to reload for longer than the settings allow."""
        return self._files.stale(self._settings.reload_failure_s)

    async def run(self) -> int:
        """Serve until a signal, or until a worker cannot start; return the exit code."""
        loop = asyncio.get_running_loop()
        for stop in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(stop, self._stopping.set)
        # On a terminal, SIGHUP means that the terminal was closed.
        on_hangup = self._stopping.set if os.isatty(2) else self._reload_soon
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        server = AdminServer(
            create_admin(self, self._metrics_dir, self._settings, self._incidents, self._preview),
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
        if self._preview is not None:
            self._preview.close()
        server.should_exit = True
        await asyncio.wait({serving})
        return self._exit_code

    async def reload(self) -> bool:
        """Replace all workers by ones that serve the current bundle; return whether this worked.

        Old workers serve until all new ones are ready, then finish their requests. One reload runs
        and at most one waits, which has not read the bundle yet; all further callers share the
        result of the waiting one.
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
            done = self._was_ready and await self._replace()
        self._incidents.reloads["done" if done else "failed"].inc()
        if done:
            log.info("reloaded", extra={"workers": len(self._serving)})
        else:
            log.error("reload failed; keeping the current model")
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
        if self._preview is not None:
            self._preview.use(served)
        for number in new:
            self._activate_or_start(number)
        for number in old:
            self._retire(number)
        await run_in_daemon_thread(shutil.rmtree, replaced, True)
        return True

    async def _prepare(self, numbers: range) -> Settings | None:
        """Start new workers from a new copy; return its settings, or None if that failed."""
        copy = self._copies / secrets.token_hex(8)
        try:
            # On a daemon thread, so that a disk that hangs cannot prevent the end of this process.
            served = await run_in_daemon_thread(copy_bundle, self._settings, copy)
            if await self._load(numbers, served):
                return served
        except ConfigError as exc:
            log.error("%s", exc)
        except Exception:
            log.exception("new workers cannot be started")
        await run_in_daemon_thread(shutil.rmtree, copy, True)
        return None

    async def _load(self, numbers: range, served: Settings) -> bool:
        """Start workers beside those that serve; return whether all have loaded."""
        self._new_loaded = asyncio.get_running_loop().create_future()
        for number in numbers:
            self._start(number, served)
        try:
            done = await asyncio.wait_for(self._new_loaded, self._load_s)
        except TimeoutError:
            log.error("new workers are not ready after %d s", self._load_s)
            done = False
        finally:
            self._new_loaded = None
        if not done:
            for number in numbers:
                self._discard(number)
        return done

    def _discard(self, number: int) -> None:
        """End a worker that does not serve yet, as soon as its process exists."""
        if number in self._forking:
            self._unwanted.add(number)
        elif number in self._workers:
            self._workers[number].process.send_signal(signal.SIGKILL)

    def _start(self, number: int, served: Settings) -> None:
        if self._stopping.is_set():
            return
        self._forking[number] = start("forking", self._fork(number, served), self._tasks)

    async def _fork(self, number: int, served: Settings) -> None:
        messages: Receiver | None = None
        try:
            messages, theirs = message_pair()
            with theirs:
                channel = self._dispatcher.add(number)
                heartbeat = self._watchdog.heartbeat(number)
                with channel.sock:
                    process = await self._fork_server.fork(
                        f"worker-{number}",
                        worker.run,
                        served,
                        channel,
                        heartbeat,
                        theirs,
                        self._files.current(),
                    )
        except Exception as exc:  # noqa: BLE001  # every failure is retried
            if messages is not None:
                messages.close()
            self._dispatcher.remove(number)
            self._unwanted.discard(number)
            if not self._stopping.is_set():
                log.error("worker cannot be forked: %r", exc, extra={"worker": number})
            self._schedule_restart(number, loaded=False)
            return
        finally:
            del self._forking[number]
        loop = asyncio.get_running_loop()
        self._workers[number] = _Worker(process, messages, loop.time())
        loop.add_reader(messages.fileno(), self._receive, number)
        loop.add_reader(process.sentinel, self._ended, number)
        if number in self._unwanted or self._stopping.is_set():
            process.send_signal(signal.SIGKILL)
        self._unwanted.discard(number)

    def _receive(self, number: int) -> None:
        child = self._workers[number]
        try:
            message = child.messages.receive()
        except BlockingIOError:
            return
        except ValueError as exc:
            log.error("%s; killing it", exc, extra={"worker": number})
            child.process.send_signal(signal.SIGKILL)
            message = None
        if message is None:
            asyncio.get_running_loop().remove_reader(child.messages.fileno())
        else:
            self._handle(number, child, message)

    def _handle(self, number: int, child: _Worker, message: Message) -> None:
        if not isinstance(message, Status):
            self._files.update(number, message)
            return
        if message.state == "draining":
            if not self._stopping.is_set():  # the signal went to this worker alone
                self._retire_worker(number, child)
            return
        child.ready = message.state == "ready"
        if not child.loaded:
            child.loaded = True
            child.loaded_at = asyncio.get_running_loop().time()
            if number in self._serving:
                self._activate(number)
            else:
                self._check_new()
        if self.ready() and not self._was_ready:
            self._was_ready = True
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
        self._dispatcher.remove(number)
        self._files.remove(number)
        loop = asyncio.get_running_loop()
        loop.remove_reader(child.process.sentinel)
        loop.remove_reader(child.messages.fileno())
        child.messages.close()
        child.process.close()
        with suppress(OSError):  # otherwise its gauges remain, which is no reason to fail
            mark_process_dead(child.process.pid, self._metrics_dir)  # type: ignore[no-untyped-call]  # no hints there
        if child.loaded and loop.time() - child.loaded_at >= STABLE_S:
            self._backoff[number].reset()
        delay_s = self._schedule_restart(number, loaded=child.loaded)
        if delay_s is not None:
            self._incidents.restarts[child.end].inc()
            start("logging an end", self._log_ended(number, child, delay_s), self._tasks)

    async def _log_ended(self, number: int, child: _Worker, delay_s: float) -> None:
        exit_code = await child.process.exit_code()
        log.error(
            "worker %s, starting another",
            child.end,
            extra={"worker": number, "exit_code": exit_code, "after_s": delay_s},
        )

    def _schedule_restart(self, number: int, *, loaded: bool) -> float | None:
        """Replace a worker that has ended; return the delay, or None if it is not replaced."""
        if self._stopping.is_set():
            return None
        if number not in self._serving:
            if self._new_loaded is not None and not self._new_loaded.done():
                self._new_loaded.set_result(False)
            return None
        if not self._was_ready and not loaded:
            # No worker was ever ready: the settings are wrong, and another start would fail too.
            self._exit_code = 1
            self._stopping.set()
            return None
        delay_s = self._backoff[number]()
        asyncio.get_running_loop().call_later(delay_s, self._restart, number)
        return delay_s

    def _restart(self, number: int) -> None:
        if number in self._serving:  # unless a reload has replaced it in the meantime
            self._start(number, self._served)

    def _is_ready(self, number: int) -> bool:
        child = self._workers.get(number)
        return (
            child is not None
            and child.ready
            and not child.retiring
            and not self._watchdog.slow(number)
        )

    def _activate(self, number: int) -> None:
        self._watchdog.start(number)
        self._dispatcher.activate(number)

    def _check_new(self) -> None:
        """Settle the reload once all its workers have loaded."""
        new = [child for number, child in self._workers.items() if number not in self._serving]
        if (
            self._new_loaded is not None
            and not self._new_loaded.done()
            and len(new) == len(self._serving)
            and all(child.loaded for child in new)
        ):
            self._new_loaded.set_result(True)

    def _activate_or_start(self, number: int) -> None:
        if number in self._workers:
            self._activate(number)
        else:  # it has ended since it loaded
            self._start(number, self._served)

    def _retire(self, number: int) -> None:
        """Send the worker no more connections; it finishes its requests and ends."""
        child = self._workers.get(number)
        if child is None:
            self._discard(number)
        else:
            self._retire_worker(number, child)

    def _retire_worker(self, number: int, child: _Worker) -> None:
        child.retiring = True
        self._dispatcher.retire(number)
        allowed = self._settings.http.keep_alive_s + self._settings.shutdown_timeout_s + GRACE_S
        asyncio.get_running_loop().call_later(allowed, child.process.send_signal, signal.SIGKILL)

    async def _watch(self) -> None:
        """Kill workers that hang or do not load; they are then replaced like any that ends."""
        loop = asyncio.get_running_loop()
        for number, child in self._workers.items():
            if child.loaded:
                hung = not child.retiring and self._watchdog.hung(number)
            elif hung := loop.time() - child.started_at > self._load_s:
                log.error(
                    "worker has not loaded within %d s, killing it",
                    self._load_s,
                    extra={"worker": number},
                )
            if hung:
                child.end = "hung"
                child.process.send_signal(signal.SIGKILL)

    def _admin_ended(self, serving: asyncio.Task[None]) -> None:
        """Exit: without the admin port, the service can be neither monitored nor reloaded."""
        if not self._stopping.is_set():
            log.error("admin server ended", exc_info=serving.exception())
            self._exit_code = 1
            self._stopping.set()

    async def _stop(self) -> None:
        log.info("draining", extra={"workers": len(self._workers)})
        self._fork_server.close()
        for child in self._workers.values():
            child.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(self._settings.drain_delay_s)
        self._dispatcher.close()
        deadline = asyncio.get_running_loop().time() + self._settings.shutdown_timeout_s + GRACE_S
        while (self._workers or self._forking) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  # _ended empties it
            await asyncio.sleep(0.02)
        for number, child in self._workers.items():
            log.error(
                "worker does not end within the time limit, killing it", extra={"worker": number}
            )
            child.process.send_signal(signal.SIGKILL)
            self._exit_code = 1
        self._fork_server.end()  # otherwise this process would wait for it at exit
        log.info("stopped")


def _url(listener: socket.socket, scheme: str = "http") -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
