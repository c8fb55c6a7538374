"""HTTP on one connection of a worker: uvicorn's protocol, and the limits that it leaves open.

uvicorn times out nothing but idle connections, and reads headers of any size. Here no connection
has a timer of its own: the worker looks at all of them once a second (`Connection.check`), and a
request costs one look at the clock.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app.dealer import Hand
from app.errors import MEDIA_TYPE, BadFraming, HeadersTooLarge, RequestError, TooSlow
from app.patience import Line
from app.settings import HttpSettings

if TYPE_CHECKING:
    from app.service import Service

CONTINUE = b"HTTP/1.1 100"
AROUND = 4  # bytes of a header beside its name and value: colon, space, line end


class OneWrite(asyncio.Transport):
    """Sends the head of an answer together with the first of its body.

    uvicorn writes them one after the other, and uvloop sends each at once: two system calls and two
    packets per answer.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None  # kept back
        self._begun = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep the head, send all else."""
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.writelines((head, data) if data else (head,))
        elif self._begun or bytes(data[:12]) == CONTINUE:
            self._transport.write(data)
        else:
            self._head, self._begun = bytes(data), True

    def close(self) -> None:
        """Close once all is sent."""
        if self._head is not None:
            self.write(b"")
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether it has been closed."""
        return self._transport.is_closing()


class Connection(HttpToolsProtocol):
    """Tells its requests when the client is gone, and the dealer when it has ended.

    Args:
        hand: where its end is counted.
        limits: of headers and times.
        service: whose metrics count refusals that no request sees, and which may be draining.
        config, server_state, app_state: uvicorn's.
    """

    def __init__(
        self,
        hand: Hand,
        limits: HttpSettings,
        service: Service,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._hand = hand
        self._limits = limits
        self._state = service.state
        self._rejections = service.metrics.rejections
        self._line = Line()
        self._since: float | None = self.loop.time()  # when what is awaited from the client began
        self._heading = True  # what comes next is a part of headers
        self._all_head = True  # so is all of the piece at hand
        self._head_bytes = 0  # that came in earlier pieces
        self._piece_bytes = 0
        self._unread_since: float | None = None
        self._refusal: RequestError | None = None

    def data_received(self, data: bytes) -> None:
        """A piece of one request, or of several."""
        self._all_head = self._heading
        self._piece_bytes = len(data)
        super().data_received(data)
        if self._all_head:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.max_header_bytes:
                self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["state"]["line"] = self._line
        self._since = self.loop.time()

    def on_headers_complete(self) -> None:
        """The headers are there; `HeadersTooLarge` ends up in `send_400_response`."""
        self._heading = self._all_head = False
        allowed = self._limits.max_header_bytes
        # Small pieces hold small headers: no need to add them up.
        if len(self.headers) > self._limits.max_headers or (
            self._head_bytes + self._piece_bytes > allowed and self._size() > allowed
        ):
            self._refusal = self._too_large()
            raise self._refusal
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":  # no body follows
            self.cycle.transport = OneWrite(self.transport)
        if self._state.draining:
            self.cycle.keep_alive = False  # the next request is for somebody else

    def on_message_complete(self) -> None:
        """The request is there, body and all."""
        self._heading = True
        self._head_bytes = 0
        self._since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is out; more is read once all requests that were read have theirs.

        uvicorn reads on after each answer, so that a client who sends many requests at once and
        reads nothing could fill the memory with them.
        """
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or over a limit."""
        self._refuse(self._refusal or BadFraming(f"{msg} It must be HTTP/1.1."))

    def check(self, now: float) -> None:
        """Close the connection if its client is too slow.

        Args:
            now: on the clock of the loop.
        """
        if self.transport.get_write_buffer_size() == 0:
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        elif now - self._unread_since > self._limits.write_timeout_s:
            self._rejections[TooSlow.reason].inc()
            # With a reset: else the kernel would keep megabytes for a client that reads nothing.
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        if self.transport.is_closing():
            return
        if self._since is None:
            if self._idle() and self.timeout_keep_alive_task is None:
                self._since = now  # empty lines, say: they end uvicorn's timeout and begin nothing
        elif self.flow.read_paused:
            self._since = now  # the wait is ours
        elif self._heading:
            if self._idle() and now - self._since > self._limits.header_timeout_s:
                self._refuse(TooSlow("the headers did not arrive in time"))
        elif now - self._since > self._limits.body_timeout_s:
            self._refuse(TooSlow("the body did not arrive in time"))

    def eof_received(self) -> None:
        """The client has hung up; the loop says that the connection is lost a turn later."""
        self._line.gone = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._line.gone = True
        super().connection_lost(exc)
        self._hand.count_closed()

    def _idle(self) -> bool:
        """Nobody works on an answer."""
        return self.cycle is None or self.cycle.response_complete

    def _size(self) -> int:
        return len(self.url) + sum(
            len(name) + len(value) + AROUND for name, value in self.headers
        )  # fmt: skip

    def _too_large(self) -> HeadersTooLarge:
        limits = self._limits
        return HeadersTooLarge(
            f"too many headers; allowed: {limits.max_headers}, "
            f"{limits.max_header_bytes} bytes together"
        )

    def _refuse(self, error: RequestError) -> None:
        """Answer past the application, which has no whole request yet, and close."""
        if self.transport.is_closing():
            return
        self._rejections[error.reason].inc()
        if self._idle():
            answered = self.cycle is not None and not self._heading  # before its body was there
        else:
            answered = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not answered:
            body = error.body()
            headers = [
                *self.server_state.default_headers,
                (b"content-type", MEDIA_TYPE.encode()),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            lines = [b"%s: %s\r\n" % header for header in headers]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self.transport.close()
