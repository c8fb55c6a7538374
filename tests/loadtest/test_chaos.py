"""What `make chaos` calls a failure; the run itself takes minutes."""

import os

import pytest

from loadtest.chaos import WARM_S, Memory, Tally, verdict

WELL = {"wrong": [], "lost": 0, "over_served": 0, "growth": {"7": 0.1}, "exit_code": 0}


def test_all_is_well():
    assert verdict(WELL) == []


@pytest.mark.parametrize(
    "change",
    [
        {"wrong": ["status 500; allowed: [200]"]},
        {"lost": 1},
        {"over_served": 8},
        {"growth": {"7": 0.1, "8": 0.3}},
        {"growth": {}},
        {"exit_code": 1},
    ],
)
def test_what_must_not_be(change):
    assert len(verdict(WELL | change)) == 1


def test_a_status_that_is_not_allowed_is_noted():
    tally = Tally()
    tally.note(200, {200, 503}, images=8)
    tally.note(500, {200, 503})
    assert (tally.stolen, len(tally.wrong)) == (8, 1)


def test_memory_counts_from_when_a_worker_is_warm():
    now = [0.0]
    memory = Memory(lambda: now[0])
    memory.look([os.getpid(), 2**30])
    assert memory.growth == {}
    now[0] = WARM_S + 1
    memory.look([os.getpid()])
    assert abs(memory.growth[os.getpid()]) < 0.5
