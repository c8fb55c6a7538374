"""Work beside the event loop: in turns, bounded, and only while somebody waits for it."""

import asyncio
import math
import threading
import time
from functools import partial

import pytest

from app.errors import ClientGone, TooLate, Unavailable
from app.inference.deadline import NO_DEADLINE, Deadline
from app.inference.executor import BoundedExecutor
from app.request_context import ALWAYS_CONNECTED, ClientConnection

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def executor():
    made = BoundedExecutor(max_tasks=4, max_bytes=100)
    yield made
    made.close()


class Gate:
    """A task that runs until it is opened."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.entered.set()
        assert self.opened.wait(30)
        return "through"

    async def reached(self):
        assert await asyncio.to_thread(self.entered.wait, 30)


async def test_tasks_run_in_order_on_one_thread_beside_the_loop(executor):
    found = await executor([threading.get_ident] * 3, 0, NO_DEADLINE)
    assert len(set(found)) == 1
    assert threading.get_ident() not in found
    assert await executor([partial(pow, 2, n) for n in range(4)], 0, NO_DEADLINE) == [1, 2, 4, 8]


async def test_requests_take_turns(executor):
    gate, order = Gate(), []
    first = asyncio.create_task(executor([gate], 0, NO_DEADLINE))
    await gate.reached()
    many = asyncio.create_task(executor([partial(order.append, "many")] * 2, 0, NO_DEADLINE))
    one = asyncio.create_task(executor([partial(order.append, "one")], 0, NO_DEADLINE))
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(first, many, one)
    assert order == ["many", "one", "many"]


@pytest.mark.parametrize(
    ("tasks", "size", "message"),
    [
        (4, 1, "1 images or bodies are waiting.*allowed: 4"),
        (1, 41, "60 bytes are waiting.*allowed: 100"),
    ],
)
async def test_what_is_over_a_bound_is_refused_and_takes_no_room(executor, tasks, size, message):
    gate = Gate()
    first = asyncio.create_task(executor([gate], 60, NO_DEADLINE))
    await gate.reached()
    with pytest.raises(Unavailable, match=message):
        await executor([int] * tasks, size, NO_DEADLINE)
    second = asyncio.create_task(executor([int] * 3, 40, NO_DEADLINE))
    gate.opened.set()
    assert await first == ["through"]
    assert await second == [0, 0, 0]
    assert await executor([int] * 4, 100, NO_DEADLINE) == [0] * 4


async def test_what_is_alone_is_never_refused(executor):
    assert await executor([int] * 5, 101, NO_DEADLINE) == [0] * 5


async def test_room_is_given_back_by_a_task_that_fails(executor):
    for _ in range(10):
        with pytest.raises(ZeroDivisionError):
            await executor([partial(divmod, 1, 0)] * 4, 100, NO_DEADLINE)
    assert await executor([int] * 4, 100, NO_DEADLINE) == [0] * 4


@pytest.mark.parametrize(
    ("deadline", "error"),
    [
        (Deadline(0.0, ALWAYS_CONNECTED), TooLate),
        (Deadline(math.inf, ClientConnection(gone=True)), ClientGone),
    ],
)
async def test_nothing_runs_that_nobody_waits_for(executor, deadline, error):
    ran = []
    with pytest.raises(error):
        await executor([partial(ran.append, 1)] * 3, 0, deadline)
    assert ran == []


async def test_a_client_that_goes_stops_what_has_not_begun(executor):
    line, ran = ClientConnection(), []

    def task():
        ran.append(1)
        line.gone = len(ran) == 2

    with pytest.raises(ClientGone):
        await executor([task] * 4, 0, Deadline(math.inf, line))
    assert len(ran) == 2


async def test_a_deadline_is_answered_while_a_task_runs_and_stops_the_others():
    executor = BoundedExecutor(max_tasks=4, max_bytes=100)
    gate, ran = Gate(), []
    deadline = time.perf_counter() + 0.05
    with pytest.raises(TooLate):
        await executor([gate, partial(ran.append, 1)], 0, Deadline(deadline, ALWAYS_CONNECTED))
    assert not gate.opened.is_set()
    gate.opened.set()
    assert await executor([int] * 4, 100, NO_DEADLINE) == [0] * 4
    assert ran == []
    executor.close()


async def test_a_deadline_that_passes_in_the_queue_is_answered_and_its_tasks_never_run(executor):
    gate, ran = Gate(), []
    first = asyncio.create_task(executor([gate], 0, NO_DEADLINE))
    await gate.reached()
    deadline = time.perf_counter() + 0.05
    with pytest.raises(TooLate):
        await executor([partial(ran.append, 1)], 0, Deadline(deadline, ALWAYS_CONNECTED))
    gate.opened.set()
    await first
    assert await executor([int], 0, NO_DEADLINE) == [0]
    assert ran == []


async def test_the_time_that_counts_as_running_is_that_of_one_task():
    now = 0.0
    executor = BoundedExecutor(max_tasks=4, max_bytes=100, clock=lambda: now)

    def task():
        nonlocal now
        begun = executor.running_s
        now += 60
        return begun, executor.running_s

    assert executor.running_s == 0
    assert await executor([task] * 4, 0, NO_DEADLINE) == [(0, 60)] * 4
    assert executor.running_s == 0
    executor.close()


async def test_close_waits_for_the_running_task_and_cancels_the_others(executor):
    gate, ran = Gate(), []
    first = asyncio.create_task(executor([gate], 0, NO_DEADLINE))
    await gate.reached()
    second = asyncio.create_task(executor([partial(ran.append, 1)], 0, NO_DEADLINE))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(executor.close))
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not closing.done()
    gate.opened.set()
    assert await first == ["through"]
    await closing
    assert ran == []
