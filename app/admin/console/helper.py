"""The preview process as the supervisor sees it: started when first asked, ended when idle.

The supervisor runs no model, and a worker must not be kept from its requests. So previews have a
process of their own. What comes back over the pipe is bytes, never pickled objects, as that process
has read images from who knows where.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import orjson

from app.admin.console.question import Question
from app.errors import Unavailable
from app.settings import Settings

IDLE_S = 180.0
ANSWER_S = 30.0  # the first answer includes loading the model
WAITING = 8
END_S = 1.0  # for a process that was killed, or has closed its pipe, to end
log = logging.getLogger("scumble.console")


class Helper:
    """Asks the preview process, one question at a time.

    Args:
        settings: of the service.
        idle_s: without a question for so long, the process ends and its memory is given back.
        answer_s: a process that takes longer is killed.
    """

    def __init__(
        self, settings: Settings, *, idle_s: float = IDLE_S, answer_s: float = ANSWER_S
    ) -> None:
        self._settings = settings
        self._idle_s = idle_s
        self._answer_s = answer_s
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._process: BaseProcess | None = None
        self._loaded: Settings | None = None  # by that process
        self._pipe: Connection | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none."""
        return None if self._process is None else self._process.pid

    def use(self, settings: Settings) -> None:
        """Answer the next question with these: the process that has loaded others is ended."""
        self._settings = settings

    async def __call__(self, question: Question, image: bytes) -> tuple[int, bytes]:
        """Status and JSON body.

        Raises:
            Unavailable: too many are waiting, or the process ended or was too slow.
        """
        if self._waiting >= WAITING:
            raise Unavailable(f"{self._waiting} previews are waiting already")
        self._waiting += 1
        try:
            async with self._turn:
                return await self._ask(orjson.dumps(asdict(question)), image)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the process, if there is one. It holds nothing to save, so it is not asked."""
        if self._timer is not None:
            self._timer.cancel()
        if self._process is not None:
            self._process.kill()
            self._gone(self._process)

    async def _ask(self, question: bytes, image: bytes) -> tuple[int, bytes]:
        if self._timer is not None:
            self._timer.cancel()
        process, pipe = self._running()
        exchange = asyncio.ensure_future(asyncio.to_thread(_exchange, pipe, question, image))
        try:
            done, _ = await asyncio.wait({exchange}, timeout=self._answer_s)
        except asyncio.CancelledError:
            process.kill()  # or its thread would wait on, and the supervisor for the thread
            raise
        if not done:
            log.error("the preview process does not answer, killing it")
            process.kill()
        try:
            return await exchange
        except (EOFError, OSError, ValueError) as exc:
            process.kill()
            self._gone(process)
            raise Unavailable("the preview process ended; the next preview starts another") from exc
        finally:
            self._timer = asyncio.get_running_loop().call_later(self._idle_s, self.close)

    def _running(self) -> tuple[BaseProcess, Connection]:
        """The process and our end of its pipe; a new one where there is none."""
        if self._process is not None and self._loaded is not self._settings:
            self._process.kill()
            self._gone(self._process)
        if self._process is None or self._pipe is None:
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            process = context.Process(
                target=_run, args=(self._settings, theirs), name="preview", daemon=True
            )
            process.start()
            theirs.close()
            self._process, self._loaded = process, self._settings
            asyncio.get_running_loop().add_reader(process.sentinel, self._gone, process)
        return self._process, self._pipe

    def _gone(self, process: BaseProcess) -> None:
        """The process has ended; whoever still reads from its pipe meets the end of it."""
        asyncio.get_running_loop().remove_reader(process.sentinel)
        process.join(END_S)
        if process is self._process:
            self._process = self._pipe = None


def _run(settings: Settings, pipe: Connection) -> None:
    from app.admin.console import (
        preview,  # here: the supervisor, which names this function, stays small
    )

    preview.run(settings, pipe)


def _exchange(pipe: Connection, question: bytes, image: bytes) -> tuple[int, bytes]:
    pipe.send_bytes(question)
    pipe.send_bytes(image)
    return int(pipe.recv_bytes()), pipe.recv_bytes()
