"""Background work: it goes on, and the log says what it raised."""

import asyncio

import pytest

from app.system.background import Backoff, Throttle, repeat, start

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.parametrize(
    "failure", [ValueError("odd"), MemoryError(), RecursionError(), OSError(5)]
)
async def test_no_exception_ends_what_repeats_and_the_log_says_it_from_time_to_time(
    failure, caplog
):
    now, turns, slept = [0.0], [], []

    async def sleep(seconds):
        now[0] += seconds
        slept.append(seconds)
        if len(slept) > 25:
            raise asyncio.CancelledError

    async def turn():
        turns.append(now[0])
        raise failure

    with pytest.raises(asyncio.CancelledError):
        await repeat("the work", turn, 1.0, clock=lambda: now[0], sleep=sleep)
    assert len(turns) == 25
    assert caplog.text.count("the work failed, retrying") == 3
    assert type(failure).__name__ in caplog.text


async def test_what_runs_once_is_held_and_its_failure_logged(caplog):
    held = set()

    async def work():
        await asyncio.sleep(0)
        raise KeyError("gone")

    task = start("the work", work(), held)
    assert held == {task}
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert not held
    assert "the work failed" in caplog.text
    assert "KeyError" in caplog.text


def test_delays_double_up_to_a_cap_and_begin_again():
    backoff = Backoff(0.5, 3)
    assert [backoff() for _ in range(5)] == [0.5, 1, 2, 3, 3]
    backoff.reset()
    assert backoff() == 0.5


def test_a_throttle_lets_one_through_in_its_time():
    now = [0.0]
    due = Throttle(lambda: now[0], 10)
    passed = []
    for now[0] in (0, 1, 9.9, 10, 15, 20.5):
        passed.append(due())
    assert passed == [True, False, False, True, False, True]
