"""What a key grants: a client, routes, a defense, budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.access.stores import Bucket
from app.errors import Forbidden
from scumble.defenses import Defense

NO_DIGEST = bytes(32)  # compared with if no key matches, so that the time is the same


@dataclass(frozen=True)
class Grant:
    """What a key grants.

    Attributes:
        id: of the key, for logs.
        client: that the key belongs to; empty without keys.
        policy: name of defense and output, for logs.
        digest: SHA-256 of the key.
        revoked: the key has been revoked.
        routes: allowed paths, each with all paths below it; empty for all.
        defense: the client's defense; None for the server's.
        buckets: that images are charged to: the client's, then the shared ones.
        closed: refuse requests while the store is unavailable.
    """

    id: str = ""
    client: str = ""
    policy: str = ""
    digest: bytes = NO_DIGEST
    revoked: bool = False
    routes: tuple[str, ...] = ()
    defense: Defense | None = None
    buckets: tuple[Bucket, ...] = ()
    closed: bool = True

    def allows(self, path: str) -> bool:
        """Whether `path` is, or is below, one of the routes."""
        return not self.routes or any(
            path == route or path.startswith(route.rstrip("/") + "/") for route in self.routes
        )

    def check(self, path: str) -> None:
        """Check that the key may use a path.

        Raises:
            Forbidden: the key is revoked, or not for this path.
        """
        if self.revoked:
            raise Forbidden("this API key has been revoked")
        if not self.allows(path):
            raise Forbidden("this API key is not for this route")


Grants = Mapping[bytes, Grant]
"""Grants by the SHA-256 of their keys."""
