"""The engine `upstream`: answers of another server, whose faults never reach a client."""

import json
import math
import ssl
import time

import numpy as np
import orjson
import pytest
import trustme
from starlette.testclient import TestClient

from app.inference.bundle import Card, golden_inputs, write_card
from app.main import create_app
from app.settings import Settings
from tests.app.inference.upstream.fake import DROP, FakeUpstream, Reply, http, length, running
from tests.tiny import LABELS, SHAPE

IMAGES = golden_inputs(SHAPE)
TOKEN = "a-token-of-the-upstream"


def bundle(folder, fake: FakeUpstream, name="front", **sent):
    """A bundle for what the fake server runs, as `scumble connect` writes it."""
    target = folder / name
    target.mkdir(parents=True)
    x = IMAGES.astype(np.float64) / 255 / fake.scale
    if fake.datatype == "UINT8":
        x = IMAGES
    if fake.layout == "NCHW":
        x = x.transpose(0, 3, 1, 2)
    rows, _, _ = fake.network(x)
    golden = {"probabilities": {"float32": rows.tolist()}, "tolerance": {"float32": 0.001}}
    (target / "golden.json").write_bytes(orjson.dumps(golden))
    write_card(
        target,
        {
            "name": name,
            "version": "1",
            "labels": LABELS,
            "input": SHAPE.model_dump(),
            "upstream": {
                "version": "1",
                "input": "x",
                "datatype": fake.datatype,
                "layout": fake.layout,
                "std": [fake.scale],
                "output": "y",
                "answers": fake.answers,
                "max_batch": 8,
                "fingerprint": "0" * 64,
                **sent,
            },
        },
    )
    return folder


@pytest.fixture
def front(tmp_path):
    """`front(fake, *more, sent={}, **settings)` -> a client of the service before these servers."""
    clients = []

    def start(*fakes, sent=None, **settings) -> TestClient:
        models = bundle(tmp_path / f"models{len(clients)}", fakes[0], **(sent or {}))
        given = {
            "model_dir": models,
            "model": "front",
            "engine": "upstream",
            "upstream": " ".join(fake.url for fake in fakes),
            **settings,
        }
        client = TestClient(create_app(Settings(**given)), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def infer(client, images=IMAGES, **headers):
    tensor = {
        "name": "pixels",
        "datatype": "UINT8",
        "shape": list(images.shape),
        "data": images.ravel().tolist(),
    }
    return client.post("/v2/models/front/infer", json={"inputs": [tensor]}, headers=headers)


def rows_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    return np.array(output["data"]).reshape(output["shape"])


def metric(client, name, **labels) -> float:
    found = client.app.state.service.metrics.registry.get_sample_value(name, labels)
    return found or 0.0


def until(condition, seconds=20.0):
    """Wait for what another thread or loop brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("options", "sent", "tolerance"),
    [
        ({}, {}, 1e-6),
        ({"layout": "NHWC"}, {}, 1e-6),
        ({"datatype": "UINT8"}, {}, 1e-6),
        ({"datatype": "UINT8", "layout": "NHWC"}, {}, 1e-6),
        ({"datatype": "FP16"}, {}, 1e-6),
        ({"scale": 1 / 255}, {}, 1e-6),
        ({"answers": "logits"}, {}, 1e-6),
        ({"output_datatype": "FP16"}, {}, 1e-3),
        ({"output_datatype": "FP64"}, {}, 1e-6),
        ({"binary": False}, {"binary": False}, 1e-6),
        ({"version": None}, {"version": ""}, 1e-6),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_answers_are_those_of_the_embedded_network(front, make_client, options, sent, tolerance):
    with running(**options) as fake:
        client = front(fake, sent=sent)
        found = rows_of(infer(client))
    embedded = make_client()
    body = {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": list(IMAGES.shape)}]}
    body["inputs"][0]["data"] = IMAGES.ravel().tolist()
    expected = rows_of(embedded.post("/v2/models/tiny/infer", json=body))
    assert np.abs(found - expected).max() <= tolerance
    assert len(fake.batches) == 2  # the golden images, and these


def test_float_tensors_are_sent_as_they_are(front):
    tensor = IMAGES.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    with running() as fake:
        client = front(fake)
        pixels = rows_of(infer(client))
        body = {"name": "pixels", "datatype": "FP32", "shape": list(tensor.shape)}
        body["data"] = tensor.astype(float).ravel().tolist()
        floats = rows_of(client.post("/v2/models/front/infer", json={"inputs": [body]}))
    np.testing.assert_allclose(floats, pixels, atol=1e-6)


def other(**changes):
    """A fault that changes the answer before it is written."""

    def change(reply: Reply) -> bytes:
        for name, value in changes.items():
            setattr(reply, name, value)
        return reply.bytes()

    return change


def rows(change):
    """A fault that changes the rows."""

    def changed(reply: Reply) -> bytes:
        reply.outputs = {name: change(each) for name, each in reply.outputs.items()}
        return reply.bytes()

    return changed


def plain(status: int, body: bytes, **headers):
    """A fault that sends something else."""
    return lambda reply: http(status, body, {k.replace("_", "-"): v for k, v in headers.items()})


def output(**members):
    """A fault that sends one output as JSON."""
    return plain(200, json.dumps({"outputs": [members]}).encode())


def halved(reply: Reply) -> bytes:
    """Half of an answer whose Content-Length promises all of it, then the end."""
    whole = reply.bytes()
    start = b"HTTP/1.1 200 Any"
    return whole[: len(whole) // 2].replace(start, start + b"\r\nConnection: close")


def cut(reply: Reply) -> bytes:
    """A complete HTTP answer, in which bytes of the tensor are missing."""
    document, tail = reply.document()
    header = json.dumps(document).encode()
    return http(200, header + tail[:-4], length(header))


def more(reply: Reply) -> bytes:
    """A complete HTTP answer, in which bytes follow the tensor."""
    document, tail = reply.document()
    header = json.dumps(document).encode()
    return http(200, header + tail + b"more", length(header))


def renamed(reply: Reply) -> bytes:
    """Another output than the one that was asked for."""
    return other(outputs={"z": reply.outputs["y"]})(reply)


FLOATS = {"name": "y", "datatype": "FP32"}
FAULTS = {
    "the connection is closed": lambda reply: DROP,
    "half of the answer": halved,
    "no HTTP": lambda reply: b"SSH-2.0-OpenSSH_9.6\r\n\r\nConnection: close",
    "an HTML page": plain(200, b"<html><h1>It works!</h1></html>"),
    "an HTML error": plain(502, b"<html><h1>Bad gateway</h1></html>"),
    "not found": plain(404, b'{"error":"unknown model"}'),
    "an error of the server": plain(500, b'{"error":"CUDA out of memory"}'),
    "a redirect": plain(302, b"", Location="/login"),
    "no body": plain(200, b""),
    "no outputs": plain(200, b'{"model_name":"net"}'),
    "a list": plain(200, b"[]"),
    "an output without a name": output(shape=[6, 4], datatype="FP32", data=[0] * 24),
    "an output without a datatype": output(name="y", shape=[6, 4], data=[0] * 24),
    "too few numbers": output(**FLOATS, shape=[6, 4], data=[1]),
    "words": output(**FLOATS, shape=[1, 1], data=["a"]),
    "a negative shape": output(**FLOATS, shape=[-6, 4], data=[]),
    "a huge shape": output(**FLOATS, shape=[2**30, 2**30, 2**30], data=[]),
    "no size": output(**FLOATS, shape=[6, 4], parameters={"binary_data_size": "96"}),
    "missing bytes": cut,
    "more bytes than outputs": more,
    "a length that is not a number": plain(200, b"{}", Inference_Header_Content_Length="+1"),
    "a length of 5000 digits": plain(200, b"{}", Inference_Header_Content_Length="9" * 5000),
    "a length beyond the body": plain(200, b"{}", Inference_Header_Content_Length="999"),
    "fewer rows": rows(lambda y: y[:-1]),
    "fewer classes": rows(lambda y: y[:, :-1]),
    "another output": renamed,
    "whole numbers": other(datatypes={"y": "UINT8"}),
    "NaN": rows(lambda y: y * np.nan),
    "logits for probabilities": rows(lambda y: y * 9),
    "another version": other(version="2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_503_with_retry_after_and_no_rows(front, fault, caplog):
    with running() as fake:
        client = front(fake)
        fake.fault = FAULTS[fault]
        answer = infer(client)
        assert answer.status_code == 503, answer.text
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"].startswith("upstream ")
        assert "outputs" not in answer.json()
        assert "Traceback" not in caplog.text
        assert 1 <= caplog.text.count("WARNING") + caplog.text.count("ERROR") <= 4
        fake.fault = None
        until(lambda: client.get("/readyz").status_code == 200)
        rows_of(infer(client))


@pytest.mark.parametrize(
    "fault", ["the connection is closed", "half of the answer", "an HTML error"]
)
def test_a_fault_that_passes_is_not_seen_by_the_client(front, fault):
    with running() as fake:
        client = front(fake)
        expected = rows_of(infer(client))
        fake.fault, fake.faults = FAULTS[fault], 1
        np.testing.assert_array_equal(rows_of(infer(client)), expected)
        assert metric(
            client,
            "scumble_upstream_requests_total",
            replica=f"localhost:{fake.port}",
            outcome="failed",
        )


def test_a_row_that_is_no_distribution_fails_its_request_alone(front):
    def second_is_nan(reply: Reply) -> bytes:
        reply.outputs["y"][1:2] = np.nan
        return reply.bytes()

    with running() as fake:
        client = front(fake)
        expected = rows_of(infer(client))
        fake.fault = second_is_nan
        np.testing.assert_array_equal(rows_of(infer(client, IMAGES[:1])), expected[:1])
        assert infer(client, IMAGES[:2]).status_code == 503
        for _ in range(5):  # an image of a client's does not open the circuit
            infer(client, IMAGES[:2])
        np.testing.assert_array_equal(rows_of(infer(client, IMAGES[:1])), expected[:1])
        assert client.get("/readyz").status_code == 200


def test_retry_after_of_the_upstream_is_handed_on_within_bounds(front):
    with running() as fake:
        client = front(fake)
        for said, heard in (("7", "7"), ("999999", "60"), ("soon", "1")):
            until(lambda: client.get("/readyz").status_code == 200)
            fake.fault = lambda reply, said=said: http(503, b"busy", {"Retry-After": said})
            assert infer(client).headers["retry-after"] == heard
            fake.fault = None


def test_a_slow_upstream_gives_504_at_the_deadline_and_opens_no_circuit(front):
    with running() as fake:
        client = front(fake)
        fake.delay_s = 1.0
        for _ in range(4):
            assert infer(client, **{"X-Deadline-Ms": "50"}).status_code == 504
        fake.delay_s = 0.0
        rows_of(infer(client))
        assert client.get("/readyz").status_code == 200


def test_an_upstream_that_is_too_slow_gives_504_and_is_not_asked_again(front):
    with running() as fake:
        client = front(fake, upstream_timeout_s=0.2)
        asked = len(fake.requests)
        fake.delay_s = 1.0
        answer = infer(client)
        assert answer.status_code == 504
        assert answer.json()["detail"] == "the upstream did not answer in time"
        assert len(fake.requests) == asked + 1


def test_a_dead_replica_is_not_seen_by_clients(front):
    with running() as first, running() as second:
        client = front(first, second)
        expected = rows_of(infer(client))
        first.stop()
        for _ in range(12):
            np.testing.assert_array_equal(rows_of(infer(client)), expected)
        assert client.get("/readyz").status_code == 200
        failed = metric(
            client,
            "scumble_upstream_requests_total",
            replica=f"localhost:{first.port}",
            outcome="failed",
        )
        assert failed <= 3  # then its circuit is open


def test_without_an_upstream_the_service_starts_and_waits_for_it(front, caplog):
    fake = FakeUpstream()
    fake.start()
    fake.stop()
    client = front(fake)
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "upstream unavailable")
    answer = infer(client)
    assert (answer.status_code, answer.json()["detail"]) == (503, "upstream unavailable")
    fake.start()
    try:
        until(lambda: client.get("/readyz").status_code == 200)
        rows_of(infer(client))
    finally:
        fake.stop()
    assert caplog.text.count("upstream check failed") == 1


@pytest.mark.parametrize("change", [{"seed": 8}, {"version": "2"}, {"answers": "logits"}])
def test_another_network_makes_the_service_not_ready(front, change, caplog):
    with running() as fake:
        client = front(fake)
        rows_of(infer(client))
        fake.stop()
        before = {name: getattr(fake, name) for name in change}
        vars(fake).update(change)
        fake.start()
        answer = infer(client)
        assert answer.status_code == 503, "an answer of another network"
        until(lambda: client.get("/readyz").json()["status"] == "upstream model changed")
        assert infer(client).json()["detail"] == "upstream model changed"
        assert caplog.text.count("upstream model changed:") == 1
        vars(fake).update(before)
        until(lambda: client.get("/readyz").status_code == 200)
        rows_of(infer(client))


def test_the_network_changes_while_connections_stay_open_and_the_periodic_check_notices(front):
    with running() as fake:
        client = front(fake, upstream_check_s=1)
        rows_of(infer(client))
        fake.seed = 8
        until(lambda: client.get("/readyz").json()["status"] == "upstream model changed")


def test_the_defense_behind_the_upstream_gives_what_the_graph_gives(front, make_client):
    names = {"dcp": {"beta": 1.2}, "reverse_sigmoid": {"beta": 0.6}, "label": {}, "top_k": {"k": 2}}
    with running() as fake:
        for name, params in names.items():
            given = {"defense": name, "defense_params": params}
            found = rows_of(infer(front(fake, **given)))
            embedded = make_client(**given)
            tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(IMAGES.shape)}
            tensor["data"] = IMAGES.ravel().tolist()
            body = {"inputs": [tensor]}
            expected = rows_of(embedded.post("/v2/models/tiny/infer", json=body))
            assert np.abs(found - expected).max() < 3e-6, name


def test_requests_that_wait_share_batches_within_the_limit(front):
    with running() as fake:
        client = front(fake, upstream_concurrency=1)
        fake.batches.clear()
        many = np.concatenate([IMAGES] * 5)
        assert len(rows_of(infer(client, many))) == 30
        assert sum(fake.batches) == 30
        assert max(fake.batches) == 8


def test_token_and_traceparent_are_sent_and_the_token_is_not_shown(front, caplog):
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with running(token=TOKEN) as fake:
        client = front(fake, upstream_token=TOKEN)
        rows_of(infer(client, traceparent=trace))
        assert fake.requests[-1]["authorization"] == f"Bearer {TOKEN}"
        assert fake.requests[-1]["traceparent"] == trace
        fake.token = "another"
        infer(client)
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(client.app.state.service)


def test_a_wrong_token_is_reported_by_readiness(front):
    with running(token=TOKEN) as fake:
        client = front(fake)
        assert client.get("/readyz").json()["status"] == "upstream unavailable"


def test_tls_is_checked_with_the_named_certificates(front, tmp_path):
    authority, stranger = trustme.CA(), trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    for name, ca in (("right", authority), ("wrong", stranger)):
        ca.cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    with running(ssl=context) as fake:
        rows_of(infer(front(fake, upstream_ca=tmp_path / "right.pem")))
        refused = front(fake, upstream_ca=tmp_path / "wrong.pem")
        assert refused.get("/readyz").json()["status"] == "upstream unavailable"


def test_the_energy_comes_from_logits_and_the_residual_from_features(front):
    from app.inference.upstream.v2_messages import Tensors
    from app.inference.upstream.v2_network import V2Network
    from scumble.defenses.scores import Whitener

    card = Card.model_validate_json(
        orjson.dumps(
            {
                "format": "scumble-bundle/1",
                "name": "front",
                "version": "1",
                "labels": LABELS,
                "input": SHAPE.model_dump(),
                "files": {},
                "upstream": {
                    "input": "x",
                    "datatype": "UINT8",
                    "layout": "NHWC",
                    "output": "y",
                    "answers": "probabilities",
                    "logits": "z",
                    "features": "h",
                    "fingerprint": "0" * 64,
                },
            }
        )
    )
    network = V2Network.of(card)
    fake = FakeUpstream(datatype="UINT8", layout="NHWC")
    rows, logits, features = fake.network(IMAGES)
    found = network.read_tensors(Tensors({"y": rows, "z": logits, "h": features}, "1"), len(IMAGES))
    rng = np.random.default_rng(0)
    whitener = Whitener(
        features.mean(0), rng.normal(size=(2, features.shape[1])).astype(np.float32)
    )
    evidence = found.evidence(whitener)
    assert network.scores == {"energy", "residual"}
    np.testing.assert_allclose(evidence.energy, np.log(np.exp(logits).sum(1)), rtol=1e-5)
    np.testing.assert_allclose(evidence.residual, whitener.residual(features), rtol=1e-6)
    assert math.isfinite(evidence.energy.sum())
