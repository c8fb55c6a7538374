"""An HTTP client for the replicas of a model server: retries, circuit breakers, back-pressure.

An inference has no effect on the server, so a request that failed is sent again, to another replica
if there is one. A request is sent only to a replica whose circuit is closed and that serves the
network which the bundle's card describes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp import hdrs

from app.errors import ConfigError, RequestError, TooLate, Unavailable
from app.inference.upstream.circuit import Circuit
from app.inference.upstream.network_interface import InvalidAnswer, OtherNetwork
from app.inference.upstream.v2_messages import LENGTH
from app.system.background import Throttle
from app.telemetry.metrics import Metrics, UpstreamMetrics

ATTEMPTS = 3
MOST_BYTES = 64 * 2**20  # of an answer
MOST_RETRY_S = 60
BUSY = frozenset({429, 502, 503, 504})  # another replica, or the same one later, may answer
UNAVAILABLE = "upstream unavailable"
CHANGED = "upstream model changed"
log = logging.getLogger("scumble")

T = TypeVar("T")


class UpstreamFailure(Exception):
    """A replica did not answer as it should.

    Attributes:
        retry_after_s: what the replica asks for; None if it says nothing.
        counts: whether the failure is one of the replica, and not of the request's short deadline.
    """

    def __init__(
        self, detail: str, *, retry_after_s: int | None = None, counts: bool = True
    ) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s
        self.counts = counts


class UpstreamTimeout(UpstreamFailure):
    """A replica did not answer in time."""


@dataclass(frozen=True)
class Answer:
    """What a replica answered.

    Attributes:
        status: of HTTP.
        headers: case-insensitive.
        body: the whole of it.
        url: of the replica.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str = ""

    @property
    def length(self) -> str | None:
        """Bytes of the JSON before the tensors, as the header says it."""
        return self.headers.get(LENGTH)


class Replica:
    """One server that has the model.

    Args:
        url: of the model, `http://HOST/v2/models/NAME`, or of the server of a JSON API.
        circuit: opens when the replica fails.
        metrics: of the replica.

    Attributes:
        server: URL of the server, without the model's path.
        in_flight: requests that wait for an answer.
        changed: what differs from the card; None while nothing does.
        verified: whether its answers have been compared with the golden ones.
        closes: whether it closes the connection after each answer.
        recheck: begins another comparison, since a new connection may lead to another server.
    """

    def __init__(self, url: str, circuit: Circuit, metrics: UpstreamMetrics) -> None:
        self.url = url
        self.server, _, path = url.partition("/v2/models/")
        self.model_path = f"/v2/models/{path}"
        self.circuit = circuit
        self.metrics = metrics
        self.in_flight = 0
        self.changed: str | None = None
        self.verified = False
        self.closes = False
        self.recheck: Callable[[Replica], asyncio.Task[object] | None] = lambda _: None

    @property
    def usable(self) -> bool:
        """Whether requests may be sent to it."""
        return self.verified and self.changed is None and self.circuit.closed

    def show(self) -> None:
        """Write its state into the metrics."""
        self.metrics.usable.set(self.usable)
        self.metrics.circuit_open.set(not self.circuit.closed)


@dataclass
class Connected:
    """Whether a request needed a new connection.

    Attributes:
        replica: that it was sent to.
        check: which its answer waits for; None for a connection that was there.
    """

    replica: Replica
    check: asyncio.Task[object] | None = None


class UpstreamClient:
    """Sends requests to one of several replicas.

    `running` opens the connections' pool; outside of it no request can be sent.

    Args:
        urls: of the model on each replica.
        metrics: of this worker.
        timeout_s: limit of each request.
        connections: kept open to each replica.
        token: sent as `Authorization: Bearer`.
        tls: what certificates are accepted; None for the system's.
        clock: of the deadlines, in seconds.
        monotonic: of the circuits, in seconds.
    """

    def __init__(
        self,
        urls: Sequence[str],
        metrics: Metrics,
        *,
        timeout_s: float = 10.0,
        connections: int = 8,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.perf_counter,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout_s = timeout_s
        self.replicas = [
            Replica(url, Circuit(clock=monotonic), metrics.upstream(_place(url))) for url in urls
        ]
        self._connections = connections
        self._headers = {hdrs.ACCEPT_ENCODING: "identity", hdrs.USER_AGENT: "scumble"}
        if token:
            self._headers[hdrs.AUTHORIZATION] = f"Bearer {token}"
        self._tls = tls
        self._clock = clock
        self._throttle = Throttle(monotonic)
        self._session: aiohttp.ClientSession | None = None
        self._turn = 0

    async def open(self) -> None:
        """Open the pool, on the running loop."""
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_on_connection)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                limit_per_host=self._connections,
                keepalive_timeout=60,
                ssl=True if self._tls is None else self._tls,
            ),
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trace_configs=[trace],
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def unusable(self) -> str | None:
        """Why no request can be sent; None if one can."""
        if any(replica.usable for replica in self.replicas):
            return None
        changed = any(replica.changed for replica in self.replicas)
        return CHANGED if changed else UNAVAILABLE

    def refuse_unusable(self) -> None:
        """Refuse a request at once, while no replica could answer it.

        Raises:
            Unavailable: no replica is usable.
        """
        if (reason := self.unusable) is not None:
            raise Unavailable(reason)

    async def ask(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        read: Callable[[Answer], T],
        *,
        until: float = math.inf,
        method: str = "POST",
        of_server: bool = False,
        refusals: bool = False,
    ) -> T:
        """Send a request to a usable replica, and on failure to another.

        Args:
            path: below the URL of the replica, such as `/infer`.
            body: of the request.
            headers: of the request.
            read: parses the answer, and raises InvalidAnswer if it is none.
            until: when the last of those who wait for it stops waiting.
            method: of HTTP.
            of_server: `path` begins at the server and not at the model.
            refusals: `read` takes answers with other statuses, too. The request is a client's own,
                so what comes of it does not touch the circuit: the golden outputs judge the
                replica. Only a request whose connection failed is sent to the same replica again.

        Raises:
            Unavailable: no replica is usable, or all failed.
            TooLate: no answer in time.
        """
        tried: list[Replica] = []
        failure: UpstreamFailure | None = None
        again = True
        while len(tried) < ATTEMPTS:
            replica = self._choose(tried, again=again)
            if replica is None:
                break
            tried.append(replica)
            try:
                return await self._attempt(
                    replica, of_server, method, path, body, headers, read, until, refusals
                )
            except UpstreamFailure as exc:
                failure = exc
                self._report(replica, exc)
                if isinstance(exc, UpstreamTimeout):
                    break
                again = not refusals or isinstance(exc.__cause__, aiohttp.ClientConnectionError)
        if failure is None:
            raise Unavailable(self.unusable or UNAVAILABLE)
        raise self._refusal(failure) from failure

    async def _attempt(
        self,
        replica: Replica,
        of_server: bool,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        read: Callable[[Answer], T],
        until: float,
        refusals: bool,
    ) -> T:
        base = replica.server if of_server else replica.url
        start = self._clock()
        connected = Connected(replica)
        try:
            answer = await self.send(
                replica, method, base + path, body, headers, until - start,
                connected=connected, refusals=refusals,
            )  # fmt: skip
            found = read(answer)
            if connected.check is not None:  # the server may be a new one as well
                left_s = None if until == math.inf else max(0.0, until - self._clock())
                done, _ = await asyncio.wait({connected.check}, timeout=left_s)
                if not done:
                    raise UpstreamTimeout("no time was left for the check", counts=False)
                if not replica.verified:
                    raise UpstreamFailure(UNAVAILABLE, counts=False)
            if replica.changed is not None:
                raise UpstreamFailure(CHANGED, counts=False)
        except InvalidAnswer as exc:
            failure = UpstreamFailure(f"the answer is invalid: {exc}")
            self._count(replica, failure, judged=not refusals)
            if isinstance(exc, OtherNetwork) and not refusals:
                self.check_failed(replica, exc)  # the next check says what has changed
            raise failure from exc
        except UpstreamFailure as exc:
            self._count(replica, exc, judged=not refusals)
            if refusals and isinstance(exc.__cause__, aiohttp.ClientConnectionError):
                replica.recheck(replica)
            raise
        if not refusals:
            replica.circuit.succeeded()
        if answer.status != 200:
            replica.metrics.failed.inc()
            return found
        replica.metrics.answered.inc()
        replica.metrics.seconds.observe(self._clock() - start)
        return found

    async def send(
        self,
        replica: Replica,
        method: str,
        url: str,
        body: bytes | None,
        headers: Mapping[str, str],
        left_s: float,
        *,
        connected: Connected | None = None,
        refusals: bool = False,
    ) -> Answer:
        """Send one request to one replica, whatever its state, and return a complete answer.

        Args:
            replica: that is asked.
            method: of HTTP.
            url: of the request.
            body: of the request.
            headers: of the request.
            left_s: seconds that the request may take, at most `timeout_s`.
            connected: is told if the request needs a new connection; None for checks.
            refusals: an answer may have any status but those of a busy server.

        Raises:
            UpstreamFailure: no connection, no or not all of an answer, or not a status of success.
        """
        if self._session is None:
            raise UpstreamFailure("the client is closed", counts=False)
        short = left_s < self.timeout_s
        limit_s = left_s if short else self.timeout_s
        if limit_s <= 0:
            raise UpstreamTimeout("no time was left", counts=False)
        replica.in_flight += 1
        try:
            async with self._session.request(
                method,
                url,
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=limit_s),
                allow_redirects=False,
                trace_request_ctx=connected,
            ) as response:
                replica.closes = response.headers.get(hdrs.CONNECTION, "").lower() == "close"
                answer = Answer(
                    response.status, response.headers, await _read(response.content), replica.url
                )
        except TimeoutError:
            raise UpstreamTimeout(f"no answer within {limit_s:.3g} s", counts=not short) from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise UpstreamFailure(f"{type(exc).__name__}: {exc}") from exc
        finally:
            replica.in_flight -= 1
        if answer.status != 200 and not (refusals and answer.status not in BUSY):
            raise UpstreamFailure(
                f"status {answer.status}: {answer.body[:200].decode('utf-8', 'replace')!r}",
                retry_after_s=_retry_after(answer) if answer.status in BUSY else None,
            )
        return answer

    def check_failed(self, replica: Replica, failure: Exception) -> None:
        """Send nothing to a replica until a check succeeds."""
        replica.verified = False
        if replica.circuit.closed:
            replica.circuit.open()
            log.warning("upstream check failed: %s", failure, extra={"upstream": replica.url})
        else:
            replica.circuit.failed()
        replica.show()

    def note_invalid(self, answer: Answer, images: int) -> None:
        """Count an answer with rows that are not distributions; an image may be the cause."""
        for replica in self.replicas:
            if replica.url == answer.url:
                replica.metrics.invalid.inc()
        if self._throttle():
            log.warning(
                "upstream gave no distribution for %d images",
                images,
                extra={"upstream": answer.url},
            )

    def _choose(self, tried: list[Replica], *, again: bool = True) -> Replica | None:
        """The usable replica with the fewest requests, of those not tried if there are any.

        Args:
            tried: before.
            again: whether one of them may be chosen if there are no others.
        """
        usable = [replica for replica in self.replicas if replica.usable]
        fresh = [replica for replica in usable if replica not in tried]
        candidates = fresh or (usable if again else [])
        if not candidates:
            return None
        self._turn += 1
        least = min(replica.in_flight for replica in candidates)
        idle = [replica for replica in candidates if replica.in_flight == least]
        return idle[self._turn % len(idle)]

    def _count(self, replica: Replica, failure: UpstreamFailure, *, judged: bool) -> None:
        late = isinstance(failure, UpstreamTimeout)
        (replica.metrics.late if late else replica.metrics.failed).inc()
        if failure.counts and judged:
            was_closed = replica.circuit.closed
            replica.circuit.failed()
            replica.show()
            if was_closed and not replica.circuit.closed:
                log.warning("upstream circuit open", extra={"upstream": replica.url})

    def _report(self, replica: Replica, failure: UpstreamFailure) -> None:
        if failure.counts and self._throttle():
            log.warning("upstream failed: %s", failure, extra={"upstream": replica.url})

    def _refusal(self, failure: UpstreamFailure) -> RequestError:
        if isinstance(failure, UpstreamTimeout):
            return TooLate("the upstream did not answer in time")
        return Unavailable(self.unusable or UNAVAILABLE, failure.retry_after_s or 1)


async def _on_connection(
    session: aiohttp.ClientSession, context: Any, params: aiohttp.TraceConnectionCreateEndParams
) -> None:
    """Have a replica checked once a request needed a new connection to it."""
    del session, params
    connected = context.trace_request_ctx
    if isinstance(connected, Connected):
        connected.check = connected.replica.recheck(connected.replica)


async def _read(content: aiohttp.StreamReader) -> bytes:
    """A whole body.

    Raises:
        UpstreamFailure: it is larger than `MOST_BYTES`.
    """
    parts, size = [], 0
    async for part in content.iter_any():
        size += len(part)
        if size > MOST_BYTES:
            raise UpstreamFailure(f"the answer has more than {MOST_BYTES} bytes")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _retry_after(answer: Answer) -> int | None:
    text = answer.headers.get("Retry-After", "")
    return min(max(int(text), 1), MOST_RETRY_S) if text.isdecimal() and len(text) < 9 else None


def _place(url: str) -> str:
    """Host and port of a URL, as the metrics name a replica."""
    return url.split("://", 1)[1].split("/", 1)[0]


def open_ca(path: str | None) -> ssl.SSLContext | None:
    """What accepts the certificates of one authority.

    Raises:
        ConfigError: the file cannot be read, or has no certificate.
    """
    if path is None:
        return None
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"SCUMBLE_UPSTREAM_CA is {path!r}: not a readable PEM file of certificates: {exc}"
        ) from exc
