"""Deals new connections to the workers, each to the one that has the fewest open.

Workers that share a listening socket take from it whoever wakes first: of eight kept-alive
connections all can land on one worker while the other idles. Here the supervisor accepts, and sends
the open socket over a Unix socket to its worker, which then talks to the client alone. That costs
a little per connection, nothing per request, and evens out whatever clients do.

The supervisor keeps its copy of a socket until the worker has confirmed it: what was on its way to
a worker that died is dealt to another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable
from ctypes import c_uint64
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray

BACKLOG = 2048
PAUSE_S = 0.1
TAKEN = b"t"
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
        if not data:
            return None
        with contextlib.suppress(OSError):  # the supervisor is gone: nobody keeps a copy
            self.channel.send(TAKEN)
        return [socket.socket(fileno=fd) for fd in fds]

    def count_closed(self) -> None:
        """One of its connections has ended."""
        self.closed[self.number] += 1  # type: ignore[index]  # ctypes has no type for its arrays


@dataclass(eq=False)
class _Seat:
    channel: socket.socket
    dealt: int = 0  # minus what it has closed: open connections
    unconfirmed: deque[socket.socket] = field(default_factory=deque)

    def confirm(self) -> bool:
        """Let go of what the worker has taken; False once it says no more."""
        try:
            said = self.channel.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for _ in said:
            self.unconfirmed.popleft().close()
        return bool(said)


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
        self._coming: dict[int, _Seat] = {}
        self._seats: dict[int, _Seat] = {}
        self._leaving: dict[int, _Seat] = {}
        self._undealt: deque[socket.socket] = deque()
        self._listening = False

    def hand(self, number: int) -> Hand:
        """The side of a new worker; it gets connections once it is seated."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._coming[number] = _Seat(ours)
        return Hand(theirs, self._closed, number)

    def seat(self, number: int) -> None:
        """The worker is ready."""
        seat = self._seats[number] = self._coming.pop(number)
        seat.dealt = self._closed[number]
        asyncio.get_running_loop().add_reader(seat.channel.fileno(), self._confirmed, seat)
        self._resume()

    def leave(self, number: int) -> None:
        """The worker shall get no more: it takes what is on its way and ends."""
        seat = self._coming.pop(number, None) or self._seats.pop(number, None)
        if seat is not None:
            self._leaving[number] = seat
            seat.channel.shutdown(socket.SHUT_WR)
        if not self._seats:
            self._pause()

    def gone(self, number: int) -> None:
        """The worker's process has ended: others get what it has not taken."""
        self.leave(number)
        seat = self._leaving.pop(number, None)
        if seat is None:
            return
        seat.confirm()
        asyncio.get_running_loop().remove_reader(seat.channel.fileno())
        seat.channel.close()
        self._undealt += seat.unconfirmed
        if self._ended() and not self._seats:
            while self._undealt:
                self._undealt.pop().close()
        self._resume()

    def close(self) -> None:
        """Deal what the kernel has accepted already, then refuse connections, and tell workers."""
        if self._listening:
            while self._seats and self._accept():
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

    def _confirmed(self, seat: _Seat) -> None:
        if not seat.confirm():
            asyncio.get_running_loop().remove_reader(seat.channel.fileno())

    def _ended(self) -> bool:
        return self._listener.fileno() < 0

    def _listen(self) -> None:
        if not self._listening and not self._ended():
            self._listener.setblocking(False)
            self._listener.listen(BACKLOG)
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._some)
            self._listening = True

    def _pause(self) -> None:
        """Nobody is there: connections wait in the kernel."""
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listening = False

    def _pause_for_a_while(self) -> None:
        self._pause()
        asyncio.get_running_loop().call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        while self._seats and self._undealt:
            if not self._deal(self._undealt.popleft()):
                return
        if self._seats:
            self._listen()

    def _some(self) -> None:
        for _ in range(AT_ONCE):
            if not self._seats or not self._accept():
                return

    def _accept(self) -> bool:
        """Accept one connection and deal it; False if there is none, or nobody to take it."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as exc:  # the client is gone already, or we are out of files
            log.warning("a connection could not be accepted: %s", exc)
            self._pause_for_a_while()  # or the loop would turn round and round this
            return False
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._deal(connection)

    def _deal(self, connection: socket.socket) -> bool:
        """Send it to the worker with the fewest; False if none takes anything now."""
        opened = self.open_connections()
        for number in sorted(opened, key=lambda n: (self._late(n), opened[n])):
            seat = self._seats[number]
            # A worker that has just died, or reads nothing: the next one gets it.
            with contextlib.suppress(OSError):
                socket.send_fds(seat.channel, [b"c"], [connection.fileno()])
                seat.dealt += 1
                seat.unconfirmed.append(connection)
                return True
        self._undealt.append(connection)
        self._pause_for_a_while()
        return False
