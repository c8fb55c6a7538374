"""What breaks first follows from the costs, and the simulated requests from the seed."""

import random

import pytest

from loadtest import simulation
from loadtest.pages import read

COSTS = {
    "request_us": 700.0,  # so 1,000 requests a second at 70 %
    "redis_us": {"1": 50.0, "32": 10.0},
    "scrape_ms": {"1": 15.0, "8": 30.0, "64": 1500.0},
    "series": {"1": 1000, "8": 1000, "64": 1000},
    "dispatch_us": {"1": 100.0, "8": 100.0, "64": 200.0},
}


def drawn():
    return random.Random(0)  # noqa: S311  # nothing secret


def test_shares_are_those_of_the_costs():
    found = simulation.shares(COSTS, 64, 100)
    assert found == pytest.approx(
        {
            "dispatcher": 640 * 200e-6,  # 64,000 requests on 640 connections a second
            "scrape": 1.5 / 15,
            "Redis": 6_400_000 * 10e-6,
            "Prometheus": 1000 * 100 / 10_000_000,
        }
    )


def test_limits_are_workers_of_all_replicas():
    limits = simulation.limits(COSTS)
    # 1,000 charges a second and worker of 10 us each; 1,000 series for 64 workers.
    assert limits == {"dispatcher": None, "scrape": None, "Redis": 100, "Prometheus": 640_000}


def test_the_first_to_break_is_the_one_with_the_largest_share_above_one():
    first = {(row["workers"], row["replicas"]): row["first"] for row in simulation.rows(COSTS)}
    assert first[1, 10] is None
    assert first[8, 100] == first[64, 10] == "Redis"


def test_connections_are_all_given_out():
    draw = drawn()
    for spread in (simulation.least, simulation.hashed):
        counts = spread(100, 8, draw)
        assert (len(counts), sum(counts)) == (8, 100)
    assert max(simulation.least(100, 8, draw)) == 13


def test_a_worker_alone_with_one_connection_never_waits():
    found = simulation.waits(1, [0.5], 1.0, 20, drawn())
    assert found == pytest.approx([0.5] * 20)


def test_a_seed_gives_the_same_figures_and_hashing_is_worse():
    times = [1.0, 2.0]
    runs = [simulation.balance(simulation.hashed, 8, times, 1, 300) for _ in range(2)]
    assert runs[0] == runs[1]
    even = simulation.balance(simulation.least, 8, times, 1, 300)
    assert even["most_over_mean"] == 1
    assert even["p99_over_service"] < runs[0]["p99_over_service"]


def test_the_committed_rows_follow_from_the_committed_costs():
    document = read("simulation.json")
    assert document["rows"] == list(simulation.rows(document["costs"]))
    assert document["limits"] == simulation.limits(document["costs"])
