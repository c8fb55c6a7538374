"""Where workers come from: a process that has imported what they need, and forks.

A worker takes longer to import its libraries than to load its model. Here that is done once, while
the supervisor still starts, and the workers share the memory of it. The process loads no model and
runs nothing else, so what they inherit is modules; the rest each makes for itself.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

# A terminal or an init system may signal the whole group. The process must not end before the
# workers, as it is the one that sees how they end; it does when the supervisor and they have.
KEPT_FROM = {signal.SIGTERM, signal.SIGHUP}


class Nursery:
    """Begins to import at once, on another core if there is one.

    Args:
        engine: as in the settings. One that is not installed is passed over; a worker says so.
    """

    def __init__(self, engine: str) -> None:
        # Only a process of one thread forks safely: another may hold a lock in that moment.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        self._context = get_context("forkserver")
        modules = ["app.main"]
        if engine in ("auto", "openvino"):
            modules.append("app.engines.openvino")
        self._context.set_forkserver_preload(modules)
        resource_tracker.ensure_running()  # first: starting it would let the signals through again
        with _held_back():
            forkserver.ensure_running()

    def __call__(self, name: str, run: Callable[..., None], *args: Any) -> BaseProcess:
        """A new process that runs `run(*args)`; waits until all is imported."""
        process = self._context.Process(target=_born, args=(run, *args), name=name)
        with _held_back():  # should the one that forks have ended, this starts another
            process.start()
        return process


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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, KEPT_FROM)
    run(*args)
