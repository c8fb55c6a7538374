"""V2 requests that are passed through: one output is defended, and nothing else leaks."""

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np
import pytest
from click.testing import CliRunner

from app.access.keys import KeyFile, write_keys
from app.commands.connect import connect
from app.errors import ConfigError
from app.http.protocols.v2 import LENGTH
from app.main import create_app
from app.settings import Settings
from tests.app.access.test_admission import row
from tests.app.audit.test_log import entries
from tests.app.http.test_application import samples
from tests.app.inference.upstream.fake import DROP, FakeUpstream, http
from tests.app.inference.upstream.test_upstream import until
from tests.pictures import encoded, picture

PIXELS = np.stack([np.asarray(picture(seed=n)) for n in range(3)])
PLANAR = PIXELS.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
SERVED = "/v2/models/net/infer"
OTHER = "/v2/models/other/infer"
TENSOR = {"name": "x", "datatype": "FP32", "shape": [3, 3, 8, 8]}
IN_JSON = {**TENSOR, "data": PLANAR.reshape(-1).tolist()}


class Recorder(FakeUpstream):
    """Answers more than it is asked for, and records what it is asked.

    Attributes:
        asked: path and document of each inference request.
        status: of the answers to inference requests; 200 for proper ones.
        reply: what the model `other` answers; None for a proper answer.
        held: the model `other` does not answer yet.
        in_flight: requests to it that are not answered.
        most: of them, at a time.
        connections: that were opened.
    """

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.asked: list[tuple[str, dict]] = []
        self.status = 200
        self.reply: bytes | None = None
        self.held = False
        self.in_flight = self.most = self.connections = 0
        self.message = b'{"error": "unexpected shape for input \'x\'"}'

    async def _connection(self, reader, writer):
        self.connections += 1
        await super()._connection(reader, writer)

    async def _answer(self, method, path, headers, body):
        if "other" in path:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            while self.held:  # noqa: ASYNC110  # set by another thread
                await asyncio.sleep(0.005)
            self.in_flight -= 1
        if method == "POST":
            length = headers.get("inference-header-content-length")
            self.asked.append((path, json.loads(body[: int(length)] if length else body)))
            if self.status != 200:
                return http(self.status, self.message)
            if self.reply is not None and "other" in path:
                return self.reply
        elif path.endswith("/ready"):
            return http(404 if "gone" in path else 200, b"")
        return await super()._answer(method, path, headers, body)

    def _infer(self, headers, body):
        # Three images as one.
        reply = super()._infer(headers, body.replace(b"[1,9,8,8]", b"[3,3,8,8]"))
        _, logits, features = self.network(PLANAR)
        reply.outputs |= {"logits": logits, "features": features}
        reply.datatypes |= {"logits": "FP32", "features": "FP32"}
        return reply

    def _document(self, path):
        document = super()._document(path)
        if document is not None and "outputs" in document:
            document["outputs"].append({"name": "logits", "datatype": "FP32", "shape": [-1, 4]})
            document["parameters"] = {"secret": "path/to/weights"}
        return document


@pytest.fixture(scope="module")
def upstream():
    fake = Recorder()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture(autouse=True)
def fresh(upstream):
    upstream.asked.clear()
    upstream.status = 200
    upstream.reply = None
    upstream.most = 0
    yield
    upstream.held = False


@pytest.fixture(scope="module")
def folder(upstream, tmp_path_factory):
    """A bundle that describes the upstream's model."""
    models = tmp_path_factory.mktemp("models")
    command = [upstream.url, "--name", "net", "--models", str(models), "--normalize", "0..1"]
    done = CliRunner().invoke(connect, [*command, "--output", "y"])
    assert done.exit_code == 0, done.output
    return models


MODELS = {"net": {}, "other": {"output": "y", "defense": "label"}}


@pytest.fixture
def make(make_client, upstream, folder):
    def client(models=MODELS, **settings):
        own = {"model_dir": folder, "model": "net", "engine": "upstream", "upstream": upstream.url}
        return make_client(**{**own, **settings}, upstream_models=models)

    return client


@pytest.fixture
def clean(upstream):
    return upstream.network(PLANAR)[0]


def in_bytes(tail: bytes | None = None, **document) -> dict:
    raw = PLANAR.tobytes() if tail is None else tail
    tensor = {**TENSOR, "parameters": {"binary_data_size": PLANAR.nbytes}}
    head = json.dumps({"inputs": [tensor], **document}).encode()
    return {"content": head + raw, "headers": {LENGTH: str(len(head))}}


def values(answer) -> tuple[dict, np.ndarray]:
    assert answer.status_code == 200, answer.text
    length = answer.headers.get(LENGTH)
    document = json.loads(answer.content[: None if length is None else int(length)])
    (output,) = document["outputs"]
    data = output.pop("data") if length is None else answer.content[int(length) :]
    rows = np.frombuffer(data, "<f4") if length else np.array(data, np.float32)
    return document, rows.reshape(output["shape"])


BOTH_WAYS = {
    "JSON": {"json": {"inputs": [IN_JSON], "id": "a"}},
    "bytes": in_bytes(id="a"),
    "bytes to bytes": in_bytes(id="a", parameters={"binary_data_output": True}),
    "named": {"json": {"inputs": [IN_JSON], "id": "a", "outputs": [{"name": "y"}]}},
    "named in bytes": in_bytes(
        id="a", outputs=[{"name": "y", "parameters": {"binary_data": True}}]
    ),
    "nulls": {"json": {"inputs": [IN_JSON], "id": "a", "outputs": None, "parameters": None}},
}


@pytest.mark.parametrize("path", [SERVED, OTHER, "/v2/models/net/versions/1/infer"])
@pytest.mark.parametrize("form", BOTH_WAYS)
def test_only_the_defended_output_comes_back(make, upstream, clean, form, path):
    client = make(defense="label")
    document, rows = values(client.post(path, **BOTH_WAYS[form]))
    np.testing.assert_array_equal(rows, np.eye(4)[clean.argmax(axis=1)])
    assert set(document) == {"model_name", "model_version", "outputs", "id"} - (
        {"model_version"} if path == OTHER else set()
    )
    assert document["outputs"][0]["name"] == "y"
    sent_to, sent = upstream.asked[-1]
    assert sent_to.endswith("/infer")
    assert [output["name"] for output in sent["outputs"]] == ["y"]
    assert "id" not in sent


def test_tensors_arrive_as_they_were_sent(make, upstream, clean):
    """Nothing is clipped, scaled or decoded; without a defense the rows are the network's."""
    _, rows = values(make().post(SERVED, **BOTH_WAYS["bytes"]))
    np.testing.assert_allclose(rows, clean, atol=1e-6)
    path, document = upstream.asked[-1]
    (tensor,) = document["inputs"]
    assert path == "/v2/models/net/versions/1/infer"
    assert tensor == {**TENSOR, "parameters": {"binary_data_size": PLANAR.nbytes}}


def test_logits_are_those_of_the_defended_row(make, clean):
    models = {"other": {"output": "z", "answers": "logits", "defense": "round",
                        "defense_params": {"decimals": 1}}}  # fmt: skip
    _, found = values(make(models).post(OTHER, **BOTH_WAYS["JSON"]))
    rounded = np.exp(found) / np.exp(found).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rounded * 10, np.rint(rounded * 10), atol=1e-5)
    np.testing.assert_array_equal(rounded.argmax(axis=1), clean.argmax(axis=1))


def json_request(**changes) -> dict:
    return {"json": {"inputs": [IN_JSON], **changes}}


def with_output(**changes) -> dict:
    return json_request(outputs=[{"name": "y", **changes}])


REFUSED = {
    "another output": (json_request(outputs=[{"name": "logits"}]), 422, "only 'y'"),
    "two outputs": (json_request(outputs=[{"name": "y"}, {"name": "logits"}]), 422, "only 'y'"),
    "raw output": (json_request(parameters={"raw_output": True}), 422, "raw_output"),
    "a parameter of the model": (json_request(parameters={"verbose": 1}), 422, "verbose"),
    "a sequence": (json_request(parameters={"sequence_id": 1}), 422, "sequence_id"),
    "an unknown member": (json_request(raw_output_contents=True), 422, "raw_output_contents"),
    "classes": (with_output(parameters={"classification": 4}), 422, "classification"),
    "output into shared memory": (
        with_output(parameters={"shared_memory_region": "a", "shared_memory_byte_size": 48}),
        422,
        "shared_memory",
    ),
    "input from shared memory": (
        {"json": {"inputs": [{**TENSOR, "parameters": {"shared_memory_region": "a"}}]}},
        422,
        "shared_memory",
    ),
    "a raw body": ({"content": b"\x89PNG", "headers": {LENGTH: "0"}}, 400, "JSON"),
    "no inputs": ({"json": {"inputs": []}}, 422, "0 inputs"),
    "no list": ({"json": {"inputs": {}}}, 400, "list"),
    "no shape": ({"json": {"inputs": [{**IN_JSON, "shape": []}]}}, 422, "shape"),
    "no images": ({"json": {"inputs": [{**IN_JSON, "shape": [0, 3, 8, 8]}]}}, 422, "shape"),
    "unequal numbers of images": (
        {"json": {"inputs": [IN_JSON, {**IN_JSON, "name": "z", "shape": [2, 3, 8, 12]}]}},
        422,
        "2 images",
    ),
    "too many images": ({"json": {"inputs": [{**IN_JSON, "shape": [9, 3, 8, 8]}]}}, 413, "9"),
    "bytes missing": (in_bytes(tail=b"x"), 400, "1 bytes follow"),
    "no data": ({"json": {"inputs": [TENSOR]}}, 400, "no data"),
    "no JSON": ({"content": b"{"}, 400, "JSON"),
    "nested data": (
        {
            "content": json.dumps({"inputs": [TENSOR | {"data": []}]}).replace(
                "[]", "[" * 400 + "1" + "]" * 400
            )
        },
        422,
        "data is nested too deeply",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_reveal_more_is_refused_and_never_sent(make, upstream, name):
    request, status, said = REFUSED[name]
    client = make(limits={"max_tensor_images": 8})
    before = len(upstream.asked)
    answer = client.post(OTHER, **request)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]
    assert len(upstream.asked) == before


@pytest.mark.parametrize(
    ("status", "ours"), [(400, 422), (404, 404), (422, 422), (413, 413), (500, 503), (302, 503)]
)
def test_refusals_of_the_upstream_keep_their_status_and_the_log_has_their_text(
    make, upstream, caplog, status, ours
):
    client = make()
    upstream.status = status
    answer = client.post(OTHER, **BOTH_WAYS["JSON"])
    assert answer.status_code == ours
    said = "failed with" if ours == 503 else "refused the request with"
    assert answer.json()["error"] == f"the upstream {said} status {status}"
    assert "unexpected shape" in caplog.text
    upstream.status = 200
    assert client.post(OTHER, **BOTH_WAYS["JSON"]).status_code == 200


def predict(client):
    return client.post("/v1/predict", files={"image": ("x.png", encoded(picture(seed=0)))})


HARMFUL = {
    **{f"status {n}": http(n, b"no") for n in (400, 401, 403, 429, 500, 502, 503, 504)},
    "too large": http(200, b"x" * 10_001),
    "half of an answer": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{",
    "no HTTP": b"SSH-2.0\r\n\r\nConnection: close",
    "no connection": DROP,
    "no JSON": http(200, b"{"),
    "a long length": http(200, b"{}", {LENGTH: "9" * 5000}),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_nothing_that_a_passed_model_answers_takes_the_replica_from_others(
    make, upstream, monkeypatch, name
):
    monkeypatch.setattr("app.inference.upstream.client.MOST_BYTES", 10_000)
    client = make()
    upstream.reply = HARMFUL[name]
    for _ in range(4):
        answer = client.post(OTHER, **BOTH_WAYS["JSON"])
        assert answer.status_code == (422 if name == "status 400" else 503), answer.text
        assert predict(client).status_code == 200
    asked = sum(path == OTHER for path, _ in upstream.asked)
    assert asked == 12 if name == "no connection" else asked == 4
    valid = 4 if name in ("no JSON", "a long length") else 0
    assert answered(client, upstream) == 4 + valid


def test_a_dead_replica_is_noticed_by_requests_that_are_passed_through(make, upstream):
    second = Recorder()
    second.start()
    client = make(upstream=f"{upstream.url} {second.url}")
    second.stop()
    for _ in range(6):
        values(client.post(OTHER, **BOTH_WAYS["JSON"]))
    usable = f'scumble_upstream_usable{{"replica": "localhost:{second.port}"}}'
    until(lambda: samples(client)[usable] == 0)


def answered(client, upstream) -> float:
    replica = f'"replica": "localhost:{upstream.port}"'
    return samples(client)[f'scumble_upstream_requests_total{{"outcome": "answered", {replica}}}']


def test_requests_that_are_passed_through_leave_room_for_others(make, upstream):
    client = make(upstream_concurrency=2, limits={"max_queue": 8})
    upstream.held = True
    with ThreadPoolExecutor(8) as pool:
        posts = [pool.submit(client.post, OTHER, **BOTH_WAYS["JSON"]) for _ in range(2)]
        until(lambda: upstream.in_flight == 2)
        waits = pool.submit(client.get, "/v2/models/other")
        for _ in range(3):
            assert predict(client).status_code == 200
        for path in ("/v2/models/other", "/v2/models/other/ready"):
            assert client.get(path, headers={"X-Deadline-Ms": "50"}).status_code == 504
        full = client.post(OTHER, **BOTH_WAYS["JSON"])
        assert full.status_code == 503
        assert "images are waiting; allowed: 8" in full.json()["error"]
        assert client.get("/readyz").status_code == 200
        upstream.held = False
        assert [each.result().status_code for each in [*posts, waits]] == [200] * 3
    assert upstream.most == 2
    values(client.post(OTHER, **BOTH_WAYS["JSON"]))


def test_a_short_deadline_gives_504_and_keeps_the_connection(make, upstream, monkeypatch):
    monkeypatch.setattr("app.http.protocols.v2_pass_through.LEAST_S", 30.0)
    client = make()
    values(client.post(OTHER, **BOTH_WAYS["JSON"]))
    connections = upstream.connections
    for n in (2, 3):
        upstream.held = True
        late = client.post(OTHER, **BOTH_WAYS["JSON"], headers={"X-Deadline-Ms": "1000"})
        assert late.status_code == 504
        assert late.json()["error"] == "the upstream did not answer in time"
        upstream.held = False
        until(lambda n=n: answered(client, upstream) == n)
    assert upstream.connections == connections


COUNTING = """
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

from scumble.defenses.base import Defense


@dataclass(frozen=True, kw_only=True)
class Counting(Defense):
    pause_s: float = 0.0
    calls: ClassVar[list] = []

    def __call__(self, probs, inputs):
        self.calls.append((len(probs), threading.current_thread().name))
        if self.pause_s and probs.shape[1] == 4:  # not those at the start
            time.sleep(self.pause_s)
        return probs
"""


@pytest.fixture
def counting(make, tmp_path):
    """`counting(**params)` -> a client of a model with this defense, and the list of its calls."""
    file = tmp_path / "counting.py"
    file.write_text(COUNTING)

    def made(**params):
        other = {"output": "y", "defense": f"{file}:Counting", "defense_params": params}
        client = make({"other": other}, batch={"max_size": 2})
        calls = client.app.state.service.pass_through.models["other"].defense.calls
        calls[1:] = []
        return client, calls

    return made


def test_a_defense_gets_parts_of_the_rows_and_never_holds_the_loop(counting, clean):
    client, calls = counting()
    _, rows = values(client.post(OTHER, **BOTH_WAYS["JSON"]))
    np.testing.assert_allclose(rows, clean, atol=1e-6)
    assert [size for size, _ in calls[1:]] == [2, 1]
    assert all(thread.startswith("decode") for _, thread in calls[1:])


def test_a_deadline_ends_a_defense_between_its_parts(counting):
    client, calls = counting(pause_s=1.0)
    late = client.post(OTHER, **BOTH_WAYS["JSON"], headers={"X-Deadline-Ms": "700"})
    assert late.status_code == 504
    client.post(OTHER, **BOTH_WAYS["JSON"])  # after all tasks of the first one
    assert [size for size, _ in calls[1:]].count(1) == 1


def test_a_defense_of_the_server_that_is_too_slow_stops_the_start(make):
    with pytest.raises(ConfigError, match=r"takes .* for 32 images; allowed: 2.5e-07 s, 1/4 of"):
        make(defense="label", watchdog_s=1e-6)


AT_START = """
import time
from dataclasses import dataclass

from scumble.defenses.base import Defense


@dataclass(frozen=True, kw_only=True)
class Slow(Defense):
    def __call__(self, probs, inputs):
        time.sleep(0.15 if len(probs) > 1 else 0)
        return probs


@dataclass(frozen=True, kw_only=True)
class Fails(Defense):
    def __call__(self, probs, inputs):
        return probs[:, :10] if len(probs) == 1 else probs / "0"
"""


@pytest.mark.parametrize(
    ("name", "said"), [("Slow", "takes 0.* s for 32 images; allowed: 0.1 s"), ("Fails", "fails on")]
)
def test_the_defense_of_another_model_is_tried_at_start(make, tmp_path, name, said):
    file = tmp_path / "at_start.py"
    file.write_text(AT_START)
    models = {"other": {"output": "y", "defense": f"{file}:{name}"}}
    with pytest.raises(ConfigError, match=f"SCUMBLE_UPSTREAM_MODELS: model 'other': .*{said}"):
        make(models, watchdog_s=0.4)


def test_rows_that_are_no_distributions_are_not_sent_out(make):
    models = {"other": {"output": "h", "defense": "none"}}
    client = make(models)
    for _ in range(5):
        answer = client.post(OTHER, **BOTH_WAYS["JSON"])
        assert answer.status_code == 503
    assert "distribution" in answer.json()["error"]
    assert client.get("/readyz").status_code == 200


def test_fewer_rows_than_images_are_not_sent_out(make):
    """Otherwise a model that takes several images as one would answer more than was charged."""
    tensor = {**IN_JSON, "shape": [1, 9, 8, 8]}
    answer = make().post(OTHER, json={"inputs": [tensor]})
    assert answer.status_code == 503


def test_other_models_of_the_server_do_not_exist(make, upstream):
    client = make({"net": {}})
    before = len(upstream.asked)
    answers = [client.post(OTHER, **BOTH_WAYS["JSON"]), client.get("/v2/models/other")]
    assert [answer.status_code for answer in answers] == [404, 404]
    extensions = ("repository/index", "models/net/config", "models/net/stats", "trace/setting")
    for path in (*extensions, "logging", "systemsharedmemory/status"):
        assert client.get(f"/v2/{path}").status_code == 404
    assert len(upstream.asked) == before


@pytest.mark.parametrize("name", ["net", "other"])
def test_metadata_show_the_defended_output_alone(make, name):
    client = make()
    for path in (f"/v2/models/{name}", f"/v2/models/{name}/versions/1"):
        document = client.get(path).json()
        assert document["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
        assert document["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]
        assert set(document) == {"name", "platform", "versions", "inputs", "outputs"}
    assert client.get(f"/v2/models/{name}/ready").status_code == 200


def test_readiness_of_a_model_is_the_upstreams(make):
    client = make({"gone": {"output": "y", "defense": "label"}})
    assert client.get("/v2/models/gone/ready").status_code == 503


def changed(folder, target, **members):
    """A copy of the bundle whose card has other members."""
    name = members.get("name", "net")
    shutil.copytree(folder / "net", target / name)
    card = json.loads((target / name / "card.json").read_text())
    (target / name / "card.json").write_text(json.dumps({**card, **members}))
    return {"model_dir": target, "model": name}


@pytest.mark.parametrize("of_card", ["1", "7"])
def test_another_version_of_the_served_model_is_unknown(make, folder, tmp_path, upstream, of_card):
    """The versions in paths are the upstream's, whatever the card's is."""
    client = make(**changed(folder, tmp_path, version=of_card))
    for version, status in (("1", 200), ("2", 404), ("7", 404), ("%2E%2E", 404)):
        answer = client.post(f"/v2/models/net/versions/{version}/infer", **BOTH_WAYS["JSON"])
        assert answer.status_code == status, version
    assert [path for path, _ in upstream.asked[1:]] == ["/v2/models/net/versions/1/infer"]


@pytest.mark.parametrize("version", ["..", ".", "...", "a" * 65, "a b", "..\n"])
def test_a_version_that_leads_elsewhere_is_unknown(make, upstream, version):
    client = make()
    before = len(upstream.asked)
    encoded_version = quote(version, safe="").replace(".", "%2E")
    answer = client.post(f"/v2/models/other/versions/{encoded_version}/infer", **BOTH_WAYS["JSON"])
    assert answer.status_code == 404
    assert len(upstream.asked) == before
    for valid in ("3", "..a", "v1.2"):
        client.post(f"/v2/models/other/versions/{valid}/infer", **BOTH_WAYS["JSON"])
        assert upstream.asked[-1][0] == f"/v2/models/other/versions/{valid}/infer"


def test_no_version_can_be_asked_for_where_none_is_known(make, folder, tmp_path, upstream):
    sent = json.loads((folder / "net" / "card.json").read_text())["upstream"]
    client = make(**changed(folder, tmp_path, upstream={**sent, "version": ""}))
    assert client.post(SERVED, **BOTH_WAYS["JSON"]).status_code == 200
    assert upstream.asked[-1][0] == SERVED
    answer = client.post("/v2/models/net/versions/1/infer", **BOTH_WAYS["JSON"])
    assert answer.status_code == 404


def test_a_model_with_the_name_of_the_card_is_the_served_one(make, folder, tmp_path):
    with pytest.raises(ConfigError, match="model 'other': the served model, 'net' on the upstream"):
        make(**changed(folder, tmp_path, name="other"))


def test_replicas_have_the_same_model(make, upstream):
    urls = f"{upstream.url} {upstream.url[: -len('net')]}other"
    with pytest.raises(ConfigError, match="/v2/models/net and /v2/models/other"):
        make(upstream=urls)
    make({}, upstream=urls)


@pytest.fixture
def keyed(make, tmp_path):
    """`keyed(key, ...)` -> a function that makes a client with one of these keys."""

    def made(*keys, **settings):
        write_keys(tmp_path / "keys.json", KeyFile(keys=list(keys)))
        return make(
            keys_file=tmp_path / "keys.json", audit_file=tmp_path / "log", workers=1, **settings
        )

    return made


def test_images_are_charged_counted_and_logged(keyed, tmp_path):
    client = keyed(row("acme", limits={"total_images": 7}), audit_on_failure="closed")
    client.headers["X-API-Key"] = "acme"
    refused = json_request(parameters={"raw_output": True})
    asked = [(OTHER, BOTH_WAYS["JSON"]), (SERVED, BOTH_WAYS["bytes"]), (OTHER, refused)]
    asked += [(OTHER, BOTH_WAYS["bytes"])]
    found = [client.post(path, **request) for path, request in asked]
    assert [answer.status_code for answer in found] == [200, 200, 422, 429]
    stranger = client.post(OTHER, **BOTH_WAYS["JSON"], headers={"X-API-Key": "x"})
    unclear = client.post(OTHER, **BOTH_WAYS["JSON"], headers={"X-Deadline-Ms": "x"})
    assert (stranger.status_code, unclear.status_code) == (401, 422)
    assert ";r=4" in found[0].headers["RateLimit"]
    assert ";r=1" in found[1].headers["RateLimit"]
    counted = samples(client)
    for name in ("net", "other"):
        label = f'scumble_images_total{{"model": "{name}", "precision": "float32"}}'
        assert counted[label] == 3
    assert counted['scumble_client_images_total{"client": "acme"}'] == 6
    lines = entries(tmp_path / "log")
    assert [(line["model"], line["images"], line["status"]) for line in lines] == [
        ("other", 3, 200), ("net", 3, 200), ("other", 0, 422), ("other", 3, 429),
        ("other", 0, 401), ("other", 0, 422),
    ]  # fmt: skip
    assert (lines[0]["policy"], lines[0]["version"]) == ("label", None)
    assert (lines[1]["policy"], lines[1]["version"]) == ("none", "1")


UNKNOWN = {
    "nothing": ("nothing", None),
    "nothing/versions/9": ("nothing", "9"),
    "x" * 300: ("x" * 64, None),
    "net/versions/9": ("net", "9"),
    "net/versions/" + "9" * 300: ("net", "9" * 64),
}


def test_the_audit_log_has_the_unknown_model_or_version_that_was_asked(keyed, tmp_path):
    client = keyed(row("acme", limits={"total_images": 7}), audit_on_failure="closed")
    client.headers["X-API-Key"] = "acme"
    for path in UNKNOWN:
        answer = client.post(f"/v2/models/{path}/infer", **BOTH_WAYS["JSON"])
        assert answer.status_code == 404, path
    lines = entries(tmp_path / "log")
    assert [(line["model"], line["version"]) for line in lines] == list(UNKNOWN.values())
    assert {(line["client"], line["images"]) for line in lines} == {("acme", 0)}
    assert not [name for name in samples(client) if "nothing" in name or "xxx" in name]


def test_a_keys_own_defense_is_for_the_served_model_alone(keyed, clean):
    client = keyed(
        row("label", output={"form": "label"}),
        row("random", defense="random", defense_params={"epsilon": 0.5}),
    )
    request = BOTH_WAYS["JSON"]

    def post(path, key):
        return client.post(path, **request, headers={"X-API-Key": key})

    _, rows = values(post(SERVED, "label"))
    np.testing.assert_array_equal(rows, np.eye(4)[clean.argmax(axis=1)])
    assert post(OTHER, "label").status_code == 403
    answer = post(SERVED, "random")
    assert answer.status_code == 422
    assert "is for images" in answer.json()["error"]


def test_a_request_that_the_upstream_refuses_is_not_charged(keyed, upstream):
    client = keyed(row("acme", limits={"total_images": 3}))
    client.headers["X-API-Key"] = "acme"
    upstream.status = 400
    assert client.post(OTHER, **BOTH_WAYS["JSON"]).status_code == 422
    upstream.status = 200
    assert client.post(OTHER, **BOTH_WAYS["JSON"]).status_code == 200


def test_v1_still_takes_images(make, clean):
    client = make(defense="label")
    files = [("image", ("x.png", encoded(picture(seed=n)), "image/png")) for n in range(3)]
    answer = client.post("/v1/predict", files=files)
    assert answer.status_code == 200, answer.text
    rows = [each["probabilities"] for each in answer.json()["predictions"]]
    np.testing.assert_array_equal(np.array(rows), np.eye(4)[clean.argmax(axis=1)])


WRONG = {
    "no output": ({"other": {"defense": "label"}}, {}, "output is ''"),
    "no defense": ({"other": {"output": "y"}}, {}, "defense ''"),
    "unknown defense": ({"other": {"output": "y", "defense": "magic"}}, {}, "unknown defense"),
    "a defense of a bundle": (
        {"other": {"output": "y", "defense": "codebook"}}, {}, "needs the codebook",
    ),
    "a defense of images": (
        {"other": {"output": "y", "defense": "random", "defense_params": {"epsilon": 0.5}}},
        {},
        "needs images",
    ),
    "the server's defense needs images": (
        {"net": {}},
        {"defense": "random", "defense_params": {"epsilon": 0.5}},
        "needs images",
    ),
    "the served one with settings": ({"net": {"output": "y"}}, {}, "the served one"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_passed_through_stops_the_start(make, name):
    models, settings, said = WRONG[name]
    with pytest.raises(ConfigError, match=f"SCUMBLE_UPSTREAM_MODELS: model .*{said}"):
        make(models, **settings)


def test_another_engine_passes_nothing_through(models):
    settings = Settings(model_dir=models, model="tiny", upstream_models={"net": {}})
    with pytest.raises(ConfigError, match="SCUMBLE_UPSTREAM_MODELS needs the engine upstream"):
        create_app(settings)
