"""The budgets of one request: its charge, its refund, and what the client is told of them.

Source: draft-ietf-httpapi-ratelimit-headers-10 (RateLimit-Policy and RateLimit as lists of
strings with parameters). Only the client's own buckets are shown: the level of a shared bucket
would tell one client about the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from app.access.grants import Grant
from app.access.stores import SHARED, Bucket, Charge, StateStore, StoreError
from app.errors import OverBudget, Unavailable
from app.telemetry.client_usage import ClientUsage

NEVER_S = 86400  # Retry-After if waiting does not help; clients take a day for "do not retry"


class Limits(Protocol):
    """Budgets as settings and keys have them; None for no limit."""

    @property
    def window_images(self) -> int | None:
        """Images in a window."""
        ...

    @property
    def window_s(self) -> int:
        """Seconds of the window."""
        ...

    @property
    def total_images(self) -> int | None:
        """Images in total."""
        ...

    @property
    def window_clean(self) -> int | None:
        """Clean answers in a window."""
        ...

    @property
    def total_clean(self) -> int | None:
        """Clean answers in total."""
        ...


@dataclass(slots=True)
class Admission:
    """One admitted request and its charge.

    Attributes:
        grant: of the client's key.
        store: counts the images.
        clients: metrics of clients with keys.
        on_store_failure: called when the store did not respond.
        images: charged.
        charged: by the store; None before the charge and after a refund.
        left: images left of the client's budgets, by name; None before the store has responded.
        headers: RateLimit fields of the response.
        returned: images given back to budgets of clean answers, because they were withheld.
    """

    grant: Grant
    store: StateStore
    clients: ClientUsage
    on_store_failure: Callable[[StoreError], None]
    images: int = 0
    charged: Charge | None = None
    left: dict[str, int] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    returned: int = 0

    async def charge(self, images: int) -> None:
        """Take the images from the budgets.

        Raises:
            OverBudget: a budget has fewer images left; nothing was taken.
            Unavailable: the store did not respond and the key fails closed.
        """
        buckets = self.grant.buckets
        if not buckets:
            return
        charge: Charge | StoreError
        try:
            charge = await self.store.charge(buckets, images)
        except StoreError as exc:
            charge = exc
        self._take(charge, images)

    def charge_soon(self, images: int, done: Callable[[Exception | None], None]) -> None:
        """The same without waiting.

        Args:
            images: to charge.
            done: called at once or later on the event loop, with the error that `charge` would
                raise.
        """
        buckets = self.grant.buckets
        if not buckets:
            done(None)
            return

        def charged(charge: Charge | Exception) -> None:
            fault = None
            try:
                self._take(charge, images)
            except Exception as exc:  # noqa: BLE001  # the caller answers it
                fault = exc
            done(fault)

        self.store.charge_soon(buckets, images, charged)

    async def refund_withheld(self, images: int) -> None:
        """Give back images whose answers were withheld to the buckets that count clean answers.

        All images were charged first, so requests at the same time get no more than the budget. A
        refund that is lost costs the client some answers.
        """
        if self.charged is None or not images:
            return
        buckets, charge = self._part(self.charged, clean=True)
        self.returned = images
        if await self._refund(buckets, charge, images):
            for name, bucket, left in by_client(buckets, charge):
                self._show(name, bucket, min(bucket.limit, left + images))

    async def refund(self) -> None:
        """Give back what was charged, because the client got no answer for it."""
        if self.charged is None:
            return
        charged, self.charged = self.charged, None
        if not self.returned:
            await self._refund(self.grant.buckets, charged, self.images)
            return
        await self._refund(*self._part(charged, clean=False), self.images)
        await self._refund(*self._part(charged, clean=True), self.images - self.returned)

    def _take(self, charge: Charge | Exception, images: int) -> None:
        """Note a charge; raises what `charge` raises."""
        buckets = self.grant.buckets
        if isinstance(charge, StoreError):
            self.on_store_failure(charge)
            if self.grant.closed:
                raise Unavailable("budget store unavailable") from charge
            return
        if isinstance(charge, Exception):
            raise charge
        self.left = {}
        for name, bucket, left in by_client(buckets, charge):
            self.left[name] = left
            self._show(name, bucket, left)
        self.headers = fields(buckets, charge)
        if not charge.granted:
            raise OverBudget(*refusal(buckets, charge, images))
        self.images, self.charged = images, charge

    def _part(self, charged: Charge, *, clean: bool) -> tuple[Sequence[Bucket], Charge]:
        """The buckets that do or do not count clean answers only, with their part of a charge."""
        pairs = zip(self.grant.buckets, charged.levels, strict=True)
        part = [(bucket, level) for bucket, level in pairs if bucket.clean is clean]
        levels = tuple(level for _, level in part)
        return [bucket for bucket, _ in part], Charge(granted=True, levels=levels)

    async def _refund(self, buckets: Sequence[Bucket], charge: Charge, images: int) -> bool:
        """Whether the store has taken it; if not, the client loses images and never gains any."""
        if not buckets or not images:
            return False
        try:
            await self.store.refund(buckets, images, charge)
        except StoreError as exc:
            self.on_store_failure(exc)
            return False
        return True

    def _show(self, name: str, bucket: Bucket, left: int) -> None:
        if self.grant.client:
            # Windows of different lengths are different budgets, even of one client.
            budget = f"{name}_{bucket.window_s}s" if bucket.window_s else name
            self.clients.budget(self.grant.client, budget, limit=bucket.limit, left=left)


def client_buckets(client: str, limits: Limits) -> tuple[Bucket, ...]:
    """The buckets of one client."""
    return _buckets(f"client:{client}:", limits)


def shared_buckets(limits: Limits) -> tuple[Bucket, ...]:
    """The buckets that all clients share."""
    return _buckets(SHARED, limits)


def fields(buckets: Sequence[Bucket], charge: Charge) -> dict[str, str]:
    """The `RateLimit-Policy` and `RateLimit` headers; empty if the client has no such buckets.

    Buckets of clean answers are left out: their level would tell which answers are withheld.
    """
    policies, limits = [], []
    for bucket, level in zip(buckets, charge.levels, strict=True):
        if bucket.shared or bucket.clean:
            continue
        reset = f";t={_seconds(level.reset_s)}" if bucket.window_s else ""
        policies.append(bucket.policy)
        limits.append(f'"{bucket.budget}";r={max(0, bucket.limit - level.used)}{reset}')
    if not policies:
        return {}
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(limits)}


def by_client(buckets: Sequence[Bucket], charge: Charge) -> Iterator[tuple[str, Bucket, int]]:
    """The client's own budgets: name, bucket, images left."""
    for bucket, level in zip(buckets, charge.levels, strict=True):
        if not bucket.shared:
            yield bucket.budget, bucket, max(0, bucket.limit - level.used)


def refusal(buckets: Sequence[Bucket], charge: Charge, images: int) -> tuple[str, dict[str, str]]:
    """The message and `Retry-After` for images that do not fit, for the bucket that resets last."""
    exceeded = []
    for bucket, level in zip(buckets, charge.levels, strict=True):
        if level.used + images <= bucket.limit:
            continue
        if bucket.shared:
            detail = f"shared budget of all clients exceeded: {images} images requested"
        elif bucket.clean:
            detail = f"budget of answers exceeded: {images} images requested"
        else:
            left = max(0, bucket.limit - level.used)
            detail = f"budget exceeded: {images} images requested, {left} of {bucket.limit} left"
        if not bucket.window_s:
            retry_s, reset = NEVER_S, "it does not reset"
        elif images > bucket.limit:
            retry_s, reset = NEVER_S, "the request is larger than the budget"
        else:
            retry_s = _seconds(level.reset_s)
            reset = f"resets in {retry_s} s"
        exceeded.append((retry_s, f"{detail}; {reset}"))
    retry_s, detail = max(exceeded)
    return detail, {"Retry-After": str(retry_s)}


def _buckets(prefix: str, limits: Limits) -> tuple[Bucket, ...]:
    window_s = limits.window_s
    buckets = (
        ("window", limits.window_images, window_s, False),
        ("total", limits.total_images, 0, False),
        ("window_clean", limits.window_clean, window_s, True),
        ("total_clean", limits.total_clean, 0, True),
    )
    return tuple(
        Bucket(f"{prefix}{name}", limit, seconds, clean)
        for name, limit, seconds, clean in buckets
        if limit is not None
    )


def _seconds(seconds: float) -> int:
    """Whole seconds, rounded up, so that a retry is never too early."""
    return max(1, math.ceil(seconds))
