"""Connections are spread evenly, none is lost, and retired workers get no more."""

import asyncio
import contextlib
import inspect
import resource
import socket
import time
from pathlib import Path
from typing import get_args

import httpx2
import pytest

from app.processes.connection_dispatcher import PAUSE_S, ConnectionDispatcher, Refusal
from app.system.descriptors import connections_within
from tests.app.test_faults import connect
from tests.pictures import PNG


class Count:
    value = 0

    def inc(self):
        self.value += 1


class Setup:
    """A dispatcher on a free port, and workers that are nothing but their sockets."""

    def __init__(self, workers, **options):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.refusals = {reason: Count() for reason in get_args(Refusal)}
        self.dispatcher = ConnectionDispatcher(
            self.listener, workers, refusals=self.refusals, **options
        )
        self.channels, self.received, self.clients = {}, {}, []
        for number in range(workers):
            self.join(number)

    def join(self, number):
        if number in self.channels:
            self.stop(number)
            self.dispatcher.remove(number)
        self.channels[number] = self.dispatcher.add(number)
        self.channels[number].sock.setblocking(False)
        self.received[number] = []
        self.dispatcher.activate(number)

    def stop(self, number):
        self.channels[number].sock.close()
        for connection in filter(None, self.received[number]):
            connection.close()

    def connect(self, count):
        for _ in range(count):
            client = socket.create_connection(self.address)
            self.clients.append(client)

    def receive(self, number):
        """What has arrived; None in the end if no more will come."""
        with contextlib.suppress(BlockingIOError):
            while (arrived := self.channels[number].receive()) is not None:
                self.received[number] += arrived
            self.received[number].append(None)
        return self.received[number]

    def close_connections(self, number, count):
        for _ in range(count):
            self.received[number].pop().close()
            self.channels[number].count_closed()

    def close(self):
        self.dispatcher.close()
        for number in self.channels:
            self.stop(number)
            self.dispatcher.remove(number)
        for client in self.clients:
            client.close()


def with_dispatcher(workers, **options):
    """The test is a coroutine that takes a dispatcher with this many workers."""

    def decorate(test):
        async def on_a_loop(**fixtures):
            with contextlib.closing(Setup(workers, **options)) as setup:
                await test(setup, **fixtures)

        def run(**fixtures):
            asyncio.run(on_a_loop(**fixtures))

        run.__name__ = test.__name__
        parameters = list(inspect.signature(test).parameters.values())[1:]
        run.__signature__ = inspect.Signature(parameters)  # what pytest gives
        return run

    return decorate


def sorted_by_peer(setup, connections):
    """For each client its connection, None for those that have none."""
    by_peer = {connection.getpeername(): connection for connection in connections}
    return [by_peer.get(client.getsockname()) for client in setup.clients]


async def settled():
    for _ in range(20):
        await asyncio.sleep(0.001)


@with_dispatcher(3)
async def test_connections_are_spread_evenly(setup):
    setup.connect(8)
    await settled()
    assert sorted(len(setup.receive(number)) for number in range(3)) == [2, 3, 3]
    assert sum(setup.dispatcher.open_connections().values()) == 8


@with_dispatcher(2)
async def test_the_worker_with_the_fewest_connections_gets_the_next(setup):
    setup.connect(10)
    await settled()
    assert len(setup.receive(0)) == len(setup.receive(1)) == 5
    setup.close_connections(1, 4)
    setup.connect(4)
    await settled()
    assert (len(setup.receive(0)), len(setup.receive(1))) == (5, 5)
    assert setup.dispatcher.open_connections() == {0: 5, 1: 5}


@with_dispatcher(1)
async def test_a_received_connection_works(setup):
    setup.connect(1)
    await settled()
    (connection,) = setup.receive(0)
    setup.clients[0].sendall(b"hello")
    connection.setblocking(True)
    assert connection.recv(5) == b"hello"
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@with_dispatcher(2)
async def test_a_retired_worker_gets_no_more_and_a_new_one_starts_at_zero(setup):
    setup.connect(4)
    await settled()
    setup.receive(0)
    setup.dispatcher.retire(0)
    assert setup.receive(0)[-1] is None
    setup.connect(2)
    await settled()
    assert len(setup.receive(1)) == 4
    setup.join(0)
    assert setup.dispatcher.open_connections() == {0: 0, 1: 4}
    setup.connect(4)
    await settled()
    assert len(setup.receive(0)) == 4


@with_dispatcher(1)
async def test_connections_wait_for_a_worker(setup):
    setup.dispatcher.retire(0)
    setup.connect(2)
    await settled()
    setup.join(0)
    await settled()
    assert len(setup.receive(0)) == 2


@with_dispatcher(2)
async def test_closing_dispatches_what_the_kernel_has_accepted_and_refuses_the_rest(setup):
    setup.connect(6)
    setup.dispatcher.close()  # the loop has not turned since
    taken = [*setup.receive(0), *setup.receive(1)]
    assert taken.count(None) == 2
    assert len(taken) == 8
    with pytest.raises(ConnectionRefusedError):
        setup.connect(1)


@with_dispatcher(2)
async def test_a_worker_that_has_died_unnoticed_is_skipped(setup):
    setup.channels[0].sock.close()
    setup.connect(4)
    await settled()
    assert len(setup.receive(1)) == 4


@with_dispatcher(2)
async def test_connections_on_their_way_to_a_dead_worker_go_to_another(setup):
    setup.connect(6)
    await settled()
    setup.channels[0].receive()[0].close()  # this one it had: it is lost with the worker
    setup.channels[0].sock.close()
    setup.dispatcher.remove(0)
    assert len(setup.receive(1)) == 5
    assert setup.dispatcher.open_connections() == {1: 5}
    for client, connection in zip(
        setup.clients, sorted_by_peer(setup, setup.received[1]), strict=True
    ):
        if connection is not None:
            connection.sendall(b"hello")
            assert client.recv(5) == b"hello"


@with_dispatcher(1)
async def test_connections_that_no_worker_can_receive_wait_for_a_new_one(setup):
    setup.connect(2)
    await settled()
    setup.channels[0].sock.close()
    setup.dispatcher.remove(0)
    setup.join(0)
    assert len(setup.receive(0)) == 2


@with_dispatcher(1)
async def test_a_connection_that_a_worker_closes_is_closed(setup):
    setup.connect(1)
    await settled()
    setup.receive(0)
    setup.close_connections(0, 1)
    await settled()  # the confirmation arrives: no copy holds it open
    assert setup.clients[0].recv(1) == b""


@with_dispatcher(2)
async def test_a_retired_worker_still_receives_what_is_on_its_way(setup):
    setup.connect(4)
    await settled()
    setup.dispatcher.retire(0)
    assert len(setup.receive(0)) == 3  # two connections, and the end
    setup.stop(0)
    setup.dispatcher.remove(0)
    assert len(setup.receive(1)) == 2


REFUSED = b"HTTP/1.1 503 Service Unavailable\r\n\r\n"


async def read(client):
    """What a client gets until the connection ends."""
    client.setblocking(False)
    found, loop = b"", asyncio.get_running_loop()
    while piece := await loop.sock_recv(client, 1000):
        found += piece
    return found


def refused(setup):
    return {reason: count.value for reason, count in setup.refusals.items() if count.value}


@with_dispatcher(2, max_connections=3, answer=REFUSED)
async def test_connections_over_the_limit_are_answered_and_counted(setup):
    setup.connect(10)
    for _ in range(20):  # as workers that are not busy
        await settled()
        setup.receive(0), setup.receive(1)
    assert setup.dispatcher.open_connections() == {0: 3, 1: 3}
    assert refused(setup) == {"limit": 4}
    for client in setup.clients[6:]:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # must not turn the answer into a reset
        assert await read(client) == REFUSED
    # After the flood, the spread is even again.
    setup.close_connections(0, 3), setup.close_connections(1, 3)
    setup.connect(4)
    await settled()
    assert len(setup.receive(0)) == len(setup.receive(1)) == 2
    assert refused(setup) == {"limit": 4}


@with_dispatcher(2, max_connections=3)
async def test_a_worker_below_its_limit_gets_what_a_full_one_cannot(setup):
    setup.connect(6)
    await settled()
    setup.receive(0), setup.receive(1)
    setup.close_connections(1, 2)
    await settled()
    setup.connect(2)
    await settled()
    assert len(setup.receive(0)) == len(setup.receive(1)) == 3
    assert refused(setup) == {}


@with_dispatcher(1, max_held=3)
async def test_connections_that_a_busy_worker_has_not_received_wait_in_the_kernel(setup):
    setup.connect(8)
    await settled()
    assert refused(setup) == {}
    assert setup.dispatcher.open_connections() == {0: 3}


@with_dispatcher(2, answer=REFUSED)
async def test_connections_that_a_worker_without_descriptors_rejects_are_not_counted_as_open(setup):
    setup.connect(10)
    await settled()
    setup.receive(1)
    with out_of_descriptors():
        assert setup.receive(0) == []
    await settled()
    assert setup.dispatcher.open_connections() == {0: 0, 1: 5}
    assert refused(setup) == {"descriptors": 5}
    answers = [client for client in setup.clients if not sorted_by_peer(setup, setup.received[1])]
    assert all([await read(client) == REFUSED for client in answers])
    setup.connect(6)
    await settled()
    assert (len(setup.receive(0)), len(setup.receive(1))) == (6, 5)


@with_dispatcher(1)
async def test_connections_wait_while_no_descriptor_is_free_to_accept_them(setup):
    setup.connect(3)
    with out_of_descriptors():
        await settled()
    assert refused(setup).keys() == {"descriptors"}
    await asyncio.sleep(2 * PAUSE_S)
    assert len(setup.receive(0)) == 3


@with_dispatcher(1, max_connections=1)
async def test_refusals_are_logged_as_one_line(setup, caplog):
    setup.connect(5)
    for _ in range(5):
        await settled()
        setup.receive(0)
    assert refused(setup) == {"limit": 4}
    assert [record.message for record in caplog.records] == ["refusing connections"]


@contextlib.contextmanager
def out_of_descriptors():
    """In the meantime this process cannot open a new file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("descriptors", "connections"),
    [(60, 30), (128, 64), (300, 236), (1024, 960), (20_000, 4096), (resource.RLIM_INFINITY, 4096)],
)
def test_connections_follow_from_the_limit_of_descriptors(descriptors, connections):
    assert connections_within(descriptors) == connections


@pytest.mark.server
def test_a_flood_of_connections_is_refused_and_the_spread_is_even_afterwards(serve):
    server = serve(
        workers=2,
        http__max_connections=10,
        http__header_timeout_s=1,
        http__keep_alive_s=300,
    )
    name = 'scumble_connections_refused_total{reason="limit"}'
    with contextlib.ExitStack() as stack:
        flood = [stack.enter_context(connect(server)) for _ in range(60)]
        answers = []
        for connection in flood:
            connection.settimeout(20)
            answers.append(connection.recv(1000)[:12])
    assert answers.count(b"HTTP/1.1 503") == server.metrics()[name] > 0
    assert answers.count(b"HTTP/1.1 408") == 60 - answers.count(b"HTTP/1.1 503") >= 20
    deadline = time.monotonic() + 10
    while sum(opened(server)) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(httpx2.Client(headers={"Content-Type": "image/png"}))
            assert client.post(f"{server.url}/v1/predict", content=PNG).status_code == 200
        assert opened(server) == [10, 10]


@pytest.mark.server
def test_a_worker_without_descriptors_keeps_its_open_connections(serve):
    server = serve(workers=2, http__header_timeout_s=1)
    with contextlib.ExitStack() as stack:  # what each imports with its first image needs files, too
        for _ in range(2):
            client = stack.enter_context(httpx2.Client(headers={"Content-Type": "image/png"}))
            assert client.post(f"{server.url}/v1/predict", content=PNG).status_code == 200
    (victim, _) = server.workers()
    soft, hard = resource.prlimit(victim, resource.RLIMIT_NOFILE)
    assert soft == hard
    used = len(list(Path(f"/proc/{victim}/fd").iterdir()))
    resource.prlimit(victim, resource.RLIMIT_NOFILE, (used + 2, hard))
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(httpx2.Client(headers={"Content-Type": "image/png"}))
            for _ in range(20)
        ]
        codes = [
            client.post(f"{server.url}/v1/predict", content=PNG).status_code
            for client in clients * 2
        ]
    assert set(codes) == {200, 503}
    refused = server.metrics()['scumble_connections_refused_total{reason="descriptors"}']
    assert codes.count(503) == refused > 0
    assert any(entry["event"] == "refusing connections" for entry in server.log)
    resource.prlimit(victim, resource.RLIMIT_NOFILE, (soft, hard))
    deadline = time.monotonic() + 10
    while sum(opened(server)) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(httpx2.Client(headers={"Content-Type": "image/png"}))
            assert client.post(f"{server.url}/v1/predict", content=PNG).status_code == 200
        assert opened(server) == [5, 5]


def opened(server):
    """Connections of each worker, as the console shows them."""
    found = httpx2.get(f"{server.admin}/console/metrics").json()
    return [worker["connections"] for worker in found["workers"]]


@pytest.mark.server
def test_kept_alive_connections_of_a_real_server_are_spread_evenly(serve):
    server = serve(workers=2)
    headers = {"Content-Type": "image/png"}
    before = cpu(server)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx2.Client()) for _ in range(4)]
        for _ in range(100):
            for client in clients:
                answer = client.post(f"{server.url}/v1/predict", content=PNG, headers=headers)
                assert answer.status_code == 200
        after = cpu(server)
    used = [after[key] - before[key] for key in before]
    assert len(used) == 2
    assert min(used) > 0.25 * max(used)


def cpu(server):
    name = "scumble_worker_cpu_seconds_total"
    return {key: value for key, value in server.metrics().items() if key.startswith(name)}
