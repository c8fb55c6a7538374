"""The simulation keeps to its bounds, reaches them, and does what the real store does."""

import asyncio
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access.keys import KeyLimits
from app.access.quotas import client_buckets
from app.access.stores.redis import RedisStore
from loadtest import budgets
from loadtest.budgets import Leased, Load, Local, Shared, bounds, make_load, rows, simulate
from tests.redis_server import RedisServer, needs_redis

DOCUMENT = json.loads(budgets.OUT.read_text())


def load(clients: int, replicas: int, asked: list[tuple[int, int, int]], replaced: dict) -> Load:
    """Nobody is a thief."""
    columns = np.array(asked, np.int64).reshape(-1, 3).T
    return Load(clients, 0, replicas, *columns, replaced)


@st.composite
def loads(draw) -> tuple[Load, int]:
    """A few clients in a hurry, a few replicas, some of them replaced; and how many were."""
    clients, replicas = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    request = st.tuples(
        st.integers(0, clients - 1), st.integers(0, replicas - 1), st.integers(1, 12)
    )
    asked = draw(st.lists(request, max_size=150))
    moments = st.integers(0, max(0, len(asked) - 1))
    which = st.lists(st.integers(0, replicas - 1), min_size=1, max_size=3)
    replaced = draw(st.dictionaries(moments, which, max_size=4)) if asked else {}
    return load(clients, replicas, asked, replaced), sum(map(len, replaced.values()))


@given(loads(), st.integers(0, 60), st.integers(1, 20))
def test_no_strategy_passes_its_bound(given_load, budget, lease):
    asked, replaced = given_load
    size = (asked.clients, asked.replicas, budget)
    for name, strategy in {
        "shared": Shared(*size),
        "leases": Leased(*size, lease),
        "local": Local(*size),
    }.items():
        found = simulate(strategy, asked, budget)
        b = lease if name == "leases" else 0
        over, left = bounds(name, b, asked.replicas, replaced, budget)
        assert found.served.max() <= budget + over
        assert found.left.max() <= left


@given(loads(), st.integers(0, 60))
def test_leases_of_one_image_are_the_shared_store(given_load, budget):
    asked, _ = given_load
    size = (asked.clients, asked.replicas, budget)
    one, other = (simulate(s, asked, budget) for s in (Leased(*size, 1), Shared(*size)))
    assert (one.served == other.served).all()


def test_the_bounds_are_reached():
    """One client, three replicas; the second is replaced."""
    single = [(0, replica, 1) for replica in (0, 1, 2)]
    asked = load(1, 3, single + [(0, 1, 1)] + [(0, 0, 1)] * 10, {3: [1]})
    over, left = bounds("leases", 10, 3, 1, 40)
    assert left == 27
    assert simulate(Leased(1, 3, 40, 10), asked, 40).left[0] == left
    every = [(0, replica, 1) for replica in (0, 1, 2) for _ in range(40)]
    asked = load(1, 3, every + [(0, 1, 1)] * 40, {120: [1]})
    over, left = bounds("local", 0, 3, 1, 40)
    assert simulate(Local(1, 3, 40), asked, 40).served[0] == 40 + over == 160


def test_a_lease_counts_in_the_store_once_for_many_images():
    asked = load(1, 1, [(0, 0, 1)] * 20, {})
    found = simulate(Leased(1, 1, 20, 10), asked, 20)
    assert (found.answers, found.calls) == (20, 2)


def test_the_same_seed_gives_the_same_figures():
    def figures() -> list:
        return [asdict(row) for row in rows(300, 2, 20, (1, 3), seed=5)]

    assert figures() == figures()


def test_the_committed_figures_keep_to_the_bounds_and_show_the_error():
    assert {(row["replicas"], row["replaced"]) for row in DOCUMENT["rows"]} == {
        (count, replaced) for count in budgets.REPLICAS for replaced in (0, count)
    }
    for row in DOCUMENT["rows"]:
        case = (row["strategy"], row["lease"], row["replicas"], row["replaced"])
        assert (row["bound_over"], row["bound_left"]) == bounds(*case, DOCUMENT["budget"])
        assert row["worst_over"] <= row["bound_over"]
        assert row["worst_left"] <= row["bound_left"]
        if row["strategy"] == "local":
            assert row["worst_over"] == row["bound_over"]  # thieves get all there is to get
    assert DOCUMENT["clients"] == 10_000


@pytest.mark.server
@needs_redis
def test_the_shared_row_is_what_our_store_does(tmp_path):
    """Four replicas, each with connections of its own, answer each request as the simulation."""
    budget = 10
    asked = make_load(clients=300, thieves=2, replicas=4, budget=budget, replace=False, seed=1)
    server = RedisServer(tmp_path)

    class Real:
        """The simulation's interface on top of the store."""

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.loop = loop
            self.stores = [RedisStore.at(server.url) for _ in range(asked.replicas)]
            self.calls = 0

        def ask(self, replica: int, client: int, images: int) -> bool:
            self.calls += 1
            buckets = client_buckets(str(client), KeyLimits(total_images=budget))
            charge = self.stores[replica].charge(buckets, images)
            return self.loop.run_until_complete(charge).granted

        def replace(self, replica: int) -> None:
            raise AssertionError("nobody is replaced here")

    try:
        with asyncio.Runner() as runner:
            real = Real(runner.get_loop())
            found = simulate(real, asked, budget)
            for store in real.stores:
                runner.run(store.close())
    finally:
        server.stop()
    expected = simulate(Shared(asked.clients, asked.replicas, budget), asked, budget)
    assert (found.served == expected.served).all()
    assert (found.left == 0).all()
    assert found.served.max() == budget
    assert found.calls == found.answers == expected.answers > 500
