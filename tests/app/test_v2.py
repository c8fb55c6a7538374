"""Tensors over the V2 protocol: same answers as for images, exact framing, no 5xx."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from app.bundle import Card
from app.errors import RequestError
from app.v2 import LENGTH, read_infer
from tests.pictures import encoded, picture
from tests.tiny import LABELS, SHAPE

URL = "/v2/models/tiny/infer"
PIXELS = np.stack([np.asarray(picture(seed=n)) for n in range(3)])
PLANAR = PIXELS.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
CARD = Card(format="scumble-bundle/1", name="t", version="1", labels=LABELS, input=SHAPE, files={})


def tensor(array, **changes) -> dict:
    datatype = "UINT8" if array.dtype == np.uint8 else "FP32"
    return {"name": "pixels", "datatype": datatype, "shape": list(array.shape), **changes}


def binary(array, *, want_binary=True, tail=None, length=None, **changes) -> dict:
    parameters = {"binary_data_size": array.nbytes}
    document = {"inputs": [{**tensor(array, parameters=parameters), **changes}]}
    if want_binary:
        document["outputs"] = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    head = json.dumps(document).encode()
    content = head + (array.tobytes() if tail is None else tail)
    return {"content": content, "headers": {LENGTH: str(len(head) if length is None else length)}}


def from_binary(answer) -> np.ndarray:
    length = int(answer.headers[LENGTH])
    output = json.loads(answer.content[:length])["outputs"][0]
    assert output["parameters"]["binary_data_size"] == len(answer.content) - length
    return np.frombuffer(answer.content[length:], "<f4").reshape(output["shape"])


@pytest.fixture
def expected(client):
    def ask(pixels):
        content = encoded(picture(seed=pixels))
        answer = client.post(
            "/v1/predict", content=content, headers={"Content-Type": "image/png"}
        ).json()
        return answer["predictions"][0]["probabilities"]

    return np.array([ask(n) for n in range(3)], np.float32)


@pytest.mark.parametrize("array", [PIXELS, PLANAR], ids=["UINT8", "FP32"])
def test_every_form_gives_the_answer_of_v1(client, expected, array):
    forms = [
        client.post(URL, json={"inputs": [tensor(array, data=array.tolist())]}),
        client.post(URL, json={"inputs": [tensor(array, data=array.reshape(-1).tolist())]}),
        client.post(URL, **binary(array, want_binary=False)),
    ]
    for answer in forms:
        output = answer.json()["outputs"][0]
        found = np.array(output["data"], np.float32).reshape(output["shape"])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(from_binary(client.post(URL, **binary(array))), expected, atol=1e-6)


def test_id_comes_back_and_is_absent_without(client):
    request = {"inputs": [tensor(PIXELS, data=PIXELS.tolist())]}
    assert client.post(URL, json={**request, "id": "a/b"}).json()["id"] == "a/b"
    assert "id" not in client.post(URL, json=request).json()


def test_a_large_request_runs_in_parts_and_in_order(make_client):
    client = make_client(batch={"max_size": 4})
    many = np.repeat(PIXELS, 7, 0)
    found = from_binary(client.post(URL, **binary(many)))
    each = [from_binary(client.post(URL, **binary(PIXELS[n : n + 1])))[0] for n in range(3)]
    np.testing.assert_array_equal(found, np.repeat(each, 7, 0))


def test_images_are_counted_one_by_one(client):
    client.post(URL, **binary(PIXELS))
    client.app.state.service.metrics.flush()
    registry = client.app.state.service.metrics.registry
    labels = {"model": "tiny", "precision": "float32"}
    assert registry.get_sample_value("scumble_images_total", labels) == 3
    labels = {"code": "200", "route": "/v2/models/{model}/infer"}
    assert registry.get_sample_value("scumble_requests_total", labels) == 1
    assert registry.get_sample_value("scumble_stage_seconds_count", {"stage": "defend"}) == 1


def test_every_face_shows_the_defended_vector(make_client):
    client = make_client(defense="dcp", defense_params={"beta": 1.2})
    png = encoded(picture(seed=0))
    answer = client.post("/v1/predict", content=png, headers={"Content-Type": "image/png"}).json()
    found = from_binary(client.post(URL, **binary(PIXELS[:1])))[0]
    np.testing.assert_array_equal(
        found, np.array(answer["predictions"][0]["probabilities"], np.float32)
    )


def test_float_tensors_can_be_refused(make_client):
    client = make_client(tensor_input=False)
    assert client.post(URL, **binary(PLANAR)).status_code == 422
    assert client.post(URL, **binary(PIXELS)).status_code == 200


def test_another_model_is_not_found(client):
    answer = client.post("/v2/models/other/infer", **binary(PIXELS))
    assert answer.status_code == 404
    assert "'tiny'" in answer.json()["error"]


BAD = PLANAR.copy()
BAD[0, 0, 0, 0] = np.nan
REFUSED = {
    "no json": ({"content": b"x"}, 400),
    "json list": ({"json": []}, 400),
    "no inputs": ({"json": {}}, 400),
    "two inputs": ({"json": {"inputs": [tensor(PIXELS, data=[0])] * 2}}, 422),
    "other input": ({"json": {"inputs": [tensor(PIXELS, name="x", data=[0])]}}, 422),
    "other datatype": ({"json": {"inputs": [tensor(PIXELS, datatype="INT8", data=[0])]}}, 422),
    "other shape": ({"json": {"inputs": [tensor(PIXELS, shape=[1, 8, 8], data=[0])]}}, 422),
    "planar bytes": (binary(PIXELS, shape=[3, 3, 8, 8]), 422),
    "shape of truth values": (binary(PIXELS, shape=[True, 8, 8, 3]), 422),
    "no images": (binary(PIXELS[:0]), 422),
    "negative": (binary(PIXELS, shape=[-3, 8, 8, 3]), 422),
    "no data": ({"json": {"inputs": [tensor(PIXELS)]}}, 400),
    "ragged data": ({"json": {"inputs": [tensor(PIXELS, data=[[1], [1, 2]])]}}, 400),
    "text data": ({"json": {"inputs": [tensor(PIXELS, data=["x"])]}}, 400),
    "short data": ({"json": {"inputs": [tensor(PIXELS, data=[1, 2])]}}, 400),
    "256": ({"json": {"inputs": [tensor(PIXELS, data=(PIXELS + 256.0).tolist())]}}, 422),
    "fraction": ({"json": {"inputs": [tensor(PIXELS, data=(PIXELS * 0.3).tolist())]}}, 422),
    "float above 1": (binary(PLANAR * 2), 422),
    "nan": (binary(BAD), 422),
    "bytes missing": (binary(PIXELS, tail=PIXELS.tobytes()[:-1]), 400),
    "bytes too many": (binary(PIXELS, tail=PIXELS.tobytes() + b"x"), 400),
    "length beyond body": (binary(PIXELS, length=10_000_000), 400),
    "length 0": (binary(PIXELS, length=0), 400),
    "length that begins well": (binary(PIXELS, length=f"000000000005{'9' * 5000}"), 400),
    "length text": (binary(PIXELS, length="many"), 400),
    "wrong size": (binary(PIXELS, parameters={"binary_data_size": 5}), 400),
    "other output": (
        {"json": {"inputs": [tensor(PIXELS, data=[0])], "outputs": [{"name": "x"}]}},
        400,
    ),
    "id is a number": ({"json": {"id": 3, "inputs": [tensor(PIXELS, data=PIXELS.tolist())]}}, 400),
    "compressed": ({"content": b"x", "headers": {"Content-Encoding": "gzip"}}, 415),
    "too many": (binary(np.zeros((1025, 8, 8, 3), np.uint8)), 413),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(client, name):
    request, status = REFUSED[name]
    answer = client.post(URL, **request)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    changes=st.dictionaries(
        st.sampled_from(["name", "datatype", "shape", "parameters", "data"]), json_values
    ),
    more=st.dictionaries(st.sampled_from(["id", "outputs", "parameters", "inputs"]), json_values),
    tail=st.binary(max_size=700),
    length=st.none() | st.integers(-5, 5) | st.text(max_size=3),
)
def test_any_request_is_read_or_refused(changes, more, tail, length):
    whole = tensor(PIXELS[:1], parameters={"binary_data_size": PIXELS[:1].nbytes})
    head = json.dumps({"inputs": [{**whole, **changes}], **more}).encode()
    declared = len(head) + length if isinstance(length, int) else length
    headers = {} if declared is None else {LENGTH: str(declared).encode("utf-8").decode("latin-1")}
    try:
        request = read_infer(Headers(headers), head + tail, CARD, 8)
    except RequestError:
        return
    assert len(request.batch) >= 1
