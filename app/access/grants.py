"""What a key allows: whose it is, which routes, which defense, which budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.access.stores import Bucket
from app.errors import Forbidden
from scumble.defenses import Defense

NOBODY = bytes(32)  # compared with where no key matches, so that this takes as long


@dataclass(frozen=True)
class Grant:
    """What a key allows.

    Attributes:
        id: of the key, for logs.
        client: whose key it is; empty where there are no keys.
        policy: name of what stands between the engine and this client, for logs.
        digest: SHA-256 of the key.
        revoked: the key was taken back.
        routes: allowed paths, each with all below it; none for all.
        defense: what stands between the engine and this client; None for the server's own.
        buckets: what its images count against; the client's, then everybody's.
        closed: refuse while the store is away.
    """

    id: str = ""
    client: str = ""
    policy: str = ""
    digest: bytes = NOBODY
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
        """Refuse what the key does not allow.

        Raises:
            Forbidden: it is revoked, or not for this path.
        """
        if self.revoked:
            raise Forbidden("this API key has been revoked")
        if not self.allows(path):
            raise Forbidden("this API key is not for this route")


Grants = Mapping[bytes, Grant]
"""By the SHA-256 of their keys."""
