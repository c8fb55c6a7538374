"""Deals new connections to the workers, each to the one that has the fewest open.

Workers that share a listening socket take from it whoever wakes first: of eight kept-alive
connections all can land on one worker while the other idles. Here the supervisor accepts, and sends
the open socket over a Unix socket to its worker, which then talks to the client alone. That costs
a little per connection, nothing per request, and evens out whatever clients do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from ctypes import c_uint64
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray

BACKLOG = 2048
PAUSE_S = 0.1
AT_ONCE = 64  # accepted in one turn of the loop, so that the admin port is not starved
log = logging.getLogger("scumble")


@dataclass(frozen=True)
class Hand:
    """A worker's side: where its connections come from, and where it counts those that ended.

    Attributes:
        channel: a Unix socket; it ends when no more will come.
        closed: one counter per worker, in memory that the supervisor sees.
        number: of this worker's counter.
    """

    channel: socket.socket
    closed: object
    number: int

    def take(self) -> list[socket.socket] | None:
        """The connections that have arrived, or None once no more will.

        Raises:
            BlockingIOError: there is nothing yet.
        """
        data, fds, _, _ = socket.recv_fds(self.channel, 1, 1)
        return [socket.socket(fileno=fd) for fd in fds] if data else None

    def count_closed(self) -> None:
        """One of its connections has ended."""
        self.closed[self.number] += 1  # type: ignore[index]  # ctypes has no type for its arrays


@dataclass
class _Seat:
    channel: socket.socket
    dealt: int = 0  # minus what it has closed: open connections


class Dealer:
    """Accepts on a bound socket once a worker is there.

    Args:
        listener: bound, not listening.
        workers: how many numbers there are.
        late: who gets connections only if all are.
    """

    def __init__(
        self, listener: socket.socket, workers: int, late: Callable[[int], bool] = lambda _: False
    ) -> None:
        self._listener = listener
        self._late = late
        self._closed = RawArray(c_uint64, workers)
        self._coming: dict[int, socket.socket] = {}
        self._seats: dict[int, _Seat] = {}
        self._listening = False

    def hand(self, number: int) -> Hand:
        """The side of a new worker; it gets connections once it is seated."""
        self.leave(number)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._coming[number] = ours
        return Hand(theirs, self._closed, number)

    def seat(self, number: int) -> None:
        """The worker is ready."""
        self._seats[number] = _Seat(self._coming.pop(number), self._closed[number])
        self._listen()

    def leave(self, number: int) -> None:
        """The worker is gone, or shall get no more and end."""
        for channel in (self._coming.pop(number, None), self._channel(number)):
            if channel is not None:
                channel.close()
        if not self._seats:
            self._pause()

    def close(self) -> None:
        """Deal what the kernel has accepted already, then refuse connections, and tell workers."""
        if self._listening:
            while self._seats and self._deal():
                pass
        self._pause()
        self._listener.close()
        for number in [*self._coming, *self._seats]:
            self.leave(number)

    def open_connections(self) -> dict[int, int]:
        """How many each worker has."""
        return {
            number: seat.dealt - self._closed[number] for number, seat in self._seats.items()
        }  # fmt: skip

    def _channel(self, number: int) -> socket.socket | None:
        seat = self._seats.pop(number, None)
        return None if seat is None else seat.channel

    def _listen(self) -> None:
        if not self._listening:
            self._listener.setblocking(False)
            self._listener.listen(BACKLOG)
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._some)
            self._listening = True

    def _pause(self) -> None:
        """Nobody is there: connections wait in the kernel."""
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listening = False

    def _resume(self) -> None:
        if self._seats:
            self._listen()

    def _some(self) -> None:
        for _ in range(AT_ONCE):
            if not self._seats or not self._deal():
                return

    def _deal(self) -> bool:
        """Accept one connection and send it on; False if there is none."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as exc:  # the client is gone already, or we are out of files
            log.warning("a connection could not be accepted: %s", exc)
            self._pause()  # or the loop would turn round and round this
            asyncio.get_running_loop().call_later(PAUSE_S, self._resume)
            return False
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened = self.open_connections()
            for number in sorted(opened, key=lambda n: (self._late(n), opened[n])):
                seat = self._seats[number]
                # A worker that has just died, or reads nothing: the next one gets it.
                with contextlib.suppress(OSError):
                    socket.send_fds(seat.channel, [b"c"], [connection.fileno()])
                    seat.dealt += 1
                    return True
        return True
