"""The application on Ray Serve: two replicas, one budget, and the errors of `scumble serve`.

Ray's pins are its own, so it runs in an environment of its own, or these tests are skipped:

    python -m venv runs/ray
    runs/ray/bin/pip install -e '.[serve,redis]' -r deploy/ray-requirements.txt
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from app.access.keys import KeyFile, write_keys
from loadtest.peers.processes import running
from scumble.evaluation.local_server import variables
from tests.app.access.test_admission import BAD, IMAGE, row
from tests.app.access.test_budgets import Thief, spend, wait_for
from tests.redis_server import RedisServer, needs_redis

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / "runs" / "ray" / "bin" / "python"
BUDGET = 600
READY_S = 120
STOP_S = 40
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

pytestmark = [
    pytest.mark.server,
    needs_redis,
    pytest.mark.skipif(not PYTHON.exists(), reason="Ray is not installed in runs/ray"),
]


@pytest.fixture(scope="module")
def folder():
    """Short: Ray's sockets lie in it, and their paths have a limit of 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ray-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def redis(folder):
    server = RedisServer(folder)
    yield server
    if server.process.poll() is None:
        server.stop()


def ray_environment(folder: Path, **settings: object) -> dict[str, str]:
    """Ray keeps a token of its own in the home folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SCUMBLE_")}
    home = {"HOME": str(folder), "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    return kept | home | variables(settings)


@pytest.fixture(scope="module")
def ray(models, folder, redis):
    """A server with two replicas: its url, and its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = [
        row("thief", limits={"total_images": BUDGET}),
        row("same", defense="random", defense_params={"epsilon": 0.5}),
        row("last", limits={"total_images": 100}),
    ]
    write_keys(folder / "keys.json", KeyFile(keys=keys))
    settings = {
        "model_dir": models,
        "model": "tiny",
        "port": port,
        "keys_file": folder / "keys.json",
        "store": redis.url,
    }
    command = [str(PYTHON), str(ROOT / "deploy" / "ray_serve.py"), "--replicas", "2"]
    url = f"http://127.0.0.1:{port}"
    with running(command, ray_environment(folder, **settings), folder / "ray.log") as processes:
        try:
            deadline = time.monotonic() + READY_S
            while len(replicas(processes)) < 2 or status(f"{url}/readyz") != 200:
                assert time.monotonic() < deadline, processes.last_words(40)
                assert processes.leader.poll() is None, processes.last_words(40)
                time.sleep(0.2)
            yield SimpleNamespace(url=url, processes=processes)
        finally:
            processes.stop(STOP_S)


def status(url: str) -> int:
    try:
        return httpx2.get(url, timeout=5).status_code
    except httpx2.TransportError:
        return 0


def replicas(processes) -> dict[int, float]:
    """Seconds of processor time of each replica, by process."""
    found = {}
    for process in processes.alive():
        place = Path(f"/proc/{process.pid}")
        try:
            if place.joinpath("cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                fields = place.joinpath("stat").read_text().rpartition(")")[2].split()
                found[process.pid] = (int(fields[11]) + int(fields[12])) * TICK_S
        except FileNotFoundError:
            continue
    return found


def ask(ray, key: str, *images, **more) -> httpx2.Response:
    more = {"headers": {"X-API-Key": key}} | more
    return httpx2.post(f"{ray.url}/v1/predict", files=[*images] or [IMAGE], timeout=20, **more)


def test_one_budget_is_served_exactly_by_two_replicas(ray):
    before = replicas(ray.processes)
    thief = Thief(SimpleNamespace(url=ray.url))
    spend(thief)
    assert thief.served == BUDGET
    assert thief.statuses.keys() == {200, 429}
    after = replicas(ray.processes)
    assert before.keys() == after.keys()
    assert len(after) == 2
    assert all(after[pid] - before[pid] >= 0.05 for pid in after)  # both have worked


def test_a_spent_budget_is_told_as_ever(ray):
    answer = ask(ray, "thief")
    assert answer.status_code == 429
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["retry-after"] == "86400"
    assert answer.headers["ratelimit-policy"] == f'"total";q={BUDGET};qu="images"'


def test_errors_have_their_shape(ray):
    unknown = ask(ray, "nobody")
    assert unknown.status_code == 401
    assert unknown.headers["www-authenticate"].startswith("Bearer")
    bad = ask(ray, "same", BAD)
    assert bad.status_code == 422
    plain = {"X-API-Key": "same", "Content-Type": "text/plain"}
    strange = httpx2.post(f"{ray.url}/v1/predict", content=b"x", headers=plain)
    assert strange.status_code == 415
    nowhere = httpx2.get(f"{ray.url}/v3", headers=plain)
    assert nowhere.status_code == 404
    for answer in (unknown, bad, strange, nowhere):
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status_code
        assert answer.json()["error"]


def test_health_needs_no_key(ray):
    for path in ("livez", "readyz", "v2/health/live", "v2/health/ready"):
        assert status(f"{ray.url}/{path}") == 200


def test_both_replicas_draw_the_same_for_the_same_image(ray):
    answers = {str(ask(ray, "same").json()["predictions"]) for _ in range(30)}
    assert len(answers) == 1


def test_without_redis_keys_fail_closed_and_the_server_is_not_ready(ray, redis):
    redis.stop(signal.SIGKILL)
    try:
        answer = ask(ray, "last")
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert "retry-after" in answer.headers
        # The other replica learns it when it next asks the store.
        wait_for(lambda: status(f"{ray.url}/readyz"), 503)
        assert status(f"{ray.url}/livez") == 200
    finally:
        redis.start()
    wait_for(lambda: ask(ray, "last").status_code, 200)


def test_sigterm_ends_all_of_it(ray):
    ray.processes.stop(STOP_S)
    assert ray.processes.ended_by == "SIGTERM"
    assert ray.processes.leader.returncode == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "which 2 workers do not share"),
        (
            {"tls_cert": "c.pem"},
            "not on Ray Serve, whose proxy has no such thing: SCUMBLE_TLS_CERT",
        ),
    ],
    ids=["budgets in memory", "TLS"],
)
def test_what_cannot_hold_is_refused_before_ray_starts(models, folder, more, said):
    command = [str(PYTHON), str(ROOT / "deploy" / "ray_serve.py"), "--replicas", "2"]
    settings = {"model_dir": models, "model": "tiny", "keys_file": folder / "keys.json", **more}
    environment = ray_environment(folder, **settings)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert said in done.stderr
