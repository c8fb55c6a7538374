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
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from app.dealer import Hand
from app.errors import MEDIA_TYPE, BadFraming, HeadersTooLarge, RequestError, TooSlow
from app.patience import Line
from app.settings import HttpSettings

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent, HTTPResponseBodyEvent, HTTPResponseStartEvent

    from app.service import Service

CLOSES = b"connection: close\r\n"
AROUND = 4  # bytes of a header beside its name and value: colon, space, line end


class Cycle(RequestResponseCycle):
    """One request and its answer; an answer that is there as a whole leaves in one piece.

    uvicorn writes the head, then the body, and uvloop sends each at once: two system calls and two
    packets per answer. It also looks through every header with regular expressions.
    """

    _start: HTTPResponseStartEvent | None = None  # kept back until the first of the body is there

    async def send(self, message: ASGISendEvent) -> None:
        """Handle a message of the application."""
        if message["type"] == "http.response.start" and self._start is None:
            self._start = message
            return
        if self._start is not None and not self.response_started:
            if message["type"] == "http.response.body" and self._whole(self._start, message):
                return
            await super().send(self._start)
        await super().send(message)

    async def send_500_response(self) -> None:
        """Of an application that failed; what it may have begun was not sent yet."""
        self._start = None
        await super().send_500_response()

    def _whole(self, start: HTTPResponseStartEvent, message: HTTPResponseBodyEvent) -> bool:
        """Send the answer if it is a plain one, and say whether."""
        body = message.get("body", b"")
        headers = [*self.default_headers, *start.get("headers", ())]
        fields = dict(headers)
        if (
            message.get("more_body")
            or self.disconnected
            or self.flow.write_paused
            or self.scope["method"] == "HEAD"
            or fields.get(b"content-length") != b"%d" % len(body)
            or b"connection" in fields
            or b"transfer-encoding" in fields
        ):
            return False
        lines = [b"%s: %s\r\n" % header for header in headers]
        if not self.keep_alive:
            lines.append(CLOSES)
        head = b"".join(lines)
        if not len(lines) == head.count(b"\n") == head.count(b"\r"):  # a line too many
            return False  # uvicorn says what is wrong with it
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(b"".join((STATUS_LINE[start["status"]], head, b"\r\n", body)))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True


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
        self._quiet_since: float | None = None  # the last answer is out and no request is there
        self._unread_since: float | None = None
        self._refusal: RequestError | None = None

    def data_received(self, data: bytes) -> None:
        """A piece of one request, or of several."""
        self._all_head = self._heading
        self._piece_bytes = len(data)
        rest: bytes | memoryview = data
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as offer:
                    rest = memoryview(rest)[offer.args[0] :]
                    self._decline_upgrade()
        except httptools.HttpParserError:
            self.send_400_response("not an HTTP/1.1 request")
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
        parser, scope, before = self.parser, self.scope, self.cycle
        method, version = parser.get_method().decode("ascii"), parser.get_http_version()
        fault = _fault(method, version, self.headers)
        if fault is not None:
            self._refusal = BadFraming(fault)
            raise self._refusal
        if parser.should_upgrade():
            return  # the parser takes what follows for another protocol: `_decline_upgrade`
        target = httptools.parse_url(self.url)
        raw_path = target.path or b"/"
        scope["http_version"] = version
        scope["method"] = method
        scope["path"] = _decoded(raw_path)
        scope["raw_path"] = raw_path
        scope["query_string"] = target.query or b""
        self.cycle = Cycle(
            scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            self.expect_100_continue,
            # While draining, the next request is for somebody else.
            parser.should_keep_alive() and version != "1.0" and not self._state.draining,
            self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:  # its turn comes when those before it have their answers
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_message_complete(self) -> None:
        """The request is there, body and all."""
        if self.parser.should_upgrade():
            return
        self._heading = True
        self._head_bytes = 0
        self._since = self._quiet_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is out; more is read once all requests that were read have theirs.

        uvicorn reads on after each answer, so that a client who sends many requests at once and
        reads nothing could fill the memory with them. It also sets a timer after each.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._quiet_since = self.loop.time()
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or over a limit."""
        self._refuse(self._refusal or BadFraming(msg))

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
            quiet_since = self._quiet_since
            if quiet_since is not None and now - quiet_since > self._limits.keep_alive_s:
                self.transport.close()
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

    def _decline_upgrade(self) -> None:
        """Read the request's headers again without the offer to speak another protocol.

        Clients offer HTTP/2 so with any request, and expect HTTP/1.1 unless the answer is a 101.
        """
        parser, headers = self.parser, self.headers
        version = parser.get_http_version().encode()
        lines = [b"%s: %s\r\n" % header for header in headers if header[0] != b"upgrade"]
        head = [parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n", *lines, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's has it
        self.parser.feed_data(b"".join(head))

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


def _fault(method: str, version: str, headers: list[tuple[bytes, bytes]]) -> str | None:
    """What a proxy in front of this server could read differently, beside what llhttp refuses."""
    hosts, coding = 0, None
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            coding = value
    if version not in ("1.1", "1.0"):
        return f"unsupported HTTP version {version}; allowed: 1.1, 1.0"
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return f"request has {hosts} Host headers; it must have one"
    if coding is not None and (version == "1.0" or coding.strip().lower() != b"chunked"):
        shown = coding[:40].decode("latin-1")
        return f"unsupported Transfer-Encoding {shown!r}; allowed: chunked, with HTTP/1.1"
    return "unsupported method CONNECT; this server is no proxy" if method == "CONNECT" else None


def _decoded(raw_path: bytes) -> str:
    """A path without its percent-encoding; an encoded slash is no slash, and stays as it is."""
    path = raw_path.decode("ascii")
    if "%" not in path:
        return path
    return unquote(path.replace("%2F", "%252F").replace("%2f", "%252f"))
