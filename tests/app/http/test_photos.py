"""A photo of 12 megapixels and the limits that a client is told, by the defaults."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.http.application import build
from app.http.protocols.v2 import LENGTH
from app.inference.bundle import InputShape
from app.inference.decode import decode
from app.inference.executor import BoundedExecutor
from app.inference.image_formats import FORMATS
from loadtest import boxed_files
from tests.pictures import PNG, encoded

V2 = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def photo() -> bytes:
    return encoded(Image.new("RGB", (4000, 3000), (200, 30, 40)), "JPEG")


def test_a_photo_of_12_megapixels_is_answered_and_decoded_beside_the_loop(make_client, photo):
    threads = {}

    def decoder(data, *args):
        threads[data] = threading.get_ident()
        return decode(data, *args)

    client = make_client()
    service = replace(client.app.state.service, decoder=decoder)
    with TestClient(build(service)) as client:
        answer = client.post("/v1/predict", content=photo, headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == 200, answer.text
        assert client.post("/v1/predict", content=PNG).status_code == 200
        assert threads[PNG] == client.portal.call(threading.get_ident)
        assert threads[photo] != threads[PNG]


def test_many_photos_count_by_what_is_decoded_of_them(make_client, photo):
    form = [("image", photo)] * 3
    client = make_client()
    assert client.post("/v1/predict", files=form).status_code == 200
    client = make_client(limits={"max_request_pixels": 562_499})
    answer = client.post("/v1/predict", files=form)
    assert answer.status_code == 413
    assert answer.json()["detail"] == (
        "the 3 images of the request have 562500 pixels together; "
        "allowed: 562499 (SCUMBLE_LIMITS__MAX_REQUEST_PIXELS)"
    )


@pytest.mark.parametrize(
    ("limits", "detail"),
    [
        (
            {"max_jpeg_pixels": 11_999_999},
            "= 12000000 pixels; allowed: 11999999 (SCUMBLE_LIMITS__MAX_JPEG_PIXELS)",
        ),
        (
            {"max_pixels": 187_499},
            "of which this model needs 187500; allowed: 187499 (SCUMBLE_LIMITS__MAX_PIXELS)",
        ),
    ],
)
def test_a_photo_over_a_limit_is_refused(make_client, photo, limits, detail):
    client = make_client(limits=limits)
    for files in ([("image", photo)], [("image", photo), ("image", PNG)]):
        answer = client.post("/v1/predict", files=files)
        assert answer.status_code == 413
        assert detail in answer.json()["detail"]


def large_input(client: TestClient) -> TestClient:
    """The same service under a card that says 224 x 224 pixels; its network is never asked."""
    service = client.app.state.service
    shape = InputShape(height=224, width=224, channels=3)
    card = service.card.model_copy(update={"input": shape})
    return TestClient(build(replace(service, card=card)))


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        (5 * 2**20, {"max_tensor_images": 34, "max_float_images": 8}),
        (10 * 2**20, {"max_tensor_images": 69, "max_float_images": 17}),
        (10, {"max_tensor_images": 1, "max_float_images": 1}),
        (10**9, {"max_tensor_images": 1024, "max_float_images": 1024}),
    ],
)
def test_the_limits_of_tensors_agree_with_the_limit_of_bodies(make_client, size, limits):
    client = large_input(make_client(limits={"max_body_bytes": size}))
    told = client.get("/v1/model").json()["limits"]
    assert {name: told[name] for name in limits} == limits


def test_as_many_float_images_as_are_told_are_taken_and_one_more_is_not(make_client):
    client = make_client(limits={"max_body_bytes": 8000})
    told = client.get("/v1/model").json()["limits"]["max_float_images"]
    assert 1 < told < 1024
    statuses = []
    for count in (told, told + 2):
        pixels = np.zeros((count, 3, 8, 8), np.float32)
        head = (
            b'{"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [%d, 3, 8, 8], '
            b'"parameters": {"binary_data_size": %d}}]}' % (count, pixels.nbytes)
        )
        headers = {LENGTH: str(len(head))}
        statuses.append(client.post(V2, content=head + pixels.tobytes(), headers=headers))
    assert [answer.status_code for answer in statuses] == [200, 413]


def test_hostile_avif_files_are_answered_or_refused(client):
    statuses = {
        name: client.post("/v1/predict", content=make()).status_code
        for name, make in boxed_files.FILES.items()
    }
    assert {name for name, status in statuses.items() if status == 200} == {
        "avif-plain", "avif-10-bit-alpha", "avif-256-tiles", "avif-nested-boxes"
    }  # fmt: skip
    assert set(statuses.values()) == {200, 413, 422}


@pytest.mark.skipif("AVIF" not in FORMATS.values(), reason="this Pillow is without AVIF")
def test_avif_photos_are_told_and_taken_by_all_protocols(client):
    assert "image/avif" in client.get("/v1/model").json()["formats"]
    data = encoded(Image.new("RGB", (64, 64), (200, 30, 40)), "AVIF")
    for content_type in ("image/avif", "application/octet-stream"):
        headers = {"Content-Type": content_type}
        assert client.post("/v1/predict", content=data, headers=headers).status_code == 200
    assert client.post(V2, content=data, headers={LENGTH: "0"}).status_code == 200


def test_a_large_avif_photo_is_decoded_beside_the_loop(make_client):
    small = encoded(Image.new("RGB", (64, 64)), "AVIF")
    large = boxed_files.FILES["avif-plain"]()
    service = make_client().app.state.service
    assert service.small_header(small) is not None
    assert service.small_header(large) is None


def test_long_lists_of_boxes_are_read_beside_the_loop(make_client):
    tasks = []

    class Counted(BoundedExecutor):
        async def __call__(self, given, size, deadline):
            tasks.append(len(given))
            return await super().__call__(given, size, deadline)

    service = replace(make_client().app.state.service, executor=Counted(64, 2**26))

    tiles = boxed_files.FILES["avif-256-tiles"]()
    small = encoded(Image.new("RGB", (64, 64)), "AVIF")
    with TestClient(build(service)) as client:
        for files, expected in (([tiles], [1, 1]), ([tiles, PNG], [2, 2]), ([small, PNG], [])):
            tasks.clear()
            answer = client.post("/v1/predict", files=[("image", file) for file in files])
            assert answer.status_code == 200, answer.text
            assert tasks == expected
        tasks.clear()
        answer = client.post("/v1/predict", files=[("image", tiles)] * 9)
        assert (answer.status_code, tasks[-1]) == (413, 9)
