"""Slow, broken and greedy clients on raw sockets, against a real server."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import time

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from app.admin.application import MAX_CONNECTIONS
from app.http.connections import Cycle
from app.telemetry.metrics import FLUSH_S
from tests.app.test_faults import connect, post, raw
from tests.pictures import PNG

pytestmark = pytest.mark.server
FAST = {
    "http__header_timeout_s": 1,
    "http__body_timeout_s": 2,
    "http__write_timeout_s": 1,
    "http__keep_alive_s": 1,
}
PIECES = 100  # sent by a client that trickles before the test gives up
HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


@pytest.fixture(scope="module")
def fast(models, preloaded):
    """A server with short time limits, for all tests of this file."""
    with preloaded.serving(model_dir=models, model="tiny", workers=1, **FAST) as server:
        yield server


@pytest.fixture(scope="module")
def server(models, preloaded):
    """A server with the default limits, for all tests of this file."""
    with preloaded.serving(model_dir=models, model="tiny", workers=1) as server:
        yield server


@contextlib.contextmanager
def counted(server, metric="scumble_rejections_total", **reasons: int):
    """The block adds so many to the metric, by reason."""

    def found() -> dict[str, float]:
        samples = server.metrics()
        return {name: samples.get(f'{metric}{{reason="{name}"}}', 0) for name in reasons}

    before = found()
    yield
    after = found()
    assert {name: after[name] - before[name] for name in reasons} == reasons


def everything(connection) -> bytes:
    """What arrives until the server closes."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def whole(connection, answers: int = 1) -> bytes:
    """So many predictions, head and body."""
    found = b""
    while found.count(b"]}]}") < answers:
        piece = connection.recv(65536)
        assert piece, found
        found += piece
    return found


def problem(answer: bytes, status: int) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    assert json.loads(body)["status"] == status
    return json.loads(body)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/pre", HEAD], ids=["nothing", "line", "headers"])
def test_headers_that_do_not_arrive_are_given_up(fast, sent):
    with counted(fast, slow=1), connect(fast) as connection:
        connection.sendall(sent)
        problem(everything(connection), 408)
    assert post(fast).status_code == 200


def test_headers_that_trickle_are_given_up(fast):
    with connect(fast) as connection:
        connection.settimeout(0.2)
        connection.sendall(HEAD)
        answer = b""
        for _ in range(PIECES):
            connection.sendall(b"X-A: b\r\n")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(1000)
                break
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_body_that_does_not_arrive_is_given_up(fast):
    with counted(fast, slow=1, gone=1), connect(fast) as connection:
        connection.sendall(raw()[:-5])
        problem(everything(connection), 408)
    time.sleep(4 * FLUSH_S)
    assert fast.metrics()["scumble_inflight"] == 0
    assert post(fast).status_code == 200


def test_a_body_that_trickles_after_its_refusal_is_given_up(fast):
    with connect(fast) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        for _ in range(PIECES):
            try:
                connection.sendall(b"x")
            except OSError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the connection is still open")


def test_a_body_in_time_is_answered(fast):
    request = raw()
    with connect(fast) as connection:
        for first in range(0, len(request), 40):
            connection.sendall(request[first : first + 40])
            time.sleep(0.1 if first < 400 else 0)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_an_idle_connection_is_closed_and_empty_lines_do_not_keep_it(fast):
    for line in (b"", b"\r\n"):
        with connect(fast) as connection:
            connection.sendall(raw())
            assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
            connection.settimeout(0.3)
            for _ in range(PIECES):
                try:
                    connection.sendall(line)
                    if not connection.recv(1000):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                pytest.fail("the connection is still open")


def test_answers_that_are_not_read_are_cut_off(fast):
    with counted(fast, slow=1), connect(fast) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(1)
        question = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100
        blocked = 0
        while blocked < 20:
            try:
                connection.sendall(question)
            except TimeoutError:
                blocked += 1
            except OSError:
                break
        else:
            pytest.fail("the connection is still open")
    time.sleep(4 * FLUSH_S)
    assert fast.metrics()["scumble_inflight"] == 0


@pytest.mark.parametrize(
    "more",
    [
        b"".join(b"X-%d: y\r\n" % n for n in range(101)),
        b"X-Long: " + b"y" * 17_000 + b"\r\n",
        b"X-Endless: " + b"y" * 300_000,
    ],
    ids=["many", "long", "endless"],
)
def test_too_much_header_is_431(server, more):
    with counted(server, headers=1), connect(server) as connection:
        with contextlib.suppress(OSError):  # closed already
            connection.sendall(HEAD + more + b"\r\n")
        answer = everything(connection)
    if answer:  # a reset for bytes that nobody read may have taken the answer with it
        assert "allowed: 100, 16384 bytes" in problem(answer, 431)["detail"]
    assert post(server).status_code == 200


def test_a_long_path_counts_as_header(server):
    with connect(server) as connection:
        connection.sendall(b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        problem(everything(connection), 431)


def test_headers_just_within_the_limits_are_read_beside_any_body(server):
    more = {f"X-{n}": "y" * 150 for n in range(90)}
    big = PNG + bytes(100_000)
    with connect(server) as connection:
        for _ in range(2):
            connection.sendall(raw(big, **more))
            assert whole(connection).startswith(b"HTTP/1.1 200")
        # The end of a body and the next request in one piece.
        both = raw(big, **more) + raw(**more)
        connection.sendall(both[:50_000])
        time.sleep(0.1)
        connection.sendall(both[50_000:])
        found = whole(connection, answers=2)
        assert found.count(b"HTTP/1.1 200") == 2


def test_what_is_no_http_is_a_problem_too(server):
    with counted(server, framing=1), connect(server) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        problem(everything(connection), 400)


@pytest.mark.parametrize(
    "header",
    [b"X-Long: " + b"y" * 10_000, b"\r\n".join(b"X-%d: y" % n for n in range(20))],
    ids=["long", "many"],
)
def test_headers_of_parts_are_bounded(client, header):
    body = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n'
        + header
        + b"\r\n\r\n"
        + PNG
        + b"\r\n--b--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = client.post("/v1/predict", content=body, headers=kind)
    assert answer.status_code == 400
    assert answer.json()["status"] == 400


class Written(asyncio.Transport):
    """What a connection is asked to send, one entry per system call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def write(self, data):
        self.calls.append(bytes(data))

    def close(self):
        self.calls.append("close")


def start(length: int | None, *more: tuple[bytes, bytes], status: int = 200) -> dict:
    known = () if length is None else ((b"content-length", b"%d" % length),)
    return {"type": "http.response.start", "status": status, "headers": [*known, *more]}


def piece(body: bytes, more_body: bool = False) -> dict:
    return {"type": "http.response.body", "body": body, "more_body": more_body}


OK = b"HTTP/1.1 200 OK\r\n"
TWO = b"content-length: 2\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
CLOSES = (b"connection", b"close")


@pytest.mark.parametrize(
    ("request_", "messages", "calls"),
    [
        ({}, [start(2), piece(b"ab")], [OK + TWO + b"\r\nab"]),
        ({}, [start(0, status=404), piece(b"")],
         [b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"]),
        ({"keep_alive": False}, [start(2), piece(b"ab")],
         [OK + TWO + b"connection: close\r\n\r\nab", "close"]),
        ({}, [start(2, CLOSES), piece(b"ab")],
         [OK + TWO + b"connection: close\r\n\r\n", b"ab", "close"]),
        ({}, [start(2), piece(b"a", True), piece(b"b")], [OK + TWO + b"\r\n", b"a", b"b"]),
        ({}, [start(None), piece(b"ab")], [OK + CHUNKED, b"2\r\nab\r\n0\r\n\r\n"]),
        ({"method": "HEAD"}, [start(2), piece(b"ab")], [OK + TWO + b"\r\n"]),
        ({"disconnected": True}, [start(2), piece(b"ab")], []),
    ],
)  # fmt: skip
def test_a_whole_answer_is_one_write(request_, messages, calls):
    cycle, ended = made_cycle(**request_)
    asyncio.run(sent(cycle, messages))
    assert cycle.transport.calls == calls
    assert len(ended) == bool(calls)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([start(2, (b"x", b"a\r\nset-cookie: b")), piece(b"ab")], "Invalid HTTP header value"),
        ([start(2, (b"x", b"a\nb")), piece(b"ab")], "Invalid HTTP header value"),
        ([start(2, (b"x\r", b"a")), piece(b"ab")], "Invalid HTTP header name"),
        ([start(3), piece(b"ab")], "shorter than Content-Length"),
        ([start(1), piece(b"ab")], "longer than Content-Length"),
        ([start(2), start(2)], "http.response.body"),
        ([piece(b"ab")], "http.response.start"),
        ([start(2), piece(b"ab"), piece(b"ab")], "already completed"),
    ],
)
def test_an_answer_that_is_none_is_not_sent(messages, says):
    cycle, _ = made_cycle()
    with pytest.raises(RuntimeError, match=says):
        asyncio.run(sent(cycle, messages))


def test_an_application_that_fails_after_its_head_gives_a_500():
    async def app(scope, receive, send):
        await send(start(2))
        raise ValueError("no body")

    cycle, ended = made_cycle()
    asyncio.run(cycle.run_asgi(app))
    *pieces, closed = cycle.transport.calls
    answer = b"".join(pieces)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert answer.endswith(b"Internal Server Error")
    assert closed == "close"
    assert ended == [True]


def made_cycle(method: str = "GET", keep_alive: bool = True, disconnected: bool = False):
    transport, ended = Written(), []
    cycle = Cycle(
        {"method": method},
        transport,
        FlowControl(transport),
        logging.getLogger("cycle"),
        None,
        False,
        [],
        asyncio.Event(),
        False,
        keep_alive,
        lambda: ended.append(cycle.response_complete),
    )
    cycle.disconnected = disconnected
    return cycle, ended


async def sent(cycle, messages) -> None:
    for message in messages:
        await cycle.send(message)


def test_pipelined_requests_of_all_methods_are_answered_in_order(fast):
    with connect(fast) as connection:
        connection.sendall(
            b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n"
            b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
            + raw()
            + b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        answers = everything(connection)
    statuses = re.findall(rb"HTTP/1.1 (\d+)", answers)
    assert statuses[1:] == [b"200", b"200", b"404"]
    assert answers.endswith(b"}")


def admin(server):
    host, port = server.admin.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_the_admin_port_has_the_same_limits(fast):
    """Silent clients, endless headers and trailers, and nobody else waits for them."""
    reset = (ConnectionResetError, BrokenPipeError)
    metric = "scumble_admin_rejections_total"
    with contextlib.ExitStack() as stack:
        stack.enter_context(counted(fast, metric, slow=50, headers=3))
        silent = [stack.enter_context(admin(fast)) for _ in range(50)]
        for flood in (
            b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 750_000,
            b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: " + b"b" * 6_000_000,
            b"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
            + b"X-A: b\r\n" * 750_000,
        ):
            with admin(fast) as connection, contextlib.suppress(*reset):
                connection.sendall(flood)
                everything(connection)
        assert {everything(connection)[9:12] for connection in silent} == {b"408"}


def test_the_admin_port_has_no_more_connections_than_it_may(serve):
    server = serve(workers=1)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(admin(server)) for _ in range(MAX_CONNECTIONS + 20)]
        for connection in crowd[MAX_CONNECTIONS:]:
            problem(everything(connection), 503)
    deadline = time.monotonic() + 10
    name = 'scumble_admin_rejections_total{reason="unavailable"}'
    while time.monotonic() < deadline:
        with contextlib.suppress(KeyError):  # those of the crowd were not closed yet
            if server.metrics()[name] >= 20:
                return
    pytest.fail("nobody was refused")
