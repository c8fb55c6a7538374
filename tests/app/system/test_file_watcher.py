"""Watched files are reloaded on change, and no failure ends the watching."""

import threading

import pytest
from prometheus_client import CollectorRegistry

from app.errors import ConfigError
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


class RecordingListener:
    """Remembers every call."""

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
        self.listener = RecordingListener()
        self.watcher = FileWatcher(
            failures=self.metrics.reload_failures,
            failing_s=self.metrics.reload_failing_s,
            allowed_s=60,
            listener=self.listener,
            clock=lambda: self.now,
        )
        self.watcher.add(self.file)

    async def turns(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1
            await self.watcher.check_all()

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
    assert caplog.text.count("API key reload failed; keeping the current keys") == 3
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
    assert watch.listener.all == [("keys", 0.0), ("keys", None)]


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
