"""Calls that may block for ever, on a thread that nobody has to wait for.

The threads of `asyncio.to_thread` and of `concurrent.futures` are joined when the process ends: one
that never returns would keep it from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_daemon_thread(call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Call `call(*args)` on a daemon thread of its own; gives the future of what it returns."""
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
        except BaseException as exc:  # noqa: BLE001  # whoever awaits the future gets it
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=getattr(call, "__name__", None), daemon=True).start()
    return future
