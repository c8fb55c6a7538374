"""The audit log over the public port: what stands in it, and what a full disk does."""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import orjson
import pytest
from prometheus_client import Counter
from starlette.testclient import TestClient

from app.access.keys import KeyFile, write_keys
from app.audit.hash_chain import verify
from app.audit.log import Audit
from app.errors import ConfigError
from app.main import create_app
from app.request_context import ALWAYS_CONNECTED, RequestContext
from app.settings import Settings
from tests.app.access.test_admission import BAD, IMAGE, ask, row
from tests.app.http.test_application import samples
from tests.pictures import PNG

HEADERS = {"Content-Type": "image/png"}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "audit" / "log"


@pytest.fixture
def audited(make_client, log, tmp_path):
    """`audited(**settings)` -> a client of an application with keys and an audit log."""
    log.parent.mkdir()
    keys = (
        row("acme", limits={"window_images": 9, "total_images": 5}),
        row("partner", defense="dcp", defense_params={"beta": 1.2}, output={"form": "label"}),
        row("gone", revoked="2026-01-02T00:00:00+00:00"),
    )
    write_keys(tmp_path / "keys.json", KeyFile(keys=keys))

    def make(**settings):
        settings = {"keys_file": tmp_path / "keys.json", "workers": 1, **settings}
        return make_client(audit_file=log, **settings)

    return make


def entries(log, kind: str = "prediction") -> list[dict]:
    """All lines of this kind, after a check of their chains."""
    files = sorted(log.parent.glob("log.worker-*"))
    parts, faults = verify(files)
    assert faults == []
    lines = [orjson.loads(line) for file in files for line in file.read_bytes().splitlines()]
    assert len(lines) == sum(len(part.seals) for part in parts)
    return [line for line in lines if line["kind"] == kind]


def test_every_prediction_has_a_line_whether_answered_or_refused(audited, log):
    client = audited(audit_on_failure="closed")
    ask(client, "acme", 2)
    ask(client, "acme", 4)
    ask(client, "partner", 3)
    ask(client, "gone")
    ask(client, None)
    client.post("/v1/predict", files=[IMAGE, BAD], headers={"X-API-Key": "acme"})
    client.post("/v2/models/tiny/infer", headers={"X-API-Key": "partner"})
    client.post("/v2/models/other/infer", headers={"X-API-Key": "partner"})
    client.get("/v1/model", headers={"X-API-Key": "acme"})
    client.get("/livez")
    found = entries(log)
    names = ("client", "policy", "route", "status", "images", "refusal", "left")
    infer = "/v2/models/{model}/infer"
    assert [tuple(line.get(name) for name in names) for line in found] == [
        ("acme", "none", "/v1/predict", 200, 2, None, {"window": 7, "total": 3}),
        ("acme", "none", "/v1/predict", 429, 4, "budget", {"window": 7, "total": 3}),
        ("partner", "dcp+label", "/v1/predict", 200, 3, None, None),
        ("gone", "none", "/v1/predict", 403, 0, "forbidden", None),
        (None, None, "/v1/predict", 401, 0, "unauthorized", None),
        ("acme", "none", "/v1/predict", 422, 0, "unprocessable", None),
        ("partner", "dcp+label", infer, 400, 0, "framing", None),
        ("partner", "dcp+label", infer, 404, 0, "not_found", None),
    ]
    served, asked = ("tiny", "1"), ("other", None)
    assert [(line["model"], line["version"]) for line in found] == [served] * 7 + [asked]
    assert all(line["time"].endswith("+00:00") for line in found)


def test_neither_keys_nor_images_nor_probabilities_get_in(audited, log):
    client = audited(audit_on_failure="closed")
    answer = client.post(
        "/v1/predict", files=[IMAGE], headers={"X-API-Key": "partner", "X-Request-ID": "abc.1"}
    )
    (line,) = entries(log)
    assert line["id"] == answer.json()["id"] == "abc.1"
    assert set(line) == {
        *("seq", "chain", "prev", "seal", "kind", "time", "id", "route", "status", "images"),
        *("model", "version", "client", "policy"),
    }
    text = log.with_name("log.worker-0").read_text()
    for number in answer.json()["predictions"][0]["probabilities"]:
        assert number in (0, 1) or str(number)[:6] not in text


def test_without_keys_the_policy_is_the_servers(make_client, log):
    log.parent.mkdir()
    options = {"defense": "dcp", "defense_params": {"beta": 1.2}}
    client = make_client(audit_file=log, audit_on_failure="closed", **options)
    client.post("/v1/predict", content=PNG, headers=HEADERS)
    (line,) = entries(log)
    assert (line["client"], line["policy"]) == (None, "dcp")


def test_an_open_log_is_written_soon_and_whole_at_the_end(make_client, models, log):
    log.parent.mkdir()
    app = create_app(Settings(model_dir=models, model="tiny", audit_file=log))
    with TestClient(app) as client:
        for _ in range(20):
            client.post("/v1/predict", content=PNG, headers=HEADERS)
        time.sleep(0.5)
        assert len(entries(log)) == 20
        client.post("/v1/predict", content=PNG, headers=HEADERS)
    assert len(entries(log)) == 21
    assert len(entries(log, "start")) == 1


def test_closed_refuses_while_the_log_cannot_be_written_and_recovers(audited, log):
    client = audited(audit_on_failure="closed")
    assert ask(client, "acme").status_code == 200
    log.parent.rename(log.parent.with_name("elsewhere"))
    refused = ask(client, "acme")
    assert refused.status_code == 503
    assert "audit log" in refused.json()["detail"]
    assert refused.headers["retry-after"] == "1"
    for path in ("/readyz", "/v2/health/ready"):
        assert client.get(path).status_code == 503
    assert ask(client, "acme", 2).status_code == 503
    assert samples(client)['scumble_audit_lines_total{"outcome": "lost"}'] >= 2
    log.parent.with_name("elsewhere").rename(log.parent)
    assert client.get("/readyz").status_code == 200
    answer = ask(client, "acme")
    assert answer.status_code == 200
    assert '"total";r=3' in answer.headers["ratelimit"], "what was refused was refunded"
    assert [line["lines"] for line in entries(log, "lost")] == [2]
    assert [line["status"] for line in entries(log)] == [200, 200]


def test_open_serves_on_while_the_log_cannot_be_written_and_says_what_is_lost(audited, log):
    client = audited(audit_on_failure="open")
    log.parent.rename(log.parent.with_name("elsewhere"))
    for _ in range(3):
        assert ask(client, "partner").status_code == 200
    time.sleep(0.3)
    assert client.get("/readyz").status_code == 200
    assert samples(client)['scumble_audit_lines_total{"outcome": "lost"}'] == 3
    log.parent.with_name("elsewhere").rename(log.parent)
    assert ask(client, "partner").status_code == 200
    time.sleep(0.3)
    assert [line["lines"] for line in entries(log, "lost")] == [3]
    assert len(entries(log)) == 1


def test_a_folder_that_is_not_there_stops_the_start(models, tmp_path):
    with pytest.raises(ConfigError, match="is missing or not writable"):
        create_app(Settings(model_dir=models, model="tiny", audit_file=tmp_path / "no" / "log"))


@pytest.mark.server
def test_killed_workers_leave_whole_chains_and_their_successors_go_on(serve, log):
    log.parent.mkdir()
    server = serve(workers=2, audit_file=log, audit_on_failure="closed", audit_fsync="never")

    def steal(_) -> int:
        served = 0
        with httpx2.Client(base_url=server.url, headers=HEADERS, timeout=30) as client:
            for _ in range(100):
                try:
                    served += client.post("/v1/predict", content=PNG).status_code == 200
                except httpx2.TransportError:
                    continue
        return served

    with ThreadPoolExecutor(4) as pool:
        thieves = pool.map(steal, range(4))
        second = log.with_name("log.worker-1")
        while not (second.exists() and b"\n" in second.read_bytes()):
            time.sleep(0.001)
        start = orjson.loads(second.read_bytes().splitlines()[0])
        os.kill(start["pid"], signal.SIGKILL)
        served = sum(thieves)
    while httpx2.get(f"{server.admin}/readyz").status_code != 200:
        time.sleep(0.05)
    served += sum(ThreadPoolExecutor(4).map(steal, range(4)))
    server.stop()
    assert sum(line["status"] == 200 for line in entries(log)) >= served > 700
    assert len(entries(log, "start")) == 3
    assert sorted(path.name for path in log.parent.iterdir()) == ["log.worker-0", "log.worker-1"]


def test_a_callback_that_raises_leaves_no_other_without_its_line(caplog):
    class Disk:
        def append(self, entries):
            pass

        def close(self):
            pass

    counts = (Counter(name, name, registry=None) for name in ("written", "lost"))
    fields = dict(zip(("written", "lost"), counts, strict=True))

    async def run():
        audit = Audit(Disk(), facts={}, policy=None, closed=True, **fields)
        async with audit.running():
            told = asyncio.get_running_loop().create_future()
            audit.note(RequestContext(ALWAYS_CONNECTED), "/v1/predict", 200, broken)
            audit.note(RequestContext(ALWAYS_CONNECTED), "/v1/predict", 200, told.set_result)
            return await asyncio.wait_for(told, 30)

    def broken(written):
        raise ValueError("a fault of the caller")

    assert asyncio.run(run())
    assert "a fault of the caller" in caplog.text
