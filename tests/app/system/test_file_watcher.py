"""Files that are read anew: seen means loaded, and no failure ends the watching."""

import threading

import pytest
from prometheus_client import CollectorRegistry

from app.errors import ConfigError
from app.processes.last_good import CHUNK, LastGoodFiles, Reporter
from app.system.file_watcher import Contents, FileWatcher, LastGood, WatchedFile
from app.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Disk:
    """A file that can be read or not, and what is made of it."""

    def __init__(self) -> None:
        self.content = b"1"
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.built: list[bytes] = []
        self.answers = threading.Event()
        self.answers.set()
        self.reads = 0

    def read(self) -> tuple[bytes, ...]:
        self.reads += 1
        self.answers.wait(30)
        if self.failure is not None:
            raise self.failure
        return (self.content,)

    def build(self, parts: tuple[bytes, ...]) -> bytes:
        self.built.append(parts[0])
        if self.refusal is not None:
            raise self.refusal
        return parts[0]


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.all: list[tuple] = []

    def loaded(self, name, contents):
        self.all.append((name, contents.parts[0]))

    def failing(self, name, since):
        self.all.append((name, since))


class Watch:
    """A watcher of one file, on a clock of its own."""

    def __init__(self, **options) -> None:
        self.now = 0.0
        self.disk = Disk()
        self.file = WatchedFile(
            "keys", self.disk.read, self.disk.build, clock=lambda: self.now, **options
        )
        self.metrics = Metrics(CollectorRegistry())
        self.heard = Heard()
        self.watcher = FileWatcher(
            failures=self.metrics.reload_failures,
            failing_s=self.metrics.reload_failing_s,
            allowed_s=60,
            listener=self.heard,
            clock=lambda: self.now,
        )
        self.watcher.add(self.file)

    async def turns(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1
            await self.watcher.turn()

    def sample(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(f"scumble_reload_{name}", {"file": "keys"})


FAILURES = {
    "unreadable": PermissionError(13, "Permission denied"),
    "out of descriptors": OSError(24, "Too many open files"),
    "gone": FileNotFoundError(2, "No such file"),
    "broken": ConfigError("not JSON"),
    "out of memory": MemoryError(),
    "not foreseen": TypeError("Integer exceeds 64-bit range"),
}


@pytest.mark.parametrize("which", FAILURES)
@pytest.mark.parametrize("where", ["failure", "refusal"])
async def test_what_failed_is_tried_again_until_it_is_loaded(which, where, caplog):
    watch = Watch()
    await watch.turns()
    watch.disk.content = b"2"
    setattr(watch.disk, where, FAILURES[which])
    await watch.turns(30)
    assert watch.file.value == b"1"
    assert watch.sample("failures_total") == 30
    assert watch.sample("failing_seconds") == 30
    assert caplog.text.count("the old API keys stay") == 3
    assert str(FAILURES[which]) in caplog.text
    setattr(watch.disk, where, None)
    await watch.turns(10)
    assert watch.file.value == b"2"
    assert watch.sample("failing_seconds") == 0


async def test_a_file_is_read_each_time_so_nothing_of_its_date_matters():
    watch = Watch()
    await watch.turns(3)
    assert watch.disk.built == [b"1"]
    watch.disk.content = b"2"
    await watch.turns(3)
    assert watch.disk.built == [b"1", b"2"]


async def test_what_cannot_be_used_is_built_more_and_more_rarely_and_a_change_at_once():
    watch = Watch()
    watch.disk.content, watch.disk.refusal = b"2", ConfigError("no such defense")
    await watch.turns(31)
    assert watch.disk.built.count(b"2") == 6  # after 1, 2, 4, 8, 10 s
    assert watch.sample("failures_total") == 31
    watch.disk.content = b"3"
    await watch.turns()
    assert watch.disk.built[-1] == b"3"


async def test_it_is_stale_after_the_time_that_the_settings_allow_and_then_well_again():
    watch = Watch()
    watch.disk.failure = OSError(24, "Too many open files")
    await watch.turns(60)
    assert watch.watcher.stale() == []
    await watch.turns(2)
    assert watch.watcher.stale() == ["keys"]
    watch.disk.failure = None
    await watch.turns()
    assert watch.watcher.stale() == []
    assert watch.heard.all == [("keys", 0.0), ("keys", None)]


async def test_a_read_that_never_returns_counts_as_failing_and_is_not_begun_twice():
    watch = Watch()
    watch.disk.answers.clear()
    await watch.turns(2)
    assert watch.sample("failing_seconds") == 2
    assert watch.disk.reads == 2  # one of them when it was opened
    watch.disk.content = b"2"
    watch.disk.answers.set()
    await watch.turns(2)
    assert watch.sample("failing_seconds") == 0
    assert watch.file.value == b"2"


async def test_while_the_file_is_broken_the_last_good_one_is_used():
    broken = Disk()
    broken.failure = ConfigError("not JSON")
    with pytest.raises(ConfigError, match="not JSON"):
        WatchedFile("keys", broken.read, broken.build)
    given = LastGood(Contents(1.0, (b"good",)), checked_at=5.0)
    file = WatchedFile("keys", broken.read, broken.build, last_good=given)
    assert (file.value, file.checked_at, file.failing) == (b"good", 5.0, True)


class Pipe:
    """Both ends of a supervisor's pipe, for one worker."""

    def __init__(self, files: LastGoodFiles, worker: int) -> None:
        self.files, self.worker, self.sizes = files, worker, []

    def send(self, message) -> None:
        self.sizes.append(len(getattr(message, "content", b"")))
        self.files.heard(self.worker, message)


@pytest.mark.parametrize("parts", [(b"",), (b"x" * 100_000, b"", b"y"), (b"a" * CHUNK, b"b")])
def test_the_supervisor_keeps_what_workers_loaded_whole_and_the_latest(parts):
    files = LastGoodFiles(clock=lambda: 9.0)
    pipes = [Pipe(files, number) for number in range(2)]
    Reporter(pipes[0]).loaded("keys", Contents(2.0, parts))
    assert files.given() == {"keys": LastGood(Contents(2.0, parts), 9.0)}
    assert max(pipes[0].sizes) <= CHUNK
    Reporter(pipes[1]).loaded("keys", Contents(1.0, (b"older",)))
    assert files.given()["keys"].contents.parts == parts
    Reporter(pipes[1]).loaded("keys", Contents(3.0, (b"newer",)))
    assert files.given()["keys"].contents.parts == (b"newer",)


def test_half_of_what_a_worker_loaded_is_dropped_with_it():
    files = LastGoodFiles(clock=lambda: 9.0)
    sent = []
    pipe = Pipe(files, 0)
    pipe.send = sent.append
    Reporter(pipe).loaded("keys", Contents(2.0, (b"x" * 20_000,)))
    files.heard(0, sent[0])
    files.gone(0)
    assert files.given() == {}
    for message in sent:
        files.heard(1, message)
    assert files.given()["keys"].contents.parts == (b"x" * 20_000,)


def test_a_successor_learns_since_when_its_file_fails():
    now = [100.0]
    files = LastGoodFiles(clock=lambda: now[0])
    first, second = (Reporter(Pipe(files, number)) for number in range(2))
    first.loaded("keys", Contents(1.0, (b"good",)))
    first.failing("keys", 40.0)
    assert files.stale(50) == ["keys"]
    assert files.stale(70) == []
    files.gone(0)
    assert files.given()["keys"].checked_at == 40.0
    assert files.stale(50) == []  # nobody says so any more
    first.failing("keys", None)
    second.failing("keys", None)
    assert files.given()["keys"].checked_at == 100.0
