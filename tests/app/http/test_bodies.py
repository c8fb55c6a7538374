"""Bodies and their framing, over the application: what is read, and how the rest is refused."""

import asyncio
import base64
import codecs
import json
import tracemalloc

import numpy as np
import pytest

from app.errors import BadFraming, ClientGone, TooLarge
from app.http.bodies import read_body, read_buffer
from tests.pictures import PNG, encoded, picture

LIMITS = {"limits": {"max_body_bytes": 20_000, "max_images": 3, "max_pixels": 10_000}}


@pytest.fixture(scope="module")
def client(make_shared_client):
    return make_shared_client()


@pytest.fixture(scope="module")
def limited(make_shared_client):
    return make_shared_client(**LIMITS)


def instances(*images: bytes) -> bytes:
    rows = [{"b64": base64.b64encode(image).decode()} for image in images]
    return json.dumps({"instances": rows}).encode()


def form(*images: bytes, name: str = "image") -> dict:
    return {"files": [(name, ("x.png", image, "image/png")) for image in images]}


def raw(body: bytes, kind: str = "image/png", **headers: str) -> dict:
    return {"content": body, "headers": {"Content-Type": kind, **headers}}


MULTIPART = "multipart/form-data; boundary=b"


def base64_of(text: str) -> bytes:
    return json.dumps({"instances": [{"b64": text}]}).encode()


def parts(name: bytes = b'; filename="x"', more: bytes = b"") -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="image"' + name
    return head + b"\r\n" + more + b"\r\n" + PNG + b"\r\n--b--\r\n"


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
    "no type": ({"content": PNG}, 1),
    "empty type": (raw(PNG, ""), 1),
    "image/jpg": (raw(encoded(picture(), "JPEG"), "image/jpg"), 1),
    "another image type": (raw(PNG, "image/gif"), 1),
    "octet stream": (raw(PNG, "application/octet-stream"), 1),
    "what S3 calls it": (raw(PNG, "binary/octet-stream"), 1),
    "what curl sends by default": (raw(PNG, "application/x-www-form-urlencoded"), 1),
    "JSON without a type": ({"content": instances(PNG)}, 1),
    "JSON as curl sends it": (raw(b" \n" + instances(PNG), "application/x-www-form-urlencoded"), 1),
    "JSON, charset": (raw(instances(PNG), "Application/JSON ; charset=UTF-8"), 1),
    "JSON, byte order mark": (raw(b"\xef\xbb\xbf" + instances(PNG), "application/json"), 1),
    "identity": (raw(PNG, **{"Content-Encoding": "Identity"}), 1),
    "no encoding": (raw(PNG, **{"Content-Encoding": " "}), 1),
    "base64 in lines": (raw(base64_of(base64.encodebytes(PNG).decode()), "application/json"), 1),
    "base64 with CRLF": (
        raw(base64_of(base64.encodebytes(PNG).decode().replace("\n", "\r\n")), "application/json"),
        1,
    ),
    "base64 for URLs": (
        raw(base64_of(base64.urlsafe_b64encode(PNG).decode()), "application/json"),
        1,
    ),
    "base64 without padding": (
        raw(base64_of(base64.b64encode(PNG + b"x").decode().rstrip("=")), "application/json"),
        1,
    ),
    "data URL": (
        raw(
            base64_of("data:image/png;base64," + base64.b64encode(PNG).decode()),
            "application/json",
        ),
        1,
    ),
    "form with a preamble": (raw(b"To whom\r\nit concerns\r\n" + parts(), MULTIPART), 1),
    "form with empty lines before it": (raw(b"\r\n\r\n" + parts(), MULTIPART), 1),
    "form with an epilogue": (raw(parts() + b"\r\nthe end", MULTIPART), 1),
    "form without a line end": (raw(parts().rstrip(), MULTIPART), 1),
    "quoted boundary": (raw(parts(), 'Multipart/Form-Data; Boundary="b"'), 1),
    "filename*": (raw(parts(b"; filename*=UTF-8''%C3%A9.png"), MULTIPART), 1),
    "both file names": (raw(parts(b"; filename=\"e\"; filename*=UTF-8''%C3%A9"), MULTIPART), 1),
    "no file name": (raw(parts(b""), MULTIPART), 1),
    "name without quotes": (raw(parts().replace(b'"image"', b"image"), MULTIPART), 1),
    "names in capitals": (raw(parts().replace(b"; name=", b" ; NAME="), MULTIPART), 1),
    "transfer encoding": (raw(parts(more=b"Content-Transfer-Encoding: Binary\r\n"), MULTIPART), 1),
}

CUT = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nabc'
MANY = b"".join(
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n%d\r\n' % n
    for n in range(10_000)
)
REFUSED = {
    "no type and no image": ({"content": b"hello"}, 415),
    "GIF": (raw(b"GIF89a", "image/gif"), 415),
    "another type": (raw(PNG, "text/plain"), 415),
    "another multipart type": (raw(CUT, "multipart/mixed; boundary=b"), 415),
    "no image as octet stream": (raw(b"hello", "application/octet-stream"), 415),
    "url-encoded": (raw(b"a=b", "application/x-www-form-urlencoded"), 415),
    "gzip": (raw(PNG, **{"Content-Encoding": "gzip"}), 415),
    "empty": (raw(b""), 422),
    "no image": (raw(b"hello"), 422),
    "too long": (raw(bytes(20_001)), 413),
    "too many pixels": (raw(encoded(picture(101, 100).convert("L").convert("1"))), 413),
    "cut off": (raw(PNG[:-60]), 422),
    "gzip in capitals": (raw(PNG, **{"Content-Encoding": "GZIP"}), 415),
    "two encodings": (raw(PNG, **{"Content-Encoding": "identity, gzip"}), 415),
    "empty boundary": (raw(CUT, "multipart/form-data; boundary="), 400),
    "a long boundary": (raw(CUT, "multipart/form-data; boundary=" + "b" * 201), 400),
    "another boundary": (raw(parts(), "multipart/form-data; boundary=c"), 400),
    "encoded part": (raw(parts(more=b"Content-Transfer-Encoding: base64\r\n"), MULTIPART), 415),
    "only an extended name": (raw(parts().replace(b"name=", b"name*="), MULTIPART), 400),
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
    "base64 with a word": (raw(base64_of("iVBO Rw0K?"), "application/json"), 400),
    "base64 of one digit": (raw(base64_of("i"), "application/json"), 400),
    "base64 beyond ASCII": (raw(base64_of("iVB\u00d6"), "application/json"), 400),
    "UTF-16": (raw(instances(PNG).decode().encode("utf-16"), "application/json"), 400),
    "UTF-32": (raw(instances(PNG).decode().encode("utf-32"), "application/json"), 400),
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


SPY = "scumble_spy"
ENCODED_WORD = b"=?scumble_spy?Q?x?="
NAMING_A_CODEC = {
    "form": raw(parts(), MULTIPART + "; charset=" + SPY),
    "form, field is text": raw(parts(b""), MULTIPART + "; charset=" + SPY),
    "form, quoted": raw(parts(), MULTIPART + f'; charset="{SPY}"'),
    "type of a part": raw(
        parts(more=b"Content-Type: text/plain; charset=scumble_spy\r\n"), MULTIPART
    ),
    "filename*": raw(parts(b"; filename*=scumble_spy''x"), MULTIPART),
    "filename, encoded word": raw(parts(b'; filename="' + ENCODED_WORD + b'"'), MULTIPART),
    "name*": raw(parts(b"; name*=scumble_spy''image"), MULTIPART),
    "_charset_ of HTML": raw(
        parts(more=b"Content-Type: image/png; _charset_=scumble_spy\r\n"), MULTIPART
    ),
    "JSON": raw(instances(PNG), "application/json; charset=" + SPY),
    "data URL": raw(
        base64_of(f"data:text/plain;charset={SPY};base64," + base64.b64encode(PNG).decode()),
        "application/json",
    ),
    "image": raw(PNG, "image/png; charset=" + SPY),
    "accepted": raw(PNG, **{"Accept-Charset": SPY, "Accept": f"application/json;charset={SPY}"}),
    "host": raw(PNG, Host="xn--scumble_spy.example"),
}


@pytest.mark.parametrize("name", NAMING_A_CODEC)
def test_no_client_chooses_a_codec(client, name):
    asked = []
    spy = asked.append
    codecs.register(spy)
    try:
        answer = client.post("/v1/predict", **NAMING_A_CODEC[name])
    finally:
        codecs.unregister(spy)
    assert answer.status_code == 200, answer.text
    assert asked == []


@pytest.mark.parametrize("charset", ["punycode", "undefined", "idna", "rot13", "zlib", "utf-7"])
@pytest.mark.parametrize("field", [b"image", b"x" * 4000])
def test_names_of_codecs_in_a_form_change_nothing(client, charset, field):
    body = parts(b"").replace(b'"image"', b'"' + field + b'"')
    answer = client.post("/v1/predict", **raw(body, f"{MULTIPART}; charset={charset}"))
    assert answer.status_code == (200 if field == b"image" else 400)


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
    with pytest.raises(BadFraming, match="has 3 bytes, but Content-Length is 5"):
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
