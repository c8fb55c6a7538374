"""A process that imports what workers need and forks them.

A worker takes longer to import its libraries than to load its model. The fork server imports them
once, while the supervisor is still starting, and the workers share that memory. It loads no model
and runs nothing else, so workers inherit modules only.

The supervisor's event loop never waits for the fork server. A fork is requested on a thread and has
a time limit; a fork server that exceeds it, or has ended, is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from app.errors import ConfigError
from app.inference.engine_selection import ENGINES, UPSTREAM, resolve
from app.settings import Settings
from app.system.threads import run_in_daemon_thread

MODULES = ("app.main", "app.processes.worker", "uvloop")
# A terminal or an init system may signal the whole process group; only the supervisor acts on it.
BLOCKED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
IMPORT_S = 60.0  # limit of the first fork, which waits for the imports
FORK_S = 5.0  # limit of each later fork
END_S = 1.0  # for a killed process to end, and for an exit code to arrive
UNKNOWN = 255  # multiprocessing's exit code of a process whose parent ended first
log = logging.getLogger("scumble")


class Child:
    """A worker process. Its parent is the fork server, which may end first.

    Attributes:
        pid: its process id.
        sentinel: descriptor that becomes readable when the process has ended.
    """

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None  # noqa: S101  # it was started
        self._process = process
        self.pid = process.pid
        self._closed = False
        self._pidfd: int | None = None
        with contextlib.suppress(OSError):  # it has already ended, or Linux is older than 5.3
            self._pidfd = os.pidfd_open(self.pid)
        self.sentinel = process.sentinel if self._pidfd is None else self._pidfd

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; does nothing if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            elif not self._closed:
                os.kill(self.pid, number)

    def close(self) -> None:
        """Release a process that has ended: its id may soon belong to another process."""
        self._closed = True
        if self._pidfd is not None:
            with contextlib.suppress(ChildProcessError):  # our child only if its parent ended first
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            os.close(self._pidfd)
            self._pidfd = None

    async def exit_code(self) -> int | None:
        """Exit code of a process that has ended, as reported by its parent.

        None if the parent has ended or does not report it within `END_S`.
        """
        loop = asyncio.get_running_loop()
        reported = loop.create_future()
        loop.add_reader(self._process.sentinel, _settle, reported)
        try:
            await asyncio.wait({reported}, timeout=END_S)
        finally:
            loop.remove_reader(self._process.sentinel)
        code = self._process.exitcode
        return None if code == UNKNOWN else code


class WorkerForkServer:
    """Starts the fork server; it imports at once, on another core if there is one.

    Args:
        settings: which engine to import. Workers report an engine that is not installed.
        variables: environment variables for the workers alone.

    Raises:
        ConfigError: the process cannot be started.
    """

    def __init__(self, settings: Settings, variables: Mapping[str, str]) -> None:
        self._variables = {
            # Forking is safe only with one thread: another might hold a lock at that moment.
            "OPENBLAS_NUM_THREADS": "1",
            # Otherwise a module in the current folder would shadow ours.
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
            **variables,
        }
        self._context = get_context("forkserver")
        self._lock = asyncio.Lock()
        self._pending = False
        self._closed = False
        self._forked_by: int | None = None  # id of the process that has forked and so imported all
        self._watched: int | None = None
        self._context.set_forkserver_preload([*MODULES, *engine_modules(settings)])
        try:
            with _blocked_signals():
                resource_tracker.ensure_running()  # first, since it unblocks signals
            self._ensure_running()
        except OSError as exc:
            raise ConfigError(
                f"the process that workers are forked from cannot be started: {exc}; "
                f"its socket is in {tempfile.gettempdir()!r} (TMPDIR)"
            ) from exc

    async def fork(self, name: str, run: Callable[..., None], *args: Any) -> Child:
        """Fork a process that runs `run(*args)`, once the imports are done.

        A fork server that has ended or does not respond is replaced, once per call.

        Raises:
            OSError, EOFError: the process could not be forked.
        """
        async with self._lock:
            try:
                return await self._request(name, run, *args)
            except (EOFError, ConnectionError, FileNotFoundError, TimeoutError) as exc:
                if self._closed:
                    raise
                log.error("fork server failed, replacing it: %r", exc)
            await self._end()
            return await self._request(name, run, *args)

    def close(self) -> None:
        """Refuse further forks and abort a pending one."""
        self._closed = True
        if self._pending:
            self._kill()

    def end(self) -> None:
        """End the fork server. The exit codes of its children are not reported after that."""
        self._closed = True
        self._kill()

    async def _request(self, name: str, run: Callable[..., None], *args: Any) -> Child:
        if self._closed:
            raise ConnectionAbortedError("the server is stopping")
        self._ensure_running()
        forker = _forker()
        self._watch(forker)
        process = self._context.Process(target=_main, args=(run, *args), name=name)
        limit = FORK_S if forker == self._forked_by else IMPORT_S
        self._pending = True
        try:
            starting = run_in_daemon_thread(process.start)
            done, _ = await asyncio.wait({starting}, timeout=limit)
            if not done:
                self._kill()  # this closes the pipe that the thread reads
                done, _ = await asyncio.wait({starting}, timeout=END_S)
                if not done or starting.exception():
                    raise TimeoutError(f"process {forker} did not respond within {limit:g} s")
            starting.result()
        finally:
            self._pending = False
        child = Child(process)
        if _forker() != forker:  # it has ended, and multiprocessing started one without `variables`
            child.send_signal(signal.SIGKILL)
            child.close()
            raise ConnectionResetError(f"process {forker} has ended")
        self._forked_by = forker
        return child

    def _ensure_running(self) -> None:
        with self._environment():
            forkserver.ensure_running()

    def _watch(self, forker: int | None) -> None:
        """Replace the fork server when it ends, so that the next fork need not wait for imports."""
        if forker is None or forker == self._watched:
            return
        self._watched = forker
        try:
            pidfd = os.pidfd_open(forker)
        except OSError:  # Linux is older than 5.3: the next fork replaces it
            return
        asyncio.get_running_loop().add_reader(pidfd, self._ended, pidfd, forker)

    def _ended(self, pidfd: int, forker: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        # One that has never forked may never be able to; the next fork reports why.
        if not self._closed and not self._pending and forker == self._forked_by == _forker():
            log.error("fork server ended, starting another")
            try:
                self._ensure_running()
            except OSError as exc:
                log.error("fork server cannot be started: %s", exc)

    def _kill(self) -> None:
        forker = _forker()
        if forker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(forker, signal.SIGKILL)  # our child, so its id is not reused

    async def _end(self) -> None:
        """Kill the fork server and wait for its end; multiprocessing would else think it runs."""
        self._kill()
        deadline = asyncio.get_running_loop().time() + END_S
        while _is_running(_forker()) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  # nobody sets an event
            await asyncio.sleep(END_S / 100)

    @contextmanager
    def _environment(self) -> Generator[None]:
        """Processes started in this context get the variables, with signals blocked."""
        before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)
        try:
            with _blocked_signals():
                yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def engine_modules(settings: Settings) -> list[str]:
    """Module of the engine, if it may be imported before a fork: OpenVINO starts no threads."""
    try:
        engine = resolve(settings.engine, settings.precision)
    except ConfigError:
        return []
    if engine == UPSTREAM:
        return ["app.inference.upstream.assembly"]
    return [ENGINES[engine]] if engine == "openvino" else []


def _forker() -> int | None:
    """Process id of the fork server."""
    # Private, but there is no other way to end a stopped one.
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # typeshed has no private names
    return pid


def _is_running(child: int | None) -> bool:
    """Whether our child is still running; does not reap it."""
    if child is None:
        return False
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@contextmanager
def _blocked_signals() -> Generator[None]:
    """Processes started in this context have signals blocked; this process gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _main(run: Callable[..., None], *args: Any) -> None:
    """Entry point of the new process."""
    gc.freeze()  # a collection would write to all shared pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
    run(*args)
