"""Refuses requests to the console that other sites may have caused.

Any web page can make a browser send requests to 127.0.0.1. It can read the answers only if its own
name also resolves to that address (DNS rebinding); the `Host` header then has that name. It can
send a POST without reading the answer, but not with our `Origin` or our custom header.

`/metrics`, `/livez` and `/readyz` are not guarded: monitoring uses any host name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import MEDIA_TYPE, Forbidden

MARK = "x-scumble-console"
PREFIX = "/console/"
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses foreign requests to the console, and adds security headers to its answers."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._headers = [
            (name.lower().encode(), value.encode()) for name, value in SECURITY.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI call."""
        if scope["type"] != "http" or not _ours(scope["path"]):
            await self._app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        try:
            check(scope["method"], Headers(scope=scope), self._hosts)
        except Forbidden as error:
            refusal = Response(error.body(), error.status, media_type=MEDIA_TYPE)
            await refusal(scope, receive, secured)
            return
        await self._app(scope, receive, secured)


def check(method: str, headers: Headers, hosts: frozenset[str]) -> None:
    """Refuse a request that another site may have caused.

    Raises:
        Forbidden: a foreign `Host`, or a POST with a foreign `Origin` or without our header.
    """
    host = headers.get("host", "")
    name = hostname(host)
    if not (name == "localhost" or name in hosts or _is_address(name)):
        raise Forbidden(
            f"Host is {host[:80]!r}; allowed: an IP address, localhost, "
            "or a name in SCUMBLE_ADMIN_HOSTS"
        )
    if method in ("GET", "HEAD"):
        return
    origin = headers.get("origin")
    if origin is not None and _netloc(origin) != host.lower():
        raise Forbidden(f"Origin is {origin[:80]!r}; allowed: the console's own or none")
    if MARK not in headers:
        raise Forbidden(f"header {MARK} is missing; the console sends it, other pages cannot")


def hostname(host: str) -> str:
    """The lower-case name in a `Host` header without port; empty if the header is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _ours(path: str) -> bool:
    return path == "/" or path.startswith(PREFIX)


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
