"""Where budgets are counted: one protocol, three stores.

| store  | shared by               | survives                                        |
|--------|-------------------------|-------------------------------------------------|
| memory | nobody                  | nothing                                         |
| sqlite | the workers of one node | their restart and a power cut                   |
| redis  | the workers of any node | their restart; a power cut if Redis persists it |

A charge changes all its buckets or none, in one atomic step, so that any number of workers together
serve no more than the budget. A lost refund costs the client some images and never grants more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from app.errors import ConfigError, ScumbleError
from app.settings import store_url
from app.system.installation import install_command
from app.system.urls import redacted, split

MEMORY = "memory://"
SHARED = "all:"  # prefix of the names of the buckets that all clients share


class StoreError(ScumbleError):
    """The store did not answer; it may or may not have counted."""


@dataclass(frozen=True)
class Bucket:
    """A number of images in a window of time.

    Buckets of the same name and different windows are counted separately. The limit is not stored,
    so it can be raised and lowered.

    Attributes:
        name: the same in all workers.
        limit: images.
        window_s: seconds from the first image until the count restarts; 0 for never.
        clean: counts answered images only: what a defense withheld is given back.
    """

    name: str
    limit: int
    window_s: int = 0
    clean: bool = False

    @cached_property
    def key(self) -> str:
        """The key under which stores count."""
        return f"{self.name}:{self.window_s}" if self.window_s else self.name

    @cached_property
    def shared(self) -> bool:
        """Whether all clients share it."""
        return self.name.startswith(SHARED)

    @cached_property
    def budget(self) -> str:
        """What its client calls it."""
        return self.name.rpartition(":")[2]

    @cached_property
    def policy(self) -> str:
        """Its part of `RateLimit-Policy`."""
        window = f";w={self.window_s}" if self.window_s else ""
        return f'"{self.budget}";q={self.limit};qu="images"{window}'


class Level(NamedTuple):
    """How full a bucket is.

    Attributes:
        used: images, including those of this charge if it was granted.
        start: of the window by the store's clock; tells a refund whether the window has ended.
        reset_s: seconds until the window ends; 0 if it never does.
    """

    used: int
    start: float
    reset_s: float


class Charge(NamedTuple):
    """The result of a charge: granted or not, and the level of each bucket, in order."""

    granted: bool
    levels: tuple[Level, ...]


Charged = Callable[[Charge | Exception], None]
"""Gets a charge, or why there is none: `StoreError`, or a fault of ours."""


class StateStore(Protocol):
    """Counts images in buckets."""

    async def charge(self, buckets: Sequence[Bucket], images: int) -> Charge:
        """Add `images` to every bucket, or to none if they do not fit into one of them.

        Raises:
            StoreError: no answer; the images may have been counted.
        """
        ...

    def charge_soon(self, buckets: Sequence[Bucket], images: int, done: Charged) -> None:
        """The same without waiting; `done` is called at once or later, on the event loop."""
        ...

    async def refund(self, buckets: Sequence[Bucket], images: int, charge: Charge) -> None:
        """Take a granted charge back, from buckets whose window has not ended since.

        Raises:
            StoreError: no answer; the images may stay counted.
        """
        ...

    async def ping(self) -> None:
        """Check that a charge would work, without counting images.

        Raises:
            StoreError: a charge would fail.
        """
        ...

    async def close(self) -> None:
        """Close files and connections."""
        ...


def open_store(url: str) -> StateStore:
    """Open the store that `url` names. A Redis server is not contacted yet.

    Raises:
        ConfigError: the URL is invalid, its file cannot be opened, or an extra is missing.
    """
    try:
        scheme = split(store_url(url)).scheme
    except ValueError as exc:
        raise ConfigError(f"SCUMBLE_STORE is {redacted(url)!r}: {exc}") from exc
    if scheme == "memory":
        from app.access.stores.memory import MemoryStore

        return MemoryStore()
    if scheme == "sqlite":
        from app.access.stores.sqlite import SqliteStore

        return SqliteStore.at(url)
    try:
        from app.access.stores.redis import RedisStore
    except ImportError as exc:
        raise ConfigError(
            f"SCUMBLE_STORE is {redacted(url)!r}: {exc}; "
            f"install it with: {install_command('redis')}"
        ) from exc
    return RedisStore.at(url)
