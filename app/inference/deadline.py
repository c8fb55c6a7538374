"""How long a request is worth an inference: until its deadline, and while its client is there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from app.errors import ClientGone, RequestError, TooLate

LATE = "the deadline passed before it was the request's turn"


@dataclass(slots=True)
class ClientConnection:
    """A client's connection, as far as its requests care.

    Attributes:
        gone: nobody is at the other end any more.
    """

    gone: bool = False


class Deadline(NamedTuple):
    """Of one request.

    Attributes:
        at: on the clock of whoever asks; infinite for none.
        client: what the answer would be sent over.
    """

    at: float
    client: ClientConnection

    def ended(self, now: float) -> RequestError | None:
        """Why the request is not worth an inference any more."""
        if self.client.gone:
            return ClientGone("the client closed the connection before it was its turn")
        if now >= self.at:
            return TooLate(LATE)
        return None


# Servers other than ours do not say when a client goes.
ALWAYS_CONNECTED = ClientConnection()
NO_DEADLINE = Deadline(math.inf, ALWAYS_CONNECTED)
