"""Where budgets are counted: one protocol, three places.

| store  | who may share it               | what it outlasts                          |
|--------|--------------------------------|-------------------------------------------|
| memory | one worker                     | nothing                                   |
| sqlite | the workers of one node        | all of them, and a power cut              |
| redis  | the workers of any node        | all of them; Redis as far as it writes    |

A charge touches all its buckets or none, in one atomic step, so that no number of workers serves
more than a budget. A lost refund costs the client some images; it never gives him more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.errors import ConfigError, ScumbleError
from app.system.urls import redacted, split

MEMORY = "memory://"
ALLOWED = "allowed: memory://, sqlite:///PATH, redis://HOST:PORT/DB"


class StoreError(ScumbleError):
    """The store did not answer; whether it counted is not known."""


@dataclass(frozen=True)
class Bucket:
    """A number of images for a time.

    Two buckets of one name and different windows are counted apart: a shared count would belong to
    whichever window asked last. A limit is not part of what is counted, so it can be raised and
    lowered.

    Attributes:
        name: the same in all workers.
        limit: images.
        window_s: seconds from the first image on, after which counting starts anew; 0 for never.
    """

    name: str
    limit: int
    window_s: int = 0

    @property
    def key(self) -> str:
        """What stores count under."""
        return f"{self.name}:{self.window_s}" if self.window_s else self.name


@dataclass(frozen=True)
class Level:
    """How full a bucket is.

    Attributes:
        used: images, those of this charge included if it was granted.
        start: of its window by the store's clock; tells a refund whether it is still on.
        reset_s: seconds until its window ends; 0 where it never does.
    """

    used: int
    start: float
    reset_s: float


@dataclass(frozen=True)
class Charge:
    """What became of a charge: granted or not, and the level of each bucket, in order."""

    granted: bool
    levels: tuple[Level, ...]


class StateStore(Protocol):
    """Counts images in buckets, for all that share it."""

    async def charge(self, buckets: Sequence[Bucket], images: int) -> Charge:
        """Add `images` to every bucket, or to none if one has no room for all of them.

        Raises:
            StoreError: no answer; the images may have been counted.
        """
        ...

    async def refund(self, buckets: Sequence[Bucket], images: int, charge: Charge) -> None:
        """Take a granted charge back, from buckets whose window has not ended since.

        Raises:
            StoreError: no answer; the images may stay counted.
        """
        ...

    async def ping(self) -> None:
        """Do what a charge needs, count nothing.

        Raises:
            StoreError: a charge would fail.
        """
        ...

    async def close(self) -> None:
        """Give back files and connections."""
        ...


def open_store(url: str) -> StateStore:
    """The store that `url` names; a Redis that is down is not noticed here.

    Raises:
        ConfigError: another scheme, a file that cannot be opened, or an extra that is missing.
    """
    try:
        scheme = split(url).scheme
    except ValueError as exc:
        raise ConfigError(f"SCUMBLE_STORE is {redacted(url)!r}, {exc}; {ALLOWED}") from exc
    if scheme == "memory":
        from app.access.stores.memory import MemoryStore

        return MemoryStore()
    if scheme == "sqlite":
        from app.access.stores.sqlite import SqliteStore

        return SqliteStore.at(url)
    if scheme in ("redis", "rediss", "unix"):
        try:
            from app.access.stores.redis import RedisStore
        except ImportError as exc:
            raise ConfigError(
                f"SCUMBLE_STORE is {redacted(url)!r}: {exc}; "
                "install it with: pip install 'scumble[redis]'"
            ) from exc
        return RedisStore.at(url)
    raise ConfigError(f"SCUMBLE_STORE is {redacted(url)!r}; {ALLOWED}")
