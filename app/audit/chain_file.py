"""A hash chain on disk with one writer, which survives a kill and follows log rotation.

Each writer locks the first free file of `FILE.worker-0`, `FILE.worker-1`, ... The kernel releases
the lock however the writer ends, so the next writer continues the same chain. If the file is
renamed, as log rotation does, the chain continues in a new file.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from app.audit.hash_chain import TAIL_BYTES, Link, sealed, tail
from app.system.timestamps import timestamp

Fsync = Literal["always", "everysec", "never"]
WRITERS = 4096  # files that are tried at most
log = logging.getLogger("scumble")


class ChainFile:
    """Appends entries to a chain; opens its file with the first.

    Args:
        path: the files' common beginning.
        fsync: wait for the disk with each append, once a second, or never.
        clock: seconds, for that second.
        now: seconds since 1970, for the line that a writer begins with.
        sync: waits for the disk.
    """

    def __init__(
        self,
        path: Path,
        *,
        fsync: Fsync,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        self._path = path
        self._fsync = fsync
        self._clock = clock
        self._now = now
        self._wait = sync
        self._synced = clock()
        self._file: int | None = None
        self._at = path
        self._link: Link | None = None

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the entries as lines, all of them or none.

        Raises:
            OSError: the disk is full, or the file cannot be opened or written. Where only the wait
                for the disk failed, the lines may be there all the same.
        """
        file, opening = self._open()
        link = self._link or Link(secrets.token_hex(8))
        lines = []
        for entry in [*opening, *entries]:
            line, link = sealed(link, entry)
            lines.append(line)
        _write(file, b"".join(lines))
        self._link = link
        self._sync(file)

    def close(self) -> None:
        """Wait for the disk and close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a last attempt; `append` has said what failed
                self._wait(self._file)
            os.close(self._file)
            self._file = None

    def _open(self) -> tuple[int, list[dict[str, Any]]]:
        """The file, and what the chain must say first if it was not open."""
        if self._file is not None and _same(self._file, self._at):
            return self._file, []
        self.close()
        for number in range(WRITERS):
            at = self._path.with_name(f"{self._path.name}.worker-{number}")
            file = _lock(at)
            if file is None:
                continue
            opening = self._continue(file, at)
            if opening is not None:
                self._file, self._at = file, at
                return file, opening
            os.close(file)
        raise OSError(errno.EBUSY, f"{WRITERS} files are in use already", str(self._path))

    def _continue(self, file: int, at: Path) -> list[dict[str, Any]] | None:
        """Go on where a file ends; None if it is not for us."""
        size = os.fstat(file).st_size
        if self._link is not None:  # ours was renamed: the chain goes on in a new file
            return [] if size == 0 else None
        link, rest = tail(at)
        if b"\n" in rest or len(rest) >= TAIL_BYTES:
            log.error("not an audit log, or an edited one; skipped", extra={"file": str(at)})
            return None
        opening: dict[str, Any] = {
            "kind": "start",
            "time": timestamp(self._now()),
            "pid": os.getpid(),
        }
        if rest:  # a crash cut this line off; what there is of it is kept inside the next
            opening["cut"] = base64.b64encode(rest).decode()
            os.ftruncate(file, size - len(rest))
        self._link = link
        return [opening]

    def _sync(self, file: int) -> None:
        now = self._clock()
        if self._fsync == "always" or (self._fsync == "everysec" and now - self._synced >= 1):
            self._synced = now
            self._wait(file)


def _lock(at: Path) -> int | None:
    """The file, ours alone; None if another writer has it."""
    file = os.open(at, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    if not _same(file, at):  # renamed before we had the lock
        os.close(file)
        return None
    return file


def _same(file: int, at: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(file), at.stat())
    except FileNotFoundError:
        return False


def _write(file: int, data: bytes) -> None:
    """All of it, or nothing."""
    size = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError:
        os.ftruncate(file, size)
        raise
