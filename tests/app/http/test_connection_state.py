"""Bounds on the state that a client can make a connection keep."""

import asyncio
import functools
import logging
import re
import socket
from types import SimpleNamespace

import httptools
import pytest
import uvicorn
from uvicorn.server import ServerState

from app.errors import REASONS
from app.http.connections import BLANK, STEP, BodyMemory, Common, Connection
from app.request_context import KEY
from app.settings import HttpSettings

LIMIT = 16_384
PIECE = 256 * 1024  # what a loop reads at once
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Count:
    value = 0

    def inc(self):
        self.value += 1


class Peer(asyncio.Transport):
    """The loop's side of a connection: what was written, whether it reads, whether it is closed."""

    def __init__(self):
        super().__init__()
        self.written = b""
        self.reading = True
        self.closing = False
        self.socket = None

    def get_extra_info(self, name, default=None):
        return self.socket if name == "socket" else default

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    abort = close

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def get_write_buffer_size(self):
        return 0

    @property
    def statuses(self):
        return [int(code) for code in re.findall(rb"HTTP/1.1 (\d{3}) [A-Z]", self.written)]


class Application:
    """Answers when it is told to, and keeps what it was asked."""

    def __init__(self):
        self.asked, self.ended = [], 0
        self.go = asyncio.Event()

    async def __call__(self, scope, receive, send):
        try:
            body, more = b"", scope["method"] == "POST"
            self.asked.append(scope)
            scope["read"] = body
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                scope["read"] += message["body"]
                more = message["more_body"]
            await self.go.wait()
            length = (b"content-length", b"2")
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
            await send({"type": "http.response.body", "body": b"ok"})
        finally:
            self.ended += 1


class Host:
    """A server with nothing but connections."""

    def __init__(self, application=None, allowed=10**9, **common):
        self.application = application or Application()
        self.closed = 0
        self.rejections = {reason: Count() for reason in REASONS}
        self.memory = BodyMemory(allowed)
        self.state = SimpleNamespace(draining=False)
        self.common = Common(
            HttpSettings(), self.memory, self.state, self.rejections, self._count, **common
        )
        self.config = uvicorn.Config(self.application, ws="none", lifespan="off", log_config=None)
        self.server_state = ServerState()

    def _count(self):
        self.closed += 1

    def connect(self):
        connection = Connection(self.common, self.config, self.server_state, {})
        connection.connection_made(Peer())
        return connection, connection.transport

    def refused(self):
        return {reason: count.value for reason, count in self.rejections.items() if count.value}


async def turns(count=10):
    for _ in range(count):
        await asyncio.sleep(0)


def send(connection, *pieces):
    """As a loop does: nothing more once the transport is closed or paused; gives what was taken."""
    sent = 0
    for piece in pieces:
        if connection.transport.closing or not connection.transport.reading:
            break
        connection.data_received(piece)
        sent += len(piece)
    return sent


async def send_all(connection, *pieces):
    """The same, and waits until the transport reads on."""
    for piece in pieces:
        while not connection.transport.reading:
            await turns(1)
        connection.data_received(piece)
    await turns(40)


def on_a_loop(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


def pieces(content, size=PIECE):
    return [content[i : i + size] for i in range(0, len(content), size)]


ENDLESS = 8 * 2**20
FLOODS = {
    "headers": [POST, *pieces(b"X-A: b\r\n" * (ENDLESS // 8))],
    "a header's name": [POST, *pieces(b"X" * ENDLESS)],
    "a header's value": [POST + b"X-A: ", *pieces(b"x" * ENDLESS)],
    "a url": [b"GET /", *pieces(b"x" * ENDLESS)],
    "a method": pieces(b"GETX" * (ENDLESS // 4)),
    "a version": [b"GET / HTTP/1.", *pieces(b"1" * ENDLESS)],
    "empty lines": pieces(b"\r\n" * (ENDLESS // 2)),
    "trailers": [CHUNKED + b"0\r\n", *pieces(b"X-A: b\r\n" * (ENDLESS // 8))],
    "trailers after a chunk": [
        CHUNKED + b"1\r\nx\r\n0\r\n",
        *pieces(b"X-A: b\r\n" * (ENDLESS // 8)),
    ],
    "trailers in one piece": [CHUNKED + b"0\r\n" + b"X-A: b\r\n" * 30_000, GET],
    "many small trailers": [CHUNKED + b"0\r\n", *[b"X-A: b\r\n"] * 200],
    "a trailer's name": [CHUNKED + b"0\r\n", *pieces(b"X" * ENDLESS)],
    "a trailer's value": [CHUNKED + b"0\r\nX-A: ", *pieces(b"x" * ENDLESS)],
    "a chunk's size": [CHUNKED, *pieces(b"0" * ENDLESS)],
    "a chunk's extension": [CHUNKED + b"1;", *pieces(b"x" * ENDLESS)],
    "a chunk extension's value": [CHUNKED + b"1;x=", *pieces(b"x" * ENDLESS)],
    "the preface of http/2": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", *pieces(bytes(ENDLESS))],
    "http/0.9": [b"GET /\r\n", *pieces(b"x" * ENDLESS)],
    "tls to a plain port": [b"\x16\x03\x01", *pieces(bytes(ENDLESS))],
    "expect": [POST, *pieces(b"Expect: 100-continue\r\n" * (ENDLESS // 22))],
}


@pytest.mark.parametrize("early", [False, True], ids=["no answer yet", "after a 401"])
@pytest.mark.parametrize("name", FLOODS)
@on_a_loop
async def test_lines_without_end_are_cut_off(name, early):
    host = Host(unauthorized if early else None)
    connection, peer = host.connect()
    taken = 0
    for piece in FLOODS[name]:
        taken += send(connection, piece)
        await turns(3)
    assert peer.closing
    assert taken <= len(FLOODS[name][0]) + 2 * PIECE
    assert host.memory.held == 0
    assert sum(host.refused().values()) == 1
    assert peer.statuses[-1] in (400, 401, 431)


LATER = {
    "no host": (b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "another coding": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
    "connect": (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "many headers": (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 200 + b"\r\n", 431),
}


@pytest.mark.parametrize("name", LATER)
@on_a_loop
async def test_the_headers_of_each_request_of_a_connection_are_checked(name):
    host = Host()
    host.application.go.set()
    connection, peer = host.connect()
    for sent in (GET, CHUNKED + b"0\r\n\r\n", GET):
        await send_all(connection, sent)
    later, status = LATER[name]
    await send_all(connection, later)
    assert peer.statuses == [200, 200, 200, status]
    assert peer.closing
    assert len(host.application.asked) == 3


@on_a_loop
async def test_requests_for_one_path_after_another_get_their_own():
    host = Host()
    host.application.go.set()
    connection, _ = host.connect()
    targets = [b"/%d%%20?x=%d" % (i % 12, i) for i in range(40)]
    for target in targets:
        await send_all(connection, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    found = [
        (scope["path"], scope["raw_path"] + b"?" + scope["query_string"])
        for scope in host.application.asked
    ]
    assert found == [(f"/{i % 12} ", target) for i, target in enumerate(targets)]


async def unauthorized(scope, receive, send):
    length = (b"content-length", b"0")
    await send({"type": "http.response.start", "status": 401, "headers": [length]})
    await send({"type": "http.response.body"})


TRAILERS = [
    b"Authorization: Bearer k", b"X-API-Key: k", b"Content-Type: image/png", b"X-Request-ID: abc",
    b"X-Deadline-Ms: 1", b"Host: y", b"Expect: 100-continue", b"Connection: keep-alive",
    b"Inference-Header-Content-Length: 3", b"Upgrade: x\r\nConnection: Upgrade",
]  # fmt: skip


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("size", [1, 7, 10_000])
@on_a_loop
async def test_a_trailer_never_becomes_a_header(trailer, size):
    host = Host()
    connection, peer = host.connect()
    host.application.go.set()
    request = CHUNKED + b"3\r\nabc\r\n0\r\n" + trailer + b"\r\n\r\n"
    await send_all(connection, *pieces(request + GET, size))
    first, second = host.application.asked
    assert first["headers"] == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]
    assert first["read"] == b"abc"
    assert second["headers"] == [(b"host", b"x")]
    assert peer.statuses == [200, 200]
    assert b"100 Continue" not in peer.written


@pytest.mark.parametrize(
    ("trailer", "status"),
    [
        (b"Content-Length: 3", 400),
        (b"Transfer-Encoding: identity", 400),
        (b"Transfer-Encoding: chunked", 400),
        (b"Connection: close", 200),
    ],
)
@on_a_loop
async def test_a_trailer_about_framing_ends_the_connection(trailer, status):
    host = Host()
    connection, peer = host.connect()
    host.application.go.set()
    send(connection, CHUNKED + b"3\r\nabc\r\n0\r\n" + trailer + b"\r\n\r\n" + GET)
    await turns()
    assert peer.statuses == [status]
    assert peer.closing


@pytest.mark.parametrize(
    "ahead",
    [GET, b"GET / HTTP/1.1\r\nHost:\r\n\r\n", POST + b"Content-Length: 4\r\n\r\nabcd",
     CHUNKED + b"4\r\nabcd\r\n0\r\n\r\n", CHUNKED + b"4\r\n\r\n\r\n\r\n0\r\n\r\n"],
    ids=["get", "shortest", "post", "chunked", "chunked, empty lines in it"],
)  # fmt: skip
@on_a_loop
async def test_what_is_sent_ahead_of_an_answer_is_neither_parsed_nor_read(ahead):
    host = Host()
    connection, peer = host.connect()
    count = PIECE // len(ahead)
    taken = send(connection, *[ahead * count] * 20)
    assert taken == len(ahead) * count  # one piece, not twenty
    assert not peer.reading
    parsed = len(host.application.asked) + len(connection.pipeline)
    await turns()
    assert parsed <= 2 * STEP // len(ahead) + 2
    assert host.memory.held <= taken
    # And all get their answers, in the end.
    host.application.go.set()
    for _ in range(20 * count):
        await turns(4)
        if len(host.application.asked) == count:
            break
    await turns()
    assert len(host.application.asked) == count
    assert host.memory.held == 0
    assert peer.reading


@on_a_loop
async def test_bytes_that_come_while_an_answer_is_due_stop_reading():
    host = Host()
    connection, peer = host.connect()
    send(connection, GET)
    await turns()
    assert peer.reading  # or nobody would notice that the client hangs up
    assert send(connection, *[GET] * 100) == len(GET)
    assert not peer.reading
    host.application.go.set()
    await turns()
    assert peer.statuses == [200, 200]
    assert peer.reading


@on_a_loop
async def test_a_request_in_every_cut_is_the_same_request():
    body = b"a\r\n\r\nb" * 300
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = CHUNKED + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    for size in (1, 3, 100, STEP - 1, STEP, STEP + 1, 2000, 10_000):
        host = Host()
        connection, peer = host.connect()
        host.application.go.set()
        await send_all(connection, *pieces(request + GET + chunked + GET, size))
        assert peer.statuses == [200] * 4, size
        assert [scope["read"] for scope in host.application.asked] == [body, b"", body, b""]
        assert host.memory.held == 0


@pytest.mark.parametrize("size", [0, 1, 60_000, 70_000, 300_000, 2_000_000])
@on_a_loop
async def test_reading_goes_on_once_a_body_of_any_size_is_whole(size):
    host = Host()
    connection, peer = host.connect()
    request = POST + b"Content-Length: %d\r\n\r\n" % size + bytes(size)
    await send_all(connection, *pieces(request))
    assert peer.reading
    assert not host.application.asked[0]["state"][KEY].client.gone
    connection.eof_received()
    assert host.application.asked[0]["state"][KEY].client.gone


@on_a_loop
async def test_a_hang_up_behind_bytes_that_were_sent_ahead_is_noticed():
    host = Host()
    connection, peer = host.connect()
    send(connection, GET, GET)
    await turns()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer.socket = ours
        theirs.sendall(GET)
        connection.check(0.0)
        assert not peer.closing
        theirs.shutdown(socket.SHUT_WR)
        connection.check(0.0)
    assert peer.closing


@on_a_loop
async def test_bodies_have_a_common_limit_and_the_oldest_goes_first():
    host = Host(allowed=10_000)
    slow = [host.connect() for _ in range(3)]
    for connection, _ in slow:
        send(connection, POST + b"Content-Length: 5000\r\n\r\n" + bytes(3000))
    await turns()
    assert host.memory.held == 9000
    quick, quick_peer = host.connect()
    host.application.go.set()
    send(quick, POST + b"Content-Length: 2000\r\n\r\n" + bytes(2000))
    await turns()
    assert quick_peer.statuses == [200]
    assert [peer.closing for _, peer in slow] == [True, False, False]
    refused = slow[0][1]
    assert refused.statuses == [503]
    assert b"retry-after: 1" in refused.written
    assert b"10000 bytes together" in refused.written
    assert host.refused() == {"unavailable": 1}
    assert host.memory.held == 6000
    for connection, _ in slow:
        connection.connection_lost(None)
    await turns()
    assert host.memory.held == 0
    assert not host.memory.reading
    assert host.application.ended == len(host.application.asked)


@on_a_loop
async def test_a_body_that_does_not_fit_beside_those_being_answered_is_refused():
    host = Host(allowed=10_000)
    answered = [host.connect() for _ in range(3)]
    for connection, _ in answered:
        send(connection, POST + b"Content-Length: 3000\r\n\r\n" + bytes(3000))
    await turns()
    last, last_peer = host.connect()
    send(last, POST + b"Content-Length: 2000\r\n\r\n" + bytes(2000))
    small, small_peer = host.connect()
    send(small, POST + b"Content-Length: 100\r\n\r\n" + bytes(100))
    await turns()
    assert last_peer.statuses == [503]
    host.application.go.set()
    await turns()
    assert small_peer.statuses == [200]
    assert all(peer.statuses == [200] for _, peer in answered)
    assert host.memory.held == 0


@on_a_loop
async def test_a_body_counts_until_its_request_ends_also_if_its_client_is_gone():
    host = Host()
    connection, _ = host.connect()
    send(connection, POST + b"Content-Length: 3000\r\n\r\n" + bytes(3000))
    await turns()
    connection.connection_lost(None)
    await turns()
    assert host.memory.held == 3000
    host.application.go.set()
    await turns()
    assert host.memory.held == 0


@on_a_loop
async def test_a_request_that_was_sent_ahead_and_never_began_is_forgotten():
    host = Host()
    connection, _ = host.connect()
    post = POST + b"Content-Length: 90\r\n\r\n" + bytes(90)
    send(connection, post * 100)
    await turns()
    connection.connection_lost(None)
    host.application.go.set()
    await turns()
    assert host.memory.held == 0
    assert len(host.application.asked) == 1
    assert host.closed == 1


@pytest.mark.parametrize("garbage", [b"\x16\x03", b"POST / HTTP/9.9\r\n\r\n", b"\r\n" * 10_000])
@on_a_loop
async def test_garbage_after_a_request_is_refused_after_its_answer(garbage):
    host = Host()
    connection, peer = host.connect()
    send(connection, GET + garbage)
    await turns()
    assert peer.statuses == []
    host.application.go.set()
    await turns()
    assert peer.statuses[0] == 200
    assert peer.statuses[1:] in ([400], [431])
    assert peer.closing


@on_a_loop
async def test_a_connection_over_the_limit_is_answered_503():
    host = Host(max_connections=2)
    peers = [host.connect()[1] for _ in range(3)]
    assert [peer.statuses for peer in peers] == [[], [], [503]]
    assert peers[2].closing
    assert host.refused() == {"unavailable": 1}


@on_a_loop
async def test_an_idle_connection_whose_body_came_after_its_answer_is_closed():
    host = Host(unauthorized)
    connection, peer = host.connect()
    send(connection, POST + b"Content-Length: 5\r\n\r\n")
    await turns()
    send(connection, b"abcde")
    connection.check(asyncio.get_running_loop().time() + 1)
    assert not peer.closing
    connection.check(asyncio.get_running_loop().time() + 6)
    assert peer.closing


@on_a_loop
async def test_invalid_input_of_clients_is_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    host = Host()
    for sent in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nBad\x00: y\r\n\r\n"):
        connection, _ = host.connect()
        send(connection, sent)
    await turns()
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


def test_the_parser_ends_chunked_messages_with_an_empty_line():
    """Which is what `Connection._feed` relies on."""

    class Messages:
        complete = 0

        def on_message_complete(self):
            self.complete += 1

    for end in (b"0\r\n\r\n", b"000\r\n\r\n", b"0;x=y\r\n\r\n", b"0\r\nX-A: b\r\n\r\n"):
        messages = Messages()
        parser = httptools.HttpRequestParser(messages)
        request = CHUNKED + b"1\r\nx\r\n" + end
        assert request.endswith(BLANK)
        parser.feed_data(request[:-1])
        assert not messages.complete
        parser.feed_data(request[-1:])
        assert messages.complete == 1
