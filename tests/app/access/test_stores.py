"""One contract for all budget stores: concurrent charges never exceed a limit."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, Counter
from starlette.requests import Request
from starlette.responses import Response

from app.access.admission import REFUNDS, Access
from app.access.grants import Grant
from app.access.keys import KeyLimits
from app.access.quotas import Admission, client_buckets, fields, refusal
from app.access.stores import Bucket, Charge, Level, StoreError, open_store
from app.access.stores.memory import MemoryStore
from app.access.stores.sqlite import SqliteStore
from app.errors import ConfigError, OverBudget
from app.request_context import ensure_context, request_context
from app.telemetry.client_usage import ClientUsage
from tests.redis_server import RedisServer, needs_redis

pytestmark = pytest.mark.anyio

WINDOW = Bucket("client:a:window", 10, 60)
TOTAL = Bucket("client:a:total", 25)
EVERYBODY = Bucket("all:total", 100)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


STORES = [
    "memory",
    "sqlite",
    pytest.param("redis", marks=needs_redis),
]


@pytest.fixture(params=STORES)
async def opened(request, tmp_path):
    """`opened(n)` -> n stores that share what they count, as workers do; memory has one."""
    stores = []

    def url() -> str:
        if request.param == "redis":
            server = request.getfixturevalue("redis")
            server.ask("FLUSHALL")
            return server.url
        return {"memory": "memory://", "sqlite": f"sqlite://{tmp_path}/b.db"}[request.param]

    def make(n: int) -> list:
        where = url()
        stores.extend(open_store(where) for _ in range(1 if request.param == "memory" else n))
        return stores if len(stores) == n else stores * n

    yield make
    for store in stores:
        await store.close()


async def test_charges_add_up_to_the_limit_and_not_beyond(opened):
    (store,) = opened(1)
    for used in (4, 8):
        charge = await store.charge([WINDOW], 4)
        assert charge.granted
        assert charge.levels[0].used == used
        assert 0 < charge.levels[0].reset_s <= 60
    refused = await store.charge([WINDOW], 3)
    assert not refused.granted
    assert refused.levels[0].used == 8
    assert (await store.charge([WINDOW], 2)).granted
    assert not (await store.charge([WINDOW], 1)).granted


async def test_all_buckets_are_charged_or_none(opened):
    (store,) = opened(1)
    buckets = [WINDOW, TOTAL, EVERYBODY]
    charge = await store.charge(buckets, 10)
    assert charge.granted
    assert [level.used for level in charge.levels] == [10, 10, 10]
    assert charge.levels[1].reset_s == 0
    refused = await store.charge(buckets, 1)
    assert not refused.granted
    assert [level.used for level in refused.levels] == [10, 10, 10]
    assert (await store.charge([EVERYBODY], 90)).granted
    assert not (await store.charge([TOTAL, EVERYBODY], 1)).granted
    assert (await store.charge([TOTAL], 15)).granted


async def test_buckets_do_not_mix(opened):
    (store,) = opened(1)
    other = Bucket("client:b:window", 10, 60)
    assert (await store.charge([WINDOW], 10)).granted
    assert (await store.charge([other], 10)).granted
    assert not (await store.charge([other], 1)).granted


async def test_windows_of_different_lengths_are_counted_apart(opened):
    """The shorter window of another key neither ends the longer one nor fills it."""
    (store,) = opened(1)
    hour, moment = Bucket("client:a:window", 5, 3600), Bucket("client:a:window", 1000, 1)
    charged = await store.charge([hour, TOTAL], 5)
    assert charged.granted
    for _ in range(3):
        end = (await store.charge([moment], 9)).levels[0].reset_s
        assert not (await store.charge([hour], 1)).granted
    await asyncio.sleep(end + 0.05)
    assert (await store.charge([moment], 9)).levels[0].used == 9, "a new moment"
    assert not (await store.charge([hour], 1)).granted
    await store.refund([hour, TOTAL], 5, charged)
    assert (await store.charge([hour], 5)).granted


async def test_a_total_of_an_older_file_goes_on(tmp_path):
    """Its name has no length, as before windows had one in theirs."""
    with sqlite3.connect(tmp_path / "b.db") as old:
        old.execute("CREATE TABLE buckets (name TEXT PRIMARY KEY, used INTEGER, start REAL)")
        old.execute("INSERT INTO buckets VALUES ('client:a:total', 20, 1.0)")
    old.close()
    store = SqliteStore(f"{tmp_path}/b.db")
    assert (
        await store.charge(client_buckets("a", KeyLimits(window_s=60, total_images=25)), 5)
    ).granted
    assert not (
        await store.charge(client_buckets("a", KeyLimits(window_s=60, total_images=25)), 1)
    ).granted
    await store.close()


async def test_a_refund_gives_back_what_was_charged(opened):
    (store,) = opened(1)
    buckets = [WINDOW, TOTAL]
    charge = await store.charge(buckets, 10)
    await store.refund(buckets, 10, charge)
    again = await store.charge(buckets, 10)
    assert again.granted
    assert [level.used for level in again.levels] == [10, 10]


async def test_a_window_starts_again_and_an_old_refund_does_not_change_it(opened):
    (store,) = opened(1)
    short = Bucket("client:a:window", 10, 1)
    buckets = [short, TOTAL]
    old = await store.charge(buckets, 10)
    assert not (await store.charge(buckets, 1)).granted
    await asyncio.sleep(old.levels[0].reset_s + 0.05)
    new = await store.charge(buckets, 10)
    assert new.granted
    assert [level.used for level in new.levels] == [10, 20]
    await store.refund(buckets, 10, old)
    assert not (await store.charge([short], 1)).granted
    assert (await store.charge([TOTAL], 15)).levels[0].used == 25


async def test_a_limit_that_was_lowered_refuses_and_one_that_was_raised_grants(opened):
    (store,) = opened(1)
    assert (await store.charge([TOTAL], 20)).granted
    assert not (await store.charge([Bucket(TOTAL.name, 10)], 1)).granted
    assert (await store.charge([Bucket(TOTAL.name, 30)], 10)).granted


async def test_nothing_is_granted_where_the_limit_is_zero(opened):
    (store,) = opened(1)
    assert not (await store.charge([Bucket("x", 0)], 1)).granted


@pytest.mark.parametrize("images", [1, 7])
async def test_at_once_never_more_than_the_limit(opened, images):
    stores = opened(2)
    bucket = Bucket("client:many:total", 100)

    async def greedy(store) -> int:
        served = 0
        for _ in range(25):
            served += images * (await store.charge([bucket], images)).granted
        return served

    served = await asyncio.gather(*(greedy(store) for store in stores * 4))
    assert sum(served) == 100 // images * images


async def test_a_thousand_at_once_are_all_answered(opened):
    (store,) = opened(1)
    bucket = Bucket("client:many:total", 700)
    charges = await asyncio.gather(*(store.charge([bucket], 1) for _ in range(1000)))
    assert sum(charge.granted for charge in charges) == 700
    assert sorted(c.levels[0].used for c in charges if c.granted) == list(range(1, 701))


async def test_a_request_that_is_cancelled_disturbs_no_other(opened):
    (store,) = opened(1)
    tasks = [asyncio.create_task(store.charge([Bucket("x", 100)], 1)) for _ in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(charge.granted for charge in done[1::2])
    await store.ping()
    assert 20 < (await store.charge([Bucket("x", 100)], 1)).levels[0].used <= 41


async def test_a_callback_that_raises_leaves_no_other_without_its_charge(opened, caplog):
    (store,) = opened(1)
    charged = asyncio.get_running_loop().create_future()

    def broken(charge):
        raise ValueError("a fault of the caller")

    store.charge_soon([WINDOW], 1, broken)
    store.charge_soon([WINDOW], 2, charged.set_result)
    assert (await asyncio.wait_for(charged, 30)).levels[0].used == 3
    assert "a fault of the caller" in caplog.text


async def test_ping_counts_nothing(opened):
    (store,) = opened(1)
    await store.ping()
    assert (await store.charge([TOTAL], 25)).granted


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_a_clock_set_back_opens_no_new_window(kind, tmp_path):
    now = [1000.0]

    def clock() -> float:
        return now[0]

    store = MemoryStore(clock) if kind == "memory" else SqliteStore(f"{tmp_path}/b.db", clock)
    assert (await store.charge([WINDOW], 10)).granted
    now[0] = 900
    assert not (await store.charge([WINDOW], 1)).granted
    now[0] = 1060
    assert (await store.charge([WINDOW], 10)).granted
    await store.close()


CHARGE_AND_DIE = """
import asyncio, os, sys
from app.access.stores import Bucket, open_store

async def main():
    print((await open_store(sys.argv[1]).charge([Bucket("x", 10)], 7)).granted, flush=True)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def charged_and_killed(request, tmp_path):
    """The URL of a store where a process counted 7 images and was killed; Redis too."""
    server = RedisServer(tmp_path) if request.param == "redis" else None
    url = server.url if server else f"sqlite://{tmp_path}/b.db"
    command = [sys.executable, "-c", CHARGE_AND_DIE, url]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"
    if server:
        server.stop(9)
        server.start()
    yield url
    if server:
        server.stop()


async def test_what_was_counted_outlasts_the_process(charged_and_killed):
    store = open_store(charged_and_killed)
    assert not (await store.charge([Bucket("x", 10)], 4)).granted
    assert (await store.charge([Bucket("x", 10)], 3)).granted
    await store.close()


@needs_redis
async def test_a_redis_that_is_away_is_an_error_and_its_return_is_enough(tmp_path):
    server = RedisServer(tmp_path)
    store = open_store(server.url)
    charge = await store.charge([TOTAL], 5)
    server.stop(9)
    for action in (
        store.charge([TOTAL], 1),
        store.refund([TOTAL], 5, charge),
        store.ping(),
    ):
        with pytest.raises(StoreError, match="redis: ConnectionError"):
            await action
    server.start()
    assert (await store.charge([TOTAL], 1)).levels[0].used == 6
    await store.close()
    server.stop()


@needs_redis
async def test_redis_does_a_charge_in_one_command_and_lets_windows_expire(redis):
    redis.ask("FLUSHALL")
    store = open_store(redis.url)
    buckets = [WINDOW, TOTAL, EVERYBODY]
    await store.charge(buckets, 1)
    redis.ask("CONFIG", "RESETSTAT")
    for _ in range(5):
        await store.charge(buckets, 1)
    client = store._client
    counted = await client.info("commandstats")
    assert counted["cmdstat_evalsha"]["calls"] == 5
    assert "cmdstat_eval" not in counted
    assert 0 < await client.pttl("{scumble}:client:a:window:60") <= 60_000
    assert await client.pttl("{scumble}:client:a:total") == -1
    await store.close()


@needs_redis
async def test_charges_of_one_turn_are_one_command_and_counted_one_after_another(redis):
    redis.ask("FLUSHALL")
    store = open_store(redis.url)
    await store.charge([TOTAL], 0)
    redis.ask("CONFIG", "RESETSTAT")
    both = [WINDOW, TOTAL]
    charges = await asyncio.gather(*(store.charge(both, 4) for _ in range(3)))
    assert [(c.granted, [level.used for level in c.levels]) for c in charges] == [
        (True, [4, 4]),
        (True, [8, 8]),
        (False, [8, 8]),
    ]
    counted = await store._client.info("commandstats")
    assert counted["cmdstat_evalsha"]["calls"] == 1
    await store.close()


async def test_a_closed_file_answers_no_charge(tmp_path):
    store = SqliteStore(f"{tmp_path}/b.db")
    await store.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        await store.charge([TOTAL], 1)


async def test_a_locked_file_is_an_error(tmp_path):
    store, other = (SqliteStore(f"{tmp_path}/b.db", busy_s=0.05) for _ in range(2))
    other._db.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        await store.charge([TOTAL], 1)
    with pytest.raises(StoreError, match="locked"):
        await store.ping()
    other._db.execute("ROLLBACK")
    assert (await store.charge([TOTAL], 1)).granted
    await store.close()
    await other.close()


def test_workers_that_open_a_new_file_at_once_all_can(tmp_path):
    for number in range(20):
        together = threading.Barrier(4)

        def opened(together=together, path=str(tmp_path / f"{number}.sqlite")):
            together.wait()
            return SqliteStore(path)

        with ThreadPoolExecutor(4) as pool:
            stores = [one.result() for one in [pool.submit(opened) for _ in range(4)]]
        for store in stores:
            asyncio.run(store.close())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgres://x", "allowed: memory://, sqlite:///PATH, redis://"),
        ("nonsense", "allowed: memory://"),
        ("sqlite://b.db", "allowed: sqlite:///PATH"),
        ("sqlite:///", "allowed: sqlite:///PATH"),
        ("sqlite:///b.db?mode=ro", "allowed: sqlite:///PATH"),
        ("memory://x", "allowed: memory://, sqlite"),
        ("redis://localhost/0?socket_timeot=1", "query option: .*'socket_timeot'"),
        ("redis://localhost/0?socket_timeout=soon", "query option: .*socket_timeout"),
        ("redis://localhost/0?encoding=klingon", "query option: .*klingon"),
        ("redis://localhost/0?protocol=7", "query option: "),
        ("redis://localhost/0?retry=5", "query option: "),
        ("redis://localhost/0?connection_class=x", "query option: "),
        ("rediss://localhost/0?ssl_cert_reqs=maybe", "query option: .*maybe"),
        ("unix:///run/redis.sock?socket_timeot=1", "query option: .*'socket_timeot'"),
        ("sqlite:////proc/none/b.db", "cannot be used"),
        ("redis://:hunter2@localhost/zero/x?db=y", "SCUMBLE_STORE is 'redis://localhost"),
        ("sqlite://me:hunter2@host/b.db", "SCUMBLE_STORE is 'sqlite://host/b.db'"),
        ("postgres://me:hunter2@host/b?password=hunter2", "SCUMBLE_STORE is 'postgres://host/b'"),
    ],
)
async def test_a_wrong_url_is_named_without_its_password(url, message):
    with pytest.raises(ConfigError, match=message) as raised:
        open_store(url)
    assert "hunter2" not in str(raised.value)


CLEAN = KeyLimits(window_s=60, total_images=100, window_clean=6, total_clean=10)


def admit(store, limits=CLEAN):
    return Admission(
        Grant(client="a", buckets=client_buckets("a", limits)),
        store,
        ClientUsage(CollectorRegistry()),
        on_store_failure=pytest.fail,
    )


async def test_what_is_withheld_is_given_back_to_budgets_of_clean_answers_only(opened):
    (store,) = opened(1)
    total, window, clean = client_buckets("a", CLEAN)
    assert [(b.name.split(":")[2], b.clean) for b in (total, window, clean)] == [
        ("total", False),
        ("window_clean", True),
        ("total_clean", True),
    ]
    first = admit(store)
    await first.charge(6)
    await first.refund_withheld(4)
    levels = (await store.charge((total, window, clean), 0)).levels
    assert [level.used for level in levels] == [6, 2, 2]
    second = admit(store)
    await second.charge(4)
    await second.refund_withheld(0)
    await second.refund()
    levels = (await store.charge((total, window, clean), 0)).levels
    assert levels[0].used == 6


async def test_what_was_withheld_is_given_back_once(opened):
    """An answer whose line the audit log could not write is refunded whole."""
    (store,) = opened(1)
    buckets = client_buckets("a", CLEAN)
    answered, lost = admit(store), admit(store)
    await answered.charge(2)
    await lost.charge(4)
    await lost.refund_withheld(3)
    await lost.refund()
    levels = (await store.charge(buckets, 0)).levels
    assert [level.used for level in levels] == [2, 2, 2]


class RefundsHang:
    """A store that charges at once and returns from no refund until it is `released`."""

    def __init__(self):
        self.released, self.refunds = asyncio.Event(), 0

    async def charge(self, buckets, images):
        return Charge(granted=True, levels=tuple(Level(images, 0, 0) for _ in buckets))

    async def refund(self, buckets, images, charge):
        self.refunds += 1
        await self.released.wait()

    async def close(self):
        pass


async def test_a_store_that_hangs_gathers_a_limited_number_of_refunds():
    store, failures = RefundsHang(), Counter("failures", "of a store", registry=None)
    clients = ClientUsage(CollectorRegistry())
    grant = Grant(client="a", buckets=client_buckets("a", CLEAN))
    access = Access(None, keyless=grant, store=store, failures=failures, clients=clients)

    async def withhold(request):
        context = request_context(request.scope)
        context.images = context.withheld = 1
        await context.admission.charge(1)
        return Response()

    async with access.running():
        for _ in range(REFUNDS + 5):
            scope = {"type": "http", "path": "/v1/predict", "headers": []}
            ensure_context(scope)
            await access.guard("/v1/predict", withhold)(Request(scope))
        await asyncio.sleep(0)
        assert (store.refunds, failures.collect()[0].samples[0].value) == (REFUNDS, 5)
        store.released.set()


async def test_a_thief_gets_no_more_clean_answers_than_the_budget(opened):
    """Eight connections over two workers, of whose answers three of four are withheld."""
    stores, served = opened(2), []

    async def steal(number):
        for _ in range(40):
            admission = admit(stores[number % 2], KeyLimits(total_clean=10))
            try:
                await admission.charge(1)
            except OverBudget:
                continue
            await asyncio.sleep(0)
            withheld = int(number % 4 > 0)
            served.append(1 - withheld)
            await admission.refund_withheld(withheld)

    await asyncio.gather(*(steal(number) for number in range(8)))
    assert sum(served) <= 10
    left = admit(stores[0], KeyLimits(total_clean=10))
    try:
        await left.charge(10 - sum(served))  # and all of them can be had
    except OverBudget as exc:
        pytest.fail(str(exc))


async def test_budgets_of_clean_answers_are_not_shown_to_the_client(opened):
    (store,) = opened(1)
    buckets = client_buckets("a", CLEAN)
    charge = await store.charge(buckets, 6)
    assert fields(buckets, charge)["RateLimit"] == '"total";r=94'
    text, headers = refusal(buckets, await store.charge(buckets, 1), 1)
    assert text.startswith("budget of answers exceeded: 1 images requested; resets in")
    assert int(headers["Retry-After"]) <= 60
