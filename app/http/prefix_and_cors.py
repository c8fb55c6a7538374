"""Optional middleware: a path prefix, and CORS for web pages of other origins."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import MEDIA_TYPE, Forbidden

MAX_AGE_S = 600  # for browsers to cache a preflight
METHODS = ("GET", "HEAD", "POST")
READ = (
    "Authorization",
    "Content-Type",
    "Inference-Header-Content-Length",
    "X-API-Key",
    "X-Deadline-Ms",
    "X-Request-ID",
    "traceparent",
    "tracestate",
)
WRITTEN = (
    "Allow",
    "Inference-Header-Content-Length",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-ID",
)


class Prefix:
    """Strips a prefix from the path; paths without it pass unchanged, as some proxies strip it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI call."""
        path = scope.get("path", "")
        if path == self._prefix or path.startswith(f"{self._prefix}/"):
            scope = {**scope, "path": path.removeprefix(self._prefix) or "/"}
        await self._app(scope, receive, send)


class Cors(CORSMiddleware):
    """Allows web pages of some origins to send requests; preflights need no key.

    Browser credentials (cookies, certificates) are not allowed: pages send an API key.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=["*"] if "*" in origins else origins,
            allow_methods=METHODS,
            allow_headers=READ,
            expose_headers=WRITTEN,
            max_age=MAX_AGE_S,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """The response to a preflight; a refusal has the format of all errors."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return Response(status_code=204, headers=_without_body(answer))
        error = Forbidden(f"{bytes(answer.body).decode()} (SCUMBLE_CORS_ORIGINS)")
        headers = _without_body(answer)
        return Response(error.body(), error.status, headers, media_type=MEDIA_TYPE)


def _without_body(answer: Response) -> dict[str, str]:
    return {
        name: value
        for name, value in answer.headers.items()
        if name not in ("content-length", "content-type")
    }
