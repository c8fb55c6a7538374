"""Clients of the demo: an attacker with a sufficient budget, and a visitor without."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2

from app.access.keys import Key, KeyFile, KeyLimits, digest, new_key, write_keys
from app.system.timestamps import timestamp

VISITS = 30
VISITOR_IMAGES = 20


@dataclass(frozen=True)
class Visits:
    """What a client with a small budget got from a server.

    Attributes:
        budget: images that its key allows.
        answered, refused: of its requests, each with one image.
    """

    budget: int
    answered: int
    refused: int


def admit(path: Path, thief_images: int) -> dict[str, dict[str, str]]:
    """Write a key file; returns the headers of the clients `thief` and `visitor`."""
    budgets = {"thief": thief_images, "visitor": VISITOR_IMAGES}
    secrets = {client: new_key() for client in budgets}
    created = timestamp(time.time(), "seconds")
    keys = tuple(
        Key(
            id=client,
            client=client,
            sha256=digest(secrets[client].encode()).hex(),
            created=created,
            limits=KeyLimits(total_images=images),
        )
        for client, images in budgets.items()
    )
    write_keys(path, KeyFile(keys=keys))
    return {client: {"Authorization": f"Bearer {secret}"} for client, secret in secrets.items()}


def visit(url: str, image: bytes, headers: Mapping[str, str]) -> Visits:
    """Ask the same image again and again, beyond the budget.

    Raises:
        httpx2.HTTPStatusError: refused for another reason.
    """
    statuses = []
    own = {**headers, "Content-Type": "image/png"}
    with httpx2.Client(base_url=url, headers=own, trust_env=False) as client:
        for _ in range(VISITS):
            answer = client.post("/v1/predict", content=image)
            if answer.status_code != httpx2.codes.TOO_MANY_REQUESTS:
                answer.raise_for_status()
            statuses.append(answer.status_code)
    refused = statuses.count(httpx2.codes.TOO_MANY_REQUESTS)
    return Visits(VISITOR_IMAGES, len(statuses) - refused, refused)
