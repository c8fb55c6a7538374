"""Where workers come from: a process that has imported what they need, and forks.

A worker takes longer to import its libraries than to load its model. Here that is done once, while
the supervisor still starts, and the workers share the memory of it. The process loads no model and
runs nothing else, so what they inherit is modules; the rest each makes for itself.
"""

from __future__ import annotations

import contextlib
import gc
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

MODULES = ("app.main", "app.worker", "uvloop")
# A terminal or an init system may signal the whole group, and it is the supervisor who acts on it.
KEPT_FROM = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


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

    def exit_code(self) -> int | None:
        """Of one that has ended; None where nobody is left who knows."""
        self._known = False
        self._process.join(1)
        if self._itself is not None:
            os.close(self._itself)
            self._itself = None
        return self._process.exitcode


class Nursery:
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
        modules = [*MODULES]
        if engine in ("auto", "openvino"):
            modules.append("app.engines.openvino")
        self._context.set_forkserver_preload(modules)
        try:
            with _held_back():
                resource_tracker.ensure_running()  # first: it would let signals through again
            with self._outfitted():
                forkserver.ensure_running()
        except OSError as exc:
            raise ConfigError(
                f"the process that workers are forked from cannot be started: {exc}; "
                f"its socket is in {tempfile.gettempdir()!r} (TMPDIR)"
            ) from exc

    def __call__(self, name: str, run: Callable[..., None], *args: Any) -> Child:
        """A new process that runs `run(*args)`; waits until all is imported.

        Raises:
            OSError, EOFError: it could not be forked.
        """
        process = self._context.Process(target=_born, args=(run, *args), name=name)
        with self._outfitted():  # should the one that forks have ended, this starts another
            process.start()
        return Child(process)

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
