"""Deals new connections to the workers, each to the one that has the fewest open.

Workers that share a listening socket take from it whoever wakes first: of eight kept-alive
connections all can land on one worker while the other idles. Here the supervisor accepts, and sends
the open socket over a Unix socket to its worker, which then talks to the client alone. That costs
a little per connection, nothing per request, and evens out whatever clients do.

The supervisor keeps its copy of a socket until the worker has confirmed it: what was on its way to
a worker that died is dealt to another. What no worker may take, as each has its limit, or could
take, as it is out of file descriptors, is answered with 503 here and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping
from ctypes import c_uint64
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray
from typing import Protocol

from app.telemetry.incidents import Refusal

BACKLOG = 2048
PAUSE_S = 0.1
TAKEN, LEFT = b"t", b"n"
AT_ONCE = 64  # accepted in one turn of the loop, so that the admin port is not starved
LINGER_S = 2.0  # for a client that was refused to read why
LINGERING = 128  # of these at once
LOG_S = 10.0  # between two lines about connections that were refused
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
log = logging.getLogger("scumble")


class Counts(Protocol):
    """A counter."""

    def inc(self) -> None:
        """One more."""
        ...


@dataclass(frozen=True)
class WorkerChannel:
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
            # Without a free descriptor the kernel gives the byte alone.
            self.channel.send(TAKEN if fds else LEFT)
        return [socket.socket(fileno=fd) for fd in fds]

    def count_closed(self) -> None:
        """One of its connections has ended."""
        self.closed[self.number] += 1  # type: ignore[index]  # ctypes has no type for its arrays


@dataclass(eq=False)
class _WorkerSlot:
    channel: socket.socket
    dealt: int = 0  # minus what it has closed: open connections
    unconfirmed: deque[socket.socket] = field(default_factory=deque)

    def confirm(self, refuse: Callable[[socket.socket], None]) -> bool:
        """Let go of what the worker has taken; False once it says no more.

        Args:
            refuse: gets what it could not take.
        """
        try:
            said = self.channel.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for word in said:
            connection = self.unconfirmed.popleft()
            if word == TAKEN[0]:
                connection.close()
            else:
                self.dealt -= 1
                refuse(connection)
        return bool(said)


class Refusals:
    """Tells clients that no worker takes their connections, and lets them read it.

    To close at once, with a request unread, would be a reset, which may overtake the answer.

    Args:
        answer: all of it; nothing where only a worker could speak with the client, as under TLS.
    """

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._waiting: dict[socket.socket, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __call__(self, connection: socket.socket) -> None:
        """Refuse this one."""
        loop = asyncio.get_running_loop()
        try:
            connection.setblocking(False)
            if not self._answer or len(self) >= LINGERING:
                raise BlockingIOError
            connection.send(self._answer)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()
            return
        self._waiting[connection] = loop.call_later(LINGER_S, self._end, connection)
        loop.add_reader(connection.fileno(), self._read, connection)

    def close(self) -> None:
        """Wait no more."""
        for connection in list(self._waiting):
            self._end(connection)

    def _read(self, connection: socket.socket) -> None:
        try:
            if connection.recv(65536):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        self._waiting.pop(connection).cancel()
        asyncio.get_running_loop().remove_reader(connection.fileno())
        connection.close()


class ConnectionDispatcher:
    """Accepts on a bound socket once a worker is there.

    Args:
        listener: bound, not listening.
        workers: how many numbers there are.
        late: who gets connections only if all are.
        max_connections: that a worker may have.
        max_held: that this process may have until workers have taken them.
        refusals: counters of connections that no worker took, by reason: `limit`, `descriptors`,
            and `aborted` by the client.
        answer: for those; none where the client would not understand it.
    """

    def __init__(
        self,
        listener: socket.socket,
        workers: int,
        late: Callable[[int], bool] = lambda _: False,
        *,
        max_connections: int = sys.maxsize,
        max_held: int = sys.maxsize,
        refusals: Mapping[Refusal, Counts],
        answer: bytes = b"",
    ) -> None:
        self._max_connections = max_connections
        self._max_held = max_held
        self._refusals = refusals
        self._refused = Refusals(answer)
        self._unsaid: Counter[Refusal] = Counter()
        self._listener = listener
        self._late = late
        self._closed = RawArray(c_uint64, workers)
        self._coming: dict[int, _WorkerSlot] = {}
        self._slots: dict[int, _WorkerSlot] = {}
        self._leaving: dict[int, _WorkerSlot] = {}
        self._undealt: deque[socket.socket] = deque()
        self._listening = False

    def channel(self, number: int) -> WorkerChannel:
        """The side of a new worker; it gets connections once it is active."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._coming[number] = _WorkerSlot(ours)
        return WorkerChannel(theirs, self._closed, number)

    def activate(self, number: int) -> None:
        """The worker is ready."""
        slot = self._slots[number] = self._coming.pop(number)
        slot.dealt = self._closed[number]
        asyncio.get_running_loop().add_reader(slot.channel.fileno(), self._confirmed, slot)
        self._resume()

    def leave(self, number: int) -> None:
        """The worker shall get no more: it takes what is on its way and ends."""
        slot = self._coming.pop(number, None) or self._slots.pop(number, None)
        if slot is not None:
            self._leaving[number] = slot
            slot.channel.shutdown(socket.SHUT_WR)
        if not self._slots:
            self._pause()

    def gone(self, number: int) -> None:
        """The worker's process has ended: others get what it has not taken."""
        self.leave(number)
        slot = self._leaving.pop(number, None)
        if slot is None:
            return
        slot.confirm(self._out_of_descriptors)
        asyncio.get_running_loop().remove_reader(slot.channel.fileno())
        slot.channel.close()
        self._undealt += slot.unconfirmed
        if self._ended() and not self._slots:
            while self._undealt:
                self._undealt.pop().close()
        self._resume()

    def close(self) -> None:
        """Deal what the kernel has accepted already, then refuse connections, and tell workers."""
        if self._listening:
            while self._slots and self._accept():
                pass
        self._pause()
        self._listener.close()
        self._refused.close()
        for number in [*self._coming, *self._slots]:
            self.leave(number)

    def open_connections(self) -> dict[int, int]:
        """How many each worker has."""
        return {
            number: slot.dealt - self._closed[number] for number, slot in self._slots.items()
        }  # fmt: skip

    def _confirmed(self, slot: _WorkerSlot) -> None:
        if not slot.confirm(self._out_of_descriptors):
            asyncio.get_running_loop().remove_reader(slot.channel.fileno())

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
        while self._slots and self._undealt:
            if not self._deal(self._undealt.popleft()):
                return
        if self._slots:
            self._listen()

    def _some(self) -> None:
        for _ in range(AT_ONCE):
            held = len(self._refused) + sum(len(slot.unconfirmed) for slot in self._slots.values())
            if held >= self._max_held:  # workers are busy: the others wait in the kernel
                self._pause_for_a_while()
                return
            if not self._slots or not self._accept():
                return

    def _out_of_descriptors(self, connection: socket.socket) -> None:
        self._refuse(connection, "descriptors")

    def _refuse(self, connection: socket.socket, reason: Refusal) -> None:
        self._refused(connection)
        self._count(reason)

    def _count(self, reason: Refusal) -> None:
        self._refusals[reason].inc()
        if not self._unsaid:  # one line tells of all in a while: strangers do not fill the log
            asyncio.get_running_loop().call_later(LOG_S, self._say)
            log.warning("connections are refused", extra={"reason": reason})
        self._unsaid[reason] += 1

    def _say(self) -> None:
        log.warning("connections were refused", extra={"by_reason": dict(self._unsaid)})
        self._unsaid.clear()

    def _accept(self) -> bool:
        """Accept one connection and deal it; False if there is none, or nobody to take it."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno not in EXHAUSTED:  # the client is gone already
                self._count("aborted")
                return True
            self._count("descriptors")
            self._pause_for_a_while()  # or the loop would turn round and round this
            return False
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._deal(connection)

    def _deal(self, connection: socket.socket) -> bool:
        """Send it to the worker with the fewest; False if none takes anything now."""
        opened = self.open_connections()
        if opened and min(opened.values()) >= self._max_connections:
            self._refuse(connection, "limit")
            return True
        for number in sorted(opened, key=lambda n: (self._late(n), opened[n])):
            if opened[number] >= self._max_connections:
                continue
            slot = self._slots[number]
            # A worker that has just died, or reads nothing: the next one gets it.
            with contextlib.suppress(OSError):
                socket.send_fds(slot.channel, [b"c"], [connection.fileno()])
                slot.dealt += 1
                slot.unconfirmed.append(connection)
                return True
        self._undealt.append(connection)
        self._pause_for_a_while()
        return False
