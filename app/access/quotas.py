"""Budgets as clients see them: RateLimit fields, and the sentence of a 429.

Source: draft-ietf-httpapi-ratelimit-headers-10 (RateLimit-Policy and RateLimit as lists of
strings with parameters). Only the client's own buckets are shown: how full everybody's is would
tell one client of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from app.access.stores import Bucket, Charge

EVERYBODY = "all:"  # beginning of the names of the buckets that all clients share
SPENT_S = 86400  # Retry-After where only a person can help; clients take a day for "not again"


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


def left(buckets: Sequence[Bucket], charge: Charge) -> dict[str, int]:
    """Images that are left of the client's own budgets, by their names."""
    return {name: images for name, _, images in by_client(buckets, charge)}


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
