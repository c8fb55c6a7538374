"""Real server processes: ports, workers, metrics of all together, drain, restart, faults."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from scumble.evaluation.local_server import start, variables
from tests.pictures import PNG

pytestmark = pytest.mark.server
HEADERS = {"Content-Type": "image/png"}


def post(server, **options) -> httpx2.Response:
    """One request on a connection of its own, so that workers share them."""
    options = {"content": PNG, "headers": HEADERS, "timeout": 30, **options}
    return httpx2.post(f"{server.url}/v1/predict", **options)


def resident_mb(server) -> float:
    name = "scumble_worker_resident_bytes"
    return max(v for k, v in server.metrics().items() if k.startswith(name)) / 2**20


@pytest.mark.parametrize("workers", [1, 2])
def test_metrics_rise_by_exactly_the_requests_answered_before_the_scrape(serve, workers):
    server = serve(workers=workers, defense="dcp", defense_params={"beta": 1.2})
    for _ in range(40):
        assert post(server).status_code == 200
    assert post(server, content=b"x").status_code == 422
    found = server.metrics()
    assert found['scumble_stage_seconds_bucket{le="+Inf",stage="defend"}'] == 40
    for stage in ("read", "decode", "queue", "infer", "defend", "encode"):
        assert found[f'scumble_stage_seconds_count{{stage="{stage}"}}'] == 40
    assert found['scumble_images_total{model="tiny",precision="float32"}'] == 40
    assert found['scumble_requests_total{code="200",route="/v1/predict"}'] == 40
    assert found['scumble_rejections_total{reason="unprocessable"}'] == 1
    assert found["scumble_defended_rows_total"] == 40
    assert found["scumble_workers"] == workers
    assert found["scumble_inflight"] == found["scumble_queue_depth"] == 0


def test_metrics_come_in_order_of_their_names_whichever_worker_counted_first(serve):
    server = serve(workers=2)
    names = re.findall(r"^# TYPE (\S+)", httpx2.get(f"{server.admin}/metrics").text, re.MULTILINE)
    assert len(names) == len(set(names))
    counted_by_workers = names[: names.index("scumble_worker_resident_bytes")]
    assert len(counted_by_workers) > 5
    assert counted_by_workers == sorted(counted_by_workers)


def test_public_port_has_no_metrics_and_admin_port_no_predictions(serve):
    server = serve()
    assert httpx2.get(f"{server.url}/metrics").status_code == 404
    answer = httpx2.post(f"{server.admin}/v1/predict", content=PNG, headers=HEADERS)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert httpx2.post(f"{server.admin}/metrics").status_code == 405
    assert httpx2.get(f"{server.admin}/livez").json() == {"status": "live"}
    assert httpx2.get(f"{server.admin}/readyz").json() == {"status": "ready"}


def test_a_killed_worker_is_replaced_and_counters_never_fall(serve):
    server = serve(workers=2)
    for _ in range(20):
        post(server)
    os.kill(server.workers()[-1], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if httpx2.get(f"{server.admin}/readyz").status_code == 200 and any(
                entry["event"].startswith("worker ended") for entry in server.log
            ):
                break
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    found = server.metrics()
    assert found["scumble_workers"] == 2
    assert found['scumble_images_total{model="tiny",precision="float32"}'] == 20
    for _ in range(10):
        assert post(server).status_code == 200


def test_sigterm_says_so_answers_on_and_loses_nothing(serve):
    """As behind a load balancer, which turns away once `/readyz` says 503."""
    server = serve(workers=2, drain_delay_s=6.0)
    codes = []
    turned_away = threading.Event()

    def ask():
        while not turned_away.is_set():
            codes.append(post(server).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    while httpx2.get(f"{server.admin}/readyz").status_code == 200:
        time.sleep(0.01)
    before, deadline = len(codes), time.monotonic() + 2
    while len(codes) <= before + 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    turned_away.set()
    for thread in threads:
        thread.join(10)
    assert server.wait() == 0
    assert set(codes) == {200}
    assert len(codes) > before > 0
    with pytest.raises(httpx2.ConnectError):
        post(server)


def test_workers_end_when_the_supervisor_is_killed(serve):
    server = serve(workers=2)
    server.stop(signal.SIGKILL)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            httpx2.get(f"{server.url}/livez", timeout=1)
        except httpx2.TransportError:
            return
        time.sleep(0.1)
    pytest.fail("the workers still answer")


STARTS_NOT = {
    "misspelt variable": ({"defence": "dcp"}, "unknown setting SCUMBLE_DEFENCE; did you mean"),
    "unknown defense": ({"defense": "magic"}, "unknown defense 'magic'"),
    "unknown model": ({"model": "huge"}, "no model 'huge'"),
    "wrong precision": ({"precision": "int4"}, "SCUMBLE_PRECISION is 'int4'"),
}


@pytest.mark.parametrize("name", STARTS_NOT)
def test_what_cannot_be_served_exits_1_with_a_sentence(models, name):
    extra, sentence = STARTS_NOT[name]
    server = start({"model_dir": models, "model": "tiny", **extra})
    assert server.wait() == 1
    text = " ".join(entry["event"] for entry in server.log)
    assert sentence in text
    assert "Traceback" not in text


def test_a_taken_port_is_named(models):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start({"model_dir": models, "model": "tiny", "port": port})
        assert server.wait() == 1
        assert f"cannot bind 127.0.0.1 port {port}" in server.log[-1]["event"]


def test_bad_bodies_give_4xx_and_memory_stays_flat(serve):
    server = serve(workers=1)
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nx\r\n'
    multipart = {"Content-Type": "multipart/form-data; boundary=b"}
    bodies = [
        {"content": b""},
        {"content": PNG[:-60]},
        {"content": bytes(4 * 2**20)},
        {"content": bytes(11 * 2**20)},
        {"content": PNG, "headers": {"Content-Type": "text/plain"}},
        {"content": part * 10_000 + b"--b--\r\n", "headers": multipart},
        {"content": part * 10_000, "headers": multipart},
        {"content": b"[" * 2**20, "headers": {"Content-Type": "application/json"}},
    ]
    for body in bodies * 3:
        assert 400 <= post(server, **body).status_code < 500
    before = resident_mb(server)
    for body in bodies * 12:
        assert 400 <= post(server, **body).status_code < 500
    assert resident_mb(server) < before + 20
    assert post(server).status_code == 200


def test_an_endless_body_is_cut_off(serve):
    server = serve(workers=1)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
        for _ in range(11):
            connection.sendall(chunk)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert post(server).status_code == 200


def test_check_masks_the_secret_and_names_what_is_served(models):
    done = subprocess.run(
        [sys.executable, "-m", "scumble.cli", "check"],
        env={
            **os.environ,
            **variables({"model_dir": models, "model": "tiny", "secret": "0123456789abcdef"}),
            "SCUMBLE_STORE": "redis://:hunter2@localhost/0",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert "SCUMBLE_SECRET" in done.stdout
    assert "0123456789abcdef" not in done.stdout
    assert "redis://localhost/0" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    assert "warning   authentication is off" in done.stdout
    assert "SCUMBLE_PORT" not in done.stdout
    assert "defense   NoDefense()" in done.stdout
    assert "ok: these settings can be served" in done.stdout
