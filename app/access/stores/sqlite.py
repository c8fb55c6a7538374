"""Budgets in an SQLite file, for the workers of one node.

The file uses write-ahead logging and is synchronised before a charge is granted, so a budget
survives a killed worker and a power cut. Transactions are short and run on a thread: the event loop
never waits for a disk or for another worker's lock. Charges of one turn of the loop, and those that
arrive during a transaction, share the next one, which reads and writes each bucket once.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from app.access.stores import Bucket, Charge, Charged, StoreError
from app.access.stores.memory import current, decide
from app.errors import ConfigError
from app.system.background import give, settle
from app.system.urls import redacted

BUSY_S = 2.0  # how long to wait for another worker's transaction
T = TypeVar("T")
Row = tuple[int, float]  # images, and start of the window


class Rows:
    """What one transaction reads and changes.

    Args:
        db: in a transaction.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._known: dict[str, Row | None] = {}
        self._changed: dict[str, Row] = {}

    def __getitem__(self, bucket: Bucket) -> Row | None:
        """The row of a bucket; None if it has none."""
        key = bucket.key
        if key not in self._known:
            found = self._db.execute("SELECT used, start FROM buckets WHERE name = ?", (key,))
            self._known[key] = found.fetchone()
        return self._known[key]

    def __setitem__(self, bucket: Bucket, row: Row) -> None:
        """Change it."""
        self._known[bucket.key] = self._changed[bucket.key] = row

    def save(self) -> None:
        """Write what has changed."""
        self._db.executemany(
            "INSERT OR REPLACE INTO buckets VALUES (?, ?, ?)",
            [(key, *row) for key, row in self._changed.items()],
        )


class Job(NamedTuple):
    """A part of a transaction.

    Attributes:
        run: does it, on the thread; gets the rows.
        done: gets its result, or why there is none, on the event loop.
        wanted: False once nobody waits for it; then it is left out.
    """

    run: Callable[[Rows], Any]
    done: Callable[[Any], None]
    wanted: Callable[[], bool] = lambda: True


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
        self._waiting: list[Job] = []
        self._loop: asyncio.AbstractEventLoop | None = None  # where a transaction is due or runs
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
        return await self._transaction(lambda rows: self._charge(rows, buckets, images))

    def charge_soon(self, buckets: Sequence[Bucket], images: int, done: Charged) -> None:
        """The same without waiting."""
        self._add(Job(lambda rows: self._charge(rows, buckets, images), done))

    async def refund(self, buckets: Sequence[Bucket], images: int, charge: Charge) -> None:
        """Take a charge back."""

        def run(rows: Rows) -> None:
            for bucket, level in zip(buckets, charge.levels, strict=True):
                row = rows[bucket]
                if row is not None and row[1] == level.start:
                    rows[bucket] = max(0, row[0] - images), level.start

        await self._transaction(run)

    async def ping(self) -> None:
        """Take the lock that a charge needs."""
        await self._transaction(lambda _: None)

    async def close(self) -> None:
        """Close the file."""
        self._thread.shutdown()
        self._db.close()

    async def _transaction(self, run: Callable[[Rows], T]) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._add(Job(run, partial(settle, future), lambda: not future.cancelled()))
        return await future

    def _add(self, job: Job) -> None:
        self._waiting.append(job)
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            loop.call_soon(self._begin, loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand all waiting jobs to the thread."""
        jobs, self._waiting = self._waiting, []
        if not jobs:
            self._loop = None
            return
        try:
            running = self._thread.submit(self._commit, jobs)
        except RuntimeError as exc:  # the store is closed
            self._deliver(loop, jobs, exc)
            return
        running.add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._deliver, loop, jobs, done.result())
        )

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, jobs: list[Job], outcome: list[Any] | Exception
    ) -> None:
        self._begin(loop)  # the next transaction runs meanwhile
        for number, job in enumerate(jobs):
            give(job.done, outcome[number] if isinstance(outcome, list) else outcome)

    def _commit(self, jobs: list[Job]) -> list[Any] | Exception:
        """The results of jobs in one transaction, or why there are none; on the thread."""
        try:
            with _write(self._db):
                rows = Rows(self._db)
                results = [job.run(rows) if job.wanted() else None for job in jobs]
                rows.save()
        except sqlite3.Error as exc:
            return StoreError(f"the budget file: {exc}")
        except Exception as exc:  # noqa: BLE001  # any error goes to those who wait
            return exc
        return results

    def _charge(self, rows: Rows, buckets: Sequence[Bucket], images: int) -> Charge:
        now = self._clock()
        charge = decide(buckets, [current(rows[b], b, now) for b in buckets], images, now)
        if charge.granted:
            for bucket, level in zip(buckets, charge.levels, strict=True):
                rows[bucket] = level.used, level.start
        return charge


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
