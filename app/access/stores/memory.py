"""Budgets in the memory of one worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from app.access.stores import Bucket, Charge, Charged, Level
from app.system.background import give


class MemoryStore:
    """Counts in a dictionary, which ends with the process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._rows: dict[str, tuple[int, float]] = {}  # key -> images, start of the window

    async def charge(self, buckets: Sequence[Bucket], images: int) -> Charge:
        """Add to all buckets or none."""
        return self._charge(buckets, images)

    def charge_soon(self, buckets: Sequence[Bucket], images: int, done: Charged) -> None:
        """The same; `done` is called at once."""
        give(done, self._charge(buckets, images))

    async def refund(self, buckets: Sequence[Bucket], images: int, charge: Charge) -> None:
        """Take a charge back."""
        for bucket, level in zip(buckets, charge.levels, strict=True):
            used, start = self._rows.get(bucket.key, (0, 0.0))
            if start == level.start:
                self._rows[bucket.key] = max(0, used - images), start

    async def ping(self) -> None:
        """Do nothing: memory is always available."""

    async def close(self) -> None:
        """Do nothing."""

    def _charge(self, buckets: Sequence[Bucket], images: int) -> Charge:
        now = self._clock()
        rows = [current(self._rows.get(bucket.key), bucket, now) for bucket in buckets]
        charge = decide(buckets, rows, images, now)
        if charge.granted:
            self._rows.update(
                (bucket.key, (level.used, level.start))
                for bucket, level in zip(buckets, charge.levels, strict=True)
            )
        return charge


def current(row: tuple[int, float] | None, bucket: Bucket, now: float) -> tuple[int, float]:
    """Return images and start of the bucket's window at `now`, which may be a new window.

    A clock that is set back makes a window longer. A new window would grant the images again.
    """
    if row is None or (bucket.window_s and now >= row[1] + bucket.window_s):
        return 0, now
    return row


def decide(
    buckets: Sequence[Bucket], rows: Sequence[tuple[int, float]], images: int, now: float
) -> Charge:
    """Decide whether `images` fit into all buckets, and compute the levels."""
    granted = all(
        used + images <= bucket.limit for bucket, (used, _) in zip(buckets, rows, strict=True)
    )
    more = images if granted else 0
    levels = [
        Level(used + more, start, start + bucket.window_s - now if bucket.window_s else 0.0)
        for bucket, (used, start) in zip(buckets, rows, strict=True)
    ]
    return Charge(granted, tuple(levels))
