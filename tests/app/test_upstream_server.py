"""Scumble in front of a real server of the V2 protocol: another Scumble, without a defense."""

import os
import signal
import threading
import time
from contextlib import suppress

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner

from app.commands.connect import connect
from scumble.evaluation.local_server import Server, start
from tests.pictures import PNG
from tests.ports import free_ports

pytestmark = pytest.mark.server
REFUSALS = {503, 504}


def killed(server: Server) -> None:
    """End a server and all its workers at once."""
    for pid in (server.process.pid, *server.forkers(), *server.workers()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.wait()


@pytest.fixture
def upstream(models):
    """`upstream()` -> the server behind, always on the same port."""
    (port,) = free_ports(1)
    started = []

    def run() -> Server:
        given = {"model_dir": models, "model": "tiny", "engine": "onnxruntime"}
        server = start({**given, "workers": 1, "port": port, "console": False})
        started.append(server)
        server.wait_ready()
        return server

    yield run
    for server in started:
        if server.process.poll() is None:
            server.stop()


def connected(server: Server, folder) -> dict:
    url = f"{server.url}/v2/models/tiny"
    words = [url, "--name", "front", "--models", str(folder), "--datatype", "UINT8"]
    words += ["--input", "pixels"]
    done = CliRunner().invoke(connect, words)
    assert done.exit_code == 0, done.output
    return {"model_dir": folder, "model": "front", "engine": "upstream", "upstream": url}


def predict(client: httpx2.Client) -> httpx2.Response:
    return client.post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"})


def rows(answer: httpx2.Response) -> np.ndarray:
    return np.array([each["probabilities"] for each in answer.json()["predictions"]])


def test_answers_are_those_of_the_server_behind_and_the_defense_is_ours(upstream, serve, tmp_path):
    behind = upstream()
    given = connected(behind, tmp_path)
    with httpx2.Client(base_url=behind.url) as client:
        clean = rows(predict(client))
    plain = serve(**given, workers=2)
    with httpx2.Client(base_url=plain.url) as client:
        np.testing.assert_allclose(rows(predict(client)), clean, atol=1e-6)
        assert client.get("/readyz").status_code == 200
    label = serve(**given, workers=1, defense="label")
    with httpx2.Client(base_url=label.url) as client:
        found = rows(predict(client))
    assert sorted(found[0]) == [0, 0, 0, 1]
    assert found.argmax() == clean.argmax()


def test_a_killed_upstream_gives_only_documented_refusals(upstream, serve, tmp_path):
    behind = upstream()
    front = serve(**connected(behind, tmp_path), workers=1, defense="label")
    found, ending = [], threading.Event()

    def load() -> None:
        with httpx2.Client(base_url=front.url, timeout=60) as client:
            while not ending.is_set():
                answer = predict(client)
                found.append((answer.status_code, answer.headers.get("retry-after"), answer))

    clients = [threading.Thread(target=load) for _ in range(3)]
    for client in clients:
        client.start()

    def until(status: int) -> None:
        """Wait until the last answer has this status."""
        seen, end = len(found), time.monotonic() + 60
        while len(found) == seen or found[-1][0] != status:
            assert time.monotonic() < end, "no such answer"
            time.sleep(0.01)

    try:
        until(200)
        for _ in range(2):
            killed(behind)
            until(503)
            behind = upstream()
            until(200)
    finally:
        ending.set()
        for client in clients:
            client.join()
    answered = [rows(answer) for status, _, answer in found if status == 200]
    refused = [(status, retry) for status, retry, _ in found if status != 200]
    assert {status for status, _ in refused} <= REFUSALS
    assert all(retry for status, retry in refused if status == 503)
    expected = answered[0]
    assert sorted(expected[0]) == [0, 0, 0, 1]
    for each in answered:  # none undefended, none wrong
        np.testing.assert_array_equal(each, expected)
    events = [entry["event"] for entry in front.log]
    assert events.count("upstream circuit open") <= 2 * 2
    assert not any("Traceback" in str(entry) for entry in front.log)
