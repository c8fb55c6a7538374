"""Stock clients of the V2 protocol ask a real server; the same requests go to a real Triton.

KServe and PyTriton have pins that clash with ours: each runs in an environment of its own, or is
skipped. `python -m loadtest.peers.run` makes Triton's; KServe's takes

    python -m venv runs/clients/kserve && runs/clients/kserve/bin/pip install kserve
"""

import asyncio
import base64
import importlib.util
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest

from tests.pictures import encoded, picture
from tests.tiny import LABELS

pytestmark = pytest.mark.server
ROOT = Path(__file__).parents[4]
HERE = Path(__file__).parent / "clients"
LENGTH = "Inference-Header-Content-Length"
PIXELS = np.stack([np.asarray(picture(seed=n)) for n in range(3)])
PLANAR = PIXELS.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
PNGS = [encoded(picture(seed=n)) for n in range(3)]
TEXTS = [base64.b64encode(png).decode() for png in PNGS]


@pytest.fixture(scope="module")
def server(models, preloaded):
    settings = {"defense": "dcp", "defense_params": {"beta": 1.2}, "workers": 1}
    with preloaded.serving(model_dir=models, model="tiny", **settings) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server):
    """What v1 answers to the three pictures, (3, 4)."""
    files = [("image", ("x.png", png, "image/png")) for png in PNGS]
    answer = httpx2.post(f"{server.url}/v1/predict", files=files).json()
    rows = [row["probabilities"] for row in answer["predictions"]]
    return np.array(rows, np.float32)


def interpreter(package: str, folder: str) -> str:
    """A Python that has the package: this one, or that of an environment under runs/."""
    if importlib.util.find_spec(package):
        return sys.executable
    python = ROOT / "runs" / folder / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{package} is neither installed here nor in runs/{folder}")
    return str(python)


# Triton's client


@pytest.fixture
def http():
    return pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")


@pytest.fixture
def triton_client(http, server):
    with http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


FORMS = {
    "UINT8": ("pixels", "UINT8", PIXELS, PIXELS),
    "FP32": ("pixels", "FP32", PLANAR, PLANAR),
    "BYTES": ("image", "BYTES", np.array(PNGS, np.object_), np.array(TEXTS, np.object_)),
    "BYTES [N, 1]": (
        "image",
        "BYTES",
        np.array(PNGS, np.object_)[:, np.newaxis],
        np.array(TEXTS, np.object_)[:, np.newaxis],
    ),
}


def inputs(http, form: str, *, binary: bool) -> list:
    name, datatype, as_bytes, in_json = FORMS[form]
    array = as_bytes if binary else in_json
    tensor = http.InferInput(name, list(array.shape), datatype)
    return [tensor.set_data_from_numpy(array, binary_data=binary)]


@pytest.mark.parametrize("binary_out", [True, False, None], ids=["bytes", "JSON", "all"])
@pytest.mark.parametrize("binary", [True, False], ids=["in bytes", "in JSON"])
@pytest.mark.parametrize("form", FORMS)
def test_tritonclient_infers(http, triton_client, expected, form, binary, binary_out):
    outputs = (
        None
        if binary_out is None
        else [http.InferRequestedOutput("probabilities", binary_data=binary_out)]
    )
    answer = triton_client.infer(
        "tiny", inputs(http, form, binary=binary), outputs=outputs, request_id="a/1"
    )
    np.testing.assert_allclose(answer.as_numpy("probabilities"), expected, atol=1e-6)
    document = answer.get_response()
    assert (document["id"], document["model_name"], document["model_version"]) == (
        "a/1",
        "tiny",
        "1",
    )


@pytest.mark.parametrize(("datatype", "kind"), [("FP16", "float16"), ("BF16", "bfloat16")])
def test_tritonclient_sends_half_precision(http, triton_client, expected, datatype, kind):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")  # gives numpy bfloat16
    tensor = http.InferInput("pixels", list(PLANAR.shape), datatype)
    tensor.set_data_from_numpy(PLANAR.astype(kind), binary_data=True)
    found = triton_client.infer("tiny", [tensor]).as_numpy("probabilities")
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_classifies(http, triton_client, expected, binary):
    output = http.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)
    given = inputs(http, "BYTES", binary=True)
    found = triton_client.infer("tiny", given, outputs=[output]).as_numpy("probabilities")
    assert found.shape == (3, 2)
    for row, texts in zip(expected, found, strict=True):
        for k, text in zip(np.argsort(-row), texts, strict=False):
            value, index, label = (text.decode() if binary else text).split(":")
            assert (np.float32(value), int(index), label) == (row[k], k, LABELS[k])


def test_tritonclient_asks_about_service_and_model(triton_client):
    client = triton_client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("tiny", "2")
    assert "classification" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("tiny") == client.get_model_metadata("tiny", "1")


def test_tritonclient_understands_refusals(http, triton_client):
    from tritonclient.utils import InferenceServerException

    given = inputs(http, "UINT8", binary=True)
    with pytest.raises(InferenceServerException, match="unknown model 'other'") as refused:
        triton_client.infer("other", given)
    assert refused.value.status() == "404"
    with pytest.raises(InferenceServerException, match="unknown version '2'"):
        triton_client.infer("tiny", given, model_version="2")
    with pytest.raises(InferenceServerException, match="allowed: identity"):
        triton_client.infer("tiny", given, request_compression_algorithm="gzip")


def test_tritonclient_reads_parts_and_threads(http, triton_client, expected):
    """Its own helpers for bodies, and its asynchronous call on greenlets."""
    body, length = http.InferenceServerClient.generate_request_body(
        inputs(http, "BYTES", binary=True)
    )
    answer = triton_client.async_infer("tiny", inputs(http, "UINT8", binary=True)).get_result()
    np.testing.assert_array_equal(answer.as_numpy("probabilities"), expected)
    assert body[length:].endswith(PNGS[-1])


def test_tritonclient_infers_in_asyncio(server, expected):
    aio = pytest.importorskip("tritonclient.http.aio", reason="aiohttp is not installed")

    async def ask():
        async with aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            return await client.infer("tiny", inputs(aio, "BYTES", binary=True), model_version="1")

    np.testing.assert_array_equal(asyncio.run(ask()).as_numpy("probabilities"), expected)


# KServe's client


def test_kserve_client(server, expected, tmp_path):
    python = interpreter("kserve", "clients/kserve")
    (tmp_path / "0.png").write_bytes(PNGS[0])
    (tmp_path / "pixels.json").write_text(json.dumps(PIXELS[:1].tolist()))
    files = [tmp_path / "0.png", tmp_path / "pixels.json"]
    done = subprocess.run(
        [python, HERE / "kserve_asks.py", server.url, "tiny", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    asked = ("live", "ready", "model ready", "other ready")
    assert [found.pop(name) for name in asked] == [True, True, True, False]
    best, second, *_ = np.argsort(-expected[0])
    wanted = [f"{expected[0][k]!s}:{k}:{LABELS[k]}" for k in (best, second)]
    assert found.pop("classes")["data"] == [wanted]
    for name, answer in found.items():
        assert (answer["id"], answer["model"], answer["datatype"]) == (name, "tiny", "FP32")
        np.testing.assert_allclose(answer["data"], expected[:1], atol=1e-6, err_msg=name)
    assert len(found) == 6


# A real Triton


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def triton(models, tmp_path_factory):
    """Its address; three models, as `triton_serves.py` says."""
    python = interpreter("pytriton", "peers/triton")
    ports = [free_port() for _ in range(3)]
    url = f"http://127.0.0.1:{ports[0]}"
    folder = tmp_path_factory.mktemp("triton")
    onnx = models / "tiny" / "float32.onnx"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [python, HERE / "triton_serves.py", onnx, ",".join(map(str, ports))],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 120
        while not all(answers(f"{url}/v2/models/{name}/ready") for name in OF_TRITON):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < end, "Triton is not ready"
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def plain(models, preloaded):
    """Without a defense, as Triton has none."""
    with preloaded.serving(model_dir=models, model="tiny", workers=1) as server:
        yield server.url


OF_TRITON = ("image", "pixels", "planar")
IMAGE = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": TEXTS[:1]}
BATCH = {"name": "pixels", "datatype": "UINT8", "shape": [3, 8, 8, 3], "data": PIXELS.tolist()}
FLAT = {**BATCH, "data": PIXELS.reshape(-1).tolist()}
FLOATS = {"name": "pixels", "datatype": "FP32", "shape": [3, 3, 8, 8], "data": PLANAR.tolist()}


def in_json(tensor: dict, of_output: dict | None = None, **more) -> dict:
    outputs = [{"name": "probabilities", "parameters": of_output}]
    named = {} if of_output is None else {"outputs": outputs}
    return {"json": {"inputs": [tensor], **named, **more}}


def in_bytes(tensor: dict, tail: bytes, shift: int = 0, **more) -> dict:
    parameters = {"binary_data_size": len(tail)}
    tensor = {**{k: v for k, v in tensor.items() if k != "data"}, "parameters": parameters}
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return {"content": head + tail, "headers": {LENGTH: str(len(head) + shift)}}


ALL_BYTES = {"parameters": {"binary_data_output": True}}
ALIKE = {
    "files in JSON": ("image", in_json(IMAGE)),
    "files nested": ("image", in_json({**IMAGE, "data": [TEXTS[:1]]})),
    "files in bytes": (
        "image",
        in_bytes(IMAGE, len(PNGS[0]).to_bytes(4, "little") + PNGS[0], **ALL_BYTES),
    ),
    "a raw file": ("image", {"content": PNGS[0], "headers": {LENGTH: "0"}}),
    "pixels nested": ("pixels", in_json(BATCH)),
    "pixels flat": ("pixels", in_json(FLAT, id="x/1")),
    "pixels in bytes": ("pixels", in_bytes(BATCH, PIXELS.tobytes())),
    "bytes to bytes": ("pixels", in_bytes(BATCH, PIXELS.tobytes(), **ALL_BYTES)),
    "JSON to bytes": ("pixels", in_json(BATCH, {"binary_data": True})),
    "output over request": ("pixels", in_json(BATCH, {"binary_data": False}, **ALL_BYTES)),
    "no outputs named": ("pixels", in_json(BATCH, outputs=[])),
    "floats": ("planar", in_json(FLOATS)),
    "floats in bytes": ("planar", in_bytes(FLOATS, PLANAR.tobytes(), **ALL_BYTES)),
    "no classes": ("pixels", in_json(BATCH, {"classification": 0})),
    "a class": ("pixels", in_json(BATCH, {"classification": 1})),
    "two classes in bytes": ("pixels", in_json(BATCH, {"classification": 2, "binary_data": True})),
    "more classes than there are": ("pixels", in_json(BATCH, {"classification": 9})),
}
REFUSED = {
    "other output": ("pixels", in_json(BATCH, outputs=[{"name": "x"}])),
    "other input": ("pixels", in_json({**BATCH, "name": "x"})),
    "two inputs": ("pixels", {"json": {"inputs": [BATCH, BATCH]}}),
    "other datatype": ("pixels", in_json({**BATCH, "datatype": "INT64"})),
    "other shape": ("pixels", in_json({**BATCH, "shape": [3, 3, 8, 8]})),
    "too few numbers": ("pixels", in_json({**BATCH, "data": [1, 2]})),
    "no data": ("pixels", in_json({k: v for k, v in BATCH.items() if k != "data"})),
    "no inputs": ("pixels", {"json": {}}),
    "no JSON": ("pixels", {"content": b"{"}),
    "length beyond": ("pixels", {"content": b"{}", "headers": {LENGTH: "99"}}),
    "length too short": ("pixels", in_bytes(BATCH, PIXELS.tobytes(), shift=-1)),
    "bytes missing": ("pixels", in_bytes(BATCH, PIXELS.tobytes()[:-1])),
    "negative classes": ("pixels", in_json(BATCH, {"classification": -1})),
    "classes in words": ("pixels", in_json(BATCH, {"classification": "2"})),
    "id is a number": ("pixels", in_json(BATCH, id=3)),
    "no image": ("image", {"content": b"xx", "headers": {LENGTH: "0"}}),
}


def reply(answer: httpx2.Response) -> tuple[dict, list]:
    """What the answer says, and the values in it: floats, or (float, class)."""
    length = answer.headers.get(LENGTH)
    document = json.loads(answer.content[: None if length is None else int(length)])
    (output,) = document["outputs"]
    if length is None:
        values = output.pop("data")
    elif output["datatype"] == "FP32":
        values = np.frombuffer(answer.content[int(length) :], "<f4").tolist()
        assert output["parameters"].pop("binary_data_size") == 4 * len(values)
    else:
        tail = answer.content[int(length) :]
        assert output["parameters"].pop("binary_data_size") == len(tail)
        values = strings(tail)
    if output["datatype"] == "BYTES":
        values = [tuple(map(float, text.split(":")[:2])) for text in values]
    about = {**document, "type": answer.headers["content-type"]}
    return {key: about[key] for key in about if key != "model_name"}, values


def strings(tail: bytes) -> list[str]:
    found = []
    while tail:
        end = 4 + int.from_bytes(tail[:4], "little")
        found.append(tail[4:end].decode())
        tail = tail[end:]
    return found


def both(triton: str, plain: str, model: str, request: dict) -> tuple[httpx2.Response, ...]:
    """Our answer and Triton's."""
    return (
        httpx2.post(f"{plain}/v2/models/tiny/infer", **request),
        httpx2.post(f"{triton}/v2/models/{model}/infer", **request),
    )


@pytest.mark.parametrize("name", ALIKE)
def test_the_answer_is_as_tritons(triton, plain, name):
    """Apart from labels, which PyTriton has none of, and digits, of which Triton prints six."""
    ours, theirs = both(triton, plain, *ALIKE[name])
    assert (ours.status_code, theirs.status_code) == (200, 200), ours.text + theirs.text
    (about, values), (their_about, their_values) = reply(ours), reply(theirs)
    assert about == their_about
    np.testing.assert_allclose(values, their_values, atol=2e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(triton, plain, name):
    """Triton with 400 or 500, whichever; ours is the client's fault."""
    ours, theirs = both(triton, plain, *REFUSED[name])
    assert theirs.status_code >= 400
    assert 400 <= ours.status_code < 500
    assert isinstance(theirs.json()["error"], str)
    assert isinstance(ours.json()["error"], str)


GETS = ["", "/health/live", "/health/ready", "/models/M", "/models/M/ready"]
GETS += ["/models/M/versions/1", "/models/M/versions/1/ready"]
GETS += ["/models/none", "/models/none/ready", "/models/M/versions/7", "/models/M/versions/7/ready"]


@pytest.mark.parametrize("path", GETS)
def test_what_is_said_of_the_model_is_as_tritons(triton, plain, path):
    """Ours has JSON where Triton has nothing, and all inputs in one model."""
    theirs = httpx2.get(f"{triton}/v2{path}".replace("M", "pixels"))
    ours = httpx2.get(f"{plain}/v2{path}".replace("M", "tiny"))
    assert (theirs.status_code == 200) == (ours.status_code == 200)
    if theirs.status_code != 200:
        assert isinstance(ours.json()["error"], str)
    elif theirs.content:
        theirs, ours = theirs.json(), ours.json()
        assert theirs.keys() == ours.keys()
        for key in ("versions", "outputs"):
            assert theirs.get(key) == ours.get(key)
        if "inputs" in ours:
            assert theirs["inputs"][0] in ours["inputs"]
        assert set(ours.get("extensions", [])) <= set(theirs.get("extensions", []))
