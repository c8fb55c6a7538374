"""The preview process as the supervisor sees it: started on first use, ended when idle.

The supervisor runs no model, and workers shall not be slowed down, so previews have their own
process. It answers with bytes, never pickled objects, because it decodes images from anywhere.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import orjson

from app.admin.console.preview_request import PreviewRequest
from app.errors import Unavailable
from app.settings import Settings

IDLE_S = 180.0
ANSWER_S = 30.0  # the first answer includes loading the model
WAITING = 8
END_S = 1.0  # for a process that was killed, or has closed its pipe, to end
log = logging.getLogger("scumble.console")


class PreviewProcess:
    """Asks the preview process, one request at a time.

    Args:
        settings: of the service.
        idle_s: the process ends after this time without a request.
        answer_s: a process that takes longer to answer is killed.
    """

    def __init__(
        self, settings: Settings, *, idle_s: float = IDLE_S, answer_s: float = ANSWER_S
    ) -> None:
        self._settings = settings
        self._idle_s = idle_s
        self._answer_s = answer_s
        self._lock = asyncio.Lock()
        self._waiting = 0
        self._process: BaseProcess | None = None
        self._loaded: Settings | None = None  # by that process
        self._pipe: Connection | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None while there is no process."""
        return None if self._process is None else self._process.pid

    def use(self, settings: Settings) -> None:
        """Use these settings from the next request on; a process with other settings is ended."""
        self._settings = settings

    async def __call__(self, request: PreviewRequest, image: bytes) -> tuple[int, bytes]:
        """Return status and JSON body.

        Raises:
            Unavailable: too many requests are waiting, or the process ended or was too slow.
        """
        if self._waiting >= WAITING:
            raise Unavailable(f"too many previews: {self._waiting} are waiting")
        self._waiting += 1
        try:
            async with self._lock:
                return await self._ask(orjson.dumps(asdict(request)), image)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Kill the process, if there is one; it has no state to save."""
        if self._timer is not None:
            self._timer.cancel()
        if self._process is not None:
            self._process.kill()
            self._ended(self._process)

    async def _ask(self, request: bytes, image: bytes) -> tuple[int, bytes]:
        if self._timer is not None:
            self._timer.cancel()
        process, pipe = self._running()
        exchange = asyncio.ensure_future(asyncio.to_thread(_exchange, pipe, request, image))
        try:
            done, _ = await asyncio.wait({exchange}, timeout=self._answer_s)
        except asyncio.CancelledError:
            process.kill()  # otherwise its thread would keep waiting, and the supervisor for it
            raise
        if not done:
            log.error("preview process does not respond, killing it")
            process.kill()
        try:
            return await exchange
        except (EOFError, OSError, ValueError) as exc:
            process.kill()
            self._ended(process)
            raise Unavailable("the preview process ended; the next preview starts another") from exc
        finally:
            self._timer = asyncio.get_running_loop().call_later(self._idle_s, self.close)

    def _running(self) -> tuple[BaseProcess, Connection]:
        """The process and our end of its pipe; started if necessary."""
        if self._process is not None and self._loaded is not self._settings:
            self._process.kill()
            self._ended(self._process)
        if self._process is None or self._pipe is None:
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            process = context.Process(
                target=_run, args=(self._settings, theirs), name="preview", daemon=True
            )
            process.start()
            theirs.close()
            self._process, self._loaded = process, self._settings
            asyncio.get_running_loop().add_reader(process.sentinel, self._ended, process)
        return self._process, self._pipe

    def _ended(self, process: BaseProcess) -> None:
        """Clean up after a process that has ended; a read from its pipe then fails."""
        asyncio.get_running_loop().remove_reader(process.sentinel)
        process.join(END_S)
        if process is self._process:
            self._process = self._pipe = None


def _run(settings: Settings, pipe: Connection) -> None:
    from app.admin.console import preview  # here, so that the supervisor does not load it

    preview.run(settings, pipe)


def _exchange(pipe: Connection, request: bytes, image: bytes) -> tuple[int, bytes]:
    pipe.send_bytes(request)
    pipe.send_bytes(image)
    return int(pipe.recv_bytes()), pipe.recv_bytes()
