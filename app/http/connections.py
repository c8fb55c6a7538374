"""HTTP/1.1 on one connection: uvicorn's protocol with limits on time, headers and memory.

uvicorn only times out idle connections, reads headers and trailers of any size, and parses
pipelined requests without limit. Here a request is parsed once the earlier ones are answered, and
the bytes of unanswered requests have a limit for all connections together (`BodyMemory`).

Connections have no timers: the server checks all of them once a second (`Connection.check`), and a
request reads the clock once.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

import httptools
import uvicorn
from prometheus_client import Counter
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from app.errors import MEDIA_TYPE, BadFraming, HeadersTooLarge, RequestError, TooSlow, Unavailable
from app.request_context import KEY, ClientConnection, RequestContext
from app.settings import HttpSettings

if TYPE_CHECKING:
    from uvicorn._types import (
        ASGI3Application,
        ASGIReceiveEvent,
        ASGISendEvent,
        HTTPResponseBodyEvent,
        HTTPResponseStartEvent,
    )

CLOSES = (b"connection", b"close")
CLOSING = b"\r\nconnection: close"
AROUND = 4  # bytes of a header beside its name and value: colon, space, line end
NOTED = frozenset((b"host", b"transfer-encoding", b"expect"))
BLANK = b"\r\n\r\n"  # ends headers, and chunked bodies
SMALL = 8192
STEP = 512  # bytes that may be parsed beyond the end of a request
# The client has closed its side, even if bytes that it sent before are still unread.
HUNG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR


@dataclass
class BodyMemory:
    """The bytes of unanswered requests on all connections of a server.

    Attributes:
        allowed: bytes.
        held: bytes.
        reading: connections whose body is incomplete, the oldest first.
    """

    allowed: int
    held: int = 0
    reading: dict[Connection, None] = field(default_factory=dict)

    def make_room(self, last: Connection) -> None:
        """Refuse bodies until the rest is within the limit.

        The body that has been incomplete for longest is refused first, so that slow senders
        cannot hold memory and keep others out.

        Args:
            last: the connection that received bytes last.
        """
        while self.held > self.allowed:
            connection = next(iter(self.reading), last)
            self.reading.pop(connection, None)
            connection.refuse(
                Unavailable(
                    f"requests of {self.held} bytes are being read or answered; "
                    f"allowed: {self.allowed} bytes together"
                )
            )
            if connection is last:
                return


class Direct(Protocol):
    """Answers requests without the application."""

    def __call__(
        self, cycle: Cycle, to_application: Callable[[Cycle, ASGI3Application | None], None]
    ) -> bool:
        """Take a request that is complete; it is answered later.

        Args:
            cycle: of the request.
            to_application: gives the request to an application after all; to the server's if
                there is none.

        Returns:
            Whether it was taken. If not, the application answers it.
        """
        ...


class Draining(Protocol):
    """A server whose connections close after the current answer while it drains."""

    draining: bool


@dataclass(frozen=True)
class Common:
    """Shared by the connections of a server.

    Attributes:
        limits: of headers and times.
        memory: for the bodies of all of them.
        state: whether the server is draining.
        rejections: counters by reason, of refusals before a request reaches the application.
        on_closed: called when a connection has closed.
        max_connections: further connections get a 503 and are closed.
        direct: answers some requests without the application.
    """

    limits: HttpSettings
    memory: BodyMemory
    state: Draining
    rejections: Mapping[str, Counter]
    on_closed: Callable[[], None] = lambda: None
    max_connections: int = sys.maxsize
    direct: Direct | None = None


class Cycle(RequestResponseCycle):
    """One request and its response; a complete response is written at once.

    uvicorn writes the head, then the body, and uvloop sends each immediately: two system calls and
    two packets per response. It also checks every header with regular expressions.
    """

    _start: HTTPResponseStartEvent | None = None  # held until the body starts
    held = 0  # bytes of the body that count in `BodyMemory`

    async def receive(self) -> ASGIReceiveEvent:
        """The next piece of the body, for the application.

        uvicorn resumes reading on every call, even when the body is complete and the next request
        must wait.
        """
        if self.more_body:
            return await super().receive()
        if not self.disconnected and not self.response_complete:
            if not self.message_event.is_set():  # it is, nearly always
                await self.message_event.wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": body, "more_body": False}

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
        """Respond for an application that failed; a response that it started was not sent."""
        self._start = None
        await super().send_500_response()

    def _whole(self, start: HTTPResponseStartEvent, message: HTTPResponseBodyEvent) -> bool:
        """Send a complete, plain response at once; False for any other, which uvicorn sends."""
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
        if not self.keep_alive:
            headers.append(CLOSES)
        head = b"\r\n".join([b": ".join(header) for header in headers])
        if (
            not len(headers) - 1 == head.count(b"\n") == head.count(b"\r")
        ):  # a line break in a header
            return False  # uvicorn reports what is wrong with it
        self._write(STATUS_LINE[start["status"]], head, BLANK, body)
        return True

    def answer(self, headers: bytes, body: bytes) -> bool:
        """Send a complete answer with status 200 at once.

        Args:
            headers: lines without line breaks at their end, besides those of every response.
            body: whose length the headers have.

        Returns:
            False if it must be sent by `send`, as the client has left or is slow to read.
        """
        if self.disconnected or self.flow.write_paused:
            return False
        lines = [b"%s: %s\r\n" % header for header in self.default_headers]
        if not self.keep_alive:
            headers += CLOSING
        self._write(STATUS_LINE[200], *lines, headers, BLANK, body)
        self.on_response = _nothing  # as after `run_asgi`: no reference to the connection stays
        return True

    def _write(self, *response: bytes) -> None:
        """Send a complete response."""
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(b"".join(response))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


def _nothing() -> None:
    pass


class Connection(HttpToolsProtocol):
    """One connection; tells its requests when the client disconnects.

    Args:
        common: what it shares with the other connections of the server.
        config, server_state, app_state: uvicorn's.
    """

    cycle: Cycle  # this class makes them
    pipeline: deque[tuple[Cycle, ASGI3Application]]  # type: ignore[assignment]

    def __init__(
        self,
        common: Common,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._common = common
        self._limits = common.limits
        self._memory = common.memory
        self._state = common.state
        self._rejections = common.rejections
        self._direct = common.direct
        self._begun: Cycle | None = None  # its headers are complete, and `_parse` starts it
        self._client = ClientConnection()
        self._since: float | None = self.loop.time()  # start of the wait for headers or a body
        self._heading = True  # headers are expected next
        self._lines_only = True  # the current piece had no bytes of a body
        self._line_bytes = 0  # since the last such byte, or the end of a request
        self._piece_bytes = 0
        self._trailers = self._trailer_bytes = 0
        self._hosts, self._coded = 0, False  # Host headers; there is a Transfer-Encoding
        self._rest = b""  # pipelined bytes, and where the next request starts in them
        self._rest_at = 0
        self._quiet_since: float | None = None  # since the last response, while there is no request
        self._unread_since: float | None = None
        self._refusal: RequestError | None = None
        self._answered: Cycle = None  # type: ignore[assignment]  # as uvicorn's; the cycle being answered
        self._task: asyncio.Task[None] | None = None  # of the last one that the application got
        self._failed: RequestError | None = None  # sent after the responses to the earlier requests

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Handle a new connection; refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._common.max_connections:
            self.refuse(
                Unavailable(f"too many connections; allowed: {self._common.max_connections}")
            )

    def data_received(self, data: bytes) -> None:
        """Handle received bytes, of one request or several."""
        if self._failed is not None:
            return
        if self._rest:  # received while reading was paused
            data = self._take_rest() + data
        if len(data) <= SMALL and data.find(BLANK, STEP) < 0 and not self._due():
            self._parse(data)  # nearly always; `_feed` would do the same
            if self._heading and self._memory.held <= self._memory.allowed:
                return
            data = b""
        self._feed(data, 0)

    def _feed(self, data: bytes, start: int) -> None:
        """Parse up to the end of the first unanswered request, and keep the rest for later.

        The parser cannot stop there. But headers and chunked bodies end with an empty line, so it
        gets at most `STEP` bytes and one such line beyond it.
        """
        end, allowed = len(data), self._limits.max_header_bytes
        while start < end:
            if self._due():
                self._set_aside(data, start)
                break
            stop = end
            if end - start > STEP:
                found = data.find(BLANK, start + STEP)
                if found >= 0:
                    stop = found + len(BLANK)
                if self._heading and stop - start > allowed:
                    stop = start + allowed
            self._parse(data if stop - start == end else data[start:stop])
            if self._failed is not None or self.transport.is_closing():
                break
            start = stop
        if self._failed is not None or self.transport.is_closing():
            return
        if not self._heading and not self.cycle.response_complete:
            self._memory.reading.setdefault(self)
        if self._memory.held > self._memory.allowed:
            self._memory.make_room(self)

    def _parse(self, piece: bytes) -> None:
        self._lines_only = True
        self._piece_bytes = len(piece)
        rest: bytes | memoryview = piece
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
        if self._lines_only:
            self._line_bytes += len(piece)
            if self._line_bytes > self._limits.max_header_bytes:
                self._fail(self._too_large())
        begun = self._begun
        if begun is not None:
            self._begun = None
            self._start(begun)

    def _fail(self, error: RequestError) -> None:
        """Refuse what follows, after the responses to the earlier requests."""
        if self._due():
            self._failed = error
            self.flow.pause_reading()
        else:
            self.refuse(error)

    def _due(self) -> bool:
        """Whether a complete request is unanswered."""
        return bool(self.pipeline) or (self._heading and not self._idle())

    def _set_aside(self, data: bytes, start: int) -> None:
        self._rest, self._rest_at = data, start
        self._memory.held += len(data) - start
        self.flow.pause_reading()

    def _take_rest(self) -> bytes:
        rest, self._rest = self._rest[self._rest_at :], b""
        self._memory.held -= len(rest)
        return rest

    def on_message_begin(self) -> None:
        """Start a request."""
        super().on_message_begin()
        self._hosts, self._coded = 0, False
        self.scope["state"][KEY] = RequestContext(self._client)
        self._since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a header; a trailer is counted and dropped.

        Proxies that filter headers do not look at trailers.
        """
        if self._heading:
            name = name.lower()
            self.headers.append((name, value))
            if name in NOTED:
                self._note(name, value)
            return
        self._trailers += 1
        self._trailer_bytes += len(name) + len(value) + AROUND
        if (
            self._trailers > self._limits.max_headers
            or self._trailer_bytes > self._limits.max_header_bytes
        ):
            self._refusal = self._too_large()
            raise self._refusal

    def _note(self, name: bytes, value: bytes) -> None:
        """A header that says how the request is read."""
        if name == b"host":
            self._hosts += 1
        elif name == b"transfer-encoding":
            self._coded = True
        elif value.lower() == b"100-continue":
            self.expect_100_continue = True

    def on_headers_complete(self) -> None:
        """Check the headers and start the application.

        A raised error reaches `send_400_response` through the parser.
        """
        self._lines_only = False
        allowed = self._limits.max_header_bytes
        # The sizes are only added up where the bytes received exceed the limit.
        if len(self.headers) > self._limits.max_headers or (
            self._line_bytes + self._piece_bytes > allowed and self._size() > allowed
        ):
            self._refusal = self._too_large()
            raise self._refusal
        parser, scope, before = self.parser, self.scope, self.cycle
        method, version = parser.get_method().decode("ascii"), parser.get_http_version()
        # All other requests have no fault that `_fault` looks for.
        if self._hosts != 1 or self._coded or version != "1.1" or method == "CONNECT":
            fault = _fault(method, version, self.headers)
            if fault is not None:
                self._refusal = BadFraming(fault)
                raise self._refusal
        self._heading = False
        if parser.should_upgrade():
            return  # the parser stops here; see `_decline_upgrade`
        scope["http_version"] = version
        scope["method"] = method
        scope["path"], scope["raw_path"], scope["query_string"] = _target(self.url)
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
            # While draining, the client reconnects to another worker.
            parser.should_keep_alive() and version != "1.0" and not self._state.draining,
            self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._begun = self.cycle
        else:  # it runs after the earlier ones
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        """Buffer a piece of the body until the application asks for it."""
        self._lines_only = False
        self._line_bytes = 0
        cycle = self.cycle
        if cycle.response_complete or cycle.disconnected:
            return
        cycle.body += body
        cycle.held += len(body)
        self._memory.held += len(body)
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self.parser.should_upgrade():
            return
        self._heading = True
        self._lines_only = False
        if self._trailers and not self.parser.should_keep_alive():  # by a trailer
            self.cycle.keep_alive = False
        self._line_bytes = self._trailers = self._trailer_bytes = 0
        self._since = None
        if self._memory.reading:
            self._memory.reading.pop(self, None)
        if self.cycle.response_complete:
            self._quiet_since = self.loop.time()
            return
        self._quiet_since = None
        if self.flow.read_paused:
            # A disconnect is noticed by reading; `_feed` keeps pipelined bytes for later.
            self.flow.resume_reading()
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """A response was written: start the next pipelined request, or resume reading.

        uvicorn always resumes reading, so a client that pipelines requests and reads no responses
        could fill the memory. It also sets a timer after each response.
        """
        self.server_state.total_requests += 1
        answered = self._answered
        self._memory.held -= answered.held  # as `_release` does
        answered.held = 0
        if self.transport.is_closing():
            return
        if not self._heading:
            self._memory.reading.pop(self, None)
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            if self._failed is None or self._heading or cycle is not self.cycle:
                self._start_asgi_task(cycle, app)
                if self._due():
                    return
        else:
            self._quiet_since = self.loop.time()
        if self._failed is not None:
            self.refuse(self._failed)
        elif self._rest:
            self.loop.call_soon(self._feed_rest)
        else:
            self.flow.resume_reading()

    def _feed_rest(self) -> None:
        if not self._rest or self.transport.is_closing():
            return
        rest, start = self._rest, self._rest_at
        self._rest = b""
        self._memory.held -= len(rest) - start
        self._feed(rest, start)
        if not self._rest:
            self.flow.resume_reading()

    def _start(self, cycle: Cycle) -> None:
        """Answer a request; nothing is sent before the next turn of the loop."""
        self._answered = cycle
        if self._direct is None or cycle.more_body or cycle.disconnected:
            self._start_asgi_task(cycle, self.app)
        else:
            self._task = None
            if not self._direct(cycle, self._to_application):
                self._start_asgi_task(cycle, self.app)

    def _to_application(self, cycle: Cycle, app: ASGI3Application | None = None) -> None:
        self._start_asgi_task(cycle, app or self.app)

    def _start_asgi_task(self, cycle: Cycle, app: ASGI3Application) -> None:  # type: ignore[override]  # all of ours are such
        self._answered = cycle
        self._task = task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _release(self, cycle: Cycle) -> None:
        """Free the memory of the body."""
        self._memory.held -= cycle.held
        cycle.held = 0

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP/1.1, or over a limit."""
        self._fail(self._refusal or BadFraming(msg))

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
            # Reset the connection, or the kernel would keep megabytes that are not read.
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        if self.transport.is_closing():
            return
        if self.flow.read_paused and self._hung_up():
            self.transport.abort()
            return
        if self._since is None:
            quiet_since = self._quiet_since
            if quiet_since is not None and now - quiet_since > self._limits.keep_alive_s:
                self.transport.close()
        elif self.flow.read_paused:
            self._since = now  # the client is waiting for the server
        elif self._heading:
            if self._idle() and now - self._since > self._limits.header_timeout_s:
                self._fail(TooSlow("the headers did not arrive in time"))
        elif now - self._since > self._limits.body_timeout_s:
            self._fail(TooSlow("the body did not arrive in time"))

    def eof_received(self) -> None:
        """The client has disconnected; `connection_lost` follows one turn of the loop later."""
        self._client.gone = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has closed."""
        self._client.gone = True
        super().connection_lost(exc)
        self._forget()
        answered = self._answered
        if answered is not None:
            # uvicorn tells the request that was parsed last, which may have been sent ahead.
            answered.disconnected = True
            answered.message_event.set()
            if answered.held and self._task is not None:  # the application still uses it
                self._task.add_done_callback(lambda _: self._release(answered))
            else:
                self._release(answered)
        self._common.on_closed()

    def _hung_up(self) -> bool:
        """Whether the client has disconnected, with unread bytes in between."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), HUNG_UP)
        return bool(poll.poll(0))

    def _forget(self) -> None:
        """Drop everything received."""
        self._memory.reading.pop(self, None)
        self._take_rest()
        while self.pipeline:
            self._release(self.pipeline.pop()[0])

    def _decline_upgrade(self) -> None:
        """Parse the request's headers again without `Upgrade`.

        Some clients offer HTTP/2 this way with every request, and expect HTTP/1.1 unless the
        response is a 101.
        """
        parser, headers = self.parser, self.headers
        version = parser.get_http_version().encode()
        lines = [b"%s: %s\r\n" % header for header in headers if header[0] != b"upgrade"]
        head = [parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n", *lines, b"\r\n"]
        self._heading = True
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's has it
        self.parser.feed_data(b"".join(head))

    def _idle(self) -> bool:
        """Whether no response is pending."""
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

    def refuse(self, error: RequestError) -> None:
        """Respond without the application, and close the connection."""
        if self.transport.is_closing():
            return
        self._rejections[error.reason].inc()
        if self._idle():
            answered = self.cycle is not None and not self._heading  # before its body was complete
        else:
            # The responses to earlier requests come first.
            answered = self.cycle.response_started or bool(self.pipeline)
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.cycle.body = bytearray()
            self._release(self.cycle)
        self._forget()
        if not answered:
            self.transport.write(refusal(error, self.server_state.default_headers))
        self.transport.close()


def check_all(server_state: ServerState, now: float) -> None:
    """Close the connections of a server whose clients are too slow.

    Args:
        server_state: of a server all of whose connections are of this kind.
        now: on the clock of the loop.
    """
    for connection in list(server_state.connections):
        connection.check(now)  # type: ignore[union-attr]  # see above


def refusal(error: RequestError, headers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """The bytes of an error response after which the connection closes."""
    body = error.body()
    fields = [
        *headers,
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
        (b"connection", b"close"),
    ]
    lines = [b"%s: %s\r\n" % field for field in fields]
    return b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body])


def _fault(method: str, version: str, headers: list[tuple[bytes, bytes]]) -> str | None:
    """What a proxy could read differently from this server, beyond what llhttp refuses."""
    names = [name for name, _ in headers]
    hosts = names.count(b"host")
    if version not in ("1.1", "1.0"):
        return f"unsupported HTTP version {version}; allowed: 1.1, 1.0"
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return f"request has {hosts} Host headers; it must have one"
    if b"transfer-encoding" in names:
        coding = b", ".join(value for name, value in headers if name == b"transfer-encoding")
        if version == "1.0" or coding.strip().lower() != b"chunked":
            shown = coding[:40].decode("latin-1")
            return f"unsupported Transfer-Encoding {shown!r}; allowed: chunked, with HTTP/1.1"
    return "unsupported method CONNECT; this server is not a proxy" if method == "CONNECT" else None


@lru_cache(maxsize=8)  # clients ask for the same few again and again
def _target(url: bytes) -> tuple[str, bytes, bytes]:
    """Path, raw path and query of a request's target.

    Raises:
        HttpParserInvalidURLError: the target is not a URL.
    """
    target = httptools.parse_url(url)
    raw_path = target.path or b"/"
    return _decoded(raw_path), raw_path, target.query or b""


def _decoded(raw_path: bytes) -> str:
    """The percent-decoded path; an encoded slash stays encoded."""
    path = raw_path.decode("ascii")
    if "%" not in path:
        return path
    return unquote(path.replace("%2F", "%252F").replace("%2f", "%252f"))
