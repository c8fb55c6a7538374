"""Messages from workers arrive whole or not at all, and never as pickled objects."""

import pickle
import socket

import pytest

from app.processes.messages import (
    MAX_MESSAGE,
    Chunk,
    Failing,
    Sender,
    Status,
    decode,
    encode,
    message_pair,
)
from app.system.file_watcher import Contents

MESSAGES = [
    Status("ready"),
    Status("not ready"),
    Status("draining"),
    Failing("keys", 12.5),
    Failing("tls", None),
    Chunk("tls", 3.25, (4, 0), 0, b"a\nb\x00"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_decoding_reverses_encoding(message):
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"{}",
        b"[]",
        b'["Status"]',
        b'["Other", {}]',
        b'["Status", {}]',
        b'["Status", {"state": "ready", "more": 1}]',
        b'["Chunk", {"name": "keys"}]',
        b'[["Status"], {}]',
        b'["Chunk", 1]',
        pickle.dumps(Status("ready")),
    ],
    ids=repr,
)
def test_anything_else_is_refused(data):
    with pytest.raises(ValueError, match="not a message of a worker"):
        decode(data)


def test_receiving_never_waits():
    receiver, sock = message_pair()
    with sock:
        with pytest.raises(BlockingIOError):
            receiver.receive()
        Sender(sock).status("ready")
        Sender(sock).status("draining")
        assert receiver.receive() == Status("ready")
        assert receiver.receive() == Status("draining")
        with pytest.raises(BlockingIOError):
            receiver.receive()
    assert receiver.receive() is None
    receiver.close()


def test_the_socket_keeps_messages_apart_and_chunks_fit_into_one():
    receiver, sock = message_pair()
    with sock:
        assert sock.type == socket.SOCK_SEQPACKET
        Sender(sock).loaded("keys", Contents(1.0, (b"x" * 20_000,)))
        sizes = [len(encode(receiver.receive())) for _ in range(3)]
        assert max(sizes) < MAX_MESSAGE
    receiver.close()


def test_sending_to_a_supervisor_that_has_ended_does_nothing():
    receiver, sock = message_pair()
    receiver.close()
    with sock:
        Sender(sock).status("ready")
