"""Connections are dealt evenly, none is lost, and who leaves gets no more."""

import asyncio
import contextlib
import socket

import httpx2
import pytest

from app.dealer import Dealer
from tests.pictures import PNG


class Table:
    """A dealer on a free port, and workers that are nothing but their sockets."""

    def __init__(self, workers):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.dealer = Dealer(self.listener, workers)
        self.hands, self.taken, self.clients = {}, {}, []
        for number in range(workers):
            self.join(number)

    def join(self, number):
        if number in self.hands:
            self.rise(number)
            self.dealer.gone(number)
        self.hands[number] = self.dealer.hand(number)
        self.hands[number].channel.setblocking(False)
        self.taken[number] = []
        self.dealer.seat(number)

    def rise(self, number):
        self.hands[number].channel.close()
        for connection in filter(None, self.taken[number]):
            connection.close()

    def connect(self, count):
        for _ in range(count):
            client = socket.create_connection(self.address)
            self.clients.append(client)

    def take(self, number):
        """What has arrived; None in the end if no more will come."""
        with contextlib.suppress(BlockingIOError):
            while (arrived := self.hands[number].take()) is not None:
                self.taken[number] += arrived
            self.taken[number].append(None)
        return self.taken[number]

    def hang_up(self, number, count):
        for _ in range(count):
            self.taken[number].pop().close()
            self.hands[number].count_closed()

    def close(self):
        self.dealer.close()
        for number in self.hands:
            self.rise(number)
            self.dealer.gone(number)
        for client in self.clients:
            client.close()


def with_table(workers):
    """The test is a coroutine that takes a table for so many workers."""

    def decorate(test):
        async def on_a_loop():
            with contextlib.closing(Table(workers)) as table:
                await test(table)

        def run():
            asyncio.run(on_a_loop())

        run.__name__ = test.__name__
        return run

    return decorate


def sorted_by_peer(table, connections):
    """For each client its connection, None for those that have none."""
    by_peer = {connection.getpeername(): connection for connection in connections}
    return [by_peer.get(client.getsockname()) for client in table.clients]


async def settled():
    for _ in range(20):
        await asyncio.sleep(0.001)


@with_table(3)
async def test_connections_are_dealt_evenly(table):
    table.connect(8)
    await settled()
    assert sorted(len(table.take(number)) for number in range(3)) == [2, 3, 3]
    assert sum(table.dealer.open_connections().values()) == 8


@with_table(2)
async def test_who_has_fewest_gets_the_next(table):
    table.connect(10)
    await settled()
    assert len(table.take(0)) == len(table.take(1)) == 5
    table.hang_up(1, 4)
    table.connect(4)
    await settled()
    assert (len(table.take(0)), len(table.take(1))) == (5, 5)
    assert table.dealer.open_connections() == {0: 5, 1: 5}


@with_table(1)
async def test_a_dealt_connection_works(table):
    table.connect(1)
    await settled()
    (connection,) = table.take(0)
    table.clients[0].sendall(b"hello")
    connection.setblocking(True)
    assert connection.recv(5) == b"hello"
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@with_table(2)
async def test_who_left_gets_no_more_and_who_comes_starts_at_nothing(table):
    table.connect(4)
    await settled()
    table.take(0)
    table.dealer.leave(0)
    assert table.take(0)[-1] is None
    table.connect(2)
    await settled()
    assert len(table.take(1)) == 4
    table.join(0)
    assert table.dealer.open_connections() == {0: 0, 1: 4}
    table.connect(4)
    await settled()
    assert len(table.take(0)) == 4


@with_table(1)
async def test_connections_wait_for_somebody_to_come(table):
    table.dealer.leave(0)
    table.connect(2)
    await settled()
    table.join(0)
    await settled()
    assert len(table.take(0)) == 2


@with_table(2)
async def test_closing_deals_what_the_kernel_has_and_refuses_the_rest(table):
    table.connect(6)
    table.dealer.close()  # the loop has not turned since
    taken = [*table.take(0), *table.take(1)]
    assert taken.count(None) == 2
    assert len(taken) == 8
    with pytest.raises(ConnectionRefusedError):
        table.connect(1)


@with_table(2)
async def test_a_worker_that_died_unheard_is_passed_over(table):
    table.hands[0].channel.close()
    table.connect(4)
    await settled()
    assert len(table.take(1)) == 4


@with_table(2)
async def test_what_was_on_its_way_to_a_worker_that_died_is_dealt_to_another(table):
    table.connect(6)
    await settled()
    table.hands[0].take()[0].close()  # this one it had: it is lost with the worker
    table.hands[0].channel.close()
    table.dealer.gone(0)
    assert len(table.take(1)) == 5
    assert table.dealer.open_connections() == {1: 5}
    for client, connection in zip(
        table.clients, sorted_by_peer(table, table.taken[1]), strict=True
    ):
        if connection is not None:
            connection.sendall(b"hello")
            assert client.recv(5) == b"hello"


@with_table(1)
async def test_what_nobody_can_take_waits_for_who_comes(table):
    table.connect(2)
    await settled()
    table.hands[0].channel.close()
    table.dealer.gone(0)
    table.join(0)
    assert len(table.take(0)) == 2


@with_table(1)
async def test_a_connection_that_a_worker_ends_has_ended(table):
    table.connect(1)
    await settled()
    table.take(0)
    table.hang_up(0, 1)
    await settled()  # the confirmation arrives: no copy holds it open
    assert table.clients[0].recv(1) == b""


@with_table(2)
async def test_who_leaves_still_takes_what_is_on_its_way(table):
    table.connect(4)
    await settled()
    table.dealer.leave(0)
    assert len(table.take(0)) == 3  # two connections, and the end
    table.rise(0)
    table.dealer.gone(0)
    assert len(table.take(1)) == 2


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
