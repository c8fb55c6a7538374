"""Files that are reloaded while the service runs: API keys and certificates.

Each file is read once a second and compared with the contents in use. If anything fails, from
reading the file to making the defense of a key, the current contents stay in use; the failure is
counted, logged at intervals, and retried.
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
# Adjective and noun in log lines: "API key reload failed; keeping the current keys".
TITLES: dict[FileName, tuple[str, str]] = {
    "keys": ("API key", "keys"),
    "tls": ("TLS certificate", "certificate"),
}
POLL_S = 1.0
RETRY_CAP_S = 10.0  # for a file that is readable but invalid, since building may be expensive
log = logging.getLogger("scumble")

T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """What was read.

    Attributes:
        read_at: when reading began, on the monotonic clock, which is the same in all processes.
        parts: the bytes of each file.
    """

    read_at: float
    parts: tuple[bytes, ...]


@dataclass(frozen=True)
class LastGood:
    """Contents that another process has loaded, to fall back on.

    Attributes:
        contents: what was loaded.
        checked_at: when the file could last be loaded, on the same clock.
    """

    contents: Contents
    checked_at: float


class WatchedFile(Generic[T]):
    """A file, or several that belong together, and the value built from it.

    Args:
        name: label in metrics.
        read: returns the bytes of each file.
        build: makes the value from them.
        last_good: used if the file cannot be loaded at first.
        clock: monotonic seconds, the same in all processes.

    Attributes:
        value: the last result of `build`.
        contents: what `value` was built from.
        checked_at: when the file was last known to equal `contents`.
        failing: whether the last attempt failed.
        stale: whether it has failed for longer than the settings allow.

    Raises:
        Exception: anything that `read` or `build` raises, if there is no `last_good`.
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
            title, noun = TITLES[name]
            log.error("%s load failed; using the last good %s: %s", title, noun, exc)
            self.value = build(last_good.contents.parts)
            self.contents, self.checked_at = last_good.contents, last_good.checked_at
            self.failing = True
        else:
            self.contents, self.checked_at = Contents(read_at, parts), read_at

    def check(self) -> bool:
        """Load the file if it has changed; return whether it had.

        Raises:
            Exception: anything that `read` or `build` raises; `value` is kept.
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
    """Receives changes of watched files."""

    def loaded(self, name: FileName, contents: Contents) -> None:
        """A file was loaded; called on a thread."""
        ...

    def failing(self, name: FileName, since: float | None) -> None:
        """A file fails to load since then, or loads again (None); called on the event loop."""
        ...


class FileWatcher:
    """Reloads files when they change.

    Args:
        failures: counts failed attempts, by file.
        failing_s: shows how long each file has failed.
        allowed_s: how long a file may fail before it is stale.
        listener: receives the state at the start, and every change.
        clock: monotonic seconds.
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
        self._reported: dict[FileName, bool] = {}
        self._throttles = {name: Throttle(clock) for name in FILE_NAMES}

    def add(self, file: WatchedFile[Any]) -> None:
        """Watch another file."""
        self._files[file.name] = file

    def stale(self) -> list[FileName]:
        """Files that have failed to load for longer than allowed."""
        return [name for name, file in self._files.items() if file.stale]

    async def check_all(self) -> None:
        """Check every file once. A disk that does not respond delays only the files on it."""
        for name, file in self._files.items():
            if name not in self._checking:
                self._checking[name] = asyncio.create_task(self._check(file))
        if self._checking:
            await asyncio.wait(self._checking.values(), timeout=POLL_S)
        for file in self._files.values():
            self._note(file)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch the files while the context is open."""
        for file in self._files.values():
            if self._listener is not None:
                await asyncio.to_thread(self._listener.loaded, file.name, file.contents)
            self._note(file)
        watching = asyncio.create_task(repeat("watching files", self.check_all, POLL_S))
        try:
            yield
        finally:
            watching.cancel()

    async def _check(self, file: WatchedFile[Any]) -> None:
        try:
            changed = await asyncio.to_thread(file.check)
            if changed:
                log.info("%s reloaded", TITLES[file.name][1])
                if self._listener is not None:
                    await asyncio.to_thread(self._listener.loaded, file.name, file.contents)
        except Exception as exc:  # of any kind: the next check retries
            file.failing = True
            self._failures[file.name].inc()
            if self._throttles[file.name]():
                known = isinstance(exc, ConfigError | OSError)
                log.error(
                    "%s reload failed; keeping the current %s: %s",
                    *TITLES[file.name],
                    exc if known else repr(exc),
                    exc_info=None if known else exc,
                )
        else:
            file.failing = False
        finally:
            del self._checking[file.name]

    def _note(self, file: WatchedFile[Any]) -> None:
        """Update the metrics of a file and report a change."""
        failing = file.failing or file.name in self._checking
        failing_s = max(0.0, self._clock() - file.checked_at) if failing else 0.0
        self._failing_s[file.name].set(failing_s)
        file.stale = failing_s > self._allowed_s
        if failing != self._reported.get(file.name):
            self._reported[file.name] = failing
            if self._listener is not None:
                self._listener.failing(file.name, file.checked_at if failing else None)
