"""Templates of other people's APIs, against a server that reads and answers in its own way.

The server takes requests apart with the standard library and Pillow, works out the answer from the
levels it found, and writes it in the API's form. Whatever the encoding and the form, the oracle
must give what the plain function gives.
"""

import base64
import io
import json
import math
import string
import textwrap
import threading
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import httpx2
import numpy as np
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from PIL import Image

import scumble.api_template
from scumble.attacker.errors import AttackError, BadTemplate, OracleRefused
from scumble.attacker.oracle import HttpOracle
from scumble.attacker.template_transport import load

LABELS = ["cat", "dog", "a bird", "größer.4"]
WEIGHTS = np.random.default_rng(1).normal(0, 2, (3 * 4 * 5, len(LABELS)))


def logits(levels):
    """uint8 (N, H, W, C) -> (N, K)."""
    return (levels / 255).reshape(len(levels), -1) @ WEIGHTS


def plain(levels):
    """The probabilities of `logits`."""
    return np.array(
        [[1 / sum(math.exp(b - a) for b in row) for a in row] for row in logits(levels)]
    )


# ---- how the server reads ----------------------------------------------------------------------


def from_png(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def from_multipart(field):
    def read(headers, body):
        head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
        (part,) = message_from_bytes(head + body).get_payload()
        assert part.get_param("name", header="Content-Disposition") == field
        assert part.get_filename()
        assert part.get_content_type() == "image/png"
        return [from_png(part.get_payload(decode=True))]

    return read


def from_json(find, one):
    def read(headers, body):
        assert headers["Content-Type"] == "application/json"
        return [one(image) for image in find(json.loads(body))]

    return read


def from_base64(text):
    return from_png(base64.b64decode(text, validate=True))


def from_floats(layout, undo):
    def one(image):
        pixels = np.array(image, float)
        pixels = np.moveaxis(pixels, 0, 2) if layout == "NCHW" else pixels
        found = undo(pixels)
        assert abs(found - found.round()).max() < 1e-2
        return found.round().astype(np.uint8)

    return one


# ---- rows: the `[request]` table, how the server reads it ----------------------------------------

REQUESTS = {
    "png": ({"encoding": "png"}, lambda headers, body: [from_png(body)]),
    "png-put": (
        {
            "encoding": "png",
            "method": "PUT",
            "headers": {"X-Api-Key": "k", "Content-Type": "application/x-image"},
            "query": {"top": "5", "ä&b": "c d"},
        },
        lambda headers, body: [from_png(body)],
    ),
    "multipart": ({"encoding": "multipart", "field": "the file"}, from_multipart("the file")),
    "base64": (
        {"encoding": "base64", "body": '{"inputs": "$image", "n": 1}'},
        from_json(lambda body: [body["inputs"]], from_base64),
    ),
    "base64-list": (
        {
            "encoding": "base64",
            "body": '{"instances": "$images"}',
            "item": '{"b64": "$image"}',
            "batch": 3,
        },
        from_json(lambda body: [item["b64"] for item in body["instances"]], from_base64),
    ),
    "base64-url": (
        {"encoding": "base64", "body": '[{"url": "$image"}]', "prefix": "data:image/png;base64,"},
        from_json(
            lambda body: [body[0]["url"].removeprefix("data:image/png;base64,")], from_base64
        ),
    ),
    "floats": (
        {"encoding": "floats"},
        from_json(lambda body: [body], from_floats("NCHW", lambda x: x * 255)),
    ),
    "floats-255": (
        {
            "encoding": "floats",
            "layout": "NHWC",
            "range": [0, 255],
            "body": '{"instances": "$images", "signature_name": "serving_default"}',
            "batch": 4,
        },
        from_json(lambda body: body["instances"], from_floats("NHWC", lambda x: x)),
    ),
    "floats-normal": (
        {
            "encoding": "floats",
            "layout": "NHWC",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.25],
            "body": '{"inputs": [{"data": "$images"}]}',
            "batch": 2,
        },
        from_json(
            lambda body: body["inputs"][0]["data"],
            from_floats("NHWC", lambda x: (x * [0.2, 0.3, 0.25] + np.array([0.4, 0.5, 0.6])) * 255),
        ),
    ),
    "floats-signed": (
        {"encoding": "floats", "range": [-1, 1], "body": '[["$image"]]'},
        from_json(lambda body: body[0], from_floats("NCHW", lambda x: (x + 1) * 127.5)),
    ),
}

# ---- rows: the `[response]` table, how the server writes an answer -------------------------------

FORMS = {
    "list": (
        {"form": "list", "scale": "probabilities"},
        lambda levels: plain(levels)[0].tolist(),
    ),
    "list-logits": (
        {"form": "list", "scale": "logits"},
        lambda levels: (logits(levels)[0] - 300).tolist(),
    ),
    "map": (
        {"form": "map"},
        lambda levels: dict(sorted(zip(LABELS, plain(levels)[0].tolist(), strict=True))),
    ),
    "map-percent": (
        {"form": "map", "scale": "percent"},
        lambda levels: dict(zip(LABELS, (100 * plain(levels)[0]).tolist(), strict=True)),
    ),
    "pairs": (
        {"form": "pairs"},
        lambda levels: sorted(
            (
                {"label": label, "score": p}
                for label, p in zip(LABELS, plain(levels)[0].tolist(), strict=True)
            ),
            key=lambda pair: -pair["score"],
        ),
    ),
    "pairs-nested": (
        {"form": "pairs", "label": "0.name", "score": "1", "scale": "logits"},
        lambda levels: [
            [{"name": label}, x]
            for label, x in zip(LABELS, logits(levels)[0].tolist(), strict=True)
        ],
    ),
}


class Api:
    """A server of `read` and `write` at a port of this machine.

    Args:
        read: headers and body -> levels of each image.
        write: levels of all images -> the JSON of the answer.
    """

    def __init__(self, read, write):
        self.images, self.asked = 0, []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                images = read(self.headers, body)
                api.images += len(images)
                api.asked.append((self.command, self.path, self.headers, len(images), len(body)))
                answer = write(np.array(images))
                answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST  # noqa: N815 - the name is the standard library's

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def toml(document):
    """A document as TOML: a second way to write what `tomllib` reads."""
    return "".join(
        f"[{quoted(name)}]\n" + "".join(f"{quoted(k)} = {value(v)}\n" for k, v in table.items())
        if isinstance(table, dict)
        else f"{quoted(name)} = {value(table)}\n"
        for name, table in sorted(document.items(), key=lambda item: isinstance(item[1], dict))
    )


def quoted(text):
    return '"' + "".join(c if c.isalnum() else f"\\U{ord(c):08x}" for c in text) + '"'


def value(node):
    if isinstance(node, dict):
        return "{" + ", ".join(f"{quoted(k)} = {value(v)}" for k, v in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(value, node)) + "]"
    if isinstance(node, bool):
        return str(node).lower()
    return quoted(node) if isinstance(node, str) else str(node)


def document(request=None, response=None, model=None):
    return {
        "model": {"name": "m", "labels": LABELS, "shape": [3, 4, 5]} | (model or {}),
        "request": {"path": "/ask", "encoding": "png"} | (request or {}),
        "response": {"form": "list"} | (response or {}),
    }


@pytest.fixture
def loaded(tmp_path):
    """`loaded(request, response, model)` -> the template of a file."""

    def make(*tables):
        path = tmp_path / "api.toml"
        path.write_text(toml(document(*tables)), encoding="utf-8")
        return load(path)

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """One for all examples of a property."""
    return tmp_path_factory.mktemp("drawn")


def pictures(n):
    levels = np.random.default_rng(0).integers(0, 256, (n, 4, 5, 3), np.uint8)
    return levels, levels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)


def oracle(template, api, budget=100, **options):
    return HttpOracle(
        api.url,
        budget=budget,
        transport=template.transport,
        model=template.model,
        **options,
    )


@pytest.mark.parametrize("encoding", REQUESTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_oracle_gives_what_the_plain_function_gives(encoding, form, loaded):
    (request, read), (response, write) = REQUESTS[encoding], FORMS[form]
    several = "$images" in request.get("body", "")
    path = "out.*.answer" if several else "result.0.answer"
    template = loaded(request, response | {"path": path})

    def answer(images):
        rows = [{"answer": write(image[None])} for image in images]
        return {"out" if several else "result": rows}

    levels, images = pictures(7)
    with Api(read, answer) as api, oracle(template, api, budget=10) as asked:
        found = asked(images)
        assert (asked.ledger.answered, asked.remaining, api.images) == (7, 3, 7)
    np.testing.assert_allclose(found, plain(levels), atol=2e-6)
    batch = request.get("batch", 1)
    assert sorted(size for *_, size, _ in api.asked) == sorted(
        min(batch, 7 - start) for start in range(0, 7, batch)
    )
    for method, target, headers, _, _ in api.asked:
        assert method == request.get("method", "POST")
        assert urlsplit(target).path == "/ask"
        query = {name: [value] for name, value in request.get("query", {}).items()}
        assert parse_qs(urlsplit(target).query) == query
        for name, text in request.get("headers", {}).items():
            assert headers.get_all(name) == [text]
    assert template.transport.name == "template:api"
    assert template.transport.step == (0 if encoding.startswith("floats") else 1 / 255)


def test_the_example_of_the_module(tmp_path):
    text = textwrap.dedent(scumble.api_template.__doc__.split("\n\n", 1)[1].rsplit("\n\n", 1)[0])
    path = tmp_path / "example.toml"
    path.write_text(text, encoding="utf-8")
    template = load(path)
    message = template.transport.pack("cifar", np.ones((2, 3, 32, 32), np.float32))
    assert message.path == "/v1/models/cifar:predict?verbose=0"
    assert message.headers["x-api-key"]
    pixels = np.array([item["pixels"] for item in json.loads(message.content)["instances"]])
    assert pixels.shape == (2, 32, 32, 3)
    expected = [(255 - 123.7) / 58.4, (255 - 116.3) / 57.1, (255 - 103.5) / 57.4]
    np.testing.assert_allclose(pixels[0, 0, 0], expected, rtol=1e-5)
    answer = json.dumps({"predictions": [{"scores": [1, 1]}, {"scores": [0, 9]}]}).encode()
    found = template.transport.unpack({}, answer, 2)
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.0001234, 0.9998766]], atol=1e-6)


def test_what_is_on_this_machine_is_not_asked_for_through_a_proxy(loaded, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    levels, images = pictures(1)
    with (
        Api(
            lambda headers, body: [from_png(body)], lambda images: plain(images)[0].tolist()
        ) as api,
        oracle(loaded(), api) as asked,
    ):
        np.testing.assert_allclose(asked(images), plain(levels), atol=2e-6)


def test_grey_pictures(loaded):
    request = {"encoding": "base64", "body": '{"image": "$image"}'}
    template = loaded(request, {}, {"shape": [1, 4, 5]})
    levels = np.arange(20, dtype=np.uint8).reshape(4, 5)
    images = levels[None, None].astype(np.float32) / np.float32(255)
    content = json.loads(template.transport.pack("m", images).content)
    np.testing.assert_array_equal(from_base64(content["image"]), levels)


def test_top_answers_leave_the_rest_at_0_and_the_sum_below_1(loaded):
    template = loaded({}, {"form": "pairs"})
    found = template.transport.unpack({}, b'[{"label": "dog", "score": 0.6, "more": []}]', 4)
    np.testing.assert_allclose(found, [[0, 0.6, 0, 0]])


def test_numbers_serve_as_labels(loaded):
    template = loaded({}, {"form": "pairs"}, {"labels": ["0", "1"]})
    found = template.transport.unpack({}, b'[{"label": 1, "score": 0.6}]', 2)
    np.testing.assert_allclose(found, [[0, 0.6]])


@pytest.mark.parametrize("encoding", ["base64-list", "floats-normal", "floats-255"])
@pytest.mark.parametrize("limit", [8000, 20_000])
def test_bodies_stay_below_the_limit(encoding, limit, loaded):
    request, read = REQUESTS[encoding]
    request = request | {"batch": 100}
    template = loaded(request, {"path": "out"}, {"max_body_bytes": limit})
    levels, images = pictures(40)
    with Api(read, lambda images: {"out": plain(images).tolist()}) as api:
        with oracle(template, api) as asked:
            np.testing.assert_allclose(asked(images), plain(levels), atol=2e-6)
        assert max(length for *_, length in api.asked) <= limit
        assert 1 < len(api.asked) < 40


@pytest.mark.parametrize(
    ("response", "content", "found"),
    [
        ({}, b"<html>", "unexpected"),
        ({}, b"[NaN, 0, 0, 1]", "unexpected"),
        ({}, b"[1, 0, 0]", r"no list of 4 labels: \[1, 0, 0\]"),
        ({}, b'{"cat": 1}', "no list"),
        ({}, b'["a", 0, 0, 1]', r"not numbers: \['a'\]"),
        ({}, b"[true, 0, 0, null]", r"not numbers: \[True, None\]"),
        ({}, b"[37.5, 12.5, 25, 25]", "no probabilities"),
        ({}, b"[-0.5, 0.5, 0.5, 0.5]", "no probabilities"),
        ({"scale": "percent"}, b"[101, 0, 0, 0]", "no percent"),
        ({"path": "out"}, b"[1, 0, 0, 0]", "no 'out' in"),
        ({"path": "out"}, b'{"error": "busy"}', "no 'out' in {'error': 'busy'}"),
        ({"path": "0"}, b"[]", "no '0'"),
        ({"path": "*"}, b"{}", r"no '\*'"),
        ({"path": "a.b"}, b'{"a": "b"}', "no 'b' in 'b'"),
        ({"form": "map"}, b'{"wolf": 1}', r"unknown labels: \['wolf'\]"),
        ({"form": "map"}, b"[1, 0, 0, 0]", "no map"),
        ({"form": "pairs"}, b'[{"label": "wolf", "score": 1}]', "unknown labels"),
        ({"form": "pairs"}, b'[{"label": ["cat"], "score": 1}]', "unknown labels"),
        ({"form": "pairs"}, b'[{"label": "cat"}]', "no 'score'"),
        ({"form": "pairs"}, b'["cat"]', "no 'label'"),
        ({"form": "pairs"}, b"7", "no pairs"),
        (
            {"form": "pairs"},
            b'[{"label": "cat", "score": 0.5}, {"label": "cat", "score": 0.4}]',
            "no pairs",
        ),
    ],
)
def test_an_answer_that_does_not_follow_is_refused_with_what_was_found(
    response, content, found, loaded
):
    template = loaded({}, response)
    _, images = pictures(1)
    with (
        Api(lambda headers, body: [from_png(body)], lambda images: content) as api,
        oracle(template, api) as asked,
        pytest.raises(OracleRefused, match=f"does not follow template:api: .*{found}"),
    ):
        asked(images)


@pytest.mark.parametrize("content", [b"[[1, 0, 0, 0]]", b"{}", b"[]"])
def test_a_list_of_images_wants_a_list_of_as_many_answers(content, loaded):
    request, read = REQUESTS["floats-255"]
    with (
        Api(read, lambda images: content) as api,
        oracle(loaded(request), api) as asked,
        pytest.raises(OracleRefused),
    ):
        asked(pictures(2)[1])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.sampled_from([*LABELS, "label"]), x),
)


@given(
    content=JSON,
    form=st.sampled_from(["list", "map", "pairs"]),
    scale=st.sampled_from(["probabilities", "percent", "logits"]),
    path=st.sampled_from(["", "0", "*", "label.*"]),
)
@example(content=[1e308, -1e308, 0, 0], form="list", scale="logits", path="")
@example(content=[1e4, -1e4, 0, 10**30], form="list", scale="logits", path="")
@example(content={}, form="map", scale="logits", path="")
def test_any_answer_is_probabilities_or_refused(content, form, scale, path, folder):
    file = folder / "any.toml"
    file.write_text(toml(document({}, {"form": form, "scale": scale, "path": path})), "utf-8")
    try:
        found = load(file).transport.unpack({}, json.dumps(content).encode(), 4)
    except OracleRefused:
        return
    assert found.shape == (1, 4)
    assert (found >= -1e-6).all()
    assert (found <= 1 + 1e-6).all()


# ---- what `load` refuses -------------------------------------------------------------------------

FLOATS = {"encoding": "floats"}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (({"method": "GET"},), "request.method is 'GET'; allowed: 'POST' or 'PUT'"),
        (({"encoding": "jpg"},), "request.encoding is 'jpg'; allowed: 'png', 'multipart', "),
        (({"pth": "/x"},), "request.pth is '/x'; allowed here: path, method"),
        (({}, {"form": "tree"}), "response.form is 'tree'; allowed: 'list', 'map' or 'pairs'"),
        (({}, {}, {"shape": [3, 4]}), "model.shape.2 is missing"),
        (({}, {}, {"shape": [2, 4, 4]}), "model.shape has 2 channels; allowed in a PNG: 1 or 3"),
        (({}, {}, {"labels": ["a", "a"]}), "labels has ['a'] twice; allowed: each once"),
        (({}, {}, {"labels": "ab"}), "model.labels is 'ab'; allowed: a valid tuple"),
        (({"batch": 2},), 'batch is 2; allowed: 1, or body with "$images"'),
        (({"batch": True},), "request.batch is True; allowed: a valid integer"),
        (({"field": "f", "mean": [0]},), "['field', 'mean'] given; allowed with png: []"),
        ((FLOATS | {"body": "[]"},), "body is '[]'; allowed: with either"),
        ((FLOATS | {"body": '["$image", "$images"]'},), "allowed: with either"),
        ((FLOATS | {"body": '{"a"}'},), "request.body: '{\"a\"}' is not JSON"),
        ((FLOATS | {"item": "1"},), "item is '1'; allowed: with \"$image\""),
        ((FLOATS | {"mean": [1, 2]},), "request.mean or std; allowed: 1 or 3 numbers"),
        ((FLOATS | {"std": [0]},), "request.std.0 is 0"),
        ((FLOATS | {"std": [math.nan]},), "request.std.0 is nan"),
        ((FLOATS | {"range": [0, math.inf]},), "request.range.1 is inf"),
        ((FLOATS | {"body": "[" * 300 + '"$image"' + "]" * 300},), "request cannot be made"),
        ((FLOATS | {"body": "[" * 1000 + '"$image"' + "]" * 1000},), ""),
        (({"path": "http://evil.com/"},), "request.path is 'http://evil.com/'"),
        (({"path": "//evil.com/"},), "request.path is '//evil.com/'"),
        (({"path": "ask"},), "request.path is 'ask'"),
        (({"path": "/a b"},), "request.path is '/a b'"),
        (({"path": "/a?b=c"},), "request.path is '/a?b=c'"),
        (({"path": "/a\n"},), "request.path is '/a\\n'"),
        (({"headers": {"Host": "evil.com"}},), "headers has ['host']; allowed: all but"),
        (({"headers": {"AUTHORIZATION": "x"}},), "headers has ['authorization']"),
        (({"encoding": "multipart", "headers": {"content-type": "x"}},), "['content-type']"),
        (({"headers": {"x": "a\r\nHost: b"}},), "request.headers.x is 'a\\r\\nHost: b'"),
        (({"headers": {"x y": "a"}},), "request.headers.x y"),
        (({"query": {"top": 5}},), "request.query.top is 5; allowed: a valid string"),
        (({"query": {"q": "x" * 70_000}},), "request cannot be made"),
    ],
)
def test_what_does_not_fit_is_named(tables, message, loaded, tmp_path):
    with pytest.raises(BadTemplate) as caught:
        loaded(*tables)
    assert str(tmp_path / "api.toml") in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[model",
        b"\xff",
        b"a = " + b"[" * 5000,
        b"a = " + b"9" * 5000,
        b"model = 0x" + b"f" * 9000,
        b"[model]\nlabels = 0x" + b"f" * 9000,
        b"[model]\nmax_body_bytes = 0x" + b"f" * 9000,
        b"[request]\nbatch = 0x" + b"f" * 9000,
        b"[request]\nmean = [0x" + b"f" * 9000 + b"]",
        b"request = 2020-01-01",
    ],
    ids=range(11),
)
def test_what_is_no_template(content, tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(BadTemplate, match=r"x\.toml: "):
        load(path)


def test_no_file(tmp_path):
    for path in [tmp_path, tmp_path / "absent", tmp_path / "nul\0"]:
        with pytest.raises(BadTemplate):
            load(path)


LEAVES = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.dates()
    | st.sampled_from(["png", "floats", "base64", "multipart", "PUT", "NHWC", "pairs", "logits"])
    | st.sampled_from(["/x", '"$image"', '{"a": "$images"}', 2, 3, [0, 255], ["a", "b"]])
    | st.sampled_from([[3, 2, 2], [1, 2, 2]])
)
FIELDS = [f for t in scumble.api_template.TABLES.values() for f in t.model_fields]
KEYS = st.sampled_from(FIELDS) | st.text(string.printable, max_size=4)
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=4) | st.dictionaries(KEYS, x, max_size=4), max_leaves=8
)


def loads_or_is_bad(content, folder):
    path = folder / "drawn.toml"
    path.write_text(toml(content), encoding="utf-8")
    try:
        template = load(path)
    except BadTemplate:
        event("bad")
        return
    event("loads")
    shape = tuple(template.model["input"][k] for k in ("channels", "height", "width"))
    if math.prod(shape) > 10_000:
        return
    message = template.transport.pack("m", np.full((1, *shape), 0.5, np.float32))
    with httpx2.Client(base_url="http://localhost") as client:
        request = client.build_request(message.method, message.path, headers=message.headers)
    assert (request.url.scheme, request.url.host) == ("http", "localhost")


@given(content=st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_document_loads_or_is_bad(content, folder):
    loads_or_is_bad(content, folder)


CHANGES = st.one_of(
    *(
        st.tuples(st.just(name), st.sampled_from(list(table.model_fields)), VALUES)
        for name, table in scumble.api_template.TABLES.items()
        if name
    )
)


@given(
    changes=st.lists(CHANGES, max_size=2),
    base=st.sampled_from([request for request, _ in REQUESTS.values()]),
)
def test_any_change_loads_or_is_bad(changes, base, folder):
    content = document(base)
    for table, field, drawn in changes:
        content[table][field] = drawn
    loads_or_is_bad(content, folder)


def test_a_bad_template_is_an_attack_error():
    assert issubclass(BadTemplate, AttackError)
