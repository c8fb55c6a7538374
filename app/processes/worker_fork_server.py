"""Where workers come from: a process that has imported what they need, and forks.

A worker takes longer to import its libraries than to load its model. Here that is done once, while
the supervisor still starts, and the workers share the memory of it. The process loads no model and
runs nothing else, so what they inherit is modules; the rest each makes for itself.

The supervisor's loop never waits for that process. A fork is requested on a thread and has a limit;
a process that exceeds it, or has ended, is replaced.
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
from app.system.threads import run_in_daemon_thread

MODULES = ("app.main", "app.processes.worker", "uvloop")
# A terminal or an init system may signal the whole group, and it is the supervisor who acts on it.
KEPT_FROM = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
IMPORT_S = 60.0  # for the first fork, which waits until all is imported
FORK_S = 5.0  # for each later one
END_S = 1.0  # for a process that was killed to end, and for an exit code to arrive
UNKNOWN = 255  # multiprocessing's exit code of a process whose parent ended first
log = logging.getLogger("scumble")


class Child:
    """A worker process. It is a child of the one that forked it, which may end before it does.

    Attributes:
        pid: its number.
        sentinel: a file that can be read once it has ended.
    """

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None  # noqa: S101  # it was started
        self._process = process
        self.pid = process.pid
        self._known = True  # that the number is still its own
        self._itself: int | None = None
        with contextlib.suppress(OSError):  # it has ended already, or the kernel is of before 5.3
            self._itself = os.pidfd_open(self.pid)
        self.sentinel = process.sentinel if self._itself is None else self._itself

    def send(self, what: signal.Signals) -> None:
        """Signal it; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self._itself is not None:
                signal.pidfd_send_signal(self._itself, what)
            elif self._known:
                os.kill(self.pid, what)

    def close(self) -> None:
        """It has ended: its number may soon be another's."""
        self._known = False
        if self._itself is not None:
            with contextlib.suppress(ChildProcessError):  # ours only where its parent ended first
                os.waitid(os.P_PIDFD, self._itself, os.WEXITED | os.WNOHANG)
            os.close(self._itself)
            self._itself = None

    async def exit_code(self) -> int | None:
        """Of one that has ended, as soon as its parent reports it.

        None where the parent has ended, or does not report it within `END_S`.
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
    """Begins to import at once, on another core if there is one.

    Args:
        engine: as in the settings. One that is not installed is passed over; a worker says so.
        variables: more of the environment, for the workers alone.

    Raises:
        ConfigError: the process cannot be started.
    """

    def __init__(self, engine: str, variables: Mapping[str, str]) -> None:
        self._variables = {
            # Only a process of one thread forks safely: another may hold a lock in that moment.
            "OPENBLAS_NUM_THREADS": "1",
            # It would look for our modules in the current folder first, whatever is there.
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
            **variables,
        }
        self._context = get_context("forkserver")
        self._turn = asyncio.Lock()
        self._pending = False
        self._closed = False
        self._forked_by: int | None = None  # the process that has forked, so has imported all
        self._watched: int | None = None
        modules = [*MODULES]
        if engine in ("auto", "openvino"):
            modules.append("app.inference.engines.openvino")
        self._context.set_forkserver_preload(modules)
        try:
            with _held_back():
                resource_tracker.ensure_running()  # first: it would let signals through again
            self._ensure_running()
        except OSError as exc:
            raise ConfigError(
                f"the process that workers are forked from cannot be started: {exc}; "
                f"its socket is in {tempfile.gettempdir()!r} (TMPDIR)"
            ) from exc

    async def fork(self, name: str, run: Callable[..., None], *args: Any) -> Child:
        """A new process that runs `run(*args)`, forked once all is imported.

        A process to fork from that has ended or does not answer is replaced, once in each call.

        Raises:
            OSError, EOFError: it could not be forked.
        """
        async with self._turn:
            try:
                return await self._request(name, run, *args)
            except (EOFError, ConnectionError, FileNotFoundError, TimeoutError) as exc:
                if self._closed:
                    raise
                log.error("the process that forks workers is replaced: %r", exc)
            await self._end()
            return await self._request(name, run, *args)

    def close(self) -> None:
        """Refuse further forks, and let go of one that is pending."""
        self._closed = True
        if self._pending:
            self._kill()

    def end(self) -> None:
        """End the process that forks. Without it, nobody reports the exit codes of its children."""
        self._closed = True
        self._kill()

    async def _request(self, name: str, run: Callable[..., None], *args: Any) -> Child:
        if self._closed:
            raise ConnectionAbortedError("the server stops")
        self._ensure_running()
        forker = _forker()
        self._watch(forker)
        process = self._context.Process(target=_born, args=(run, *args), name=name)
        limit = FORK_S if forker == self._forked_by else IMPORT_S
        self._pending = True
        try:
            starting = run_in_daemon_thread(process.start)
            done, _ = await asyncio.wait({starting}, timeout=limit)
            if not done:
                self._kill()  # which ends the pipe that the thread waits for
                done, _ = await asyncio.wait({starting}, timeout=END_S)
                if not done or starting.exception():
                    raise TimeoutError(f"process {forker} has not answered for {limit:g} s")
            starting.result()
        finally:
            self._pending = False
        child = Child(process)
        if _forker() != forker:  # it ended in between, and another began without our variables
            child.send(signal.SIGKILL)
            child.close()
            raise ConnectionResetError(f"process {forker} has ended")
        self._forked_by = forker
        return child

    def _ensure_running(self) -> None:
        with self._outfitted():
            forkserver.ensure_running()

    def _watch(self, forker: int | None) -> None:
        """Replace it when it ends, so that the next worker need not wait for the imports."""
        if forker is None or forker == self._watched:
            return
        self._watched = forker
        try:
            itself = os.pidfd_open(forker)
        except OSError:  # the kernel is of before 5.3: the next fork replaces it
            return
        asyncio.get_running_loop().add_reader(itself, self._ended, itself, forker)

    def _ended(self, itself: int, forker: int) -> None:
        asyncio.get_running_loop().remove_reader(itself)
        os.close(itself)
        # One that has not forked yet may never: the next fork tries, and says what is wrong.
        if not self._closed and not self._pending and forker == self._forked_by == _forker():
            log.error("the process that forks workers has ended, starting another")
            try:
                self._ensure_running()
            except OSError as exc:
                log.error("it cannot be started: %s", exc)

    def _kill(self) -> None:
        forker = _forker()
        if forker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(forker, signal.SIGKILL)  # our child: its number is not another's

    async def _end(self) -> None:
        """Kill it, and wait until the kernel has, or it would be taken to be there still."""
        self._kill()
        deadline = asyncio.get_running_loop().time() + END_S
        while _is_running(_forker()) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  # nobody sets an event
            await asyncio.sleep(END_S / 100)

    @contextmanager
    def _outfitted(self) -> Generator[None]:
        """What is started meanwhile gets the variables, and not the signals."""
        before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)
        try:
            with _held_back():
                yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _forker() -> int | None:
    """Process id of the one that forks."""
    # Private, but there is no other way to end one that is stopped.
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # typeshed has no private names
    return pid


def _is_running(child: int | None) -> bool:
    """Whether our child has not ended; leaves it to be waited for."""
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
def _held_back() -> Generator[None]:
    """What is started meanwhile does not get the signals; this process gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_FROM)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _born(run: Callable[..., None], *args: Any) -> None:
    """In the new process."""
    gc.freeze()  # a collection would write into all that is shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, KEPT_FROM)
    run(*args)
