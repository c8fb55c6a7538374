"""What travels with a request: one typed object in the ASGI scope's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import Scope

if TYPE_CHECKING:
    from app.access.quotas import Admission
    from app.telemetry.stages import Stages

KEY = "scumble"  # of the one entry in `scope["state"]`


@dataclass(eq=False, slots=True)
class ClientConnection:
    """The client's connection.

    Attributes:
        gone: the client has closed it.
    """

    gone: bool = False


# For servers other than ours, which do not report when a client disconnects.
ALWAYS_CONNECTED = ClientConnection()


@dataclass(slots=True)
class RequestContext:
    """One request, from its first byte to its span.

    Attributes:
        client: the connection that the answer goes to.
        id: the client's `X-Request-ID`, or a random one.
        traceparent: the client's W3C trace context, if it sent one and logs or spans link to it.
        images: how many the request holds; 0 until they are counted.
        withheld: how many of their answers the defense withheld.
        facts: what the audit log says of the model, where it is not the served one.
        refusal: the reason label of the error that was sent instead of an answer.
        admission: the client's grant and charge; None without keys and budgets.
        stages: the times of the stages, for spans; None unless the request was traced and answered.
        start: when the request was taken without the application (`app.http.fast_path`); 0 if it
            was not.
        fault: why it could not be answered that way; the application refuses it with this. Its
            admission holds what it was charged.
    """

    client: ClientConnection = ALWAYS_CONNECTED
    id: str = ""
    traceparent: str | None = None
    images: int = 0
    withheld: int = 0
    facts: Mapping[str, str | None] | None = None
    refusal: str | None = None
    admission: Admission | None = None
    stages: Stages | None = None
    start: float = 0.0
    fault: BaseException | None = None


def request_context(scope: Scope) -> RequestContext:
    """The context of a request that has passed `app.http.middleware.Observe`."""
    context: RequestContext = scope["state"][KEY]
    return context


def ensure_context(scope: Scope) -> RequestContext:
    """The context of a request, which our own server has already made and others have not."""
    state = scope.get("state")
    context: RequestContext | None = None if state is None else state.get(KEY)
    if context is None:
        context = RequestContext()
        # A new dictionary: a server may hand the same state to all its requests.
        scope["state"] = {KEY: context} if state is None else {**state, KEY: context}
    return context
