"""Temporary folders that are removed at the end, or by the next process that makes one.

A killed process cannot remove its folder. Each folder is therefore locked while its process lives;
an unlocked one is left over. The lock also protects it from systemd-tmpfiles, which cleans `/tmp`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder, and remove folders of the same prefix and user whose processes have ended.

    Raises:
        OSError: the folder cannot be made.
    """
    parent = parent or Path(tempfile.gettempdir())
    for left in parent.glob(f"{prefix}*"):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    folder, lock = _make(prefix, parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(prefix: str, parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(folder)
        if lock is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(folder.stat(), os.fstat(lock)):
                    return folder, lock
            os.close(lock)  # another process has removed it, before it was locked


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if another process or user has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
