"""Floods that try to exhaust a server, on raw sockets; `loadtest.chaos` runs them in turn.

Each returns its connections, and the server must close all of them by itself.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

CLOSED_S = 20.0  # by when the server must have closed a connection
Connect = Callable[[], socket.socket]

POST = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
KEY = b"X-API-Key: honest\r\n"


def send(connect: Connect, *pieces: bytes) -> Iterator[socket.socket]:
    """Send as much as the server accepts on one connection."""
    with suppress(OSError):
        connection = connect()
        yield connection
        with suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)


def headers(connect: Connect) -> Iterator[socket.socket]:
    """8 MB of headers."""
    yield from send(connect, POST, *[b"X-A: b\r\n" * 100_000] * 10)


def trailers(connect: Connect) -> Iterator[socket.socket]:
    """8 MB of trailers, after a 401."""
    yield from send(
        connect, POST, b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *[b"X-A: b\r\n" * 100_000] * 10
    )


def declared(connect: Connect) -> Iterator[socket.socket]:
    """Declared bodies of 5 MiB that are never sent."""
    for _ in range(40):
        yield from send(connect, POST, KEY, b"Content-Length: 5242880\r\n\r\n")


def unfinished(connect: Connect) -> Iterator[socket.socket]:
    """Bodies without their last byte, together more than the server stores."""
    for _ in range(10):
        yield from send(connect, POST, KEY, b"Content-Length: 4000000\r\n\r\n", bytes(3_999_999))


def ahead(connect: Connect) -> Iterator[socket.socket]:
    """Endless pipelined requests whose answers are not read."""
    for _ in range(20):
        yield from send(connect, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)


def leavers(connect: Connect) -> Iterator[socket.socket]:
    """Large bodies from clients that disconnect before the answer."""
    for _ in range(10):
        for connection in send(connect, POST, KEY, b"Content-Length: 300000\r\n\r\n"):
            yield connection
        with suppress(OSError):
            connection.sendall(bytes(300_000))
            connection.shutdown(socket.SHUT_RDWR)


def crowd(connect: Connect) -> Iterator[socket.socket]:
    """More connections than the server accepts, without any data."""
    for _ in range(200):
        yield from send(connect)


FLOODS: list[Callable[[Connect], Iterator[socket.socket]]] = [
    headers, trailers, declared, unfinished, ahead, leavers, crowd,
]  # fmt: skip


def left_open(flood: Callable[[Connect], Iterator[socket.socket]], connect: Connect) -> int:
    """Run one flood; returns how many connections the server did not close."""
    found = 0
    with ExitStack() as stack:
        for connection in [stack.enter_context(each) for each in flood(connect)]:
            connection.settimeout(CLOSED_S)
            try:
                while connection.recv(65536):
                    pass
            except TimeoutError:
                found += 1
            except OSError:
                continue
    return found
