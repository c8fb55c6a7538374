"""Triton, MLServer and Ray Serve with `cifar10`, alone and behind the service.

Each server runs in an environment under runs/upstreams, or its tests are skipped; the reason of the
skip has the command that makes the environment.
"""

import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from app.commands.connect import connect
from app.inference.bundle import Bundle, golden_inputs
from scumble.evaluation.local_server import serving
from tests.pictures import encoded
from tests.ports import free_ports
from tests.upstreams.servers import MODEL, ROOT, SERVERS, answers, infer, serving_cifar10

pytestmark = pytest.mark.server
EMBEDDED = 1e-3
THREADS = 4


@pytest.fixture(scope="module")
def golden():
    """Images, and what the embedded engine answers to them."""
    bundle = Bundle(ROOT / "models" / "cifar10")
    rows = bundle.golden().probabilities["float32"]
    return SimpleNamespace(images=golden_inputs(bundle.card.input), rows=np.array(rows))


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    """One of the servers: its URL, a bundle made from it, and how to kill and restart it."""
    with started(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


@contextmanager
def started(name: str, folder, model: str = MODEL):
    ports = free_ports(3)
    url = f"http://127.0.0.1:{ports[0]}{model}"
    with ExitStack() as stack:
        process = stack.enter_context(serving_cifar10(name, folder, ports))

        def kill() -> None:
            for one in process.alive():
                with suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
            while process.alive():
                time.sleep(0.05)

        def start() -> None:
            stack.enter_context(serving_cifar10(name, folder / "again", ports))

        models = folder / "models"
        done = CliRunner().invoke(connect, [url, "--name", "cifar10", "--models", str(models)])
        assert done.exit_code == 0, done.output
        yield SimpleNamespace(name=name, url=url, models=models, kill=kill, start=start)


@contextmanager
def in_front(server, **settings):
    """The service before the server."""
    own = {"model_dir": server.models, "model": "cifar10", "workers": 1}
    with serving(**own, engine="upstream", upstream=server.url, **settings) as service:
        yield service


def test_the_server_answers_as_the_embedded_engine(server, golden):
    described = httpx2.get(server.url, trust_env=False).json()
    in_json = infer(server.url, golden.images, binary=False)
    if server.name == "mlserver":  # does not know the binary extension
        in_bytes = in_json
    else:
        in_bytes = infer(server.url, golden.images, binary=True)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}
    rows = {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}
    assert described["name"] == "cifar10"
    assert described["inputs"] == [tensor]
    assert described["outputs"] == [rows]
    np.testing.assert_allclose(in_json, golden.rows, atol=EMBEDDED)
    np.testing.assert_array_equal(in_bytes.astype(np.float32), in_json.astype(np.float32))


def test_triton_decodes_files_itself(server, golden):
    if server.name != "triton":
        pytest.skip("only Triton's script has a model that takes files")
    answer = httpx2.post(
        f"{server.url}-files/infer",
        content=encoded(Image.fromarray(golden.images[0])),
        headers={"Inference-Header-Content-Length": "0"},
        trust_env=False,
    )
    row = np.frombuffer(answer.content[-40:], "<f4")
    np.testing.assert_allclose(row, golden.rows[0], atol=EMBEDDED)


@pytest.mark.parametrize("defense", ["none", "label"])
def test_the_service_before_the_server_answers_as_the_embedded_engine(server, golden, defense):
    with in_front(server, defense=defense) as service:
        found = [
            infer(service.url + MODEL, golden.images, binary=binary) for binary in (True, False)
        ]
    expected = golden.rows
    if defense == "label":
        expected = np.eye(10)[golden.rows.argmax(axis=1)]
    np.testing.assert_allclose(found[0], expected, atol=EMBEDDED)
    np.testing.assert_array_equal(found[0], found[1])


def test_a_killed_server_costs_503s_and_no_wrong_answer(server, golden):
    """Under load it is killed with SIGKILL and started again."""
    stop, seen = threading.Event(), []
    expected = np.eye(10)[golden.rows.argmax(axis=1)]

    def ask(service) -> None:
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
        with httpx2.Client(trust_env=False, timeout=60) as client:
            for i in range(10**6):
                if stop.is_set():
                    return
                image = golden.images[i % len(golden.images)]
                body = {"inputs": [{**tensor, "data": image.reshape(-1).tolist()}]}
                answer = client.post(f"{service.url}{MODEL}/infer", json=body)
                right = False
                if answer.status_code == 200:
                    row = answer.json()["outputs"][0]["data"]
                    right = row == expected[i % len(expected)].tolist()
                seen.append((answer.status_code, right, "retry-after" in answer.headers))
                if answer.status_code != 200:
                    time.sleep(0.02)

    def wait_for(condition) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, seen[-5:]
            time.sleep(0.02)

    def wait_for_answers(status: int) -> None:
        first = len(seen)
        wait_for(lambda: sum(each[0] == status for each in seen[first:]) >= 20)

    with in_front(server, defense="label") as service:
        threads = [threading.Thread(target=ask, args=(service,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            wait_for_answers(200)
            server.kill()
            wait_for_answers(503)
            wait_for(lambda: not answers(f"{service.admin}/readyz"))
            server.start()
            wait_for_answers(200)
            wait_for(lambda: answers(f"{service.admin}/readyz"))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert {status for status, *_ in seen} == {200, 503}
    assert all(right for status, right, _ in seen if status == 200)
    assert all(retry for status, _, retry in seen if status == 503)
