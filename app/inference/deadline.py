"""How long a request is worth an inference: until its deadline, while its client is connected."""

from __future__ import annotations

import math
from typing import NamedTuple

from app.errors import ClientGone, RequestError, TooLate
from app.request_context import ALWAYS_CONNECTED, ClientConnection

LATE = "the deadline passed before it was the request's turn"


class Deadline(NamedTuple):
    """Of one request.

    Attributes:
        at: time on the caller's clock; infinite for no deadline.
        client: what the answer would be sent over.
        traceparent: the trace that it belongs to, for servers that are asked on its behalf.
    """

    at: float
    client: ClientConnection
    traceparent: str | None = None

    def ended(self, now: float) -> RequestError | None:
        """The error for a request that has expired or whose client has left; None for others."""
        if self.client.gone:
            return ClientGone("the client closed the connection before it was its turn")
        if now >= self.at:
            return TooLate(LATE)
        return None


NO_DEADLINE = Deadline(math.inf, ALWAYS_CONNECTED)
