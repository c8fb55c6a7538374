"""Keys and certificates that cannot be read for a while: real servers."""

import contextlib
import json
import os
import resource
import signal
from datetime import UTC, datetime

import httpx2
import pytest

from app.access.keys import KeyFile, read_keys, revoke_key, write_keys
from tests.app.access.test_admission import row
from tests.app.http.test_tls import authority, issue, trusting  # noqa: F401  # fixtures
from tests.app.processes.test_worker_fork_server import ready, wait_for
from tests.app.test_faults import IMAGE, post
from tests.pictures import PNG

pytestmark = pytest.mark.server
FAILED = 'scumble_reload_failures_total{file="keys"}'
NOW = datetime(2026, 1, 2, tzinfo=UTC)
KEY = {"X-API-Key": "one"}


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.json"
    write_keys(path, KeyFile(keys=(row("one"), row("two"))))
    return path


@contextlib.contextmanager
def out_of_descriptors(server, path):
    """The workers can open nothing more."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in server.workers()}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    yield
    for pid, limits in before.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def unreadable(server, path):
    """Something else has the file's name."""
    away = path.with_name("away")
    path.rename(away)
    path.mkdir()
    yield
    path.rmdir()
    away.rename(path)


@contextlib.contextmanager
def not_foreseen(server, path):
    """A key has an integer beyond 64 bits."""
    with changed(path, b'"defense_params":{"decimals":100000000000000000000}'):
        yield


@contextlib.contextmanager
def a_defense_that_cannot_be_made(server, path):
    with changed(path, b'"defense_params":{"decimals":99}'):
        yield


@contextlib.contextmanager
def changed(path, member):
    good = path.read_bytes()
    document = read_keys(path).model_dump(mode="json")
    document["keys"][1] |= {"defense": "round", "defense_params": {}}
    broken = json.dumps(document, separators=(",", ":")).encode()
    path.write_bytes(broken.replace(b'"defense_params":{}', member))
    yield
    path.write_bytes(good)


TROUBLES = [out_of_descriptors, unreadable, not_foreseen, a_defense_that_cannot_be_made]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_revocation_counts_as_soon_as_the_file_can_be_read(serve, keys_file, trouble):
    server = serve(workers=1, keys_file=keys_file, http__keep_alive_s=600)
    with httpx2.Client(base_url=server.url, headers={**IMAGE, **KEY}, timeout=30) as client:
        assert client.post("/v1/predict", content=PNG).status_code == 200
        with trouble(server, keys_file):
            if trouble is out_of_descriptors:
                revoke_key(keys_file, "id-one", NOW)
            wait_for(lambda: server.metrics()[FAILED] >= 1)
            assert client.post("/v1/predict", content=PNG).status_code == 200
        if trouble is not out_of_descriptors:
            revoke_key(keys_file, "id-one", NOW)
        wait_for(lambda: client.post("/v1/predict", content=PNG).status_code == 403)
    assert any("API key reload failed" in entry["event"] for entry in server.log)
    wait_for(lambda: not server.metrics()['scumble_reload_failing_seconds{file="keys"}'])


def test_workers_that_die_while_files_are_broken_come_up_with_the_last_good_ones(
    serve,
    keys_file,
    issue,  # noqa: F811  # the fixture
    trusting,  # noqa: F811  # the fixture
):
    files = issue()
    server = serve(workers=2, keys_file=keys_file, reload_failure_s=1, **files)
    write_keys(keys_file, KeyFile(keys=(row("new"),)))  # the last good one is not the first one
    with httpx2.Client(base_url=server.url, verify=trusting, headers=IMAGE, timeout=30) as client:
        statuses = {"new": 200, "one": 401}
        for key, status in statuses.items():
            for _ in range(4):
                wait_for(lambda key=key, status=status: ask(client, key) == status)
        keys_file.write_text('{"keys": [')
        files["tls_cert"].write_text("no certificate")
        for pid in server.workers():
            os.kill(pid, signal.SIGKILL)
        restarts = 'scumble_worker_restarts_total{reason="ended"}'
        wait_for(lambda: server.metrics()[restarts] == 2)
        wait_for(lambda: ready(server) and len(server.workers()) == 2)
        for key, status in statuses.items():
            assert ask(client, key) == status
        stale = {"status": "ready", "stale": ["keys", "tls"]}
        wait_for(lambda: httpx2.get(f"{server.admin}/readyz").json() == stale)
        wait_for(lambda: client.get("/readyz").json() == stale)
        assert httpx2.post(f"{server.admin}/reload", timeout=60).status_code == 200
        assert ask(client, "new") == 200
        assert server.metrics()[restarts] == 2
        write_keys(keys_file, KeyFile(keys=(row("newest"),)))
        issue()
        wait_for(lambda: httpx2.get(f"{server.admin}/readyz").json() == {"status": "ready"})
        assert ask(client, "newest") == 200


def ask(client, key: str) -> int:
    """Over a connection of its own, so that each worker has its turn."""
    headers = {"X-API-Key": key, "Connection": "close"}
    return client.post("/v1/predict", content=PNG, headers=headers).status_code


def test_closed_refuses_while_keys_cannot_be_read_for_too_long(serve, keys_file):
    server = serve(workers=1, keys_file=keys_file, keys_on_failure="closed", reload_failure_s=1)
    assert post(server, **KEY).status_code == 200
    with unreadable(server, keys_file):
        wait_for(lambda: post(server, **KEY).status_code == 503)
        assert post(server, **{"X-API-Key": "unknown"}).status_code == 503
        assert httpx2.get(f"{server.url}/livez").status_code == 200
        answer = httpx2.get(f"{server.url}/readyz")
        assert (answer.status_code, answer.json()["stale"]) == (503, ["keys"])
        wait_for(lambda: not ready(server))
    wait_for(lambda: post(server, **KEY).status_code == 200)
    wait_for(lambda: ready(server))


def test_a_certificate_counts_once_the_worker_has_descriptors_again(
    serve,
    issue,  # noqa: F811  # the fixture
    trusting,  # noqa: F811  # the fixture
):
    server = serve(workers=1, **issue())
    failed = 'scumble_reload_failures_total{file="tls"}'

    def serial() -> str:
        with httpx2.Client(verify=trusting) as client:
            stream = client.get(f"{server.url}/livez").extensions["network_stream"]
            return stream.get_extra_info("ssl_object").getpeercert()["serialNumber"]

    before = serial()
    with out_of_descriptors(server, None):
        issue()
        wait_for(lambda: server.metrics()[failed] >= 1)
    wait_for(lambda: serial() != before)
