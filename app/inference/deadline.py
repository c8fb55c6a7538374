"""How long a request is worth an inference: until its deadline, and while its client is there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from app.errors import ClientGone, RequestError, TooLate

LATE = "the deadline passed before it was the request's turn"


@dataclass(slots=True)
class Line:
    """A client's connection, as far as its requests care.

    Attributes:
        gone: nobody is at the other end any more.
    """

    gone: bool = False


class Patience(NamedTuple):
    """Of one request.

    Attributes:
        deadline: on the clock of whoever asks; infinite for none.
        line: what the answer would be sent over.
    """

    deadline: float
    line: Line

    def ended(self, now: float) -> RequestError | None:
        """Why the request is not worth an inference any more."""
        if self.line.gone:
            return ClientGone("the client closed the connection before it was its turn")
        if now >= self.deadline:
            return TooLate(LATE)
        return None


# Servers other than ours do not say when a client goes.
STAYS = Line()
FOREVER = Patience(math.inf, STAYS)
