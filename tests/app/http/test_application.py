"""The public port. One error shape, everywhere:

application/problem+json: {"type", "title", "status", "detail", "error"}
status equals the HTTP status, error equals detail, X-Request-ID is echoed.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.http.application import build
from app.inference.bundle import open_bundle
from app.inference.engines import load
from tests.pictures import PNG, encoded, picture
from tests.tiny import LABELS

HEADERS = {"Content-Type": "image/png"}


def test_an_answer(client):
    answer = client.post("/v1/predict", content=PNG, headers=HEADERS)
    document = answer.json()
    assert document.keys() == {"model", "version", "id", "predictions"}
    assert (document["model"], document["version"]) == ("tiny", "1")
    assert document["id"] == answer.headers["x-request-id"]
    (prediction,) = document["predictions"]
    probabilities = prediction["probabilities"]
    assert len(probabilities) == len(LABELS)
    assert math.isclose(sum(probabilities), 1, abs_tol=1e-6)
    best = probabilities.index(max(probabilities))
    assert prediction["index"] == best
    assert prediction["label"] == LABELS[best]
    assert prediction["probability"] == probabilities[best]


def test_the_answer_is_the_engines(client, models):
    source = picture(seed=3)
    engine = load(
        "openvino",
        open_bundle(models, "tiny").onnx("float32"),
        threads=1,
        precision="float32",
    )
    expected = engine(np.asarray(source)[np.newaxis])[0]
    answer = client.post("/v1/predict", content=encoded(source), headers=HEADERS).json()
    np.testing.assert_array_equal(
        np.array(answer["predictions"][0]["probabilities"], np.float32), expected
    )


def test_top_k_sorts_and_replaces_the_vector(client):
    full = client.post("/v1/predict", content=PNG, headers=HEADERS).json()["predictions"][0]
    short = client.post("/v1/predict?top_k=3", content=PNG, headers=HEADERS).json()
    top = short["predictions"][0]["top"]
    assert "probabilities" not in short["predictions"][0]
    assert [row["probability"] for row in top] == sorted(full["probabilities"], reverse=True)[:3]
    assert all(row["label"] == LABELS[row["index"]] for row in top)


def test_a_good_request_id_is_kept_and_a_bad_one_replaced(client):
    def ask(name: str) -> str:
        headers = {**HEADERS, "X-Request-ID": name}
        return client.post("/v1/predict", content=PNG, headers=headers).json()["id"]

    assert ask("abc-1.2_3") == "abc-1.2_3"
    assert ask("a b") != "a b"
    assert ask("x" * 65) != "x" * 65


def test_the_model_says_nothing_of_the_defense(make_client):
    client = make_client(defense="dcp", defense_params={"beta": 1.2})
    answer = client.get("/v1/model")
    assert answer.json()["labels"] == LABELS
    assert answer.json()["input"] == {"height": 8, "width": 8, "channels": 3}
    everything = answer.text + client.get("/openapi.json").text + str(answer.headers)
    for word in ("defen", "dcp", "beta", "openvino", "uvicorn", "server"):
        assert word not in everything.lower()


def test_health(client):
    assert client.get("/livez").json() == {"status": "live"}
    assert client.get("/readyz").json() == {"status": "ready"}
    client.app.state.service.state.draining = True
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 503
    assert client.post("/v1/predict", content=PNG, headers=HEADERS).status_code == 200


REFUSALS = {
    "no route": ("GET", "/nope", {}, 404),
    "wrong method": ("GET", "/v1/predict", {}, 405),
    "wrong method on model": ("POST", "/v1/model", {}, 405),
    "type": ("POST", "/v1/predict", {"content": b"x"}, 415),
    "framing": ("POST", "/v1/predict", {"json": {}}, 400),
    "image": ("POST", "/v1/predict", {"content": b"x", "headers": HEADERS}, 422),
    "size": ("POST", "/v1/predict", {"content": bytes(11 * 2**20), "headers": HEADERS}, 413),
    "top_k 0": ("POST", "/v1/predict?top_k=0", {"content": PNG, "headers": HEADERS}, 422),
    "top_k text": ("POST", "/v1/predict?top_k=two", {"content": PNG, "headers": HEADERS}, 422),
    "top_k too large": ("POST", "/v1/predict?top_k=5", {"content": PNG, "headers": HEADERS}, 422),
    "top_k huge": (
        "POST",
        f"/v1/predict?top_k={'9' * 5000}",
        {"content": PNG, "headers": HEADERS},
        422,
    ),
    "top_k that begins well": (
        "POST",
        f"/v1/predict?top_k=000000003{'9' * 5000}",
        {"content": PNG, "headers": HEADERS},
        422,
    ),
    "top_k in other digits": (
        "POST",
        "/v1/predict?top_k=%D9%A2",
        {"content": PNG, "headers": HEADERS},
        422,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_one_error_shape(client, name):
    method, path, options, status = REFUSALS[name]
    answer = client.request(method, path, **options)
    assert answer.status_code == status
    check_problem(answer)


def check_problem(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem.keys() == {"type", "title", "status", "detail", "error"}
    assert problem["status"] == answer.status_code
    assert problem["error"] == problem["detail"] != ""
    assert answer.headers["x-request-id"]
    assert "Traceback" not in answer.text


def test_a_fault_of_ours_is_a_problem_too_and_is_logged(client, caplog):
    def broken(*args):
        raise RuntimeError("secret detail")

    app = build(replace(client.app.state.service, decoder=broken))
    client = TestClient(app, raise_server_exceptions=False)
    answer = client.post("/v1/predict", content=PNG, headers=HEADERS)
    assert answer.status_code == 500
    check_problem(answer)
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text


def test_a_full_queue_is_503_with_retry_after(make_client):
    client = make_client(limits={"max_queue": 1})
    image = ("image", ("x.png", PNG, "image/png"))
    answer = client.post("/v1/predict", files=[image, image])
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    check_problem(answer)


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "", "1" * 5000])
def test_a_deadline_that_is_none_is_refused(client, value):
    headers = {**HEADERS, "X-Deadline-Ms": value}
    answer = client.post("/v1/predict", content=PNG, headers=headers)
    assert answer.status_code == 422
    assert "X-Deadline-Ms" in answer.json()["detail"]
    check_problem(answer)
    headers["X-Deadline-Ms"] = " 5000 "
    assert client.post("/v1/predict", content=PNG, headers=headers).status_code == 200


def samples(client) -> dict[str, float]:
    client.app.state.service.metrics.flush()
    registry = client.app.state.service.metrics.registry
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_every_stage_is_counted_once_per_request(make_client):
    client = make_client(defense="dcp", defense_params={"beta": 1.2})
    image = ("image", ("x.png", PNG, "image/png"))
    for _ in range(3):
        client.post("/v1/predict", content=PNG, headers=HEADERS)
    client.post("/v1/predict", files=[image, image])
    client.post("/v1/predict", content=b"x", headers=HEADERS)
    found = samples(client)
    for stage in ("read", "decode", "queue", "infer", "defend", "encode"):
        assert found[f'scumble_stage_seconds_count{{"stage": "{stage}"}}'] == 4
    assert found['scumble_images_total{"model": "tiny", "precision": "float32"}'] == 5
    assert found['scumble_requests_total{"code": "200", "route": "/v1/predict"}'] == 4
    assert found['scumble_requests_total{"code": "422", "route": "/v1/predict"}'] == 1
    assert found['scumble_rejections_total{"reason": "unprocessable"}'] == 1
    assert found["scumble_defended_rows_total{}"] == 5
    assert found["scumble_response_l1_count{}"] == 5
    assert found["scumble_response_l1_sum{}"] > 0.5
    assert found["scumble_inflight{}"] == found["scumble_queue_depth{}"] == 0


def test_a_scanner_adds_no_series(client):
    client.get("/a")
    before = len(samples(client))
    for n in range(50):
        client.get(f"/wp-admin/{n}")
    assert len(samples(client)) == before


def test_access_log_has_no_content(make_client, caplog):
    caplog.set_level("INFO", "scumble.access")
    make_client(access_log=True).post("/v1/predict", content=PNG, headers=HEADERS)
    (record,) = [r for r in caplog.records if r.name == "scumble.access"]
    assert (record.route, record.status, record.method) == ("/v1/predict", 200, "POST")
    assert not hasattr(record, "probabilities")
