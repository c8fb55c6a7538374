"""All errors, and how clients see them.

ScumbleError                  a message for a person, without a traceback
├─ ConfigError                the server does not start
│  └─ BundleError             a model bundle is missing, incomplete or tampered with
└─ RequestError               one request is refused, as `application/problem+json`
   ├─ BadFraming         400  the body does not match its headers
   ├─ Unauthorized       401  no API key, or an unknown one
   ├─ Forbidden          403  the key is revoked or not valid for this route
   ├─ NotFound           404  no such route or model
   ├─ MethodNotAllowed   405
   ├─ TooSlow            408  headers or body did not arrive in time
   ├─ TooLarge           413  over a limit; nothing was decoded
   ├─ UnsupportedType    415
   ├─ Unprocessable      422  well framed, but not an image or not allowed
   ├─ OverBudget         429  a budget is exceeded; carries Retry-After
   ├─ HeadersTooLarge    431  too many headers, or too long
   ├─ ClientGone         499  the client has disconnected; never sent
   ├─ Unavailable        503  overloaded, draining or no store; carries Retry-After
   ├─ TooLate            504  the deadline passed before inference began
   └─ Internal           500  an error of the server
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
    """One request is refused; metrics count it under `reason`, one of a fixed set."""

    status: ClassVar[int]
    title: ClassVar[str]
    reason: ClassVar[str]

    def __init__(self, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.headers = headers or {}

    def problem(self) -> dict[str, Any]:
        """RFC 9457 members, plus `error`, the only one that protocol V2 clients read."""
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
    """The body does not match its headers."""

    status, title, reason = 400, "Bad request", "framing"


class Unauthorized(RequestError):
    """No API key, or an unknown one."""

    status, title, reason = 401, "Unauthorized", "unauthorized"


class Forbidden(RequestError):
    """A known key, but revoked or not valid for this route."""

    status, title, reason = 403, "Forbidden", "forbidden"


class NotFound(RequestError):
    """No such route or model."""

    status, title, reason = 404, "Not found", "not_found"


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""

    status, title, reason = 405, "Method not allowed", "method"


class TooSlow(RequestError):
    """The client did not send its request, or read its answer, in time."""

    status, title, reason = 408, "Request timeout", "slow"


class TooLarge(RequestError):
    """Over a limit; nothing was decoded."""

    status, title, reason = 413, "Content too large", "too_large"


class UnsupportedType(RequestError):
    """The route does not support the content type."""

    status, title, reason = 415, "Unsupported media type", "media_type"


class Unprocessable(RequestError):
    """Well framed, but not an image or not allowed."""

    status, title, reason = 422, "Unprocessable content", "unprocessable"


class OverBudget(RequestError):
    """A budget of the client, or of all clients, is exceeded."""

    status, title, reason = 429, "Too many requests", "budget"


class HeadersTooLarge(RequestError):
    """Too many headers, or too long ones."""

    status, title, reason = 431, "Request header fields too large", "headers"


class ClientGone(RequestError):
    """The client disconnected before the answer; only metrics see this."""

    status, title, reason = 499, "Client closed request", "gone"


class TooLate(RequestError):
    """The deadline passed while the request was waiting."""

    status, title, reason = 504, "Gateway timeout", "deadline"


class Unavailable(RequestError):
    """Overloaded, draining or no budget store: retry later or elsewhere."""

    status, title, reason = 503, "Service unavailable", "unavailable"

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_s)})


class Internal(RequestError):
    """An error of the server; the details are in the log, under the request id."""

    status, title, reason = 500, "Internal server error", "internal"


MEDIA_TYPE = "application/problem+json"
REASONS = tuple(kind.reason for kind in RequestError.__subclasses__())
