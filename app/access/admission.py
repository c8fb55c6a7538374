"""Checks API keys and charges budgets, in front of the routes.

    header -> SHA-256 -> grant -> route -> [endpoint: charge -> engine -> defense] -> headers

Keys are reloaded when their file changes (`app.system.file_watcher`). If the file is broken, the
current keys stay in use; with `closed`, only for a limited time. A request is charged after the
headers of its images are read and before any image is decoded. A request that then fails or is
refused is refunded.
"""

from __future__ import annotations

import asyncio
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
from app.endpoint_type import Endpoint
from app.errors import OverBudget, Unauthorized, Unavailable
from app.request_context import RequestContext, request_context
from app.system.background import Throttle
from app.system.file_watcher import WatchedFile
from app.telemetry.client_usage import ClientUsage

OPEN = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
REFUNDS = 1000  # of withheld answers, at a time
log = logging.getLogger("scumble")


class Access:
    """Admits requests.

    Args:
        keys: the grants, reloaded with their file; None for a service without keys.
        closed: refuse requests while the file of keys is stale.
        keyless: the grant of every request if there are no keys.
        store: counts the budgets.
        failures: counts failures of the store.
        clients: counts the images of each client.
        clock: seconds.
    """

    def __init__(
        self,
        keys: WatchedFile[Grants] | None,
        *,
        closed: bool = False,
        keyless: Grant,
        store: StateStore,
        failures: Counter,
        clients: ClientUsage,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self._keys = keys
        self._closed = closed
        self._keyless = keyless
        self._failures = failures
        self.clients = clients
        self._log_due = Throttle(clock)
        self._refunds: set[asyncio.Task[None]] = set()

    def known(self, scope: Scope) -> Grant:
        """Find the grant of a request's key.

        Raises:
            Unauthorized: the key is missing or unknown.
            Unavailable: the file of keys is stale.
        """
        if self._keys is None:
            return self._keyless
        if self.outdated:
            raise Unavailable("API keys cannot be checked: their file cannot be read")
        key = _key(scope)
        if key is None:
            raise Unauthorized(
                "API key required: send Authorization: Bearer KEY or X-API-Key: KEY",
                {"WWW-Authenticate": 'Bearer realm="scumble"'},
            )
        found = digest(key)
        grant = self._keys.value.get(found, self._keyless)
        if not hmac.compare_digest(grant.digest, found):
            raise Unauthorized(
                "unknown API key",
                {"WWW-Authenticate": 'Bearer realm="scumble", error="invalid_token"'},
            )
        return grant

    def guard(self, path: str, endpoint: Endpoint) -> Endpoint:
        """Wrap an endpoint in the check of keys and budgets; open routes stay as they are."""
        if path in OPEN:
            return endpoint

        async def guarded(request: Request) -> Response:
            context = request_context(request.scope)
            admission = context.admission if context.fault is not None else None
            if admission is None:
                admission = self.admit(request.scope, context)
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
            self.answered(context, admission)
            return response

        return guarded

    def admit(self, scope: Scope, context: RequestContext) -> Admission:
        """Admit a request that uses a path.

        Args:
            scope: of the request.
            context: gets the admission.

        Raises:
            Unauthorized: the key is missing or unknown.
            Forbidden: the key is revoked, or not for this path.
            Unavailable: the file of keys is stale.
        """
        grant = self.known(scope)
        admission = Admission(grant, self.store, self.clients, self.note_store_failure)
        context.admission = admission
        grant.check(scope["path"])
        return admission

    def answered(self, context: RequestContext, admission: Admission) -> None:
        """Count the images of a request that has its answer."""
        if context.images and admission.grant.client:
            self.clients.answered(admission.grant.client, context.images)
        if context.withheld:
            self._note_withheld(admission, context.withheld)

    @property
    def outdated(self) -> bool:
        """Whether requests are refused because the file of keys cannot be read."""
        return self._closed and self._keys is not None and self._keys.stale

    async def ready(self) -> bool:
        """Whether the store answers, or no request needs it."""
        if not any(grant.closed and grant.buckets for grant in self._all()):
            return True
        try:
            await self.store.ping()
        except StoreError as exc:
            self.note_store_failure(exc)
            return False
        return True

    def note_store_failure(self, exc: StoreError) -> None:
        """Count a failure of the store, and log it from time to time."""
        self._failures.inc()
        if self._log_due():
            log.error("budget store unavailable: %s", exc)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Close the store on exit."""
        try:
            yield
        finally:
            await asyncio.gather(*self._refunds)
            await self.store.close()

    def _note_withheld(self, admission: Admission, images: int) -> None:
        """Count them, and refund them beside the answer: its time must not tell what is withheld.

        Beyond `REFUNDS` at a time, which only a store that hangs can cause, none is made: the
        client loses images, the worker no memory.
        """
        if admission.grant.client:
            self.clients.withheld(admission.grant.client, images)
        if not any(bucket.clean for bucket in admission.grant.buckets):
            return
        if len(self._refunds) >= REFUNDS:
            self.note_store_failure(StoreError(f"{REFUNDS} refunds are waiting"))
            return
        refund = asyncio.get_running_loop().create_task(admission.refund_withheld(images))
        self._refunds.add(refund)
        refund.add_done_callback(self._refunds.discard)

    def _all(self) -> list[Grant]:
        return [self._keyless] if self._keys is None else list(self._keys.value.values())


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
