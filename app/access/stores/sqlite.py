"""Budgets in an SQLite file, for the workers of one node.

The file uses write-ahead logging and is synchronised before a charge is granted, so a budget
survives a killed worker and a power cut. Transactions are short and run on a thread: the event loop
never waits for a disk or for another worker's lock. Charges that arrive during a transaction share
the next one.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from app.access.stores import Bucket, Charge, StoreError
from app.access.stores.memory import current, decide
from app.errors import ConfigError
from app.system.urls import redacted

BUSY_S = 2.0  # how long to wait for another worker's transaction
T = TypeVar("T")


class SqliteStore:
    """Counts in the table `buckets` of a file.

    Raises:
        ConfigError: the file cannot be opened or is not an SQLite database.
    """

    def __init__(
        self, path: str, clock: Callable[[], float] = time.time, busy_s: float = BUSY_S
    ) -> None:
        self._clock = clock
        try:
            self._db = sqlite3.connect(
                path, timeout=busy_s, isolation_level=None, check_same_thread=False
            )
            _write_ahead(self._db)
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS buckets"
                " (name TEXT PRIMARY KEY, used INTEGER, start REAL) WITHOUT ROWID"
            )
        except sqlite3.Error as exc:
            raise ConfigError(f"SCUMBLE_STORE: {path} cannot be used: {exc}") from exc
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        # One thread: a connection has one transaction at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="budgets")

    @classmethod
    def at(cls, url: str) -> SqliteStore:
        """Make the store of `sqlite:///PATH`.

        Raises:
            ConfigError: the URL has no path or more than a path, or the file cannot be used.
        """
        parts = urlsplit(url)
        path = unquote(parts.path)
        if parts.netloc or parts.query or parts.fragment or path in ("", "/"):
            raise ConfigError(f"SCUMBLE_STORE is {redacted(url)!r}; allowed: sqlite:///PATH")
        return cls(path)

    async def charge(self, buckets: Sequence[Bucket], images: int) -> Charge:
        """Add to all buckets or none."""

        def run() -> Charge:
            now = self._clock()
            rows = [current(self._row(bucket), bucket, now) for bucket in buckets]
            charge = decide(buckets, rows, images, now)
            if charge.granted:
                self._db.executemany(
                    "INSERT OR REPLACE INTO buckets VALUES (?, ?, ?)",
                    [
                        (bucket.key, level.used, level.start)
                        for bucket, level in zip(buckets, charge.levels, strict=True)
                    ],
                )
            return charge

        return await self._transaction(run)

    async def refund(self, buckets: Sequence[Bucket], images: int, charge: Charge) -> None:
        """Take a charge back."""

        def run() -> None:
            self._db.executemany(
                "UPDATE buckets SET used = max(0, used - ?) WHERE name = ? AND start = ?",
                [
                    (images, bucket.key, level.start)
                    for bucket, level in zip(buckets, charge.levels, strict=True)
                ],
            )

        await self._transaction(run)

    async def ping(self) -> None:
        """Take the lock that a charge needs."""
        await self._transaction(lambda: None)

    async def close(self) -> None:
        """Close the file."""
        self._thread.shutdown()
        self._db.close()

    async def _transaction(self, run: Callable[[], T]) -> T:
        done: Future[T] = Future()
        self._waiting.append((run, done))
        self._thread.submit(self._commit)
        try:
            return await asyncio.wrap_future(done)
        except sqlite3.Error as exc:
            raise StoreError(f"the budget file: {exc}") from exc

    def _commit(self) -> None:
        """Run all waiting jobs in one transaction; an earlier call may have run them."""
        jobs = []
        while self._waiting:
            run, done = self._waiting.popleft()
            if done.set_running_or_notify_cancel():
                jobs.append((run, done))
        if not jobs:
            return
        try:
            with _write(self._db):
                answers = [run() for run, _ in jobs]
        except Exception as exc:  # noqa: BLE001  # any error goes to the callers
            for _, done in jobs:
                done.set_exception(exc)
        else:
            for (_, done), answer in zip(jobs, answers, strict=True):
                done.set_result(answer)

    def _row(self, bucket: Bucket) -> tuple[int, float] | None:
        found: tuple[int, float] | None = self._db.execute(
            "SELECT used, start FROM buckets WHERE name = ?", (bucket.key,)
        ).fetchone()
        return found


@contextmanager
def _write(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")  # a lock taken after reading could deadlock
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switch a file to WAL; SQLite does not wait while another worker does the same."""
    end = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                raise
            time.sleep(0.005)
        else:
            return
