"""Messages from a worker to the supervisor.

They are bytes, not pickled objects, because a worker decodes images from anyone. The socket keeps
message boundaries (SOCK_SEQPACKET): a message arrives whole or not at all, so the supervisor never
waits for the rest of one from a worker that was stopped in the middle.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import asdict, dataclass
from typing import Literal

import orjson

from app.system.file_watcher import Contents, FileName

CHUNK = 8192  # bytes of a file per message
MAX_MESSAGE = 65536

State = Literal["ready", "not ready", "draining"]


@dataclass(frozen=True)
class Status:
    """The worker's own state."""

    state: State


@dataclass(frozen=True)
class Chunk:
    """A piece of a file that the worker has loaded.

    Attributes:
        name: which file.
        read_at: see `Contents`.
        sizes: bytes of each part.
        offset: of the piece in the concatenated parts.
        content: the piece.
    """

    name: FileName
    read_at: float
    sizes: tuple[int, ...]
    offset: int
    content: bytes


@dataclass(frozen=True)
class Failing:
    """The worker cannot load a file since that time; with None, it can again."""

    name: FileName
    since: float | None


Message = Status | Chunk | Failing
KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (Status, Chunk, Failing)}


def encode(message: Message) -> bytes:
    """A line of JSON, then the content of a chunk."""
    fields = asdict(message)
    content: bytes = fields.pop("content", b"")
    header: bytes = orjson.dumps([type(message).__name__, fields])
    return header + b"\n" + content


def decode(data: bytes) -> Message:
    """Reverse `encode`.

    Raises:
        ValueError: not a message.
    """
    header, _, content = data.partition(b"\n")
    try:
        kind, fields = orjson.loads(header)
        if kind == Chunk.__name__:
            fields |= {"content": content, "sizes": tuple(fields["sizes"])}
        return KINDS[kind](**fields)
    except (ValueError, TypeError, KeyError) as exc:
        raise ValueError(f"not a message of a worker: {header[:80]!r}") from exc


class Receiver:
    """The supervisor's end of the socket of one worker."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def fileno(self) -> int:
        """Descriptor to watch for reading."""
        return self._sock.fileno()

    def receive(self) -> Message | None:
        """Return the next message, or None at the end.

        Raises:
            BlockingIOError: nothing has arrived.
            ValueError: what has arrived is not a message.
        """
        try:
            data = self._sock.recv(MAX_MESSAGE)
        except ConnectionError:
            return None
        return decode(data) if data else None

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


class Sender:
    """The worker's end. It does nothing once the supervisor has ended."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def status(self, state: State) -> None:
        """Send the worker's state."""
        self._send(Status(state))

    def loaded(self, name: FileName, contents: Contents) -> None:
        """Send the contents of a file that was loaded."""
        sizes = tuple(map(len, contents.parts))
        whole = b"".join(contents.parts)
        for offset in range(0, max(1, len(whole)), CHUNK):
            piece = whole[offset : offset + CHUNK]
            self._send(Chunk(name, contents.read_at, sizes, offset, piece))

    def failing(self, name: FileName, since: float | None) -> None:
        """Send whether a file can be loaded."""
        self._send(Failing(name, since))

    def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(encode(message))


def message_pair() -> tuple[Receiver, socket.socket]:
    """The supervisor's end, and the socket for a worker's `Sender`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Receiver(ours), theirs
