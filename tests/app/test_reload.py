"""A new model under load: nothing is lost, nothing is mixed, and what cannot be served is not."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from app.admin.application import create_admin
from app.errors import BundleError, ConfigError
from app.processes.snapshot import copy_bundle
from app.settings import Settings
from app.system.temporary import temporary_folder
from app.telemetry.incidents import Incidents
from scumble.evaluation.local_server import start
from tests.app.processes.test_worker_fork_server import wait_for
from tests.app.test_faults import IMAGE, kill_one, post
from tests.pictures import PNG

pytestmark = pytest.mark.server


def set_version(models, version: str) -> None:
    path = models / "tiny" / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))


def tamper(models) -> None:
    path = models / "tiny" / "float32.onnx"
    path.write_bytes(path.read_bytes() + b"x")


def fail_the_self_test(models) -> None:
    """Right hashes, wrong answers: only a loaded engine can tell."""
    from hashlib import sha256

    golden, card = models / "tiny" / "golden.json", models / "tiny" / "card.json"
    document = json.loads(golden.read_text())
    rows = document["probabilities"]["float32"]
    document["probabilities"]["float32"] = [row[::-1] for row in rows]
    golden.write_text(json.dumps(document))
    written = json.loads(card.read_text())
    written["files"]["golden.json"] = sha256(golden.read_bytes()).hexdigest()
    card.write_text(json.dumps(written))


BROKEN = {
    "tampered": tamper,
    "wrong answers": fail_the_self_test,
    "gone": lambda models: shutil.rmtree(models / "tiny"),
    "malformed card": lambda models: (models / "tiny" / "card.json").write_text("{"),
}


class Asking:
    """Kept-alive clients in a loop; a request that fails in any way is noted."""

    def __init__(self, server, clients: int = 4) -> None:
        self.versions: list[str] = []
        self.failures: list[str] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        time.sleep(0.3)
        return self

    def __exit__(self, *exc_info):
        time.sleep(0.3)
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx2.Client(base_url=self._server.url, headers=IMAGE, timeout=30) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/v1/predict", content=PNG)
                    answer.raise_for_status()
                    self.versions.append(answer.json()["version"])
                except httpx2.HTTPError as exc:
                    self.failures.append(repr(exc))


def reload(server) -> subprocess.CompletedProcess:
    port = server.admin.rpartition(":")[2]
    command = [sys.executable, "-m", "scumble.cli", "reload", "--admin-port", port]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def reloads(server, result: str) -> float:
    return server.metrics()[f'scumble_reloads_total{{result="{result}"}}']


def workers_settle(server, count: int) -> None:
    deadline = time.monotonic() + 30
    while server.metrics()["scumble_workers"] != count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metrics()["scumble_workers"] == count


def test_a_reload_under_load_loses_nothing(serve, own_models):
    server = serve(workers=2, model_dir=own_models, http__keep_alive_s=1)
    with Asking(server) as asking:
        for version in ("2", "3"):
            set_version(own_models, version)
            done = reload(server)
            assert (done.returncode, done.stdout) == (0, "reloaded\n"), done.stderr
            assert httpx2.get(f"{server.admin}/readyz").status_code == 200
            assert httpx2.get(f"{server.url}/v1/model").json()["version"] == version
    assert asking.failures == []
    assert set(asking.versions) == {"1", "2", "3"}
    assert set(asking.versions[-4:]) == {"3"}
    workers_settle(server, 2)
    assert reloads(server, "done") == 2
    answered = server.metrics()['scumble_requests_total{code="200",route="/v1/predict"}']
    assert answered == len(asking.versions)


@pytest.mark.parametrize("how", BROKEN)
def test_what_cannot_be_served_changes_nothing(serve, own_models, how):
    server = serve(workers=2, model_dir=own_models)
    BROKEN[how](own_models)
    with Asking(server) as asking:
        done = reload(server)
        assert done.returncode == 1
        assert "cannot be served" in done.stderr
        workers_settle(server, 2)
        assert httpx2.get(f"{server.admin}/readyz").status_code == 200
        kill_one(server)  # its successor must be of the old model, too
        deadline = time.monotonic() + 30
        while httpx2.get(f"{server.admin}/readyz").status_code == 200:
            assert time.monotonic() < deadline
        while httpx2.get(f"{server.admin}/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(asking.failures) <= 4  # the killed worker's
    assert set(asking.versions) == {"1"}
    assert (reloads(server, "done"), reloads(server, "failed")) == (0, 1)
    assert any("reload failed" in entry["event"] for entry in server.log)


def test_sighup_reloads_and_an_idle_connection_gets_one_more_answer(serve, own_models):
    # A reload under load may take longer than the default time of idle connections.
    server = serve(workers=1, model_dir=own_models, http__keep_alive_s=60)
    with httpx2.Client(base_url=server.url, headers=IMAGE) as client:
        assert client.post("/v1/predict", content=PNG).json()["version"] == "1"
        set_version(own_models, "2")
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while not reloads(server, "done") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert post(server).json()["version"] == "2"
        # The old worker has been told to end, but may not have been scheduled since.
        last = client.post("/v1/predict", content=PNG)
        while last.headers.get("connection") != "close" and time.monotonic() < deadline:
            assert last.json()["version"] == "1"
            last = client.post("/v1/predict", content=PNG)
        assert (last.json()["version"], last.headers["connection"]) == ("1", "close")
        assert client.post("/v1/predict", content=PNG).json()["version"] == "2"
    workers_settle(server, 1)


def test_sigterm_in_the_middle_of_a_reload_ends_all(serve, own_models):
    server = serve(workers=2, model_dir=own_models)
    server.process.send_signal(signal.SIGHUP)
    time.sleep(0.4)
    assert server.stop() == 0


def test_web_pages_cannot_reload(serve):
    server = serve(workers=1)
    answer = httpx2.post(f"{server.admin}/reload", headers={"Origin": "http://evil"})
    assert answer.status_code == 403
    assert httpx2.get(f"{server.admin}/reload").headers["allow"] == "POST"


def test_a_reload_without_a_server_says_so(tmp_path):
    command = [sys.executable, "-m", "scumble.cli", "reload", "--admin-port", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "no answer from the admin port" in done.stderr


def test_a_copy_is_whole_checked_and_without_what_is_not_needed(own_models, tmp_path):
    settings = Settings(model_dir=own_models, model="tiny")
    (own_models / "tiny" / "int8.onnx").unlink()
    copy = copy_bundle(settings, tmp_path / "copy")
    assert copy.model_dir == tmp_path / "copy"
    assert copy.secret == settings.secret
    names = {path.name for path in (copy.model_dir / "tiny").iterdir()}
    assert names == {"card.json", "float32.onnx", "golden.json"}
    tamper(own_models)
    with pytest.raises(BundleError, match="sha256"):
        copy_bundle(settings, tmp_path / "other")


@pytest.fixture
def temporary(monkeypatch):
    """The folder for temporary files, for this test alone; its name must be short."""
    with tempfile.TemporaryDirectory(prefix="s") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def runs(temporary) -> list[Path]:
    return sorted(temporary.glob("scumble-run-*"))


def test_a_storm_of_signals_is_one_reload_and_another_one(serve, own_models):
    server = serve(workers=1, model_dir=own_models, http__keep_alive_s=1)
    set_version(own_models, "2")
    for _ in range(30):
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.005)  # or the kernel makes one of many
    answer = httpx2.post(f"{server.admin}/reload", timeout=60)  # comes after all of them
    assert answer.json() == {"status": "reloaded"}
    assert 1 <= reloads(server, "done") <= 3
    assert post(server).json()["version"] == "2"


def test_a_full_disk_fails_a_reload_with_a_sentence_and_leaves_nothing(
    serve, own_models, temporary
):
    server = serve(workers=1, model_dir=own_models)
    (run,) = runs(temporary)
    before = sorted((run / "models").rglob("*"))
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (100, hard))
    for _ in range(2):
        answer = httpx2.post(f"{server.admin}/reload", timeout=60)
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert "cannot be served" in answer.json()["detail"]
    assert sorted((run / "models").rglob("*")) == before
    assert reloads(server, "failed") == 2
    assert any("cannot be copied to" in entry["event"] for entry in server.log)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert httpx2.post(f"{server.admin}/reload", timeout=60).status_code == 200
    assert len(list((run / "models").iterdir())) == 1
    assert post(server).status_code == 200


def test_a_copy_that_cannot_be_made_is_named(own_models, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be copied to"):
        copy_bundle(Settings(model_dir=own_models, model="tiny"), tmp_path / "file" / "copy")


def test_the_console_shows_the_card_that_is_served(serve, own_models):
    server = serve(workers=1, model_dir=own_models)

    def version() -> str:
        return httpx2.get(f"{server.admin}/console/about").json()["model"]["version"]

    assert version() == "1"
    set_version(own_models, "2")
    assert version() == "1"
    assert httpx2.post(f"{server.admin}/reload", timeout=60).status_code == 200
    assert version() == "2"


def test_sigterm_before_it_is_ready_leaves_no_copy(models, temporary):
    server = start({"model_dir": models, "model": "tiny", "workers": 1})
    wait_for(lambda: list(temporary.glob("scumble-run-*/metrics")))
    assert server.stop() == 0
    assert runs(temporary) == []
    assert not any("Traceback" in entry["event"] for entry in server.log)


def test_what_a_killed_server_left_the_next_one_removes_and_nothing_else(serve, temporary):
    killed, living = serve(workers=1), serve(workers=1)
    assert len(runs(temporary)) == 2
    killed.stop(signal.SIGKILL)
    assert len(runs(temporary)) == 2
    serve(workers=1)
    assert len(runs(temporary)) == 2
    assert httpx2.post(f"{living.admin}/reload", timeout=60).status_code == 200


def test_folders_of_others_are_not_removed(temporary):
    (temporary / "elsewhere").mkdir()
    (temporary / "scumble-run-link").symlink_to(temporary / "elsewhere")
    (temporary / "scumble-run-left").mkdir()
    (temporary / "other").mkdir()

    def make():
        return temporary_folder("scumble-run-", temporary)

    with make() as one, make() as two:
        found = {path.name for path in temporary.iterdir()}
        assert found == {one.name, two.name, "scumble-run-link", "elsewhere", "other"}
    assert runs(temporary) == [temporary / "scumble-run-link"]


def test_a_worker_that_ends_again_and_again_is_started_more_and_more_rarely(serve, temporary):
    server = serve(workers=1)
    (run,) = runs(temporary)
    shutil.rmtree(next((run / "models").iterdir()))  # no other will load
    os.kill(server.workers()[0], signal.SIGKILL)

    def delays() -> list[float]:
        return [entry["after_s"] for entry in server.log if "after_s" in entry]

    wait_for(lambda: len(delays()) >= 4)
    assert delays()[:4] == [0.5, 1, 2, 4]


def test_what_nobody_foresaw_on_the_admin_port_is_a_problem_too():
    class Workers:
        async def reload(self) -> bool:
            raise OSError(28, "No space left on device")

    with tempfile.TemporaryDirectory() as folder:
        admin = create_admin(Workers(), folder, Settings(console=False), Incidents(), None)
        answer = TestClient(admin, raise_server_exceptions=False).post("/reload")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 500
