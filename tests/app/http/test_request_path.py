"""The order of a request: framing, headers of the images, sums, deadline, charge; then decoding.

A decoder that counts its calls, and a clock, are handed to the service.
"""

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import count

import orjson
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.access.keys import KeyFile, write_keys
from app.errors import Unprocessable
from app.http.application import build
from app.inference.decode import decode
from app.main import create_app
from app.request_context import KEY, ClientConnection, RequestContext
from app.settings import Settings
from tests.app.access.test_admission import left, row
from tests.app.http.test_application import samples
from tests.pictures import PNG, encoded, picture

LARGE = encoded(picture(600, 600), "JPEG")
FLAT = encoded(Image.new("RGB", (600, 600)))  # a small body, parsed on the event loop
OTHER = encoded(picture(seed=1))
FIVE = {"X-API-Key": "five"}


class Decoder:
    """Counts its calls and the threads they come on, and can be told what to do before each."""

    def __init__(self, before=lambda data: None):
        self.calls = []
        self.threads = set()
        self._before = before

    def __call__(self, data, *args):
        self.calls.append(data)
        self.threads.add(threading.get_ident())
        self._before(data)
        return decode(data, *args)


def refusing(bad: bytes) -> Decoder:
    """A decoder that finds one file broken after all."""

    def refuse(data):
        if data == bad:
            raise Unprocessable("image is broken")

    return Decoder(refuse)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "audit"


@pytest.fixture
def start(models, tmp_path, log):
    """`start(decoder, line, clock, **settings)` -> a client of such an application with keys.

    `line` is the connection of all its requests.
    """
    keys = (row("five", limits={"total_images": 5}), row("spent", limits={"total_images": 0}))
    write_keys(tmp_path / "keys.json", KeyFile(keys=keys))
    with ExitStack() as stack:

        def make(decoder, peer=None, clock=time.perf_counter, **settings):
            app = create_app(
                Settings(
                    model_dir=models,
                    model="tiny",
                    workers=1,
                    keys_file=tmp_path / "keys.json",
                    audit_file=log,
                    audit_on_failure="closed",
                    **settings,
                )
            )
            served = build(replace(app.state.service, decoder=decoder, clock=clock))

            async def connected(scope, receive, send):
                if peer is not None:
                    scope.setdefault("state", {})[KEY] = RequestContext(peer)
                await served(scope, receive, send)

            connected.state = served.state
            client = stack.enter_context(TestClient(connected, raise_server_exceptions=False))
            client.service = served.state.service
            return client

        yield make


def form(*images):
    return {"files": [("image", ("x.png", image, "image/png")) for image in images]}


def instances(*images):
    rows = [{"b64": base64.b64encode(image).decode()} for image in images]
    return {"json": {"instances": rows}}


def tensor(*images):
    data = [base64.b64encode(image).decode() for image in images]
    return {
        "json": {
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}]
        }
    }


INFER = "/v2/models/tiny/infer"
FORMS = {"form": ("/v1/predict", form), "json": ("/v1/predict", instances), "v2": (INFER, tensor)}


def lines(log) -> list[tuple]:
    text = log.with_name("audit.worker-0").read_bytes()
    found = [line for line in map(orjson.loads, text.splitlines()) if line["kind"] == "prediction"]
    return [tuple(line.get(name) for name in ("status", "images", "refusal")) for line in found]


UNDECODED = {
    "the budget is spent": ({"key": "spent"}, [PNG, LARGE], 429),
    "more images than the budget has": ({}, [PNG] * 6, 429),
    "the deadline has passed": ({"clock": map(float, count()).__next__}, [PNG, LARGE], 504),
    "the client is gone": ({"peer": ClientConnection(gone=True)}, [PNG, LARGE], 499),
    "one has too many pixels": ({"limits": {"max_pixels": 1000}}, [PNG, LARGE], 413),
    "all have too many pixels": ({"limits": {"max_request_pixels": 500_000}}, [LARGE] * 2, 413),
    "one is not an image": ({}, [PNG, b"no image"], 422),
    "too many images": ({"limits": {"max_images": 2}}, [PNG] * 3, 413),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", UNDECODED)
def test_nothing_is_decoded_nor_charged_where(start, log, case, form):
    options, images, status = UNDECODED[case]
    options = dict(options)
    key = options.pop("key", "five")
    decoder = Decoder()
    client = start(decoder, **options)
    url, make = FORMS[form]
    headers = {"X-API-Key": key, "X-Deadline-Ms": "500"}
    answer = client.post(url, headers=headers, **make(*images))
    assert answer.status_code == status, answer.text
    assert decoder.calls == []
    assert lines(log) == [(status, len(images) if status == 429 else 0, answer_reason(status))]
    if key == "five" and status not in (499, 504):
        assert left(client, "five") == 4


def answer_reason(status: int) -> str:
    names = {413: "too_large", 422: "unprocessable", 429: "budget", 499: "gone", 504: "deadline"}
    return names[status]


def test_the_sum_of_pixels_is_said_and_a_single_image_may_have_what_one_may(start):
    client = start(Decoder(), limits={"max_request_pixels": 360_000})
    answer = client.post("/v1/predict", headers=FIVE, **form(LARGE, PNG))
    assert answer.status_code == 413
    assert answer.json()["detail"] == (
        "the 2 images of the request have 360064 pixels together; "
        "allowed: 360000 (SCUMBLE_LIMITS__MAX_REQUEST_PIXELS)"
    )
    assert client.post("/v1/predict", headers=FIVE, **form(LARGE)).status_code == 200
    client = start(Decoder(), limits={"max_request_pixels": 1})
    assert client.post("/v1/predict", headers=FIVE, **form(LARGE)).status_code == 200


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", ["small", "large"])
def test_what_turns_out_to_be_unreadable_is_refunded_exactly(start, log, form, size):
    url, make = FORMS[form]
    images = [PNG, OTHER] if size == "small" else [LARGE, OTHER]
    client = start(refusing(OTHER))
    answer = client.post(url, headers=FIVE, **make(*images, PNG))
    assert answer.status_code == 422, answer.text
    assert "ratelimit" not in answer.headers
    assert lines(log) == [(422, 3, "unprocessable")]
    assert left(client, "five") == 4
    assert client.post(url, headers=FIVE, **make(*[PNG] * 4)).status_code == 200
    assert client.post(url, headers=FIVE, **make(PNG)).status_code == 429
    assert samples(client)['scumble_client_images_total{"client": "five"}'] == 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("images", "beside"),
    [([PNG] * 5, False), ([LARGE], True), ([LARGE, PNG], True), ([OTHER] * 5, False)],
)
def test_large_images_are_decoded_beside_the_loop_and_small_ones_on_it(start, form, images, beside):
    decoder = Decoder()
    client = start(decoder)
    url, make = FORMS[form]
    assert client.post(url, headers=FIVE, **make(*images)).status_code == 200
    assert decoder.calls == images
    (thread,) = decoder.threads
    (loop,) = {client.portal.call(threading.get_ident)}
    assert (thread != loop) is beside


@pytest.mark.parametrize("form", FORMS)
def test_a_client_that_goes_stops_the_decoding_and_pays_nothing(start, log, form):
    line = ClientConnection()

    def leave(data):
        line.gone = len(decoder.calls) == 2

    decoder = Decoder(leave)
    client = start(decoder, peer=line)
    url, make = FORMS[form]
    answer = client.post(url, headers=FIVE, **make(*[LARGE] * 5))
    assert answer.status_code == 499
    assert len(decoder.calls) == 2
    assert lines(log) == [(499, 5, "gone")]
    line.gone = False
    assert left(client, "five") == 4


def test_others_are_answered_while_a_large_image_is_decoded(start):
    entered, opened = threading.Event(), threading.Event()

    def wait(data):
        if data == LARGE:
            entered.set()
            assert opened.wait(30)

    client = start(Decoder(wait))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.post, "/v1/predict", headers=FIVE, **form(LARGE))
        assert entered.wait(30)
        assert client.get("/livez").status_code == 200
        assert client.post("/v1/predict", headers=FIVE, **form(PNG)).status_code == 200
        assert client.service.running_s() > 0
        opened.set()
        assert slow.result().status_code == 200
    assert client.service.running_s() == 0


def test_a_deadline_is_answered_while_a_large_image_is_decoded_and_costs_nothing(start):
    opened = threading.Event()
    client = start(Decoder(lambda data: opened.wait(30)))
    headers = {**FIVE, "X-Deadline-Ms": "100"}
    assert client.post("/v1/predict", headers=headers, **form(LARGE)).status_code == 504
    opened.set()
    assert left(client, "five") == 4


@pytest.mark.parametrize(
    ("limits", "images", "message"),
    [
        ({"max_queue": 1}, [LARGE], "1 images or bodies are waiting to be read; allowed: 1"),
        ({"max_queue": 2}, [FLAT] * 2, "1 images or bodies are waiting to be read; allowed: 2"),
        ({"max_decode_bytes": len(LARGE) + 1}, [LARGE, PNG], "bytes are waiting to be read"),
    ],
    ids=["a body to parse", "images to decode", "bytes"],
)
def test_more_than_may_wait_for_the_thread_is_503_and_costs_nothing(start, limits, images, message):
    entered, opened = threading.Event(), threading.Event()

    def wait(data):
        entered.set()
        assert opened.wait(30)

    client = start(Decoder(wait), limits=limits)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.post, "/v1/predict", headers=FIVE, **form(LARGE))
        assert entered.wait(30)
        answer = client.post("/v1/predict", headers=FIVE, **form(*images))
        assert answer.status_code == 503
        assert message in answer.json()["detail"]
        assert answer.headers["retry-after"] == "1"
        opened.set()
        assert slow.result().status_code == 200
    assert left(client, "five") == 3


def test_the_decode_stage_is_timed_once_and_without_the_charge(start):
    now = 0.0

    def decode_for_a_minute(data):
        nonlocal now
        now += 60

    client = start(Decoder(decode_for_a_minute), clock=lambda: now)
    store = client.service.access.store
    charge = store.charge

    async def slow(*args):
        nonlocal now
        now += 1000
        return await charge(*args)

    store.charge = slow
    assert client.post("/v1/predict", headers=FIVE, **form(PNG, OTHER)).status_code == 200
    found = samples(client)
    assert found['scumble_stage_seconds_count{"stage": "decode"}'] == 1
    assert found['scumble_stage_seconds_sum{"stage": "decode"}'] == 120
    assert found['scumble_stage_seconds_sum{"stage": "read"}'] == 0
