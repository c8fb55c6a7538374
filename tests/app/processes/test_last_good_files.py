"""The supervisor keeps the last good files, and new workers learn since when they fail."""

import pytest

from app.processes.last_good_files import LastGoodFiles
from app.processes.messages import CHUNK, Chunk, Sender, message_pair
from app.system.file_watcher import Contents, LastGood


class Link:
    """Both ends of the message socket of one worker."""

    def __init__(self, files: LastGoodFiles, worker: int) -> None:
        self.files, self.worker, self.sizes = files, worker, []
        self.receiver, self.sock = message_pair()
        self.sender = Sender(self.sock)

    def loaded(self, contents: Contents) -> None:
        self.sender.loaded("keys", contents)
        self.deliver()

    def failing(self, since: float | None) -> None:
        self.sender.failing("keys", since)
        self.deliver()

    def deliver(self, limit: int = 1000) -> None:
        for _ in range(limit):
            try:
                message = self.receiver.receive()
            except BlockingIOError:
                return
            if isinstance(message, Chunk):
                self.sizes.append(len(message.content))
            self.files.update(self.worker, message)


@pytest.fixture
def link():
    made = []

    def make(files: LastGoodFiles, worker: int) -> Link:
        made.append(Link(files, worker))
        return made[-1]

    yield make
    for each in made:
        each.receiver.close()
        each.sock.close()


@pytest.mark.parametrize("parts", [(b"",), (b"x" * 100_000, b"", b"y"), (b"a" * CHUNK, b"b")])
def test_the_latest_complete_contents_are_kept(link, parts):
    files = LastGoodFiles(clock=lambda: 9.0)
    first, second = link(files, 0), link(files, 1)
    first.loaded(Contents(2.0, parts))
    assert files.current() == {"keys": LastGood(Contents(2.0, parts), 9.0)}
    assert max(first.sizes) <= CHUNK
    second.loaded(Contents(1.0, (b"older",)))
    assert files.current()["keys"].contents.parts == parts
    second.loaded(Contents(3.0, (b"newer",)))
    assert files.current()["keys"].contents.parts == (b"newer",)


def test_incomplete_contents_are_dropped_with_their_worker(link):
    files = LastGoodFiles(clock=lambda: 9.0)
    first, second = link(files, 0), link(files, 1)
    contents = Contents(2.0, (b"x" * 20_000,))
    first.sender.loaded("keys", contents)
    first.deliver(limit=1)
    files.remove(0)
    assert files.current() == {}
    second.loaded(contents)
    assert files.current()["keys"].contents == contents


def test_a_new_worker_learns_since_when_a_file_fails(link):
    now = [100.0]
    files = LastGoodFiles(clock=lambda: now[0])
    first, second = link(files, 0), link(files, 1)
    first.loaded(Contents(1.0, (b"good",)))
    first.failing(40.0)
    assert files.stale(50) == ["keys"]
    assert files.stale(70) == []
    files.remove(0)
    assert files.current()["keys"].checked_at == 40.0
    assert files.stale(50) == []  # no running worker reports it
    first.failing(None)
    second.failing(None)
    assert files.current()["keys"].checked_at == 100.0
