"""What is made when somebody first asks for it."""

import asyncio
import threading

import pytest

from app.errors import ConfigError
from app.late import Late

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

    late = Late(make)
    assert late.made is None
    waiting = [asyncio.create_task(late()) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert late.made is None
    waiting[0].cancel()  # whoever goes takes nothing from the others
    go.set()
    assert await waiting[1] is await waiting[2] is await late() is late.made is made
    assert len(made) == 1
    assert made[0] != threading.get_ident()
    assert waiting[0].cancelled()


async def test_what_it_raises_everybody_gets():
    calls = []

    def fail():
        calls.append(1)
        raise ConfigError("no such tensor")

    late = Late(fail)
    for _ in range(2):
        with pytest.raises(ConfigError, match="no such tensor"):
            await late()
    assert late.made is None
    assert len(calls) == 1
