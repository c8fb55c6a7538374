"""A path prefix, pages of other origins, and a Unix socket, on real servers."""

import json
import signal
import socket
import stat

import httpx2
import pytest

from app.access.keys import KeyFile, write_keys
from app.errors import ConfigError
from app.settings import load_settings
from scumble.evaluation.local_server import start
from tests.app.access.test_admission import row
from tests.pictures import PNG

pytestmark = pytest.mark.server
PAGE = "https://page.example"
KEY = {"X-API-Key": "page"}
IMAGE = {"Content-Type": "image/png"}
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-api-key, x-deadline-ms",
}


@pytest.fixture(scope="module")
def server(models, preloaded, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    write_keys(file, KeyFile(keys=[row("page", limits={"window_images": 1000})]))
    with preloaded.serving(
        model_dir=models,
        model="tiny",
        workers=1,
        root_path="/scumble",
        cors_origins=json.dumps([PAGE, "http://localhost:3000"]),
        keys_file=file,
    ) as server:
        yield server


PATHS = {
    "/livez": 200,
    "/scumble/livez": 200,
    "/scumble/livez/": 200,
    "/scumble/v2/models/tiny/ready": 200,
    "/scumble/openapi.json": 200,
    "/scumble": 404,
    "/scumble/": 404,
    "/scumblelivez": 404,
    "/scumble//livez": 404,
    "/scumble/scumble/livez": 404,
    "/Scumble/livez": 404,
    "/other/livez": 404,
}


@pytest.mark.parametrize("path", PATHS)
def test_a_prefix_is_taken_off_where_it_is_there(server, path):
    assert httpx2.get(server.url + path, headers=KEY).status_code == PATHS[path]


def test_both_paths_of_a_prediction_are_one_route(server):
    answers = [
        httpx2.post(server.url + path, content=PNG, headers=KEY | IMAGE)
        for path in ("/v1/predict", "/scumble/v1/predict")
    ]
    assert answers[0].json()["predictions"] == answers[1].json()["predictions"]
    assert httpx2.post(server.url + "/scumble/v1/predict", content=PNG).status_code == 401


def test_the_document_names_the_prefix(server):
    document = httpx2.get(f"{server.url}/openapi.json").json()
    assert document["servers"] == [{"url": "/scumble"}]
    assert "/v1/predict" in document["paths"]


def test_a_preflight_needs_no_key_and_says_what_a_page_may_send(server):
    answer = httpx2.options(f"{server.url}/v1/predict", headers=PREFLIGHT)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-credentials" not in answer.headers
    allowed = answer.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in PREFLIGHT["Access-Control-Request-Headers"].split(", "))
    assert "POST" in answer.headers["access-control-allow-methods"]


@pytest.mark.parametrize(
    "changed",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": PAGE + ".evil.example"},
        {"Origin": PAGE.replace("https", "http")},
        {"Access-Control-Request-Method": "DELETE"},
        {"Access-Control-Request-Headers": "x-other"},
    ],
    ids=str,
)
def test_a_preflight_is_refused_as_a_problem(server, changed):
    answer = httpx2.options(f"{server.url}/v1/predict", headers=PREFLIGHT | changed)
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"].startswith("Disallowed CORS")
    if "Origin" in changed:
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("key", "status"), [(KEY, 200), ({}, 401)])
def test_a_page_reads_answers_and_refusals_with_their_headers(server, key, status):
    headers = {"Origin": PAGE, **IMAGE, **key}
    answer = httpx2.post(f"{server.url}/v1/predict", content=PNG, headers=headers)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "Origin" in answer.headers["vary"]
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    ours = {"x-request-id", "ratelimit", "ratelimit-policy", "retry-after", "www-authenticate"}
    assert ours <= {*exposed}
    assert ours & {*answer.headers} - {*exposed} == set()


def test_pages_of_others_read_nothing(server):
    for headers in ({}, {"Origin": "https://evil.example"}):
        answer = httpx2.get(f"{server.url}/livez", headers=headers)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


def test_any_origin_may_be_allowed(make_client):
    client = make_client(cors_origins=["*"])
    answer = client.get("/livez", headers={"Origin": "https://any.example"})
    assert answer.headers["access-control-allow-origin"] == "*"


def test_without_the_settings_nothing_is_in_front(client):
    answer = client.options("/v1/predict", headers=PREFLIGHT)
    assert answer.status_code == 405
    assert client.get("/scumble/livez", headers={"Origin": PAGE}).status_code == 404
    assert "servers" not in client.get("/openapi.json").json()
    answer = client.get("/livez", headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


NOT_ALLOWED = {
    "root_path": ["scumble", "/", "/scumble/", "//scumble", "/v1", "/v2/x", "/a b", "/a?b", "/a%b"],
    "cors_origins": [["page.example"], [PAGE + "/"], ["https://Page.example"], ["null"], [""],
                     ["https://*.example"], ["https://u@page.example"], [PAGE + ":"]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NOT_ALLOWED.items() for value in values]
)
def test_values_that_would_never_match_stop_the_start(name, value):
    with pytest.raises(ConfigError, match=f"SCUMBLE_{name.upper()}"):
        load_settings(**{name: value})


@pytest.mark.parametrize("value", ["", "/scumble", "/a/b-c/d_e.f~g", "/v10"])
def test_prefixes(value):
    assert load_settings(root_path=value).root_path == value


def ask(path, method="GET", target="/livez", **options) -> httpx2.Response:
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), timeout=30) as client:
        return client.request(method, f"http://localhost{target}", **options)


def test_the_public_port_as_a_unix_socket(models, preloaded, tmp_path):
    path = tmp_path / "public.sock"
    with preloaded.serving(model_dir=models, model="tiny", workers=2, uds=path) as server:
        assert server.url == f"unix:{path}"
        for _ in range(4):
            answer = ask(path, "POST", "/v1/predict", content=PNG, headers=IMAGE)
            assert answer.status_code == 200
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert httpx2.get(f"{server.admin}/readyz").status_code == 200
        again = start({"model_dir": models, "model": "tiny", "uds": path})
        assert again.wait(60) == 1
        assert "another server is listening on it" in again.log[-1]["event"]
        assert ask(path).status_code == 200
    assert not path.exists()


def test_a_socket_that_a_killed_server_left_is_replaced(models, preloaded, tmp_path):
    path = tmp_path / "public.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.is_socket()
    with preloaded.serving(model_dir=models, model="tiny", workers=1, uds=path) as server:
        assert ask(path).status_code == 200
        assert server.stop(signal.SIGTERM) == 0
    assert not path.exists()


def test_no_other_file_is_replaced_by_a_socket(models, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    server = start({"model_dir": models, "model": "tiny", "uds": path})
    assert server.wait(60) == 1
    assert "the path exists and is not a socket" in server.log[-1]["event"]
    assert path.read_text() == "mine"


def test_a_socket_whose_path_is_too_long_is_a_sentence(models, tmp_path):
    server = start({"model_dir": models, "model": "tiny", "uds": tmp_path / ("x" * 200)})
    assert server.wait(60) == 1
    assert "cannot bind Unix socket" in server.log[-1]["event"]
    assert "too long" in server.log[-1]["event"]
