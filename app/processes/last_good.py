"""What workers have loaded, kept by the supervisor for the workers that come after them.

A worker that starts while the file of keys is broken would have none. So each tells the supervisor
what it loaded, over the pipe that it has anyway: in memory, since a full disk must not bring a
revoked key back. It goes in messages small enough to arrive whole, as the supervisor must not wait
for the second half of one from a worker that has been stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from app.system.file_watcher import Contents, FileName, LastGood

CHUNK = 8192  # bytes; with what pickle adds it stays below one write of a pipe


@dataclass(frozen=True)
class Chunk:
    """A piece of what was loaded.

    Attributes:
        name: of the file.
        read_at: as in `Contents`.
        sizes: bytes of each part.
        offset: of the piece among all bytes.
        content: the piece.
    """

    name: FileName
    read_at: float
    sizes: tuple[int, ...]
    offset: int
    content: bytes


@dataclass(frozen=True)
class Failing:
    """A file cannot be loaded since then; with None it can again."""

    name: FileName
    since: float | None


class Reporter:
    """A worker's side: a listener that tells the supervisor."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def loaded(self, name: FileName, contents: Contents) -> None:
        """Send what was loaded."""
        sizes = tuple(map(len, contents.parts))
        whole = b"".join(contents.parts)
        with contextlib.suppress(OSError):  # the supervisor is gone: the channel says so
            for offset in range(0, max(1, len(whole)), CHUNK):
                piece = whole[offset : offset + CHUNK]
                self._pipe.send(Chunk(name, contents.read_at, sizes, offset, piece))

    def failing(self, name: FileName, since: float | None) -> None:
        """Send how the file stands."""
        with contextlib.suppress(OSError):  # as above
            self._pipe.send(Failing(name, since))


class LastGoodFiles:
    """The supervisor's side.

    Args:
        clock: seconds, the same for all processes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._contents: dict[FileName, Contents] = {}
        self._arriving: dict[tuple[int, FileName], bytearray] = {}
        self._failing: dict[int, dict[FileName, float]] = {}
        self._since: dict[FileName, float] = {}

    def heard(self, worker: int, message: Chunk | Failing) -> None:
        """Take a message of a worker."""
        if isinstance(message, Chunk):
            self._take(worker, message)
        elif message.since is not None:
            self._failing.setdefault(worker, {})[message.name] = message.since
            self._since.setdefault(message.name, message.since)
        else:
            self._failing.get(worker, {}).pop(message.name, None)
            if not any(message.name in files for files in self._failing.values()):
                self._since.pop(message.name, None)

    def gone(self, worker: int) -> None:
        """The worker has ended. Since when its files failed its successor is told."""
        self._failing.pop(worker, None)
        for key in [key for key in self._arriving if key[0] == worker]:
            del self._arriving[key]

    def given(self) -> Mapping[FileName, LastGood]:
        """What a new worker gets."""
        now = self._clock()
        return {
            name: LastGood(contents, self._since.get(name, now))
            for name, contents in self._contents.items()
        }

    def stale(self, allowed_s: float) -> list[FileName]:
        """Files that some worker could not load for longer than that."""
        before = self._clock() - allowed_s
        return sorted(
            {
                name
                for files in self._failing.values()
                for name, since in files.items()
                if since < before
            }
        )

    def _take(self, worker: int, chunk: Chunk) -> None:
        if chunk.offset == 0:
            self._arriving[worker, chunk.name] = bytearray()
        whole = self._arriving[worker, chunk.name]
        whole += chunk.content
        if len(whole) < sum(chunk.sizes):
            return
        del self._arriving[worker, chunk.name]
        known = self._contents.get(chunk.name)
        if known is not None and chunk.read_at <= known.read_at:
            return  # another worker has read the file since
        parts, end = [], 0
        for size in chunk.sizes:
            parts.append(bytes(whole[end : end + size]))
            end += size
        self._contents[chunk.name] = Contents(chunk.read_at, tuple(parts))
