"""What is made when somebody first asks for it."""

import asyncio
import threading

import pytest

from app.errors import ConfigError
from app.system.async_lazy import AsyncLazy

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def test_it_is_made_once_off_the_loop_and_nobody_waits_for_nothing():
    go, made = threading.Event(), []

    def make():
        go.wait(10)
        made.append(threading.get_ident())
        return made

    lazy = AsyncLazy(make)
    assert lazy.made is None
    waiting = [asyncio.create_task(lazy()) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert lazy.made is None
    waiting[0].cancel()  # cancelling one waiter does not affect the others
    go.set()
    assert await waiting[1] is await waiting[2] is await lazy() is lazy.made is made
    assert len(made) == 1
    assert made[0] != threading.get_ident()
    assert waiting[0].cancelled()


@pytest.mark.parametrize("failure", [ConfigError("no such tensor"), MemoryError("no memory")])
async def test_what_it_raises_everybody_gets_for_a_while_and_then_it_is_tried_again(
    failure, caplog
):
    now, calls, failures = [0.0], [], [failure, failure]

    def make():
        calls.append(1)
        if failures:
            raise failures.pop()
        return "made"

    lazy = AsyncLazy(make, retry_s=10, clock=lambda: now[0])
    for now[0], made in ((0, 1), (9.9, 1), (10, 2), (19, 2)):
        with pytest.raises(type(failure), match=str(failure)):
            await lazy()
        assert len(calls) == made
        assert lazy.made is None
    assert caplog.text.count(str(failure)) == 2
    now[0] = 20.0
    assert await lazy() == lazy.made == "made"
    now[0] = 100.0
    assert await lazy() == "made"
    assert len(calls) == 3
