"""HTTP on one connection of a worker: uvicorn's protocol, and what it leaves open."""

from __future__ import annotations

from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from app.dealer import Hand
from app.patience import Line


class Connection(HttpToolsProtocol):
    """Tells its requests when the client is gone, and the dealer when it has ended."""

    def __init__(
        self,
        hand: Hand,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._hand = hand
        self._line = Line()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["state"]["line"] = self._line

    def eof_received(self) -> None:
        """The client has hung up; the loop says that the connection is lost a turn later."""
        self._line.gone = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._line.gone = True
        super().connection_lost(exc)
        self._hand.count_closed()
