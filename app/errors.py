"""Everything that can go wrong, and how a client sees it.

ScumbleError                  a person can act on it; never a traceback
├─ ConfigError                the server does not start
│  └─ BundleError             a model bundle is missing, incomplete or tampered with
└─ RequestError               one request is refused, as `application/problem+json`
   ├─ BadFraming         400  the body is not what its headers say
   ├─ Unauthorized       401  no API key, or an unknown one
   ├─ Forbidden          403  the key is revoked, or not for this route
   ├─ NotFound           404  no such route or model
   ├─ MethodNotAllowed   405
   ├─ TooSlow            408  headers or body did not arrive in time
   ├─ TooLarge           413  over a limit; nothing was decoded
   ├─ UnsupportedType    415
   ├─ Unprocessable      422  well framed, but not an image or not allowed here
   ├─ OverBudget         429  the images are over a budget; carries Retry-After
   ├─ HeadersTooLarge    431  too many headers, or too long
   ├─ ClientGone         499  nobody is there to read the answer; never sent
   ├─ Unavailable        503  queue full, draining or no store; carries Retry-After
   ├─ TooLate            504  the deadline passed before the inference began
   └─ Internal           500  our fault
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson


class ScumbleError(Exception):
    """What was wrong, with which value, and what is allowed."""


class ConfigError(ScumbleError):
    """The settings cannot be served."""


class BundleError(ConfigError):
    """A model bundle is missing, incomplete or not what its card says."""


class RequestError(ScumbleError):
    """One request is refused; `reason` is the closed label that metrics count it under."""

    status: ClassVar[int]
    title: ClassVar[str]
    reason: ClassVar[str]

    def __init__(self, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.headers = headers or {}

    def problem(self) -> dict[str, Any]:
        """RFC 9457 members, plus `error`, the one member that protocol V2 clients read."""
        return {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": str(self),
            "error": str(self),
        }

    def body(self) -> bytes:
        """The problem as JSON bytes."""
        return orjson.dumps(self.problem())


class BadFraming(RequestError):
    """The body is not what its headers say."""

    status, title, reason = 400, "Bad request", "framing"


class Unauthorized(RequestError):
    """No API key, or one that is not in the file."""

    status, title, reason = 401, "Unauthorized", "unauthorized"


class Forbidden(RequestError):
    """A key of ours, but revoked or not for this route."""

    status, title, reason = 403, "Forbidden", "forbidden"


class NotFound(RequestError):
    """No such route or model."""

    status, title, reason = 404, "Not found", "not_found"


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""

    status, title, reason = 405, "Method not allowed", "method"


class TooSlow(RequestError):
    """The client does not send its request, or does not read its answer, in time."""

    status, title, reason = 408, "Request timeout", "slow"


class TooLarge(RequestError):
    """Over a limit; nothing was decoded."""

    status, title, reason = 413, "Content too large", "too_large"


class UnsupportedType(RequestError):
    """The content type is none that this route reads."""

    status, title, reason = 415, "Unsupported media type", "media_type"


class Unprocessable(RequestError):
    """Well framed, but not an image or not allowed here."""

    status, title, reason = 422, "Unprocessable content", "unprocessable"


class OverBudget(RequestError):
    """The client's images, or everybody's, are spent for now or for good."""

    status, title, reason = 429, "Too many requests", "budget"


class HeadersTooLarge(RequestError):
    """Too many headers, or too long ones."""

    status, title, reason = 431, "Request header fields too large", "headers"


class ClientGone(RequestError):
    """The connection ended before the request was whole or answered; only metrics see this."""

    status, title, reason = 499, "Client closed request", "gone"


class TooLate(RequestError):
    """The deadline passed while the request waited."""

    status, title, reason = 504, "Gateway timeout", "deadline"


class Unavailable(RequestError):
    """Queue full, draining or no store for budgets: try again later, or elsewhere."""

    status, title, reason = 503, "Service unavailable", "unavailable"

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_s)})


class Internal(RequestError):
    """Our fault; the details are in the log, under the request's id."""

    status, title, reason = 500, "Internal server error", "internal"


MEDIA_TYPE = "application/problem+json"
REASONS = tuple(kind.reason for kind in RequestError.__subclasses__())
