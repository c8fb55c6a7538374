"""The Python client, blocking and asynchronous.

Both wait and try again when the service is busy (429, 503) or cannot be connected to. A request
that was sent and got no answer is not repeated: it may have been counted against a budget.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import httpx2
import tenacity

from scumble.client import wire
from scumble.client.errors import BadAnswer, Unreachable
from scumble.client.proxies import explained, is_loopback

BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
FIRST_WAIT = 0.2  # seconds, at most; doubled with each attempt
FOR_GOOD = 86400.0  # seconds: a service that asks for a day has no more for us
KEY = re.compile(r"[!-~]+")


class Client:
    """Asks a service; blocks until it has answered.

    Args:
        url: of the service, such as `http://localhost:8000`.
        key: API key, sent as a bearer token; None where the service asks for none.
        ca_file: PEM file of the authorities that may vouch for an `https` service, in place of the
            usual ones. Certificates are always verified.
        timeout: seconds for each step: to connect, to send, to receive.
        max_wait: longest pause before trying again, also where the service asks for a longer one.
        retries: how often to try again.
        transport: what carries the requests; the network if None, through the proxies that the
            environment names unless the service is on this machine.
        sleep: what waits; tests pass their own.

    Raises:
        ValueError: `url`, `key`, `max_wait` or `retries` is out of range, or the environment names
            a proxy that cannot be used.
        OSError: `ca_file` cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        ca_file: str | Path | None = None,
        timeout: float = 10.0,
        max_wait: float = 30.0,
        retries: int = 5,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        options = _options(url, key, ca_file, timeout, transport, httpx2.HTTPTransport)
        with explained():
            self._http = httpx2.Client(**options)
        self._retrying = tenacity.Retrying(sleep=sleep, **retry_policy(max_wait, retries))

    def predict(
        self,
        images: wire.Sendable | Iterable[wire.Sendable],
        *,
        top_k: int | None = None,
        request_id: str | None = None,
    ) -> wire.Answer:
        """Classify one image or several.

        Args:
            images: one image or an iterable of them. An image is PNG, JPEG, WebP, AVIF or
                HEIC bytes, the path of such a file, a Pillow image, or a uint8 array (H, W),
                (H, W, 1) or (H, W, 3); an array (N, H, W, C) is N images.
            top_k: ask for the `top_k` most probable classes in place of all probabilities.
            request_id: stands in the answer and in the service's log, to find one by the other.

        Raises:
            BadImage: an image cannot be sent.
            OSError: a file cannot be read.
            Refused: the service said no, or was busy to the last attempt.
            Unreachable: no answer came.
            BadAnswer: the answer does not follow the contract.
            ValueError: `request_id` has other characters or is longer than the service takes.
        """
        return self._exchange(wire.predict(images, top_k=top_k, request_id=request_id))

    def model(self) -> wire.ModelInfo:
        """Name, labels, input shape and limits of the model that is served.

        Raises:
            Refused, Unreachable, BadAnswer: as `predict`.
        """
        return self._exchange(wire.model())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _exchange(self, call: wire.Call[wire.T]) -> wire.T:
        request = call.request(self._http)
        with _translated(request):
            # A copy, because tenacity keeps the state of a run in the object.
            response = self._retrying.copy()(self._http.send, request)
        return call.read(response)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio: same arguments, values and errors; calls are awaited."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        ca_file: str | Path | None = None,
        timeout: float = 10.0,
        max_wait: float = 30.0,
        retries: int = 5,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        options = _options(url, key, ca_file, timeout, transport, httpx2.AsyncHTTPTransport)
        with explained():
            self._http = httpx2.AsyncClient(**options)
        self._retrying = tenacity.AsyncRetrying(sleep=sleep, **retry_policy(max_wait, retries))

    async def predict(
        self,
        images: wire.Sendable | Iterable[wire.Sendable],
        *,
        top_k: int | None = None,
        request_id: str | None = None,
    ) -> wire.Answer:
        """See `Client.predict`."""
        return await self._exchange(wire.predict(images, top_k=top_k, request_id=request_id))

    async def model(self) -> wire.ModelInfo:
        """See `Client.model`."""
        return await self._exchange(wire.model())

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _exchange(self, call: wire.Call[wire.T]) -> wire.T:
        request = call.request(self._http)
        with _translated(request):
            response: httpx2.Response = await self._retrying.copy()(self._http.send, request)
        return call.read(response)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


ALLOWED = "allowed: http://HOST[:PORT] and https://HOST[:PORT]"


def _options(
    url: str,
    key: str | None,
    ca_file: str | Path | None,
    timeout: float,
    transport: Any,
    direct: Callable[..., Any],
) -> dict[str, Any]:
    """Options of the two clients of httpx2; `direct` makes a transport without a proxy."""
    base, verify = _base(url), _verify(ca_file)
    if transport is None and is_loopback(base):
        transport = direct(verify=verify)
    return {
        "base_url": base,
        "headers": _headers(key),
        "timeout": timeout,
        "transport": transport,
        "verify": verify,
    }


def _base(url: str) -> httpx2.URL:
    try:
        base = httpx2.URL(url)
    except httpx2.InvalidURL as exc:
        why = "" if "@" in url else f": {exc}"  # it may quote a part of a password
        raise ValueError(f"url is {wire.typed(url)}{why}; {ALLOWED}") from None
    if base.scheme not in ("http", "https") or not base.host:
        raise ValueError(f"url is {wire.typed(url)}; {ALLOWED}")
    return base


def _headers(key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    if not KEY.fullmatch(key):
        raise ValueError("key has other characters than printable ASCII without blanks")
    return {"Authorization": f"Bearer {key}"}


def _verify(ca_file: str | Path | None) -> ssl.SSLContext | bool:
    return True if ca_file is None else ssl.create_default_context(cafile=ca_file)


def retry_policy(max_wait: float, retries: int) -> dict[str, Any]:
    """When and after how long to try again, for tenacity's two loops."""
    if max_wait < 0 or retries < 0:
        raise ValueError(f"max_wait is {max_wait}, retries is {retries}; neither may be negative")
    backoff = tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=max_wait)

    def wait(state: tenacity.RetryCallState) -> float:
        outcome = state.outcome
        asked = None if outcome is None or outcome.failed else _retry_after(outcome.result())
        return backoff(state) if asked is None else min(asked, max_wait)

    return {
        "retry": tenacity.retry_if_exception_type(UNSENT) | tenacity.retry_if_result(_busy),
        "wait": wait,
        "stop": tenacity.stop_after_attempt(retries + 1),
        "retry_error_callback": _last_outcome,
    }


def spent(response: httpx2.Response) -> bool:
    """Whether a budget is spent that waiting does not fill."""
    over = response.status_code == HTTPStatus.TOO_MANY_REQUESTS
    return over and (_retry_after(response) or 0) >= FOR_GOOD


def _busy(response: httpx2.Response) -> bool:
    return response.status_code in BUSY and not spent(response)


def _last_outcome(state: tenacity.RetryCallState) -> httpx2.Response:
    """The busy answer, or the connection's own error, as if there had been one attempt."""
    response: httpx2.Response = state.outcome.result()  # type: ignore[union-attr] # there was one
    return response


def _retry_after(response: httpx2.Response) -> float | None:
    """The pause in seconds that a busy answer asks for, None if it does not."""
    headers = response.headers
    value = headers.get("retry-after", "")
    try:
        if value.isdecimal():
            return float(value)
        # Both dates are by the service's clock, so the client's may be wrong.
        now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (TypeError, ValueError):  # neither seconds nor a date
        return None


@contextmanager
def _translated(request: httpx2.Request) -> Iterator[None]:
    """Turns httpx2's errors into the client's."""
    url = wire.shown(request.url)
    try:
        yield
    except httpx2.DecodingError as exc:
        raise BadAnswer(f"{url} answered, but its body cannot be decompressed: {exc}") from exc
    except httpx2.RequestError as exc:
        raise Unreachable(f"no answer from {url}: {str(exc) or type(exc).__name__}") from exc
