"""Infer over the V2 protocol: every form gives the answer of v1, exact framing, no 5xx."""

import base64
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from app.errors import ConfigError, RequestError
from app.http.application import build
from app.http.protocols.v2 import LENGTH, InferRequest, read_infer, write_infer
from app.inference.bundle import Card
from app.main import create_app
from app.settings import LimitSettings, Settings
from app.system.async_lazy import AsyncLazy
from tests.app import probe_defenses
from tests.app.http.test_large_json import Recording
from tests.pictures import encoded, picture
from tests.tiny import LABELS, SHAPE

URL = "/v2/models/tiny/infer"
VERSIONED = "/v2/models/tiny/versions/1/infer"
PIXELS = np.stack([np.asarray(picture(seed=n)) for n in range(3)])
PLANAR = PIXELS.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
PNGS = [encoded(picture(seed=n)) for n in range(3)]
CARD = Card(format="scumble-bundle/1", name="t", version="1", labels=LABELS, input=SHAPE, files={})


@pytest.fixture(scope="module")
def client(make_shared_client):
    return make_shared_client()


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


def b64(file: bytes) -> str:
    return base64.b64encode(file).decode()


def files(pngs=PNGS, shape=None, **changes) -> dict:
    return {"name": "image", "datatype": "BYTES", "shape": shape or [len(pngs)], **changes}


def prefixed(pngs) -> bytes:
    return b"".join(struct.pack("<I", len(png)) + png for png in pngs)


def framed(tensor: dict, tail: bytes, **more) -> dict:
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return {"content": head + tail, "headers": {LENGTH: str(len(head))}}


def binary_files(pngs=PNGS, shape=None, tail=None, **changes) -> dict:
    tail = prefixed(pngs) if tail is None else tail
    return framed(files(pngs, shape, parameters={"binary_data_size": len(tail)}, **changes), tail)


def raw(file: bytes) -> dict:
    return {"content": file, "headers": {LENGTH: "0"}}


def asked(k, *, binary=False) -> dict:
    parameters = {"classification": k, "binary_data": binary}
    outputs = [{"name": "probabilities", "parameters": parameters}]
    return {"inputs": [tensor(PIXELS, data=PIXELS.tolist())], "outputs": outputs}


def split(answer) -> tuple[dict, bytes]:
    """The output's description and its bytes."""
    length = int(answer.headers[LENGTH])
    output = json.loads(answer.content[:length])["outputs"][0]
    assert output["parameters"]["binary_data_size"] == len(answer.content) - length
    return output, answer.content[length:]


def from_binary(answer) -> np.ndarray:
    output, tail = split(answer)
    assert output["datatype"] == "FP32"
    return np.frombuffer(tail, "<f4").reshape(output["shape"])


def strings(tail: bytes) -> list[str]:
    found = []
    while tail:
        end = 4 + struct.unpack_from("<I", tail)[0]
        found.append(tail[4:end].decode())
        tail = tail[end:]
    return found


@pytest.fixture
def expected(client):
    def ask(pixels):
        content = encoded(picture(seed=pixels))
        answer = client.post(
            "/v1/predict", content=content, headers={"Content-Type": "image/png"}
        ).json()
        return answer["predictions"][0]["probabilities"]

    return np.array([ask(n) for n in range(3)], np.float32)


def test_every_form_of_an_image_gets_the_same_random_answer(make_client):
    """PNG, pixels and floats, also with -0.0 for 0.0 and with noise of less than a level."""
    client = make_client(defense="random", defense_params={"epsilon": 1.0})
    pixels = PIXELS.copy()
    pixels[:, :4] = 0
    planar = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    rng = np.random.default_rng(0)
    pngs = [encoded(Image.fromarray(image)) for image in pixels]
    noise = [rng.uniform(-1e-4, 1e-4, planar.shape).astype(np.float32) for _ in range(8)]
    signs = [np.where(rng.random(planar.shape) < 0.5, -1, 1).astype(np.float32) for _ in range(8)]
    answer = client.post(URL, **binary_files(pngs)).json()["outputs"][0]
    expected = np.reshape(answer["data"], answer["shape"])
    floats = [planar, *((planar + n).clip(0, 1) for n in noise)]
    floats += [np.where(planar == 0, planar * sign, planar) for sign in signs]
    assert any(np.signbit(array).any() for array in floats)
    asks = [binary(array) for array in (pixels, *floats)]
    asks += [half(planar, datatype) for datatype in ("FP16", "BF16")]
    for ask in asks:
        found = from_binary(client.post(URL, **ask))
        np.testing.assert_allclose(found, expected, atol=1e-2)  # another draw is off by 0.5


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


def halves(array: np.ndarray, datatype: str) -> np.ndarray:
    """Floats as FP16, or as the upper half of each."""
    if datatype == "FP16":
        return array.astype("<f2")
    rounded = array.astype("<f4").view(np.uint32) + np.uint32(0x8000)
    return (rounded >> 16).astype("<u2")


def half(array: np.ndarray, datatype: str, **changes) -> dict:
    """The body of an infer request with floats of half precision."""
    return binary(halves(array, datatype), datatype=datatype, **changes)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_is_answered_as_the_same_values_in_fp32(client, datatype):
    sent = halves(PLANAR, datatype)
    wide = sent.astype("<f4")
    if datatype == "BF16":
        wide = (sent.astype(np.uint32) << 16).view("<f4")
    assert 0 < np.abs(wide - PLANAR).max() < 0.5 / 255
    answer = client.post(URL, **half(PLANAR, datatype))
    same = client.post(URL, **binary(wide.reshape(PLANAR.shape)))
    np.testing.assert_array_equal(from_binary(answer), from_binary(same))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_that_is_refused(client, make_client, datatype):
    over = client.post(URL, **half(PLANAR * 2, datatype))
    assert (over.status_code, over.json()["detail"]) == (
        422,
        f"{datatype} pixels must lie in [0, 1]",
    )
    nan = client.post(URL, **half(np.where(PLANAR > 0.5, np.nan, PLANAR), datatype))
    assert nan.status_code == 422
    listed = tensor(PLANAR, datatype=datatype, data=PLANAR.tolist())
    answer = client.post(URL, json={"inputs": [listed]})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(f"{datatype} has no form in JSON; allowed: its bytes")
    short = client.post(URL, **half(PLANAR, datatype, tail=b"1234"))
    assert short.status_code == 400
    fp32 = client.post(URL, **binary(PLANAR, datatype=datatype))
    assert fp32.status_code == 400  # twice the bytes
    none = make_client(tensor_input=False).post(URL, **half(PLANAR, datatype))
    assert none.json()["detail"] == "this server takes no float tensors; allowed for pixels: UINT8"


@pytest.mark.parametrize(
    ("images", "datatype", "beside"),
    [(3, "FP16", False), (300, "FP16", True), (300, "BF16", True), (300, "FP32", False)],
)
def test_large_tensors_of_half_precision_are_widened_beside_the_loop(
    client, images, datatype, beside
):
    many = np.concatenate([PLANAR] * (images // 3))
    executor = Recording()
    service = replace(client.app.state.service, executor=executor)
    ask = binary(many) if datatype == "FP32" else half(many, datatype)
    answer = TestClient(build(service)).post(URL, **ask)
    assert answer.status_code == 200
    assert executor.sizes == ([len(ask["content"])] if beside else [])
    executor.close()


FILES = {
    "JSON": {"json": {"inputs": [files(data=list(map(b64, PNGS)))]}},
    "JSON [N, 1], flat": {"json": {"inputs": [files(shape=[3, 1], data=list(map(b64, PNGS)))]}},
    "JSON [N, 1], nested": {
        "json": {"inputs": [files(shape=[3, 1], data=[[b64(png)] for png in PNGS])]}
    },
    "JSON with nulls": {
        "json": {
            "id": None,
            "outputs": None,
            "parameters": None,
            "inputs": [files(data=list(map(b64, PNGS)), parameters=None)],
        }
    },
    "bytes": binary_files(),
    "bytes [N, 1]": binary_files(shape=[3, 1]),
}


@pytest.mark.parametrize("url", [URL, VERSIONED, f"{URL}/", f"{VERSIONED}/"])
@pytest.mark.parametrize("form", FILES)
def test_files_give_the_answer_of_v1(client, expected, form, url):
    answer = client.post(url, **FILES[form])
    output = answer.json()["outputs"][0]
    assert (answer.json()["model_name"], answer.json()["model_version"]) == ("tiny", "1")
    found = np.array(output["data"], np.float32).reshape(output["shape"])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_raw_request_is_one_file_and_its_answer_is_bytes(client, kind):
    file = encoded(picture(seed=5), kind)
    answer = client.post(
        "/v1/predict", content=file, headers={"Content-Type": f"image/{kind.lower()}"}
    ).json()
    found = from_binary(client.post(URL, **raw(file)))
    expected = np.array([answer["predictions"][0]["probabilities"]], np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("k", [1, 3, 4, 9])
def test_classification_shows_the_most_probable_classes_of_the_same_vector(client, expected, k):
    answer = client.post(URL, json=asked(k)).json()["outputs"][0]
    assert (answer["datatype"], answer["shape"]) == ("BYTES", [3, min(k, 4)])
    wanted = [f"{row[c]!s}:{c}:{LABELS[c]}" for row in expected for c in np.argsort(-row)[:k]]
    assert answer["data"] == wanted
    output, tail = split(client.post(URL, json=asked(k, binary=True)))
    assert (output["datatype"], output["shape"]) == ("BYTES", [3, min(k, 4)])
    assert strings(tail) == wanted


def test_no_classes_asked_for_is_the_vector(client):
    assert client.post(URL, json=asked(0)).json()["outputs"][0]["shape"] == [3, len(LABELS)]


def test_classification_of_labels_with_colons_and_other_letters():
    card = CARD.model_copy(update={"labels": ["a:b", "größe", "", "x"]})
    probabilities = np.array([[0.25, 1e-9, 0.5, 0.25]], np.float32)
    request = InferRequest([], binary=True, classes=4)
    body, headers = write_infer(card, request, probabilities)
    tail = body[int(headers["Inference-Header-Content-Length"]) :]
    assert strings(tail) == ["0.5:2:", "0.25:0:a:b", "0.25:3:x", "1e-9:1:größe"]


def test_id_comes_back_and_is_absent_without(client):
    request = {"inputs": [tensor(PIXELS, data=PIXELS.tolist())]}
    assert client.post(URL, json={**request, "id": "a/b"}).json()["id"] == "a/b"
    assert client.post(URL, json={**request, "id": -3}).json()["id"] == "-3"
    assert "id" not in client.post(URL, json=request).json()


def test_a_large_request_runs_in_parts_and_in_order(make_client):
    client = make_client(batch={"max_size": 4})
    many = np.repeat(PIXELS, 7, 0)
    found = from_binary(client.post(URL, **binary(many)))
    each = [from_binary(client.post(URL, **binary(PIXELS[n : n + 1])))[0] for n in range(3)]
    np.testing.assert_array_equal(found, np.repeat(each, 7, 0))


@pytest.mark.parametrize("request_", [binary(PIXELS), FILES["bytes"]], ids=["pixels", "files"])
@pytest.mark.parametrize(
    ("url", "route"),
    [
        (URL, "/v2/models/{model}/infer"),
        (f"{VERSIONED}/", "/v2/models/{model}/versions/{version}/infer"),
    ],
)
def test_images_are_counted_one_by_one(make_client, url, route, request_):
    client = make_client()
    client.post(url, **request_)
    client.app.state.service.metrics.flush()
    registry = client.app.state.service.metrics.registry
    labels = {"model": "tiny", "precision": "float32"}
    assert registry.get_sample_value("scumble_images_total", labels) == 3
    labels = {"code": "200", "route": route}
    assert registry.get_sample_value("scumble_requests_total", labels) == 1
    assert registry.get_sample_value("scumble_stage_seconds_count", {"stage": "defend"}) == 1


def test_every_face_shows_the_defended_vector(make_client):
    client = make_client(defense="dcp", defense_params={"beta": 1.2})
    png = encoded(picture(seed=0))
    answer = client.post("/v1/predict", content=png, headers={"Content-Type": "image/png"}).json()
    defended = answer["predictions"][0]["probabilities"]
    one = PIXELS[:1]
    as_bytes = {"parameters": {"binary_data_output": True}}
    file = files([png], parameters={"binary_data_size": len(png) + 4})
    for form in (binary(one), framed(file, prefixed([png]), **as_bytes), raw(png)):
        found = from_binary(client.post(URL, **form))[0]
        np.testing.assert_array_equal(found, np.array(defended, np.float32))
    output = client.post(URL, json={**asked(4), "inputs": [tensor(one, data=one.tolist())]}).json()
    for text in output["outputs"][0]["data"]:
        value, index, _ = text.split(":")
        assert float(value) == defended[int(index)]


def test_float_tensors_can_be_refused(make_client):
    client = make_client(tensor_input=False)
    assert client.post(URL, **binary(PLANAR)).status_code == 422
    assert client.post(URL, **binary(PIXELS)).status_code == 200


def test_array_over_the_body_is_not_a_copy():
    head = json.dumps({"inputs": [binary_tensor()]}).encode()
    body = bytearray(head + PIXELS.tobytes())
    request = read_infer({LENGTH.encode(): b"%d" % len(head)}, body, CARD, LimitSettings())
    assert np.shares_memory(request.images, np.frombuffer(body, np.uint8))


def binary_tensor() -> dict:
    return tensor(PIXELS, parameters={"binary_data_size": PIXELS.nbytes})


def test_limits_are_checked_before_decode(make_client):
    client = make_client(limits={"max_images": 2, "max_pixels": 63})
    client = TestClient(build(replace(client.app.state.service, decoder=None)))
    assert client.post(URL, **binary_files(PNGS[:1])).status_code == 413
    assert client.post(URL, **binary_files()).status_code == 413
    assert client.post(URL, **FILES["JSON"]).status_code == 413


def small(**changes) -> dict:
    return {"json": {"inputs": [files(PNGS[:1], **{"data": [b64(PNGS[0])], **changes})]}}


def requested(outputs=None, **more) -> dict:
    return {"json": {"inputs": [tensor(PIXELS, data=PIXELS.tolist())], "outputs": outputs, **more}}


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
    "length 0 and no file": (binary(PIXELS, length=0), 422),
    "length 0 and nothing": (raw(b""), 422),
    "raw pixels": (raw(PIXELS[:1].tobytes()), 422),
    "length negative": (binary(PIXELS, length=-1), 400),
    "length that begins well": (binary(PIXELS, length=f"000000000005{'9' * 5000}"), 400),
    "length text": (binary(PIXELS, length="many"), 400),
    "wrong size": (binary(PIXELS, parameters={"binary_data_size": 5}), 400),
    "other output": (
        {"json": {"inputs": [tensor(PIXELS, data=[0])], "outputs": [{"name": "x"}]}},
        422,
    ),
    "outputs are a word": (requested("probabilities"), 400),
    "outputs are false": (requested(False), 400),
    "parameters are a list": (requested(parameters=[]), 400),
    "binary as number": (requested(parameters={"binary_data_output": 1}), 400),
    **{f"classification {k!r}": ({"json": asked(k)}, 400) for k in (-1, True, "2", 1.5, None, [1])},
    "both inputs": (
        {"json": {"inputs": [*small()["json"]["inputs"], tensor(PIXELS, data=[0])]}},
        422,
    ),
    "image of bytes": (small(datatype="UINT8"), 422),
    "image without shape": ({"json": {"inputs": [{**files(), "shape": None}]}}, 422),
    "image [1, 2]": (small(shape=[1, 2]), 422),
    "image []": ({"json": {"inputs": [{**files(PNGS[:1]), "shape": []}]}}, 422),
    "image [0]": (small(shape=[0], data=[]), 422),
    "image [2] of one": (small(shape=[2]), 400),
    "too many images": (small(shape=[33], data=[""] * 33), 413),
    "huge shape": (small(shape=[2**60]), 413),
    "data is a word": (small(data=b64(PNGS[0])), 400),
    "no data of image": (small(data=None), 400),
    "data is deep": (small(data=[[[b64(PNGS[0])]]]), 400),
    "data is not base64": (small(data=["@@@"]), 400),
    "data is a number": (small(data=[3]), 400),
    "data is not an image": (small(data=[b64(b"no image")]), 422),
    "empty image": (small(data=[""]), 422),
    "image bytes without their length": (binary_files(tail=PNGS[0]), 400),
    "image bytes cut off": (binary_files(tail=prefixed(PNGS)[:-1]), 400),
    "image bytes and one more": (binary_files(tail=prefixed(PNGS) + b"x"), 400),
    "image length beyond": (binary_files(PNGS[:1], tail=b"\xff\xff\xff\xff" + PNGS[0]), 400),
    "image bytes fewer": (binary_files(PNGS[:1], shape=[2]), 400),
    "image bytes no image": (binary_files([b"no image"]), 422),
    "image of length 0": (binary_files([b""]), 422),
    "image without bytes": (binary_files([b""], tail=b""), 400),
    "image size wrong": (
        framed(files(parameters={"binary_data_size": 5}), prefixed(PNGS)),
        400,
    ),
    "image bytes and data": (
        framed(files(PNGS[:1], data=[b64(PNGS[0])]), prefixed(PNGS[:1])),
        400,
    ),
    "id is a float": ({"json": {"id": 3.5, "inputs": [tensor(PIXELS, data=PIXELS.tolist())]}}, 400),
    "compressed": ({"content": b"x", "headers": {"Content-Encoding": "gzip"}}, 415),
    "too many": (binary(np.zeros((1025, 8, 8, 3), np.uint8)), 413),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(client, name):
    request, status = REFUSED[name]
    answer = client.post(URL, **request)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]


def test_another_model_or_version_is_not_found(client):
    for path, word in (("other", "'tiny'"), ("tiny/versions/2", "'1'"), ("x/versions/1", "'tiny'")):
        answer = client.post(f"/v2/models/{path}/infer", **binary(PIXELS))
        assert answer.status_code == 404
        assert word in answer.json()["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
ONE = {"pixels": PIXELS[:1].tobytes(), "image": prefixed(PNGS[:1])}
WHOLE = {
    "pixels": tensor(PIXELS[:1], parameters={"binary_data_size": len(ONE["pixels"])}),
    "image": files(PNGS[:1], parameters={"binary_data_size": len(ONE["image"])}),
}


@st.composite
def framings(draw) -> tuple[dict[str, str], bytes]:
    """Headers and body: a good request with a few things changed, or just bytes."""
    if draw(st.booleans()):
        length = draw(st.none() | st.integers(-1, 200) | st.text("0123456789x-", max_size=4))
        return {} if length is None else {LENGTH: str(length)}, draw(st.binary(max_size=200))
    name = draw(st.sampled_from(list(WHOLE)))
    members = ["name", "datatype", "shape", "parameters", "data"]
    changes = draw(st.dictionaries(st.sampled_from(members), json_values, max_size=2))
    more = draw(
        st.dictionaries(
            st.sampled_from(["id", "outputs", "parameters", "inputs"]), json_values, max_size=2
        )
    )
    head = json.dumps({"inputs": [{**WHOLE[name], **changes}], **more}).encode()
    tail = draw(st.just(ONE[name]) | st.binary(max_size=700))
    shift = draw(st.sampled_from([0, 0, 0, -1, 1, -3]))
    return {LENGTH: str(len(head) + shift)}, head + tail


@given(framings())
def test_any_framing_is_read_or_refused(framing):
    headers, body = framing
    fields = {name.encode(): value.encode() for name, value in headers.items()}
    try:
        request = read_infer(fields, body, CARD, LimitSettings())
    except RequestError:
        return
    assert len(request.images) >= 1


@pytest.fixture(scope="module")
def lasting(models):
    """One client for many examples."""
    app = create_app(Settings(model_dir=models, model="tiny"))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("url", [URL, VERSIONED])
def test_any_bytes_are_answered_or_a_problem(lasting, url):
    @given(framings())
    def check(framing):
        headers, body = framing
        answer = lasting.post(url, content=body, headers=headers)
        if answer.status_code != 200:
            assert 400 <= answer.status_code < 500
            assert answer.headers["content-type"] == "application/problem+json"
            assert isinstance(answer.json()["error"], str)

    check()


def test_float_tensors_cost_nothing_until_somebody_sends_one(make_client):
    client = make_client(defense="dcp", defense_params={"beta": 1.2})
    tensors = client.app.state.service.tensors
    assert client.post(URL, **binary(PIXELS)).status_code == 200
    assert tensors.made is None
    first, second = (client.post(URL, **binary(PLANAR)) for _ in range(2))
    assert first.status_code == 200
    assert first.content == second.content
    assert tensors.made is not None


def test_the_first_tensors_keep_their_deadline_while_their_engine_is_made(make_client):
    client = make_client(defense=probe_defenses.SLOW_TENSORS)
    asked = binary(PLANAR)
    asked["headers"]["X-Deadline-Ms"] = "50"
    assert client.post(URL, **asked).status_code == 504
    assert client.post(URL, **binary(PLANAR)).status_code == 200  # the copy is made in the meantime


def test_a_graph_without_float_tensors_says_so(make_client, caplog):
    client = make_client()

    def fail():
        raise ConfigError("the graph has no value named 'tensor'")

    object.__setattr__(client.app.state.service, "tensors", AsyncLazy(fail))
    answer = client.post(URL, **binary(PLANAR))
    assert answer.status_code == 503
    assert answer.json()["detail"] == "float tensors are unavailable; use UINT8"
    assert "no value named" in caplog.text
    assert client.post(URL, **binary(PIXELS)).status_code == 200
