"""Files that are read anew while the service runs: API keys and certificates.

A file counts as seen when what it holds has been loaded, not before: it is read once a second and
compared with what is in use. Whatever fails on the way, from a want of descriptors to a key whose
defense cannot be made, leaves what is in use, is counted, logged from time to time, and tried
again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, get_args

from app.errors import ConfigError
from app.system.background import Backoff, Throttle, repeat

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

FileName = Literal["keys", "tls"]
FILE_NAMES: tuple[FileName, ...] = get_args(FileName)
TITLES: dict[FileName, str] = {"keys": "API keys", "tls": "TLS certificate"}
POLL_S = 1.0
RETRY_CAP_S = 10.0  # for a file that can be read and not used: to build it may cost much
log = logging.getLogger("scumble")

T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """What was read.

    Attributes:
        read_at: when the reading began, on the monotonic clock that all processes share.
        parts: the bytes of each file.
    """

    read_at: float
    parts: tuple[bytes, ...]


@dataclass(frozen=True)
class LastGood:
    """What a process loaded, for one that cannot read it any more.

    Attributes:
        contents: what was loaded.
        checked_at: when the file could last be read, on the same clock.
    """

    contents: Contents
    checked_at: float


class WatchedFile(Generic[T]):
    """A file, or several that belong together, and what was made of it.

    Args:
        name: of the file, in metrics.
        read: gives the bytes of each file.
        build: makes of them what is used.
        last_good: what to use if the file cannot be loaded at first.
        clock: seconds, the same for all processes.

    Attributes:
        value: what `build` made last.
        contents: of what it was made.
        checked_at: when the file was last found to hold what is in use.
        failing: the last attempt failed.
        stale: it has failed for longer than the settings allow.

    Raises:
        Exception: whatever `read` and `build` raise, where there is nothing else to use.
    """

    value: T
    contents: Contents

    def __init__(
        self,
        name: FileName,
        read: Callable[[], tuple[bytes, ...]],
        build: Callable[[tuple[bytes, ...]], T],
        *,
        last_good: LastGood | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.failing = self.stale = False
        self._read = read
        self._build = build
        self._clock = clock
        self._refused: tuple[bytes, ...] | None = None
        self._reason = ""
        self._retry_at = 0.0
        self._backoff = Backoff(POLL_S, RETRY_CAP_S)
        read_at = clock()
        try:
            parts = read()
            self.value = build(parts)
        except Exception as exc:
            if last_good is None:
                raise
            log.error("the last good %s are used: %s", TITLES[name], exc)
            self.value = build(last_good.contents.parts)
            self.contents, self.checked_at = last_good.contents, last_good.checked_at
            self.failing = True
        else:
            self.contents, self.checked_at = Contents(read_at, parts), read_at

    def check(self) -> bool:
        """Load the file if it holds something else than what is in use; whether it did.

        Raises:
            Exception: whatever reading and building raise; what is in use stays.
        """
        read_at = self._clock()
        parts = self._read()
        changed = parts != self.contents.parts
        if changed:
            if parts == self._refused and read_at < self._retry_at:
                raise ConfigError(self._reason)
            try:
                value = self._build(parts)
            except Exception as exc:
                if parts != self._refused:
                    self._backoff.reset()
                self._refused, self._reason = parts, str(exc) or repr(exc)
                self._retry_at = read_at + self._backoff()
                raise
            self.value, self.contents = value, Contents(read_at, parts)
        self._refused = None
        self.checked_at = read_at
        return changed


class Listener(Protocol):
    """Who wants to know what becomes of the files."""

    def loaded(self, name: FileName, contents: Contents) -> None:
        """The file was loaded; called on a thread."""
        ...

    def failing(self, name: FileName, since: float | None) -> None:
        """It cannot be loaded since then, or it can again (None); called on the event loop."""
        ...


class FileWatcher:
    """Keeps files loaded.

    Args:
        failures: counts attempts that failed, by file.
        failing_s: shows for how long a file has failed, by file.
        allowed_s: for how long it may before it is stale.
        listener: is told of what changes, and of the state at the beginning.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        failures: Mapping[FileName, Counter],
        failing_s: Mapping[FileName, Gauge],
        allowed_s: float,
        listener: Listener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures = failures
        self._failing_s = failing_s
        self._allowed_s = allowed_s
        self._listener = listener
        self._clock = clock
        self._files: dict[FileName, WatchedFile[Any]] = {}
        self._checking: dict[FileName, asyncio.Task[None]] = {}
        self._told: dict[FileName, bool] = {}
        self._log_due = {name: Throttle(clock) for name in FILE_NAMES}

    def add(self, file: WatchedFile[Any]) -> None:
        """Keep this one loaded, too."""
        self._files[file.name] = file

    def stale(self) -> list[FileName]:
        """Files that could not be loaded for longer than allowed."""
        return [name for name, file in self._files.items() if file.stale]

    async def turn(self) -> None:
        """Look at every file once. A disk that does not answer holds nothing but its own file."""
        for name, file in self._files.items():
            if name not in self._checking:
                self._checking[name] = asyncio.create_task(self._check(file))
        if self._checking:
            await asyncio.wait(self._checking.values(), timeout=POLL_S)
        for file in self._files.values():
            self._note(file)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch meanwhile."""
        for file in self._files.values():
            if self._listener is not None:
                await asyncio.to_thread(self._listener.loaded, file.name, file.contents)
            self._note(file)
        watching = asyncio.create_task(repeat("watching files", self.turn, POLL_S))
        try:
            yield
        finally:
            watching.cancel()

    async def _check(self, file: WatchedFile[Any]) -> None:
        try:
            changed = await asyncio.to_thread(file.check)
            if changed:
                log.info("%s read anew", TITLES[file.name])
                if self._listener is not None:
                    await asyncio.to_thread(self._listener.loaded, file.name, file.contents)
        except Exception as exc:  # whatever it is, the next turn tries again
            file.failing = True
            self._failures[file.name].inc()
            if self._log_due[file.name]():
                known = isinstance(exc, ConfigError | OSError)
                log.error(
                    "the old %s stay: %s",
                    TITLES[file.name],
                    exc if known else repr(exc),
                    exc_info=None if known else exc,
                )
        else:
            file.failing = False
        finally:
            del self._checking[file.name]

    def _note(self, file: WatchedFile[Any]) -> None:
        """Show how the file stands."""
        failing = file.failing or file.name in self._checking
        failing_s = max(0.0, self._clock() - file.checked_at) if failing else 0.0
        self._failing_s[file.name].set(failing_s)
        file.stale = failing_s > self._allowed_s
        if failing != self._told.get(file.name):
            self._told[file.name] = failing
            if self._listener is not None:
                self._listener.failing(file.name, file.checked_at if failing else None)
