"""Bodies and their framing, over the application: what is read, and how the rest is refused."""

import asyncio
import base64
import json
import tracemalloc

import numpy as np
import pytest

from app.bodies import read_body, read_buffer
from app.errors import BadFraming, ClientGone, TooLarge
from tests.pictures import PNG, encoded, picture

LIMITS = {"limits": {"max_body_bytes": 20_000, "max_images": 3, "max_pixels": 10_000}}


@pytest.fixture
def limited(make_client):
    return make_client(**LIMITS)


def instances(*images: bytes) -> bytes:
    rows = [{"b64": base64.b64encode(image).decode()} for image in images]
    return json.dumps({"instances": rows}).encode()


def form(*images: bytes, name: str = "image") -> dict:
    return {"files": [(name, ("x.png", image, "image/png")) for image in images]}


def raw(body: bytes, kind: str = "image/png", **headers: str) -> dict:
    return {"content": body, "headers": {"Content-Type": kind, **headers}}


OTHERS = [encoded(picture(seed=n)) for n in range(1, 3)]
READ = {
    "png": (raw(PNG), 1),
    "jpeg": (raw(encoded(picture(), "JPEG"), "image/jpeg"), 1),
    "webp": (raw(encoded(picture(), "WEBP"), "image/webp"), 1),
    "type with parameter": (raw(PNG, "image/png; charset=binary"), 1),
    "type in capitals": (raw(PNG, "IMAGE/PNG"), 1),
    "one part": (form(PNG), 1),
    "three parts": (form(PNG, *OTHERS), 3),
    "one instance": (raw(instances(PNG), "application/json"), 1),
    "three instances": (raw(instances(PNG, *OTHERS), "application/json"), 3),
}

CUT = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nabc'
MULTIPART = "multipart/form-data; boundary=b"
MANY = b"".join(
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n%d\r\n' % n
    for n in range(10_000)
)
REFUSED = {
    "no type": ({"content": PNG}, 415),
    "wrong type": (raw(PNG, "image/gif"), 415),
    "url-encoded": (raw(b"a=b", "application/x-www-form-urlencoded"), 415),
    "gzip": (raw(PNG, **{"Content-Encoding": "gzip"}), 415),
    "empty": (raw(b""), 422),
    "no image": (raw(b"hello"), 422),
    "too long": (raw(bytes(20_001)), 413),
    "too many pixels": (raw(encoded(picture(101, 100).convert("L").convert("1"))), 413),
    "cut off": (raw(PNG[:-60]), 422),
    "no boundary": (raw(CUT, "multipart/form-data"), 400),
    "multipart cut off": (raw(CUT, MULTIPART), 400),
    "multipart of nothing": (raw(b"--b--\r\n", MULTIPART), 400),
    "multipart garbage": (raw(b"garbage", MULTIPART), 400),
    "multipart without disposition": (raw(b"--b\r\nX: y\r\n\r\nabc\r\n--b--\r\n", MULTIPART), 400),
    "wrong field": (form(PNG, name="file"), 400),
    "text field": ({"data": {"image": "text"}, "files": {"x": b""}}, 400),
    "empty part": (form(PNG, b""), 422),
    "four parts": (form(PNG, PNG, PNG, PNG), 413),
    "no json": (raw(b"{", "application/json"), 400),
    "json of another shape": (raw(b"[]", "application/json"), 400),
    "no instances": (raw(b'{"instances": []}', "application/json"), 400),
    "instance is a string": (raw(b'{"instances": ["abc"]}', "application/json"), 400),
    "instance has more members": (
        raw(b'{"instances": [{"b64": "", "url": "x"}]}', "application/json"),
        400,
    ),
    "no base64": (raw(b'{"instances": [{"b64": "@@@@"}]}', "application/json"), 400),
    "empty base64": (raw(b'{"instances": [{"b64": ""}]}', "application/json"), 422),
    "four instances": (raw(instances(*[b"x"] * 4), "application/json"), 413),
    "deep json": (raw(b"[" * 10_000, "application/json"), 400),
    "not utf-8": (raw(b'{"instances": [{"b64": "\xff"}]}', "application/json"), 400),
    "lone surrogate": (raw(b'{"instances": [{"b64": "\\ud800"}]}', "application/json"), 400),
}


@pytest.mark.parametrize("name", READ)
def test_read(limited, name):
    request, count = READ[name]
    answer = limited.post("/v1/predict", **request)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["predictions"]) == count


@pytest.mark.parametrize("name", REFUSED)
def test_refused(limited, name):
    request, status = REFUSED[name]
    answer = limited.post("/v1/predict", **request)
    assert answer.status_code == status, answer.text


def test_ten_thousand_parts_are_refused_as_too_many(client):
    answer = client.post("/v1/predict", **raw(MANY + b"--b--\r\n", MULTIPART))
    assert answer.status_code == 413
    assert "allowed: 32 images" in answer.json()["detail"]


def test_all_forms_give_the_same_answer(client):
    answers = [
        client.post("/v1/predict", **request).json()["predictions"][0]
        for request in (raw(PNG), form(PNG), raw(instances(PNG), "application/json"))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_chunked_body_is_stopped_at_the_limit(limited):
    sent = []

    def chunks():
        for n in range(100):
            sent.append(n)
            yield bytes(1000)

    answer = limited.post("/v1/predict", **raw(chunks()))
    assert answer.status_code == 413


def arriving(*chunks: bytes):
    """The ASGI side of a body that comes in pieces."""
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)}
        for i, chunk in enumerate(chunks)
    ]

    async def receive():
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    return receive


@pytest.mark.parametrize("reader", [read_body, read_buffer])
@pytest.mark.parametrize("chunks", [[b"abcdef"], [b"ab", b"", b"cdef"], [b""], [b"abcdef", b""]])
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_in_pieces(reader, chunks, declared):
    whole = b"".join(chunks)
    fields = {b"content-length": b"%d" % len(whole)} if declared else {}
    body = asyncio.run(reader(fields, arriving(*chunks), 6))
    assert body == whole
    if reader is read_buffer and declared and whole:
        assert np.frombuffer(body, np.uint8).flags.writeable


@pytest.mark.parametrize("reader", [read_body, read_buffer])
@pytest.mark.parametrize(
    ("declared", "chunks", "error"),
    [
        (None, [b"abcd", b"efg"], TooLarge),
        (7, [b"abcdefg"], TooLarge),
        (10**14, [b"a"], TooLarge),
    ],
)
def test_too_much_is_refused(reader, declared, chunks, error):
    fields = {b"content-length": b"%d" % declared} if declared else {}
    with pytest.raises(error, match="6"):
        asyncio.run(reader(fields, arriving(*chunks), 6))


def test_a_buffer_that_is_not_filled_is_refused():
    fields = {b"content-length": b"5"}
    with pytest.raises(BadFraming, match="has 3 bytes; its headers say 5"):
        asyncio.run(read_buffer(fields, arriving(b"abc"), 6))
    with pytest.raises(TooLarge):
        asyncio.run(read_buffer(fields, arriving(b"abcdef"), 6))


@pytest.mark.parametrize("sent", [0, 1, 1000, 300_000])
def test_memory_follows_what_arrived_not_what_was_declared(sent):
    chunks = [{"type": "http.request", "body": bytes(sent), "more_body": True}]
    held = []

    async def receive():
        held.append(tracemalloc.get_traced_memory()[0])
        return chunks.pop() if chunks else {"type": "http.disconnect"}

    async def read():
        tracemalloc.start()
        with pytest.raises(ClientGone, match=f"after {sent} bytes"):
            await read_buffer({b"content-length": b"5242880"}, receive, 5 * 2**20)
        tracemalloc.stop()

    asyncio.run(read())
    assert max(held) < 1.5 * sent + 20_000


def test_the_client_went_away():
    async def gone():
        return {"type": "http.disconnect"}

    for reader in (read_body, read_buffer):
        with pytest.raises(ClientGone, match="after 0 bytes"):
            asyncio.run(reader({b"content-length": b"5"}, gone, 6))
