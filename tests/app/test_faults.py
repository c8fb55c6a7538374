"""Real servers whose engines are slow or hang, and clients that do not wait."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from app.access.keys import KeyFile, write_keys
from app.telemetry.metrics import FLUSH_S
from tests.app import probe_defenses
from tests.app.access.test_admission import row
from tests.app.blocking_defense import GATE, HELD, HUNG, NAME, SLOW, SLOW_S, begun, plain
from tests.pictures import PNG

pytestmark = pytest.mark.server
IMAGE = {"Content-Type": "image/png"}


def post(server, content=PNG, **headers) -> httpx2.Response:
    url = f"{server.url}/v1/predict"
    return httpx2.post(url, content=content, headers={**IMAGE, **headers}, timeout=30)


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def raw(content=PNG, **headers) -> bytes:
    """The request as bytes."""
    lines = {"Host": "x", **IMAGE, "Content-Length": len(content), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST /v1/predict HTTP/1.1\r\n{head}\r\n".encode() + content


@contextlib.contextmanager
def busy(server, **headers):
    """A slow batch runs in the meantime; it must be answered in the end."""
    with connect(server) as connection:
        connection.sendall(raw(plain(SLOW), **headers))
        time.sleep(SLOW_S / 4)
        yield
        assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.fixture
def gate(monkeypatch, tmp_path):
    """The file that ends the batch of `held`, for a server that starts after it."""
    path = tmp_path / "gate"
    monkeypatch.setenv(GATE, str(path))
    return path


@contextlib.contextmanager
def held(server, gate, **headers):
    """A batch runs in the meantime; it ends after the block, or when the gate exists."""
    with connect(server) as connection:
        connection.sendall(raw(plain(HELD), **headers))
        while not begun(gate).exists():
            time.sleep(0.01)
        yield
        gate.touch()
        assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.fixture
def blocking_server(serve, tmp_path):
    """`blocking_server(**settings)` -> a server with the blocking defense."""

    def start(**settings):
        settings = {"workers": 1, "defense": NAME, "tensor_input": False, **settings}
        return serve(**settings)

    return start


@pytest.fixture
def budgeted(blocking_server, tmp_path):
    """The same with a key `five` that may have five images, and `slow` that may have any."""
    path = tmp_path / "keys.json"
    rows = [row("five", limits={"total_images": 5}, defense=NAME), row("slow", defense=NAME)]
    write_keys(path, KeyFile(keys=rows))

    def start(**settings):
        return blocking_server(keys_file=path, **settings)

    return start


def five_are_left(server):
    codes = [post(server, **{"X-API-Key": "five"}).status_code for _ in range(6)]
    assert codes == [200] * 5 + [429]


def test_a_deadline_is_kept_and_costs_nothing(budgeted, gate):
    server = budgeted(batch__execution="thread")
    with held(server, gate, **{"X-API-Key": "slow"}):
        answer = post(server, **{"X-API-Key": "five", "X-Deadline-Ms": "50"})
        assert answer.status_code == 504
        assert answer.json()["status"] == 504
    found = server.metrics()
    assert found['scumble_rejections_total{reason="deadline"}'] == 1
    assert found['scumble_images_total{model="tiny",precision="float32"}'] == 1
    five_are_left(server)


def test_the_servers_deadline_holds_for_all_and_clients_only_shorten_it(blocking_server, gate):
    server = blocking_server(batch__execution="thread", limits__deadline_ms=100)
    assert httpx2.get(f"{server.url}/v1/model").json()["limits"]["deadline_ms"] == 100
    with held(server, gate):
        assert post(server, **{"X-Deadline-Ms": "60000"}).status_code == 504
    assert post(server).status_code == 200


@pytest.mark.parametrize("execution", ["inline", "thread"])
def test_a_client_that_goes_while_it_waits_costs_nothing(budgeted, execution):
    server = budgeted(batch__execution=execution)
    with busy(server, **{"X-API-Key": "slow"}), connect(server) as connection:
        connection.sendall(raw(**{"X-API-Key": "five"}))
        if execution == "thread":
            time.sleep(SLOW_S / 4)
    # Inline, request and hang-up arrive together, once the loop turns again.
    deadline = time.monotonic() + 5
    gone = 'scumble_rejections_total{reason="gone"}'
    while not server.metrics().get(gone) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(4 * FLUSH_S)
    found = server.metrics()
    assert found[gone] == 1
    assert found['scumble_images_total{model="tiny",precision="float32"}'] == 1
    assert found["scumble_queue_depth"] == found["scumble_inflight"] == 0
    five_are_left(server)


@pytest.mark.parametrize("size", [1000, 100_000, 300_000, 2_000_000])
def test_who_hangs_up_is_dropped_whatever_was_sent(blocking_server, size):
    server = blocking_server(batch__execution="thread", batch__max_size=1)
    found = server.metrics
    gone = 'scumble_rejections_total{reason="gone"}'
    with ThreadPoolExecutor(1) as pool:
        files = [("image", ("x.png", plain(SLOW), "image/png"))] * 5  # five batches, one by one
        slow = pool.submit(httpx2.post, f"{server.url}/v1/predict", files=files, timeout=60)
        time.sleep(SLOW_S / 2)
        for _ in range(10):
            with connect(server) as leaver:
                leaver.sendall(raw(PNG + bytes(size)))
        assert slow.result().status_code == 200
    assert post(server).status_code == 200
    deadline = time.monotonic() + 10
    while found()[gone] < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found()[gone] == 10
    assert found()['scumble_images_total{model="tiny",precision="float32"}'] == 6


def test_liveness_is_answered_while_a_batch_runs_on_its_thread(blocking_server, gate):
    server = blocking_server(batch__execution="thread")
    with held(server, gate):
        for url in (server.url, server.admin):
            assert httpx2.get(f"{url}/livez").status_code == 200


def test_liveness_waits_for_an_inline_batch_and_never_on_the_admin_port(blocking_server, gate):
    server = blocking_server(batch__execution="inline")
    with held(server, gate), connect(server) as waiting:
        waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert httpx2.get(f"{server.admin}/livez").status_code == 200
        assert not select.select([waiting], [], [], 0)[0]
        gate.touch()
        assert waiting.recv(12) == b"HTTP/1.1 200"


def test_others_serve_on_while_a_killed_worker_is_replaced(serve):
    server = serve(workers=2)
    codes, lost = [], []
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            try:
                codes.append(post(server).status_code)
            except httpx2.TransportError:
                lost.append(len(codes))

    def answered(count):
        deadline = time.monotonic() + 60
        while len(codes) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        answered(1)
        kill_one(server)
        answered(len(codes) + 4)
    finally:
        stop.set()
        asking.join()
    assert set(codes) == {200}
    assert len(lost) <= 1  # the one that was being answered


def kill_one(server) -> None:
    os.kill(server.workers()[-1], signal.SIGKILL)


def test_a_lawful_request_that_takes_longer_than_the_watchdog_allows_is_answered(serve):
    server = serve(workers=1, defense=probe_defenses.SLOW, watchdog_s=4, tensor_input=False)
    worker = server.workers()
    files = [("image", ("x.png", PNG, "image/png"))] * 32  # 4.8 s
    answer = httpx2.post(f"{server.url}/v1/predict", files=files, timeout=60)
    assert len(answer.json()["predictions"]) == 32
    assert server.workers() == worker


@pytest.mark.parametrize("execution", ["inline", "thread"])
def test_a_worker_that_hangs_is_replaced_while_the_other_serves(blocking_server, execution):
    server = blocking_server(workers=2, watchdog_s=4, batch__execution=execution)
    with connect(server) as victim, httpx2.Client(base_url=server.url, headers=IMAGE) as other:
        victim.sendall(raw(plain(HUNG)))
        assert other.post("/v1/predict", content=PNG).status_code == 200  # the other worker's
        codes, ready = [], set()
        hung = 'scumble_worker_restarts_total{reason="hung"}'
        deadline = time.monotonic() + 60
        while not server.metrics()[hung] and time.monotonic() < deadline:
            codes.append(other.post("/v1/predict", content=PNG).status_code)
            ready.add(httpx2.get(f"{server.admin}/readyz").status_code)
            time.sleep(0.02)
        assert set(codes) == {200}
        assert 503 in ready
        assert victim.recv(100) == b""
    while httpx2.get(f"{server.admin}/readyz").status_code != 200:
        time.sleep(0.05)
    assert server.metrics()[hung] == 1
    assert any(entry["event"].startswith("worker hung") for entry in server.log)
    assert [post(server).status_code for _ in range(4)] == [200] * 4


def test_a_worker_that_does_not_return_gets_no_new_connections(blocking_server):
    server = blocking_server(
        workers=2, watchdog_s=4, batch__execution="inline", shutdown_timeout_s=1
    )
    with connect(server) as stuck:
        stuck.sendall(raw(plain(HUNG)))
        time.sleep(2)  # it is late from a quarter of the watchdog's time on
        assert [post(server).status_code for _ in range(8)] == [200] * 8


def test_a_slow_worker_is_not_replaced(blocking_server):
    server = blocking_server(workers=2, watchdog_s=2, batch__execution="inline")
    with busy(server):
        time.sleep(SLOW_S / 2)
    assert server.metrics()['scumble_worker_restarts_total{reason="hung"}'] == 0
