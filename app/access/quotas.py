"""The budgets of one request: its charge, its refund, and what the client is told of them.

Source: draft-ietf-httpapi-ratelimit-headers-10 (RateLimit-Policy and RateLimit as lists of
strings with parameters). Only the client's own buckets are shown: how full everybody's is would
tell one client of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from app.access.grants import Grant
from app.access.stores import Bucket, Charge, StateStore, StoreError
from app.errors import OverBudget, Unavailable
from app.telemetry.clients import Clients

EVERYBODY = "all:"  # beginning of the names of the buckets that all clients share
SPENT_S = 86400  # Retry-After where only a person can help; clients take a day for "not again"


@dataclass(slots=True)
class Admission:
    """One admitted request and its charge.

    Attributes:
        grant: of the client's key.
        store: counts the images.
        clients: metrics of clients with keys.
        missed: called when the store did not respond.
        images: charged.
        charged: by the store; None before the charge and after a refund.
        left: images left of the client's budgets, by name; None where nothing was asked of a store.
        headers: RateLimit fields of the response.
    """

    grant: Grant
    store: StateStore
    clients: Clients
    missed: Callable[[StoreError], None]
    images: int = 0
    charged: Charge | None = None
    left: dict[str, int] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    async def charge(self, images: int) -> None:
        """Take the images from the budgets.

        Raises:
            OverBudget: a budget has fewer images left; nothing was taken.
            Unavailable: the store did not respond and the key fails closed.
        """
        buckets = self.grant.buckets
        if not buckets:
            return
        try:
            charge = await self.store.charge(buckets, images)
        except StoreError as exc:
            self.missed(exc)
            if self.grant.closed:
                raise Unavailable("budgets cannot be counted at the moment") from exc
            return
        self.left = {}
        for name, bucket, left in by_client(buckets, charge):
            self.left[name] = left
            if self.grant.client:
                # Windows of different lengths are different budgets, even of one client.
                budget = f"{name}_{bucket.window_s}s" if bucket.window_s else name
                self.clients.budget(self.grant.client, budget, limit=bucket.limit, left=left)
        self.headers = fields(buckets, charge)
        if not charge.granted:
            raise OverBudget(*refusal(buckets, charge, images))
        self.images, self.charged = images, charge

    async def refund(self) -> None:
        """Give back what was charged, because the client got no answer for it."""
        if self.charged is None:
            return
        charge, self.charged = self.charged, None
        try:
            await self.store.refund(self.grant.buckets, self.images, charge)
        except StoreError as exc:  # the client loses images; it never gets more than its budget
            self.missed(exc)


def client_buckets(
    client: str, window_images: int | None, window_s: int, total_images: int | None
) -> tuple[Bucket, ...]:
    """The buckets of one client."""
    return _buckets(f"client:{client}:", window_images, window_s, total_images)


def common_buckets(
    window_images: int | None, window_s: int, total_images: int | None
) -> tuple[Bucket, ...]:
    """The buckets of all clients together."""
    return _buckets(EVERYBODY, window_images, window_s, total_images)


def fields(buckets: Sequence[Bucket], charge: Charge) -> dict[str, str]:
    """`RateLimit-Policy` and `RateLimit` for the client's own buckets; nothing if he has none."""
    policies, limits = [], []
    for bucket, level in zip(buckets, charge.levels, strict=True):
        if bucket.name.startswith(EVERYBODY):
            continue
        name = bucket.name.rpartition(":")[2]
        window = f";w={bucket.window_s}" if bucket.window_s else ""
        reset = f";t={_seconds(level.reset_s)}" if bucket.window_s else ""
        policies.append(f'"{name}";q={bucket.limit};qu="images"{window}')
        limits.append(f'"{name}";r={max(0, bucket.limit - level.used)}{reset}')
    if not policies:
        return {}
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(limits)}


def by_client(buckets: Sequence[Bucket], charge: Charge) -> Iterator[tuple[str, Bucket, int]]:
    """The client's own budgets: name, bucket, images that are left."""
    for bucket, level in zip(buckets, charge.levels, strict=True):
        if not bucket.name.startswith(EVERYBODY):
            yield bucket.name.rpartition(":")[2], bucket, max(0, bucket.limit - level.used)


def refusal(buckets: Sequence[Bucket], charge: Charge, images: int) -> tuple[str, dict[str, str]]:
    """The sentence and `Retry-After` for images that did not fit: of what takes longest to help."""
    found = []
    for bucket, level in zip(buckets, charge.levels, strict=True):
        if level.used + images <= bucket.limit:
            continue
        common = bucket.name.startswith(EVERYBODY)
        left = "" if common else f"; {max(0, bucket.limit - level.used)} of {bucket.limit} are left"
        whose = "all clients together" if common else "this client"
        if images > bucket.limit or not bucket.window_s:
            pause, until = SPENT_S, "and no window will bring more"
        else:
            pause = _seconds(level.reset_s)
            until = f"for another {pause} s"
        found.append((pause, f"{images} images are over the budget of {whose}{left}, {until}"))
    pause, detail = max(found)
    return detail, {"Retry-After": str(pause)}


def _buckets(
    prefix: str, window_images: int | None, window_s: int, total_images: int | None
) -> tuple[Bucket, ...]:
    found = []
    if window_images is not None:
        found.append(Bucket(f"{prefix}window", window_images, window_s))
    if total_images is not None:
        found.append(Bucket(f"{prefix}total", total_images))
    return tuple(found)


def _seconds(seconds: float) -> int:
    """Whole seconds, rounded up: who waits so long does not come too early."""
    return max(1, math.ceil(seconds))
