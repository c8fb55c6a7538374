import asyncio
import copy
import io
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.utils import format_datetime
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import scumble
from scumble import AsyncClient, Client
from scumble.client import wire
from tests.pictures import PNG, encoded, picture

URL = "http://scumble.test/base"
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)
COLOUR = np.asarray(picture())

INFO = {
    "name": "mnist",
    "version": "1",
    "labels": ["0", "1"],
    "input": {"height": 28, "width": 28, "channels": 1},
    "formats": ["image/jpeg", "image/png", "image/webp"],
    "limits": {"max_body_bytes": 1_000_000, "max_images": 16, "max_pixels": 1_000_000},
}


def prediction(**changes):
    first = {"label": "1", "index": 1, "probability": 0.75, "probabilities": [0.25, 0.75]}
    return first | changes


def answer(n=1, **changes):
    body = {"model": "mnist", "version": "1", "id": "abc", "predictions": [prediction()] * n}
    return {"status_code": 200, "json": body | changes}


def busy(status=503, **headers):
    problem = {"type": "about:blank", "title": "Busy", "status": status, "detail": "come back"}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"status_code": status, "json": problem | {"error": "come back"}, "headers": headers}


class Service:
    """Answers from a script, whose last line it repeats; an error in it is raised."""

    def __init__(self, *script):
        self.script = list(script)
        self.requests = []
        self.naps = []

    def __call__(self, request):
        self.requests.append(request)
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, Exception):
            raise step
        return httpx2.Response(**step)


async def ask_sync(service, act, **options):
    transport = httpx2.MockTransport(service)
    with Client(URL, transport=transport, sleep=service.naps.append, **options) as client:
        return act(client)


async def ask_async(service, act, **options):
    async def nap(seconds):
        service.naps.append(seconds)

    transport = httpx2.MockTransport(service)
    async with AsyncClient(URL, transport=transport, sleep=nap, **options) as client:
        return await act(client)


ASKS = {"sync": ask_sync, "async": ask_async}


@pytest.fixture(params=ASKS)
def ask(request):
    """`await ask(service, act, **options)`: one test body for both clients."""
    return ASKS[request.param]


@pytest.fixture
def anyio_backend():
    return "asyncio"


pytestmark = pytest.mark.anyio


def predict(images=PNG, **options):
    return lambda client: client.predict(images, **options)


def parts(request):
    """The parts of a multipart body as the standard library reads them."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    return message_from_bytes(head + request.content).get_payload()


# What is sent


@pytest.mark.parametrize(
    ("kind", "media_type"),
    [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("AVIF", "image/avif")],
)
@pytest.mark.parametrize("form", ["bytes", "path", "string"])
async def test_encoded_images_are_sent_as_they_are(ask, tmp_path, kind, media_type, form):
    content = encoded(picture(), kind)
    path = tmp_path / "picture"
    path.write_bytes(content)
    service = Service(answer())
    await ask(service, predict({"bytes": content, "path": path, "string": str(path)}[form]))
    (request,) = service.requests
    assert (request.method, str(request.url)) == ("POST", f"{URL}/v1/predict")
    assert request.headers["content-type"] == media_type
    assert request.content == content


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (picture(), COLOUR),
        (picture(mode="L"), np.asarray(picture(mode="L"))),
        (GREY, GREY),
        (GREY[..., None], GREY),
        (GREY.T, GREY.T),
        (COLOUR, COLOUR),
        (COLOUR[:, ::-1], COLOUR[:, ::-1]),
    ],
    ids=["colour", "grey", "HW", "HW1", "transposed", "HW3", "mirrored"],
)
async def test_pixels_arrive_exactly(ask, image, pixels):
    service = Service(answer())
    await ask(service, predict(image))
    (request,) = service.requests
    assert request.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(request.content))), pixels)


@pytest.mark.parametrize(
    "images",
    [[PNG, GREY], (PNG, GREY), iter([PNG, GREY]), np.stack([GREY, GREY])[..., None]],
    ids=["list", "tuple", "iterator", "NHWC"],
)
async def test_several_images_are_parts_of_one_request(images):
    service = Service(answer(2))
    assert len((await ask_sync(service, predict(images))).predictions) == 2
    first, second = parts(service.requests[0])
    assert first["content-disposition"] == 'form-data; name="image"; filename="image-0"'
    assert second["content-disposition"] == 'form-data; name="image"; filename="image-1"'
    assert first.get_content_type() == second.get_content_type() == "image/png"
    sent = Image.open(io.BytesIO(second.get_payload(decode=True)))
    np.testing.assert_array_equal(np.asarray(sent), GREY)


async def test_an_application_reads_the_parts_as_files(anyio_backend):
    async def endpoint(request):
        async with request.form() as form:
            contents = [await file.read() for file in form.getlist("image")]
        assert contents == [PNG, PNG]
        return JSONResponse(answer(2)["json"])

    app = Starlette(routes=[Route("/v1/predict", endpoint, methods=["POST"])])
    transport = httpx2.ASGITransport(app)
    async with AsyncClient("http://scumble.test", transport=transport) as client:
        assert len((await client.predict([PNG, PNG])).predictions) == 2


async def test_a_list_of_one_is_a_raw_body(ask):
    service = Service(answer())
    await ask(service, predict([PNG]))
    assert service.requests[0].content == PNG


async def test_top_k_and_request_id_are_sent(ask):
    service = Service(answer())
    await ask(service, predict(top_k=3, request_id="run-1.a_b"))
    (request,) = service.requests
    assert dict(request.url.params) == {"top_k": "3"}
    assert request.headers["x-request-id"] == "run-1.a_b"


@pytest.mark.parametrize("request_id", ["", "a b", "a\r\nb", "a\n", "x" * 65])
async def test_a_request_id_that_the_service_would_not_take(ask, request_id):
    service = Service(answer())
    with pytest.raises(ValueError, match="request_id is"):
        await ask(service, predict(request_id=request_id))
    assert not service.requests


UNSENDABLE = {
    "gif": (b"GIF89a", "6 bytes: not a PNG, JPEG, WebP, AVIF or HEIC image"),
    "empty": (b"", "0 bytes: not a PNG"),
    "no picture": (Path(__file__), r"test_http_client\.py': not a PNG"),
    "float": (GREY.astype(np.float32), r"float32 \(6, 8\); allowed: uint8 \(H, W\)"),
    "channels": (COLOUR[..., :2], r"uint8 \(8, 8, 2\)"),
    "no pixels": (np.zeros((0, 8), np.uint8), r"uint8 \(0, 8\)"),
    "5d": (np.zeros((1, 1, 8, 8, 3), np.uint8), r"uint8 \(1, 1, 8, 8, 3\)"),
    "cmyk": (picture(mode="CMYK"), r"CMYK.*\.convert\('RGB'\)"),
    "int": (7, "an image is int; allowed: bytes, a path"),
    "none": ([PNG, None], "an image is NoneType"),
    "no image": ([], "there are no images"),
}


@pytest.mark.parametrize(("image", "message"), UNSENDABLE.values(), ids=UNSENDABLE)
async def test_an_image_that_cannot_be_sent(ask, image, message):
    service = Service(answer())
    with pytest.raises(scumble.BadImage, match=message):
        await ask(service, predict(image))
    assert not service.requests


async def test_a_missing_file_is_the_systems_own_error(ask, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        await ask(Service(answer()), predict(tmp_path / "no.png"))


# What comes back


async def test_all_probabilities(ask):
    body = answer(news="ignored", predictions=[prediction(more=1)])
    assert await ask(Service(body), predict()) == scumble.Answer(
        model="mnist",
        version="1",
        id="abc",
        predictions=(scumble.Prediction("1", 1, 0.75, probabilities=(0.25, 0.75)),),
    )


async def test_top_k(ask):
    top = [{"label": "1", "index": 1, "probability": 0.75}]
    body = answer(predictions=[{"label": "1", "index": 1, "probability": 1, "top": top}])
    found = (await ask(Service(body), predict(top_k=1))).predictions[0]
    assert found.probabilities is None
    assert found.top == (scumble.Choice("1", 1, 0.75),)


async def test_model(ask):
    service = Service({"status_code": 200, "json": INFO | {"defense": "ignored"}})
    info = await ask(service, lambda client: client.model())
    assert (service.requests[0].method, str(service.requests[0].url)) == ("GET", f"{URL}/v1/model")
    assert info.input == scumble.InputShape(height=28, width=28, channels=1)
    assert asdict(info) == INFO | {
        "labels": tuple(INFO["labels"]),
        "formats": tuple(INFO["formats"]),
    }


MALFORMED = {
    "page": ({"text": "<html>"}, "answered 200, but body: Invalid JSON"),
    "empty": ({"content": b""}, "but body: Invalid JSON"),
    "binary": ({"content": b"\xff\xfe"}, "but body: Invalid JSON"),
    "list": ({"json": []}, "but body: Input should be an object"),
    "no member": ({"json": {}}, "but model: Field required"),
    "null": (answer(id=None), "but id: Input should be a valid string"),
    "string": (answer(predictions=[prediction(index="1")]), r"predictions\.0\.index: .*integer"),
    "no number": (answer(predictions=[prediction(probability=None)]), r"0\.probability: "),
    "in list": (answer(predictions=[prediction(probabilities=[0, "1"])]), r"probabilities\.1: "),
    "too many": (answer(n=2), "with 2 predictions for 1 images"),
    "too few": (answer(n=0), "with 0 predictions for 1 images"),
    "gzip": (
        {"content": b"not gzip", "headers": {"content-encoding": "gzip"}},
        "cannot be decompressed",
    ),
    "no content": ({"status_code": 204}, "answered 204, neither result nor refusal"),
    "redirect": (
        {"status_code": 307, "headers": {"location": "https://else.test"}},
        r"answered 307.*\(it points to https://else\.test\)",
    ),
}


@pytest.mark.parametrize(("response", "message"), MALFORMED.values(), ids=MALFORMED)
async def test_an_answer_that_is_not_the_services(ask, response, message):
    # A broken compressed body fails where it is made in a handler, so it is made of a stream.
    response = {"status_code": 200} | response
    if "content" in response:
        response["stream"] = httpx2.ByteStream(response.pop("content"))
    service = Service(response)
    with pytest.raises(scumble.BadAnswer, match=f"{URL}/v1/predict.*{message}"):
        await ask(service, predict())
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 415, 422, 500, 502, 504])
async def test_a_refusal_is_final(ask, status):
    service = Service(busy(status, retry_after="1"))
    with pytest.raises(scumble.Refused) as caught:
        await ask(service, predict())
    refused = caught.value
    assert str(refused) == f"{URL}/v1/predict answered {status}: come back"
    assert (refused.status, refused.detail) == (status, "come back")
    assert refused.problem["title"] == "Busy"
    assert len(service.requests) == 1
    assert service.naps == []
    assert str(copy.copy(refused)) == str(refused)  # as between processes


@pytest.mark.parametrize(
    ("response", "detail"),
    [
        ({"text": "<html>"}, "Bad Gateway"),
        ({"json": [1]}, "Bad Gateway"),
        ({"json": {"title": "Upstream is down"}}, "Upstream is down"),
    ],
)
async def test_a_refusal_that_is_no_problem_document(ask, response, detail):
    with pytest.raises(scumble.Refused, match=f"answered 502: {detail}"):
        await ask(Service({"status_code": 502} | response), predict())


# When it tries again

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
AT_NOON = format_datetime(NOON, usegmt=True)
SOON = format_datetime(NOON + timedelta(seconds=7), usegmt=True)


FAR = {"retry_after": "Tue, 01 Jan 2999 00:00:00 GMT"}


@pytest.mark.parametrize("headers", [{"retry_after": "86400"}, {"retry_after": "9" * 400}, FAR])
async def test_a_budget_spent_for_good_is_not_asked_again(ask, headers):
    service = Service(busy(429, **headers), answer())
    with pytest.raises(scumble.Refused, match="answered 429: come back"):
        await ask(service, predict())
    assert service.naps == []


@pytest.mark.parametrize("key", ["", "two words", "line\n", "\x7f", "é"])
async def test_a_key_that_cannot_be_a_header_is_refused_and_not_shown(key):
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="key has other characters") as raised:
            kind(URL, key=key)
        assert not key or key not in str(raised.value)


async def test_a_key_is_sent_with_every_request(ask):
    service = Service(answer())
    await ask(service, predict(), key="scumble_x")
    assert service.requests[0].headers["authorization"] == "Bearer scumble_x"
    service = Service(answer())
    await ask(service, predict())
    assert "authorization" not in service.requests[0].headers


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "nap"),
    [
        ({"retry_after": "3"}, 3),
        ({"retry_after": "0"}, 0),
        ({"retry_after": "3600"}, 30),
        ({"retry_after": "86399"}, 30),
        ({"retry_after": SOON, "date": AT_NOON}, 7),
        ({"retry_after": AT_NOON, "date": SOON}, 0),
        ({"retry_after": "Sat, 01 Jan 2000 00:00:00 GMT"}, 0),
    ],
    ids=["3 s", "0 s", "capped", "almost a day", "date", "past date", "long ago"],
)
async def test_a_busy_service_says_how_long_to_wait(ask, status, headers, nap):
    service = Service(busy(status, **headers), answer())
    await ask(service, predict(), max_wait=30)
    assert service.naps == [nap]
    assert [request.content for request in service.requests] == [PNG, PNG]


async def test_a_multipart_body_is_sent_again_whole(ask):
    service = Service(busy(), answer(2))
    await ask(service, predict([PNG, PNG]))
    first, second = service.requests
    assert first.content == second.content
    assert len(parts(second)) == 2


@pytest.mark.parametrize("value", [None, "", "soon", "-1", "1.5", "nan", "Foo, 99 Bar 2030"])
async def test_without_a_usable_retry_after_the_pauses_grow(ask, value):
    headers = {} if value is None else {"retry_after": value}
    service = Service(*[busy(**headers)] * 8, answer())
    await ask(service, predict(), retries=8, max_wait=2)
    limits = [0.2, 0.4, 0.8, 1.6, 2, 2, 2, 2]
    assert len(service.naps) == len(limits)
    assert all(0 <= nap <= limit for nap, limit in zip(service.naps, limits, strict=True))
    assert len(set(service.naps)) == len(limits), "without jitter all clients come back at once"


@pytest.mark.parametrize("retries", [0, 2])
async def test_a_service_that_stays_busy(ask, retries):
    service = Service(busy(429))
    with pytest.raises(scumble.Refused, match="answered 429: come back"):
        await ask(service, predict(), retries=retries)
    assert len(service.requests) == retries + 1
    assert len(service.naps) == retries


UNSENT = [httpx2.ConnectError("refused"), httpx2.ConnectTimeout("slow"), httpx2.PoolTimeout("full")]
SENT = [httpx2.ReadTimeout(""), httpx2.ReadError("reset"), httpx2.RemoteProtocolError("gone")]


@pytest.mark.parametrize("error", UNSENT, ids=repr)
async def test_what_was_not_sent_is_sent_again(ask, error):
    service = Service(error, error, answer())
    assert (await ask(service, predict())).id == "abc"
    assert len(service.naps) == 2


@pytest.mark.parametrize("error", UNSENT, ids=repr)
async def test_a_service_that_cannot_be_reached(ask, error):
    service = Service(error)
    with pytest.raises(scumble.Unreachable, match=f"no answer from {URL}/v1/predict: {error}"):
        await ask(service, predict(), retries=2)
    assert len(service.requests) == 3


@pytest.mark.parametrize("error", SENT, ids=repr)
async def test_what_may_have_been_counted_is_not_sent_again(ask, error):
    service = Service(error, answer())
    with pytest.raises(scumble.Unreachable, match=f": {str(error) or 'ReadTimeout'}$"):
        await ask(service, predict())
    assert len(service.requests) == 1


async def test_calls_at_once_count_their_attempts_apart(anyio_backend):
    seen = set()

    async def handler(request):
        await asyncio.sleep(0)
        name = request.headers["x-request-id"]
        first = name not in seen
        seen.add(name)
        return httpx2.Response(**(busy(retry_after="0") if first else answer(id=name)))

    names = [f"call-{i}" for i in range(20)]
    async with AsyncClient(URL, transport=httpx2.MockTransport(handler), retries=1) as client:
        calls = [client.predict(PNG, request_id=name) for name in names]
        assert [found.id for found in await asyncio.gather(*calls)] == names


# The edges


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("localhost:8000", {}),
        ("ftp://localhost", {}),
        ("http://", {}),
        ("http://a:b:c", {}),
        ("", {}),
        (URL, {"retries": -1}),
        (URL, {"max_wait": -1}),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_misuse_is_refused_by_the_constructor(kind, url, options):
    with pytest.raises(ValueError, match=r"url is|max_wait is"):
        kind(url, **options)


async def test_messages_do_not_show_a_password(ask):
    url = httpx2.URL("http://user:secret@scumble.test/v1/predict?top_k=1")
    assert wire.shown(url) == "http://scumble.test/v1/predict?top_k=1"


@pytest.mark.parametrize("url", ["http://me:pa?ss@x", "http://:1/pa@x", "ftp://me:pa@x", "pa@x"])
def test_a_refused_url_shows_no_password(url):
    with pytest.raises(ValueError, match=r"url is '\*\*\*'; allowed: http://") as caught:
        Client(url)
    assert "pa" not in str(caught.value)


def test_the_public_names_are_the_listed_ones():
    assert sorted(scumble.__all__) == scumble.__all__
    assert {name for names in scumble._HOMES.values() for name in names} == set(scumble.__all__)
    assert all(getattr(scumble, name).__name__ == name for name in scumble.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = scumble.Nothing


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import scumble", "numpy PIL httpx2 pydantic click rich onnx torch pyarrow sklearn app"),
        ("from scumble import Client", "click rich onnx onnxruntime torch pyarrow sklearn app"),
        ("import scumble.data.digits", "onnx torch pyarrow sklearn app"),
    ],
)
def test_importing_brings_only_what_is_needed(statement, absent):
    code = f"{statement}\nimport sys\nprint(*set({absent.split()}) & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
