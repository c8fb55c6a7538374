"""Runs calls that may block forever on daemon threads.

The threads of `asyncio.to_thread` and `concurrent.futures` are joined at exit, so a call that never
returns would keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_daemon_thread(call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Run `call(*args)` on its own daemon thread; return a future of its result."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():  # it was cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T is

    def run() -> None:
        result, error = None, None
        try:
            result = call(*args)
        except BaseException as exc:  # noqa: BLE001  # passed to the future
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=getattr(call, "__name__", None), daemon=True).start()
    return future
