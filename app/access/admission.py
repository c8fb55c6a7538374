"""Who may ask, what for, and how much: in front of the routes, and nowhere where keys are off.

    header -> SHA-256 -> grant -> route -> [endpoint: charge -> engine -> defense] -> headers

Keys are read again when their file changes (`app.system.file_watcher`). A broken file changes
nothing: the current keys stay in use, and the log says why; with `closed` only for a limited time.
A request is charged when the headers of its images are known and before any of them is decoded; if
it then fails or is refused, it is refunded.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from prometheus_client import Counter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from app.access.grants import Grant, Grants
from app.access.keys import digest
from app.access.quotas import Admission
from app.access.stores import StateStore, StoreError
from app.context import request_context
from app.endpoint import Endpoint
from app.errors import OverBudget, Unauthorized, Unavailable
from app.system.background import Throttle
from app.system.file_watcher import WatchedFile
from app.telemetry.clients import Clients

OPEN = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
log = logging.getLogger("scumble")


class Access:
    """Admits requests.

    Args:
        keys: the grants, as their file is loaded; None for keyless.
        closed: refuse requests with keys while that file is stale.
        anybody: what a request without a key may do where there are no keys.
        store: of the budgets.
        failures: counts requests that the store did not answer.
        clients: counts what clients with keys get.
    """

    def __init__(
        self,
        keys: WatchedFile[Grants] | None,
        *,
        closed: bool = False,
        anybody: Grant,
        store: StateStore,
        failures: Counter,
        clients: Clients,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self._keys = keys
        self._closed = closed
        self._anybody = anybody
        self._failures = failures
        self.clients = clients
        self._log_due = Throttle(clock)

    def known(self, scope: Scope) -> Grant:
        """The grant of a request's key.

        Raises:
            Unauthorized: no key, or none of ours.
            Unavailable: the keys are too old to go by.
        """
        if self._keys is None:
            return self._anybody
        if self.outdated:
            raise Unavailable("API keys cannot be checked at the moment")
        key = _key(scope)
        if key is None:
            raise Unauthorized(
                "an API key is needed, as Authorization: Bearer KEY or X-API-Key: KEY",
                {"WWW-Authenticate": 'Bearer realm="scumble"'},
            )
        found = digest(key)
        grant = self._keys.value.get(found, self._anybody)
        if not hmac.compare_digest(grant.digest, found):
            raise Unauthorized(
                "this API key is not known here",
                {"WWW-Authenticate": 'Bearer realm="scumble", error="invalid_token"'},
            )
        return grant

    def guard(self, path: str, endpoint: Endpoint) -> Endpoint:
        """The endpoint behind a check of the key, charged and refunded; open ones as they are."""
        if path in OPEN:
            return endpoint

        async def guarded(request: Request) -> Response:
            admission = Admission(self.known(request.scope), self.store, self.clients, self.missed)
            context = request_context(request.scope)
            context.admission = admission
            admission.grant.check(request.scope["path"])
            try:
                response = await endpoint(request)
            except OverBudget as exc:
                exc.headers.update(admission.headers)
                if admission.grant.client:
                    self.clients.refused(admission.grant.client)
                raise
            except Exception:
                await admission.refund()
                raise
            if admission.headers:
                response.headers.update(admission.headers)
            if context.images and admission.grant.client:
                self.clients.answered(admission.grant.client, context.images)
            return response

        return guarded

    @property
    def outdated(self) -> bool:
        """Whether requests are refused because the file of keys cannot be read."""
        return self._closed and self._keys is not None and self._keys.stale

    async def ready(self) -> bool:
        """Whether no request would be refused for want of the store."""
        if not any(grant.closed and grant.buckets for grant in self._all()):
            return True
        try:
            await self.store.ping()
        except StoreError as exc:
            self.missed(exc)
            return False
        return True

    def missed(self, exc: StoreError) -> None:
        """The store did not answer; the log says so from time to time."""
        self._failures.inc()
        if self._log_due():
            log.error("budget store unavailable: %s", exc)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Close the store at the end."""
        try:
            yield
        finally:
            await self.store.close()

    def _all(self) -> list[Grant]:
        return [self._anybody] if self._keys is None else list(self._keys.value.values())


def _key(scope: Scope) -> bytes | None:
    """The key in a request's headers."""
    other = None
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            key: bytes = value[7:].strip()
            return key
        if name == b"x-api-key":
            other = value.strip()
    return other
