"""What the V2 protocol says of the service and its model, with and without a slash at the end."""

import pytest

from app.errors import MEDIA_TYPE

MODEL = {
    "name": "tiny",
    "versions": ["1"],
    "platform": "onnx_onnxv1",
    "inputs": [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixels", "datatype": "UINT8", "shape": [-1, 8, 8, 3]},
        {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 8, 8]},
        {"name": "pixels", "datatype": "FP16", "shape": [-1, 3, 8, 8]},
        {"name": "pixels", "datatype": "BF16", "shape": [-1, 3, 8, 8]},
    ],
    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 4]}],
}
ALIVE = {"live": True, "ready": True}
READY = {"name": "tiny", "ready": True}
ANSWERS = {
    "/v2/health/live": ALIVE,
    "/v2/health/ready": ALIVE,
    "/v2/models/tiny": MODEL,
    "/v2/models/tiny/ready": READY,
    "/v2/models/tiny/versions/1": MODEL,
    "/v2/models/tiny/versions/1/ready": READY,
}
ROUTES = {"/v2": "/v2"} | {
    path: path.replace("tiny", "{model}").replace("versions/1", "versions/{version}")
    for path in ANSWERS
}


@pytest.fixture(scope="module")
def client(make_shared_client):
    return make_shared_client()


@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize("path", ANSWERS)
def test_answers(client, path, end):
    answer = client.get(path + end, follow_redirects=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == ANSWERS[path]


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_about(client, path):
    answer = client.get(path, follow_redirects=False).json()
    assert answer.keys() == {"name", "version", "extensions"}
    assert answer["name"] == "scumble"
    assert answer["extensions"] == ["binary_tensor_data", "classification"]


def test_floats_are_not_offered_where_they_are_refused(make_client):
    inputs = make_client(tensor_input=False).get("/v2/models/tiny").json()["inputs"]
    assert [tensor["datatype"] for tensor in inputs] == ["BYTES", "UINT8"]


def test_draining(make_client):
    client = make_client()
    client.app.state.service.state.draining = True
    assert client.get("/v2/health/live").json() == {"live": True, "ready": False}
    for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny/versions/1/ready"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.headers["content-type"] == MEDIA_TYPE
        assert answer.headers["retry-after"]
        assert "draining" in answer.json()["error"]
    assert client.get("/v2/models/tiny").status_code == 200


REFUSED = [
    ("GET", "/v2/models/other", 404),
    ("GET", "/v2/models/other/ready", 404),
    ("GET", "/v2/models/tiny/versions/2", 404),
    ("GET", "/v2/models/tiny/versions/2/ready", 404),
    ("GET", "/v2/models/other/versions/1/", 404),
    ("POST", "/v2/models/tiny/versions/2/infer", 404),
    ("GET", "/v2/models", 404),
    ("GET", "/v2/models/tiny/config", 404),
    ("POST", "/v2/repository/index", 404),
    ("POST", "/v2", 405),
    ("POST", "/v2/health/live", 405),
    ("GET", "/v2/models/tiny/infer", 405),
    ("GET", "/v2/models/tiny/versions/1/infer/", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), REFUSED)
def test_refused(client, method, path, status):
    answer = client.request(method, path, follow_redirects=False)
    assert answer.status_code == status
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert answer.json()["error"] == answer.json()["detail"] != ""


def test_each_route_has_its_label_and_others_have_none_of_theirs(make_client):
    client = make_client()
    for path in ROUTES:
        client.get(f"{path}/")
    client.get("/v2/models/other")
    client.get("/v2/models/tiny/versions/2/ready")
    client.app.state.service.metrics.flush()
    registry = client.app.state.service.metrics.registry

    def count(route: str, code: int) -> float | None:
        labels = {"route": route, "code": str(code)}
        return registry.get_sample_value("scumble_requests_total", labels)

    assert [count(route, 200) for route in ROUTES.values()] == [1] * len(ROUTES)
    assert count("other", 404) == 2


def test_infer_is_hot_with_and_without_a_version(client):
    infer = {("POST", f"/v2/models/tiny{version}/infer") for version in ("", "/versions/1")}
    assert infer <= client.app.hot.keys()


def test_nothing_tells_the_defense(make_client):
    plain, defended = make_client(), make_client(defense="dcp", defense_params={"beta": 1.2})
    for path in ROUTES:
        mine, other = plain.get(path), defended.get(path)
        assert mine.content == other.content
        assert mine.headers.keys() == other.headers.keys()
