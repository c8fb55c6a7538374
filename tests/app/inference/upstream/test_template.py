"""In front of a JSON API: its answers, defended; its faults never reach a client."""

import json
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from app.commands.connect import connect
from app.commands.serve import check
from app.errors import ConfigError
from app.inference.bundle import Bundle
from app.main import create_app
from app.settings import Settings, load_settings
from tests.app.inference.upstream.fake import DROP, http
from tests.app.inference.upstream.fake_api import TEMPLATES, JsonApi, template
from tests.app.inference.upstream.test_upstream import IMAGES, bundle, infer, metric, rows_of, until
from tests.tiny import LABELS

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def run(api, folder, *words, text=None):
    """`scumble connect` with the API's template, or another text."""
    file = folder / "api.toml"
    file.write_text(template(api.name) if text is None else text)
    arguments = [api.url, "--name", "front", "--models", str(folder), "--template", str(file)]
    return CliRunner().invoke(connect, [*arguments, *words])


@contextmanager
def serving(api, folder, **settings):
    """A client of the service in front of an API that runs."""
    api.start()
    with ExitStack() as stack:
        stack.callback(api.stop)
        done = run(api, folder)
        assert done.exit_code == 0, done.output
        yield stack.enter_context(front(api, folder, **settings))


def front_settings(api, folder, **settings) -> Settings:
    given = {"model_dir": folder, "model": "front", "engine": "upstream", "upstream": api.url}
    return Settings(**{**given, "upstream_template": folder / "api.toml", **settings})


def front(api, folder, **settings) -> TestClient:
    app = create_app(front_settings(api, folder, **settings))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module", params=TEMPLATES)
def api_and_client(request, tmp_path_factory):
    """One of the APIs and a client of the service before it, for many tests."""
    api = JsonApi(request.param)
    with serving(api, tmp_path_factory.mktemp("models"), upstream_timeout_s=20) as client:
        yield api, client


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """The API of lists of numbers, and a client."""
    api = JsonApi("numbers")
    with serving(api, tmp_path_factory.mktemp("models")) as client:
        yield api, client


def test_answers_are_those_of_the_embedded_network(api_and_client, make_shared_client):
    api, client = api_and_client
    api.batches.clear()
    found = rows_of(infer(client))
    body = {"name": "pixels", "datatype": "UINT8", "shape": list(IMAGES.shape)}
    body["data"] = IMAGES.ravel().tolist()
    embedded = make_shared_client().post("/v2/models/tiny/infer", json={"inputs": [body]})
    assert np.abs(found - rows_of(embedded)).max() <= 1e-6
    assert max(api.batches) == (4 if api.name == "numbers" else 1)


def test_requests_are_those_of_the_template(api_and_client):
    api, client = api_and_client
    rows_of(infer(client, IMAGES[:1], traceparent=TRACE))
    expected = {
        "numbers": ("POST", "/v1/models/net:predict", "application/json"),
        "base64": ("POST", "/predict?verbose=0", "application/json"),
        "file": ("PUT", "/classify", "image/png"),
    }
    method, target, kind = expected[api.name]
    assert api.paths[-1] == (method, target)
    assert api.requests[-1]["content-type"] == kind
    assert api.requests[-1]["traceparent"] == TRACE
    assert api.requests[-1].get("x-team") == ("vision" if api.name == "numbers" else None)


def test_float_tensors_are_sent_too(api_and_client):
    _, client = api_and_client
    tensor = IMAGES.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    body = {"name": "pixels", "datatype": "FP32", "shape": list(tensor.shape)}
    body["data"] = tensor.astype(float).ravel().tolist()
    floats = rows_of(client.post("/v2/models/front/infer", json={"inputs": [body]}))
    np.testing.assert_allclose(floats, rows_of(infer(client)), atol=1e-6)


def sent(status: int, body: bytes, **headers: str):
    """A fault that sends something else."""
    return lambda _: http(status, body, {k.replace("_", "-"): v for k, v in headers.items()})


def answer(document):
    """A fault that sends other JSON."""
    return sent(200, json.dumps(document).encode())


def scores(*row):
    """A fault that sends an answer for one image."""
    return answer({"predictions": [{"scores": row}]})


HUGE = b"1" + b"0" * 400  # beyond a float
FAULTS = {
    "the connection is closed": lambda _: DROP,
    "half of the answer": lambda _: http(200, b"x" * 100)[:-50] + b"Connection: close",
    "an HTML page": sent(200, b"<html><h1>It works!</h1></html>"),
    "an HTML error": sent(502, b"<html><h1>Bad gateway</h1></html>"),
    "an error of the server": sent(500, b'{"detail":"CUDA out of memory"}'),
    "not found": sent(404, b'{"detail":"Not Found"}'),
    "refused": sent(422, b'{"detail":"field required"}'),
    "a redirect": sent(302, b"", Location="/login"),
    "another success": sent(202, b'{"job": 7}'),
    "no body": sent(200, b""),
    "an error as an answer": answer({"error": "busy"}),
    "nothing where the path leads": answer({"predictions": [{"score": [0, 0, 0, 1]}]}),
    "a number where the path leads": answer({"predictions": 7}),
    "no answers": answer({"predictions": []}),
    "more answers than images": answer({"predictions": [{"scores": [0, 0, 0, 1]}] * 2}),
    "fewer classes": scores(1, 2, 3),
    "more classes": scores(1, 2, 3, 4, 5),
    "a map": scores({"red": 1}),
    "words": scores("1", "2", "3", "4"),
    "truth values": scores(True, False, False, False),
    "lists": scores([1], [2], [3], [4]),
    "null": scores(None, 0, 0, 0),
    "NaN": sent(200, b'{"predictions": [{"scores": [NaN, 0, 0, 0]}]}'),
    "infinite": sent(200, b'{"predictions": [{"scores": [Infinity, 0, 0, 0]}]}'),
    "a huge number": sent(200, b'{"predictions": [{"scores": [%s, 0, 0, 0]}]}' % HUGE),
    "a huge number, NaN": sent(200, b'{"predictions": [{"scores": [%s, NaN, 0, 0]}]}' % HUGE),
    "9000 digits, NaN": sent(200, b'{"predictions": [{"scores": [1%s, NaN]}]}' % (b"0" * 9000)),
    "a deep document": sent(200, b"[" * 10_000 + b"]" * 10_000),
    "a deep document with NaN": sent(200, b"[" * 10_000 + b"NaN" + b"]" * 10_000),
    "bytes that are not text": sent(200, b"\xff\xfe\x00NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_503_with_retry_after_and_no_rows(numbers, fault, caplog):
    api, client = numbers
    api.fault = FAULTS[fault]
    try:
        found = infer(client, IMAGES[:1])
    finally:
        api.fault = None
    assert found.status_code == 503, found.text
    assert 1 <= int(found.headers["retry-after"]) <= 60
    assert found.headers["content-type"] == "application/problem+json"
    assert found.json()["detail"].startswith("upstream ")
    assert "outputs" not in found.json()
    assert "Traceback" not in caplog.text
    until(lambda: client.get("/readyz").status_code == 200)
    rows_of(infer(client, IMAGES[:1]))


@pytest.mark.parametrize("number", [float("nan"), None, float("inf")], ids=str)
def test_a_row_that_is_no_distribution_fails_its_request_alone(numbers, number):
    api, client = numbers
    expected = rows_of(infer(client, IMAGES[:1]))

    def second(document):
        if len(document["predictions"]) > 1:
            document["predictions"][1]["scores"][0] = number
        return document

    api.changed = second
    try:
        for _ in range(5):  # an image of a client's does not open the circuit
            assert infer(client, IMAGES[:2]).status_code == 503
        np.testing.assert_array_equal(rows_of(infer(client, IMAGES[:1])), expected)
    finally:
        api.changed = None
    assert client.get("/readyz").status_code == 200


def test_logits_where_the_template_says_probabilities_are_refused(tmp_path):
    api = JsonApi("base64")
    with serving(api, tmp_path) as client:
        api.changed = lambda document: {"result": dict.fromkeys(LABELS, 2.5)}
        assert infer(client, IMAGES[:1]).status_code == 503


def test_back_pressure_and_slowness_are_handed_on(numbers):
    api, client = numbers
    api.fault = sent(429, b"slow down", Retry_After="7")
    try:
        refused = infer(client, IMAGES[:1])
    finally:
        api.fault = None
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
    until(lambda: client.get("/readyz").status_code == 200)
    api.delay_s = 1.0
    try:
        assert infer(client, IMAGES[:1], **{"X-Deadline-Ms": "50"}).status_code == 504
    finally:
        api.delay_s = 0.0
    rows_of(infer(client, IMAGES[:1]))


def test_a_dead_replica_is_not_seen_by_clients(tmp_path):
    first, second = JsonApi("file"), JsonApi("file")
    second.start()
    try:
        with (
            serving(first, tmp_path),
            front(first, tmp_path, upstream=f"{first.url},{second.url}/") as client,
        ):
            first.stop()
            for _ in range(4):
                rows_of(infer(client, IMAGES[:1]))
    finally:
        second.stop()


def test_the_token_is_sent_and_the_defense_runs_behind_the_api(tmp_path):
    api = JsonApi("base64", token="a-token-of-the-api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCUMBLE_UPSTREAM_TOKEN", api.token)
        with serving(api, tmp_path, defense="label") as client:
            rows = rows_of(infer(client))
            np.testing.assert_array_equal(np.sort(rows, axis=1), [[0, 0, 0, 1]] * len(IMAGES))
            labelled = f"localhost:{api.port}"
            assert metric(
                client, "scumble_upstream_requests_total", replica=labelled, outcome="answered"
            )


def test_another_network_makes_the_service_not_ready(tmp_path):
    api = JsonApi("file")
    with serving(api, tmp_path, upstream_check_s=1) as client:
        api.seed = 8
        until(lambda: client.get("/readyz").json()["status"] == "upstream model changed")
        assert infer(client, IMAGES[:1]).status_code == 503


def test_what_connect_writes_and_says(tmp_path):
    api = JsonApi("numbers")
    api.start()
    try:
        done = run(api, tmp_path, "--fit", "crop")
        words = ["--model-dir", str(tmp_path), "--model", "front", "--engine", "upstream"]
        words += ["--upstream", api.url, "--upstream-template", str(tmp_path / "api.toml")]
        checked = CliRunner().invoke(check, words)
    finally:
        api.stop()
    assert checked.exit_code == 0, checked.output
    assert "batches   up to 4 images" in checked.output
    assert done.exit_code == 0, done.output
    said = "POST /v1/models/net:predict: floats NHWC, 8x8x3", "list of 4 logits", "scores    energy"
    for sentence in (*said, "up to 4 images", "SCUMBLE_UPSTREAM_TEMPLATE="):
        assert sentence in done.output
    card = Bundle(tmp_path / "front").card
    assert card.labels == LABELS
    assert card.preprocessing.fit == "crop"
    assert "x-team" not in (tmp_path / "front" / "card.json").read_text()


REFUSED = {
    "an option that the template answers": (["--layout", "NHWC"], {}, "--layout given"),
    "not a template": ([], {"text": "[model]\n"}, "model.name is missing"),
    "a wrong path": ([], {"replaced": ("predictions.*", "outputs.*")}, "no 'outputs' in"),
    "a wrong scale": ([], {"replaced": ('"logits"', '"percent"')}, "gives no probabilities"),
    "a wrong form": ([], {"replaced": ('"list"', '"map"')}, "no map of 4 labels"),
    "a label too few": ([], {"replaced": (str(LABELS), str(LABELS[1:]))}, "no list of 3 labels"),
    "more channels": ([], {"replaced": ("[3, 8, 8]", "[4, 8, 8]")}, "4 channels"),
    "another server": ([], {"replaced": (":predict", ":classify")}, "status 404"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path, case):
    words, change, said = REFUSED[case]
    api = JsonApi("numbers")
    if case == "another server":
        api.fault = sent(404, b"")
    text = change.get("text", template("numbers"))
    text = text.replace(*change.get("replaced", ("", "")))
    api.start()
    try:
        done = run(api, tmp_path, *words, text=text)
    finally:
        api.stop()
    assert done.exit_code != 0
    assert said in " ".join(done.output.split())
    assert [each.name for each in tmp_path.iterdir()] == ["api.toml"]


def test_answers_with_the_best_classes_alone_are_refused(tmp_path):
    api = JsonApi("file")
    api.changed = lambda pairs: pairs[:2]
    api.start()
    try:
        done = run(api, tmp_path)
    finally:
        api.stop()
    assert "an answer has 2 of 4 labels" in " ".join(done.output.split())


def test_template_and_bundle_must_be_of_each_other(tmp_path):
    api = JsonApi("numbers")
    api.start()
    try:
        assert run(api, tmp_path).exit_code == 0
    finally:
        api.stop()
    file = tmp_path / "api.toml"
    other = tmp_path / "other.toml"
    other.write_text(file.read_text().replace("batch = 4", "batch = 3"))
    key = tmp_path / "key.toml"
    key.write_text(file.read_text().replace("vision", "another"))
    create_app(front_settings(api, tmp_path, upstream_template=key))
    v2 = bundle(tmp_path / "v2", JsonApi("numbers"))
    cases = [
        ({"upstream_template": None, "upstream": f"{api.url}/v2/models/net"}, "is not set; needed"),
        ({"upstream_template": other}, "made with another template"),
        ({"upstream_template": tmp_path / "missing.toml"}, "No such file"),
        ({"model_dir": v2}, "describes a V2 server"),
        ({"upstream_models": {"net": {}}}, "SCUMBLE_UPSTREAM_MODELS needs a V2 server"),
    ]
    for settings, said in cases:
        with pytest.raises(ConfigError, match=said):
            create_app(front_settings(api, tmp_path, **settings))


@pytest.mark.parametrize(
    ("url", "with_template"),
    [
        ("http://localhost:1", True),
        ("https://localhost:1/base/ http://other:2", True),
        ("http://localhost:1/v2/models/net", False),
    ],
)
def test_urls_are_of_servers_with_a_template_and_of_models_without(url, with_template, tmp_path):
    template = {"upstream_template": tmp_path / "x.toml"}
    assert load_settings(upstream=url, **(template if with_template else {})).upstream_list
    if with_template:
        with pytest.raises(ConfigError, match="SCUMBLE_UPSTREAM is "):
            load_settings(upstream=url)
    for bad in ("http://a:b@host", "http://host/?a=b", "ftp://host"):
        with pytest.raises(ConfigError, match="SCUMBLE_UPSTREAM is "):
            load_settings(upstream=bad, **template)
