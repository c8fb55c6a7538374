"""JSON that is long, deep or dense: bounded before it is parsed, parsed beside the event loop."""

import asyncio
import base64
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.errors import BadFraming, ClientGone, TooLarge
from app.http.application import build
from app.http.bodies import (
    INLINE_BYTES,
    LIST_VALUES,
    MOST_STRINGS,
    MOST_VALUES,
    PIECE,
    load_json,
    read_images,
    unbase64,
)
from app.inference.deadline import NO_DEADLINE, Deadline
from app.inference.executor import BoundedExecutor
from app.request_context import ClientConnection
from tests.pictures import PNG, encoded, picture

V1, V2 = "/v1/predict", "/v2/models/tiny/infer"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(make_shared_client):
    return make_shared_client()


def many(value: str, count: int) -> bytes:
    return b"[" + b",".join([value.encode()] * count) + b"]"


DENSE = {
    "numbers": many("0", MOST_VALUES),
    "long numbers": many("0.5", MOST_VALUES),
    "lists": many("[]", MOST_VALUES // (LIST_VALUES + 1) + 1),
    "lists of lists": many("[[]]", MOST_VALUES // (2 * LIST_VALUES + 1) + 1),
    "objects": many("{}", MOST_VALUES // (LIST_VALUES + 1) + 1),
    "deep": b"[" * (MOST_VALUES // LIST_VALUES + 2),
    "strings": many('""', 3 * MOST_STRINGS),
    "long strings": many('"abcdefghij"', MOST_STRINGS + 1),
    "members": many('{"":0}', MOST_STRINGS + 1),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("url", [V1, V2])
def test_more_values_than_can_be_parsed_at_once_are_refused(client, url, name):
    answer = client.post(url, content=DENSE[name], headers=JSON)
    assert answer.status_code == 413, answer.text
    assert "JSON has " in answer.json()["detail"]
    assert "; allowed: " in answer.json()["detail"]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_they_are_refused_before_they_are_parsed(name, kind):
    broken = DENSE[name][:-1] + b"?"  # the parser would say that this is not JSON
    with pytest.raises(TooLarge):
        load_json(kind(broken))


def test_what_is_at_the_limits_is_read():
    assert len(load_json(many("0", MOST_VALUES - LIST_VALUES + 1))) == MOST_VALUES - LIST_VALUES + 1
    assert len(load_json(many('""', MOST_STRINGS))) == MOST_STRINGS


def test_a_tensor_of_many_numbers_and_many_large_files_are_answered(make_client):
    client = make_client(limits={"max_tensor_images": 2048})
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 3))
    for data in (pixels.reshape(-1).tolist(), pixels[:500].tolist()):
        count = len(data) // 192 if isinstance(data[0], int) else len(data)
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": [count, 8, 8, 3], "data": data}
        answer = client.post(V2, json={"inputs": [tensor]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["shape"] == [count, 4]
    photo = base64.b64encode(encoded(picture(200, 200))).decode()
    assert len(photo) > INLINE_BYTES
    answer = client.post(V1, json={"instances": [{"b64": photo}] * 10})
    assert answer.status_code == 200, answer.text


DEEP = "[" * 900 + "]" * 900
LONG = "[" + ",".join(["1"] * 20_000) + "]"
TEXT = json.dumps("x" * 100_000)
TENSOR = '{"name": "pixels", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [1]}'
PLACES = {
    "inputs": '{"inputs": [%s]}',
    "all inputs": '{"inputs": %s}',
    "name": '{"inputs": [{"name": %s}]}',
    "datatype": '{"inputs": [{"name": "pixels", "datatype": %s}]}',
    "datatype of files": '{"inputs": [{"name": "image", "datatype": %s}]}',
    "shape": '{"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": %s}]}',
    "shape of files": '{"inputs": [{"name": "image", "datatype": "BYTES", "shape": %s}]}',
    "size": TENSOR.join(['{"inputs": [', "]}"]).replace(
        '"data": [1]', '"parameters": {"binary_data_size": %s}'
    ),
    "size of files": '{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], '
    '"parameters": {"binary_data_size": %s}}]}',
    "data": TENSOR.replace("[1]}", "%s}").join(['{"inputs": [', "]}"]),
    "id": TENSOR.join(['{"inputs": [', '], "id": %s}']),
    "outputs": TENSOR.join(['{"inputs": [', '], "outputs": %s}']),
    "output": TENSOR.join(['{"inputs": [', '], "outputs": [{"name": %s}]}']),
    "parameters": TENSOR.join(['{"inputs": [', '], "parameters": %s}']),
    "classification": TENSOR.join(
        ['{"inputs": [', '], "outputs": [{"name": "probabilities", "parameters": '
         '{"classification": %s}}]}']
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", [DEEP, LONG, TEXT], ids=["deep", "long", "text"])
@pytest.mark.parametrize("place", PLACES)
def test_what_a_message_quotes_is_short_however_long_or_deep(client, place, value):
    answer = client.post(V2, content=PLACES[place] % value, headers=JSON)
    assert 400 <= answer.status_code < 500, answer.text
    assert len(answer.content) < 1000


@pytest.mark.parametrize("more", [0, 1, 2, 3, 4, -1, -3, PIECE])
def test_base64_of_several_pieces_is_that_of_one(more):
    content = np.random.default_rng(0).bytes(PIECE * 3 // 4 + more)
    text = base64.b64encode(content).decode()
    assert unbase64("x", text) == content
    assert unbase64("x", "\n".join([text[:99], text[99:]])) == content
    assert unbase64("x", text.rstrip("=")) == content


@pytest.mark.parametrize("at", [0, 100, PIECE - 4, PIECE - 2, PIECE, PIECE + 4])
@pytest.mark.parametrize("wrong", ["=", "==", "@", "A", "\u00e9"])
def test_one_wrong_digit_anywhere_is_refused(at, wrong):
    text = "A" * (2 * PIECE)
    with pytest.raises(BadFraming, match="x is not valid base64"):
        unbase64("x", text[:at] + wrong + text[at + len(wrong) - (wrong == "A") :])


def arriving(body: bytes):
    async def receive():
        return {"type": "http.request", "body": body}

    return receive


class Recording(BoundedExecutor):
    """Notes the sizes of what it runs."""

    def __init__(self):
        super().__init__(10, 10**9)
        self.sizes = []

    async def __call__(self, tasks, size, deadline):
        self.sizes.append(size)
        return await super().__call__(tasks, size, deadline)


def form(*images: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    return b"".join(head + image + b"\r\n" for image in images) + b"--b--\r\n"


def instances(*images: bytes) -> bytes:
    rows = [{"b64": base64.b64encode(image).decode()} for image in images]
    return json.dumps({"instances": rows}).encode()


LARGE = PNG + bytes(INLINE_BYTES)
BODIES = {
    "small form": (form(PNG), "multipart/form-data; boundary=b", False),
    "large form": (form(PNG, LARGE), "multipart/form-data; boundary=b", True),
    "small json": (instances(PNG), "application/json", False),
    "large json": (instances(PNG, LARGE), "application/json", True),
    "json of no type": (instances(LARGE), "", True),
    "small file": (PNG, "image/png", False),
    "large file": (LARGE, "image/png", False),
}


def read(body: bytes, kind: str, executor, deadline=NO_DEADLINE) -> list[bytes]:
    fields = {b"content-type": kind.encode()}
    return asyncio.run(
        read_images(
            fields, arriving(body), max_bytes=10**7, max_images=3, executor=executor,
            deadline=deadline,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_large_bodies_are_parsed_beside_the_loop_and_small_ones_on_it(name):
    body, kind, beside = BODIES[name]
    executor = Recording()
    assert set(read(body, kind, executor)) <= {PNG, LARGE}
    assert executor.sizes == ([len(body)] if beside else [])
    executor.close()


def test_a_large_body_is_not_parsed_for_a_client_that_is_gone():
    executor = Recording()
    with pytest.raises(ClientGone):
        read(
            b"{" + bytes(INLINE_BYTES),
            "application/json",
            executor,
            Deadline(math.inf, ClientConnection(True)),
        )
    executor.close()


def test_a_large_answer_is_written_beside_the_loop(make_client):
    pixels = np.zeros((6000, 8, 8, 3), np.uint8)
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "pixels",
                    "datatype": "UINT8",
                    "shape": list(pixels.shape),
                    "parameters": {"binary_data_size": pixels.nbytes},
                }
            ],
            "outputs": [{"name": "probabilities", "parameters": {"classification": 4}}],
        }
    ).encode()
    client = make_client(limits={"max_tensor_images": 6000, "max_queue": 6000})
    executor = Recording()
    client = TestClient(build(replace(client.app.state.service, executor=executor)))
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = client.post(V2, content=head + pixels.tobytes(), headers=headers)
    assert answer.status_code == 200
    assert len(answer.json()["outputs"][0]["data"]) == 24_000
    assert executor.sizes == [0]
    executor.close()
