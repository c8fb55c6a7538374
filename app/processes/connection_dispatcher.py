"""Accepts public connections and sends each to the worker that has the fewest open.

When workers share a listening socket, the kernel hands a connection to whichever worker wakes
first, and eight kept-alive connections can all land on one worker. Here the supervisor accepts and
passes the open socket to a worker over a Unix socket; the worker then talks to the client directly.
This costs a little per connection and nothing per request.

The supervisor keeps its copy of a socket until the worker has confirmed it. If the worker dies
first, the connection goes to another worker. A connection that no worker may take (all are at
their limit) or can take (out of file descriptors) gets a 503 here and is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from ctypes import c_uint64
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray
from typing import Protocol

from app.system.background import LOG_EVERY_S
from app.telemetry.incidents import Refusal

BACKLOG = 2048
PAUSE_S = 0.1
ACCEPTED, REJECTED = b"t", b"n"
ACCEPT_BATCH = 64  # connections per turn of the event loop, so that the admin port is not starved
LINGER_S = 2.0  # how long a refused client may take to read the answer
MAX_LINGERING = 128
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
log = logging.getLogger("scumble")


class Counter(Protocol):
    """A metric that only goes up."""

    def inc(self) -> None:
        """Add one."""
        ...


@dataclass(frozen=True)
class WorkerChannel:
    """The worker's end: receives connections and counts those that have closed.

    Attributes:
        sock: Unix socket; reaches its end when the supervisor sends no more connections.
        closed: one counter per worker, in memory shared with the supervisor.
        number: index of this worker's counter.
    """

    sock: socket.socket
    closed: object
    number: int

    def receive(self) -> list[socket.socket] | None:
        """Return the connections that have arrived, or None when no more will come.

        Raises:
            BlockingIOError: nothing has arrived yet.
        """
        data, fds, _, _ = socket.recv_fds(self.sock, 1, 1)
        if not data:
            return None
        with contextlib.suppress(OSError):  # the supervisor has ended and keeps no copy
            # Without a free descriptor, the kernel delivers the byte alone.
            self.sock.send(ACCEPTED if fds else REJECTED)
        return [socket.socket(fileno=fd) for fd in fds]

    def count_closed(self) -> None:
        """Count a connection of this worker as closed."""
        self.closed[self.number] += 1  # type: ignore[index]  # ctypes has no type for its arrays


@dataclass(eq=False)
class _WorkerSlot:
    sock: socket.socket
    sent: int = 0  # open connections: this minus the worker's counter of closed ones
    unconfirmed: deque[socket.socket] = field(default_factory=deque)

    def read_confirmations(self, refuse: Callable[[socket.socket], None]) -> bool:
        """Close the copies of confirmed connections; return False at the end of the stream.

        Args:
            refuse: called with each connection that the worker rejected.
        """
        try:
            replies = self.sock.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for reply in replies:
            connection = self.unconfirmed.popleft()
            if reply == ACCEPTED[0]:
                connection.close()
            else:
                self.sent -= 1
                refuse(connection)
        return bool(replies)


class Refusals:
    """Answers refused connections and keeps each open until the client has read the answer.

    Closing at once, with a request unread, would send a reset that may overtake the answer.

    Args:
        answer: complete HTTP response; empty where this process cannot speak to the client (TLS).
    """

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._waiting: dict[socket.socket, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __call__(self, connection: socket.socket) -> None:
        """Refuse a connection."""
        loop = asyncio.get_running_loop()
        try:
            connection.setblocking(False)
            if not self._answer or len(self) >= MAX_LINGERING:
                raise BlockingIOError
            connection.send(self._answer)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()
            return
        self._waiting[connection] = loop.call_later(LINGER_S, self._end, connection)
        loop.add_reader(connection.fileno(), self._read, connection)

    def close(self) -> None:
        """Close all connections that are still open."""
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
    """Accepts connections on a bound socket while at least one worker is active.

    Args:
        listener: bound, not listening.
        workers: how many worker numbers exist.
        slow: whether a worker is slow to respond; it gets connections only if all workers are.
        max_connections: open connections per worker.
        max_held: connections that this process may hold until workers confirm them.
        refusals: counters of refused connections by reason: `limit`, `descriptors`, and `aborted`
            by the client.
        answer: response for refused connections; empty where the client would not understand it.
    """

    def __init__(
        self,
        listener: socket.socket,
        workers: int,
        slow: Callable[[int], bool] = lambda _: False,
        *,
        max_connections: int = sys.maxsize,
        max_held: int = sys.maxsize,
        refusals: Mapping[Refusal, Counter],
        answer: bytes = b"",
    ) -> None:
        self._max_connections = max_connections
        self._max_held = max_held
        self._refusals = refusals
        self._refused = Refusals(answer)
        self._unlogged = defaultdict[Refusal, int](int)
        self._listener = listener
        self._slow = slow
        self._closed = RawArray(c_uint64, workers)
        self._starting: dict[int, _WorkerSlot] = {}
        self._active: dict[int, _WorkerSlot] = {}
        self._retiring: dict[int, _WorkerSlot] = {}
        self._pending: deque[socket.socket] = deque()  # accepted, not sent to a worker yet
        self._listening = False

    def add(self, number: int) -> WorkerChannel:
        """Register a worker and return its end; it gets connections once it is active."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._starting[number] = _WorkerSlot(ours)
        return WorkerChannel(theirs, self._closed, number)

    def activate(self, number: int) -> None:
        """Send connections to the worker from now on."""
        slot = self._active[number] = self._starting.pop(number)
        slot.sent = self._closed[number]
        asyncio.get_running_loop().add_reader(slot.sock.fileno(), self._confirmed, slot)
        self._resume()

    def retire(self, number: int) -> None:
        """Send no more connections to the worker; it receives what is on its way and ends."""
        slot = self._starting.pop(number, None) or self._active.pop(number, None)
        if slot is not None:
            self._retiring[number] = slot
            slot.sock.shutdown(socket.SHUT_WR)
        if not self._active:
            self._stop_listening()

    def remove(self, number: int) -> None:
        """Forget a worker whose process has ended; others get what it did not confirm."""
        self.retire(number)
        slot = self._retiring.pop(number, None)
        if slot is None:
            return
        slot.read_confirmations(self._out_of_descriptors)
        asyncio.get_running_loop().remove_reader(slot.sock.fileno())
        slot.sock.close()
        self._pending += slot.unconfirmed
        if self._is_closed() and not self._active:
            while self._pending:
                self._pending.pop().close()
        self._resume()

    def close(self) -> None:
        """Dispatch what the kernel has accepted, then refuse connections and retire all workers."""
        if self._listening:
            while self._active and self._accept():
                pass
        self._stop_listening()
        self._listener.close()
        self._refused.close()
        for number in [*self._starting, *self._active]:
            self.retire(number)

    def open_connections(self) -> dict[int, int]:
        """Number of open connections by worker number."""
        return {
            number: slot.sent - self._closed[number] for number, slot in self._active.items()
        }  # fmt: skip

    def _confirmed(self, slot: _WorkerSlot) -> None:
        if not slot.read_confirmations(self._out_of_descriptors):
            asyncio.get_running_loop().remove_reader(slot.sock.fileno())

    def _is_closed(self) -> bool:
        return self._listener.fileno() < 0

    def _listen(self) -> None:
        if not self._listening and not self._is_closed():
            self._listener.setblocking(False)
            self._listener.listen(BACKLOG)
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept_batch)
            self._listening = True

    def _stop_listening(self) -> None:
        """Leave further connections in the kernel's queue."""
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listening = False

    def _pause(self) -> None:
        self._stop_listening()
        asyncio.get_running_loop().call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        while self._active and self._pending:
            if not self._dispatch(self._pending.popleft()):
                return
        if self._active:
            self._listen()

    def _accept_batch(self) -> None:
        for _ in range(ACCEPT_BATCH):
            held = len(self._refused) + sum(len(slot.unconfirmed) for slot in self._active.values())
            if held >= self._max_held:  # workers are busy; further connections wait in the kernel
                self._pause()
                return
            if not self._active or not self._accept():
                return

    def _out_of_descriptors(self, connection: socket.socket) -> None:
        self._refuse(connection, "descriptors")

    def _refuse(self, connection: socket.socket, reason: Refusal) -> None:
        self._refused(connection)
        self._count(reason)

    def _count(self, reason: Refusal) -> None:
        self._refusals[reason].inc()
        if not self._unlogged:  # the first is logged at once, the others as a sum: no log flooding
            asyncio.get_running_loop().call_later(LOG_EVERY_S, self._log_refused)
            log.warning("refusing connections", extra={"reason": reason})
        self._unlogged[reason] += 1

    def _log_refused(self) -> None:
        log.warning("connections were refused", extra={"by_reason": dict(self._unlogged)})
        self._unlogged.clear()

    def _accept(self) -> bool:
        """Accept and dispatch one connection; False if none waits or no worker can take it now."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno not in OUT_OF_RESOURCES:  # the client has already gone away
                self._count("aborted")
                return True
            self._count("descriptors")
            self._pause()  # the listener stays readable: without a pause the loop would spin
            return False
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._dispatch(connection)

    def _dispatch(self, connection: socket.socket) -> bool:
        """Send the connection to the least busy worker; False if no worker can take it now."""
        opened = self.open_connections()
        if opened and min(opened.values()) >= self._max_connections:
            self._refuse(connection, "limit")
            return True
        for number in sorted(opened, key=lambda n: (self._slow(n), opened[n])):
            if opened[number] >= self._max_connections:
                continue
            slot = self._active[number]
            # This fails if the worker has just died or does not read: try the next one.
            with contextlib.suppress(OSError):
                socket.send_fds(slot.sock, [b"c"], [connection.fileno()])
                slot.sent += 1
                slot.unconfirmed.append(connection)
                return True
        self._pending.append(connection)
        self._pause()
        return False
