"""The last good contents of watched files, kept by the supervisor for workers that start later.

A worker that starts while the file of API keys is broken would have no keys. Each worker therefore
sends the supervisor what it has loaded. It is kept in memory, so that a full disk cannot bring a
revoked key back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from app.processes.messages import Chunk, Failing
from app.system.file_watcher import Contents, FileName, LastGood


class LastGoodFiles:
    """Collects the files that workers report.

    Args:
        clock: monotonic seconds, the same in all processes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._contents: dict[FileName, Contents] = {}
        self._incomplete: dict[tuple[int, FileName], bytearray] = {}
        self._failing: dict[int, dict[FileName, float]] = {}
        self._since: dict[FileName, float] = {}

    def update(self, worker: int, message: Chunk | Failing) -> None:
        """Process a message from a worker."""
        if isinstance(message, Chunk):
            self._add(worker, message)
        elif message.since is not None:
            self._failing.setdefault(worker, {})[message.name] = message.since
            self._since.setdefault(message.name, message.since)
        else:
            self._failing.get(worker, {}).pop(message.name, None)
            if not any(message.name in files for files in self._failing.values()):
                self._since.pop(message.name, None)

    def remove(self, worker: int) -> None:
        """Forget a worker that has ended, but not since when its files fail."""
        self._failing.pop(worker, None)
        for key in [key for key in self._incomplete if key[0] == worker]:
            del self._incomplete[key]

    def current(self) -> Mapping[FileName, LastGood]:
        """The files for a new worker."""
        now = self._clock()
        return {
            name: LastGood(contents, self._since.get(name, now))
            for name, contents in self._contents.items()
        }

    def stale(self, allowed_s: float) -> list[FileName]:
        """Files that some worker has failed to load for longer than `allowed_s`."""
        before = self._clock() - allowed_s
        return sorted(
            {
                name
                for files in self._failing.values()
                for name, since in files.items()
                if since < before
            }
        )

    def _add(self, worker: int, chunk: Chunk) -> None:
        if chunk.offset == 0:
            self._incomplete[worker, chunk.name] = bytearray()
        whole = self._incomplete[worker, chunk.name]
        whole += chunk.content
        if len(whole) < sum(chunk.sizes):
            return
        del self._incomplete[worker, chunk.name]
        known = self._contents.get(chunk.name)
        if known is not None and chunk.read_at <= known.read_at:
            return  # another worker has read the file since
        parts, end = [], 0
        for size in chunk.sizes:
            parts.append(bytes(whole[end : end + size]))
            end += size
        self._contents[chunk.name] = Contents(chunk.read_at, tuple(parts))
