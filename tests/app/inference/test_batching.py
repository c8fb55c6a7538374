"""The micro-batcher: who shares a batch, what waits, what is refused, what fails alone."""

import asyncio
import math
import threading
import time

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from app.errors import ClientGone, TooLate, Unavailable
from app.inference.adaptive_batch_limit import AdaptiveBatchLimit
from app.inference.batching import Batcher
from app.inference.deadline import Deadline
from app.inference.engines import FAST, size_within
from app.inference.pipeline import Pipeline
from app.request_context import ALWAYS_CONNECTED, ClientConnection
from app.telemetry.metrics import Metrics
from scumble.defenses import make

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Echo:
    """An engine whose answer is the image's first two values; it remembers its batches."""

    def __init__(self, seconds=0.0, fail=False):
        self.batches = []
        self.threads = set()
        self.seconds = seconds
        self.fail = fail

    def __call__(self, batch):
        self.batches.append(len(batch))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        if self.fail:
            raise RuntimeError("engine broke")
        first = batch[:, 0, 0, :1].astype(np.float32) / 255
        return np.concatenate([first, 1 - first], axis=1)


class Gate:
    """Lets an engine's thread go on when the test says so."""

    def __init__(self, engine):
        self.engine = engine
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, batch):
        self.begun.set()
        assert self.open.wait(30)
        return self.engine(batch)


def images(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


def make_batcher(engine, **options) -> Batcher:
    metrics = Metrics(CollectorRegistry())
    defaults = {"max_size": 8, "max_queue": 100}
    return Batcher(Pipeline(engine, make("none")), metrics, **{**defaults, **options})


@pytest.fixture(params=[True, False], ids=["inline", "thread"])
def inline(request):
    return request.param


async def test_each_request_gets_its_own_rows(inline):
    batcher = make_batcher(Echo(), inline=inline)
    served = await asyncio.gather(*(batcher(images(n, n + 1)) for n in range(0, 60, 2)))
    batcher.close()
    for n, answer in zip(range(0, 60, 2), served, strict=True):
        np.testing.assert_allclose(answer.probabilities[:, 0] * 255, [n, n + 1], rtol=1e-5)


async def test_what_arrives_in_one_turn_shares_a_batch(inline):
    engine = Echo()
    batcher = make_batcher(engine, inline=inline)
    await asyncio.gather(*(batcher(images(n)) for n in range(8)))
    batcher.close()
    assert engine.batches == [8]


async def test_a_batch_holds_at_most_max_size(inline):
    engine = Echo()
    batcher = make_batcher(engine, inline=inline, max_size=4)
    await asyncio.gather(*(batcher(images(n)) for n in range(10)))
    batcher.close()
    assert engine.batches == [4, 4, 2]


async def test_single_images_fill_sizes_that_the_engine_has(inline):
    engine = Echo()
    batcher = make_batcher(engine, inline=inline, max_size=32)
    served = await asyncio.gather(*(batcher(images(n)) for n in range(27)))
    batcher.close()
    assert engine.batches == [16, 8, 2, 1]
    assert [one.probabilities[0, 0] for one in served] == pytest.approx(np.arange(27) / 255)


async def test_a_request_is_never_split(inline):
    engine = Echo()
    batcher = make_batcher(engine, inline=inline, max_size=4)
    await asyncio.gather(*(batcher(images(1, 2, 3)) for _ in range(3)))
    await batcher(images(*range(6)))
    batcher.close()
    assert engine.batches == [3, 3, 3, 6]


async def test_nobody_waits_when_idle(inline):
    batcher = make_batcher(Echo(), inline=inline, max_wait_s=3600.0)
    await asyncio.wait_for(batcher(images(1)), 30)
    batcher.close()


async def test_a_busy_engine_gathers_the_next_batch():
    engine = Echo()
    gate = Gate(engine)
    batcher = make_batcher(gate, inline=False)
    first = asyncio.create_task(batcher(images(0)))
    await asyncio.to_thread(gate.begun.wait, 30)
    rest = [asyncio.create_task(batcher(images(n))) for n in range(5)]
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(first, *rest)
    batcher.close()
    assert engine.batches == [1, 4, 1]


async def test_max_wait_lets_a_following_batch_fill_up():
    engine = Echo()
    gate = Gate(engine)
    batcher = make_batcher(gate, inline=False, max_wait_s=1.0)
    first = asyncio.create_task(batcher(images(0)))
    await asyncio.to_thread(gate.begun.wait, 30)
    second = asyncio.create_task(batcher(images(1)))
    await asyncio.sleep(0)
    gate.open.set()
    await first
    third = asyncio.create_task(batcher(images(2)))
    await asyncio.gather(second, third)
    batcher.close()
    assert engine.batches == [1, 2]


@pytest.mark.parametrize(
    ("options", "arrivals", "batches"),
    [
        ({"max_size": 4}, [[1, 1, 1, 1]], [1, 4]),  # full before the wait would begin
        ({"max_size": 4}, [[1], [1, 1, 1]], [1, 4]),  # full while it waits
        ({"max_size": 4}, [[1], [3]], [1, 4]),  # by one request
        ({"max_size": 4}, [[3], [3]], [1, 3]),  # by one that does not fit any more
        ({"max_size": 8, "target_s": 4.0}, [[1], [1]], [1, 2]),  # as full as the target allows
    ],
)
async def test_a_full_batch_does_not_wait(options, arrivals, batches):
    """With a wait of an hour, what is answered at all has not waited."""
    clock, engine = Clock(), Echo()
    gate = Gate(engine)
    batcher = make_batcher(gate, inline=False, max_wait_s=3600.0, clock=clock, **options)
    first = asyncio.create_task(batcher(images(0)))
    await asyncio.to_thread(gate.begun.wait, 30)
    clock.now = 1.0  # a batch of one takes a second: with a target of 4 s, two may share one
    tasks = [asyncio.create_task(batcher(images(*range(n)))) for n in arrivals[0]]
    await asyncio.sleep(0)
    gate.open.set()
    await first
    for later in arrivals[1:]:
        await asyncio.sleep(0)  # the first batch has ended: the next one waits for these
        tasks += [asyncio.create_task(batcher(images(*range(n)))) for n in later]
    answered = tasks[: len(arrivals[0])]
    await asyncio.wait_for(asyncio.gather(*answered), 30)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    batcher.close()
    assert engine.batches == batches


async def test_a_full_queue_refuses_and_recovers(inline):
    batcher = make_batcher(Echo(), inline=inline, max_queue=4)
    outcomes = await asyncio.gather(*(batcher(images(n)) for n in range(6)), return_exceptions=True)
    refused = [o for o in outcomes if isinstance(o, Unavailable)]
    assert len(refused) == 2
    assert refused[0].headers == {"Retry-After": "1"}
    assert (await batcher(images(1))).probabilities.shape == (1, 2)
    batcher.close()


async def test_a_failing_engine_fails_the_batch_and_nothing_else(inline):
    engine = Echo(fail=True)
    batcher = make_batcher(engine, inline=inline)
    outcomes = await asyncio.gather(*(batcher(images(n)) for n in range(3)), return_exceptions=True)
    assert [str(o) for o in outcomes] == ["engine broke"] * 3
    engine.fail = False
    assert (await batcher(images(1))).probabilities.shape == (1, 2)
    batcher.close()


async def test_a_client_that_went_away_does_not_disturb_its_batch(inline):
    batcher = make_batcher(Echo(seconds=0.01), inline=inline)
    tasks = [asyncio.create_task(batcher(images(n))) for n in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    batcher.close()
    assert isinstance(outcomes[1], asyncio.CancelledError)
    assert outcomes[2].probabilities[0, 0] * 255 == pytest.approx(2)


@pytest.mark.parametrize("fail", [False, True])
async def test_what_fails_when_it_gets_its_result_leaves_no_other_without_one(inline, fail, caplog):
    class Broken:
        def done(self):
            return False

        def set_result(self, result):
            raise ValueError("a fault of the caller")

        set_exception = set_result

    batcher = make_batcher(Echo(fail=fail), inline=inline)
    batcher.submit(images(1), Broken(), ALWAYS_CONNECTED)
    (told,) = await asyncio.gather(batcher(images(2)), return_exceptions=True)
    assert isinstance(told, RuntimeError) == fail
    again = (await asyncio.gather(batcher(images(3)), return_exceptions=True))[0]
    assert isinstance(again, RuntimeError) == fail
    batcher.close()
    assert "a fault of the caller" in caplog.text


async def test_thread_and_loop(inline):
    engine = Echo()
    batcher = make_batcher(engine, inline=inline)
    await batcher(images(1))
    batcher.close()
    assert (threading.get_ident() in engine.threads) is inline


def test_sizes_are_those_that_images_fill():
    for n in range(1, 100):
        assert size_within(n) == max(size for size in FAST if size <= n)
    assert size_within(0) == 1


@pytest.mark.parametrize(
    ("target_s", "fixed", "each", "expected"),
    [
        (0.0, 0.001, 0.001, 64),  # no target
        (0.1, 0.001, 0.001, 49),  # 0.001 + 0.001 n <= 0.05
        (0.1, 0.0, 0.01, 5),
        (1.0, 0.001, 0.001, 64),  # at most the largest
        (0.001, 0.01, 0.001, 1),  # out of reach: one by one
    ],
)
def test_the_limit_follows_the_times_of_batches(target_s, fixed, each, expected):
    batch_limit = AdaptiveBatchLimit(target_s, 64)
    assert batch_limit() == 64  # nothing is known yet
    for n in (1, 4, 16, 64, 2, 8, 32):
        batch_limit.note(n, fixed + each * n)
    assert batch_limit() == expected


def test_the_limit_forgets_old_batches():
    batch_limit = AdaptiveBatchLimit(0.1, 64)
    for n in [1, 32] * 10:
        batch_limit.note(n, 0.01 * n)
    assert batch_limit() == 5
    for n in [1, 32] * 300:
        batch_limit.note(n, 0.001 * n)
    assert 45 <= batch_limit() <= 50


def test_batches_of_one_size_tell_what_they_can():
    batch_limit = AdaptiveBatchLimit(0.1, 64)
    for _ in range(50):
        batch_limit.note(10, 0.1)
    assert batch_limit() == 5


async def test_a_target_keeps_batches_small(inline):
    clock, engine = Clock(), Echo()

    def timed(batch):
        clock.now += 0.02 + 0.005 * len(batch)
        return engine(batch)

    free = make_batcher(timed, inline=inline, max_size=16, clock=clock)
    held = make_batcher(timed, inline=inline, max_size=16, target_s=0.1, clock=clock)
    for batcher in (free, held):
        for n in (1, 4, 8):  # what it learns from
            await batcher(images(*range(n)))
    engine.batches.clear()
    await asyncio.gather(*(held(images(n)) for n in range(16)))
    assert max(engine.batches) <= 6
    engine.batches.clear()
    await asyncio.gather(*(free(images(n)) for n in range(16)))
    assert engine.batches == [16]
    free.close()
    held.close()


async def test_clients_with_other_defenses_share_a_batch():
    engine = Echo()
    batcher = make_batcher(engine, max_size=8)
    label, half = make("label"), make("round", decimals=1)
    served = await asyncio.gather(
        batcher(images(51, 102)),
        batcher(images(60), label),
        batcher(images(60, 60), half),
        batcher(images(60)),
        batcher(images(9, 9)),
    )
    assert engine.batches == [8]
    rows = [one.probabilities for one in served]
    np.testing.assert_allclose(rows[0], [[0.2, 0.8], [0.4, 0.6]], atol=1e-6)
    np.testing.assert_array_equal(rows[1], [[0, 1]])
    np.testing.assert_allclose(rows[2], [[0.2, 0.8]] * 2, atol=1e-6)
    np.testing.assert_allclose(rows[3], [[60 / 255, 195 / 255]], atol=1e-6)


class Clock:
    """Time as the test says."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


async def test_a_deadline_that_passes_while_waiting_is_refused_before_inference(inline):
    clock, engine = Clock(), Echo()
    batcher = make_batcher(engine, inline=inline, clock=clock)
    late = asyncio.create_task(batcher(images(1), deadline=Deadline(5.0, ALWAYS_CONNECTED)))
    early = asyncio.create_task(batcher(images(2), deadline=Deadline(50.0, ALWAYS_CONNECTED)))
    asyncio.get_running_loop().call_soon(setattr, clock, "now", 5.0)  # before their turn
    with pytest.raises(TooLate):
        await late
    assert (await early).probabilities[0, 0] * 255 == pytest.approx(2)
    batcher.close()
    assert engine.batches == [1]


async def test_a_deadline_is_answered_while_a_long_batch_runs():
    engine = Echo()
    gate = Gate(engine)
    batcher = make_batcher(gate, inline=False)
    first = asyncio.create_task(batcher(images(0)))
    await asyncio.to_thread(gate.begun.wait, 30)
    with pytest.raises(TooLate):
        await batcher(images(1), deadline=Deadline(time.perf_counter() + 0.05, ALWAYS_CONNECTED))
    gate.open.set()
    await first
    await batcher(images(2))
    batcher.close()
    assert engine.batches == [1, 1]


async def test_what_has_begun_is_answered_after_its_deadline():
    batcher = make_batcher(Echo(seconds=0.05), inline=False)
    deadline = Deadline(time.perf_counter() + 0.01, ALWAYS_CONNECTED)
    assert (await batcher(images(1), deadline=deadline)).probabilities.shape == (1, 2)
    batcher.close()


async def test_all_parts_of_a_request_fall_to_its_deadline():
    engine = Echo(seconds=0.1)
    batcher = make_batcher(engine, inline=False)
    first = asyncio.create_task(batcher(images(0)))
    await asyncio.sleep(0.01)
    with pytest.raises(TooLate):
        await batcher.all(
            [images(1), images(2)], None, Deadline(time.perf_counter(), ALWAYS_CONNECTED)
        )
    await first
    batcher.close()
    assert engine.batches == [1]


async def test_a_client_that_hung_up_is_dropped_and_makes_room(inline):
    engine, line = Echo(), ClientConnection()
    batcher = make_batcher(engine, inline=inline, max_queue=2)
    deadline = Deadline(math.inf, line)
    waiting = [asyncio.create_task(batcher(images(n), deadline=deadline)) for n in range(2)]
    asyncio.get_running_loop().call_soon(setattr, line, "gone", True)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ClientGone] * 2
    assert (await batcher(images(1, 2))).probabilities.shape == (2, 2)
    batcher.close()
    assert engine.batches == [2]


async def test_who_has_gone_leaves_room_in_a_full_queue_while_a_batch_runs():
    go, now = threading.Event(), [0.0]

    class Stuck(Echo):
        def __call__(self, batch):
            go.wait()
            return super().__call__(batch)

    engine = Stuck()
    batcher = make_batcher(engine, max_queue=10, inline=False, clock=lambda: now[0])
    running = asyncio.create_task(batcher(images(0)))
    await asyncio.sleep(0.01)
    line = ClientConnection()
    leavers = [
        asyncio.create_task(batcher(images(n), None, Deadline(math.inf, line))) for n in range(10)
    ]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="10 images are waiting"):
        await batcher(images(1))
    line.gone, now[0] = True, 1.0
    waiting = asyncio.create_task(batcher(images(1, 2)))
    outcomes = await asyncio.gather(*leavers, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ClientGone] * 10
    go.set()
    assert len((await waiting).probabilities) == 2
    await running
    batcher.close()
    assert engine.batches == [1, 2]
