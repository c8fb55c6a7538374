"""What a client may write on a connection, request by request, against a real server."""

import json
import re
import socket

import pytest

from tests.pictures import PNG

pytestmark = pytest.mark.server
LENGTH = f"Content-Length: {len(PNG)}"
TYPE = "Content-Type: image/png"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG)
CHUNKED = "Transfer-Encoding: chunked"
H2C = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
)


@pytest.fixture(scope="module")
def server(models, preloaded):
    with preloaded.serving(model_dir=models, model="tiny", workers=1) as server:
        yield server


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return ("\r\n".join([line, *headers]) + "\r\n\r\n").encode("latin-1") + body


def post(*headers: str, line="POST /v1/predict HTTP/1.1", body=PNG, host=("Host: x",)) -> bytes:
    return request(line, *host, TYPE, *headers, body=body)


def get(target: str, method="GET", version="HTTP/1.1", host=("Host: x",)) -> bytes:
    return request(f"{method} {target} {version}", *host)


def answers(server, *pieces: bytes) -> bytes:
    """What comes back until the server closes, as a last request asks it to."""
    with connect(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except ConnectionResetError:
            pass
        return found


LAST = request("GET /livez HTTP/1.1", "Host: x", "Connection: close")


def statuses(server, *pieces: bytes) -> list[int]:
    return list(map(int, re.findall(rb"HTTP/1\.1 (\d{3}) ", answers(server, *pieces))))


# What arrives -> the status; where it is not 400, the connection goes on.
TABLE = {
    # the length of a body
    "length": (post(LENGTH), 200),
    "length, blanks around": (post(f"Content-Length:\t {len(PNG)} "), 200),
    "length, zeros before": (post(f"content-length: 000{len(PNG)}"), 200),
    "length, plus": (post(f"Content-Length: +{len(PNG)}"), 400),
    "length, minus": (post(f"Content-Length: -{len(PNG)}"), 400),
    "length, blank within": (post("Content-Length: 1 0"), 400),
    "length, hexadecimal": (post("Content-Length: 0x10"), 400),
    "length, fraction": (post("Content-Length: 10.0"), 400),
    "length, empty": (post("Content-Length:"), 400),
    "length, beyond 64 bits": (post("Content-Length: " + "9" * 30), 400),
    "length, list": (post(f"Content-Length: {len(PNG)}, {len(PNG)}"), 400),
    "length, twice the same": (post(LENGTH, LENGTH), 400),
    "length, two": (post(LENGTH, "Content-Length: 0"), 400),
    "length, other digits": (post("Content-Length: \xb2"), 400),
    # chunks
    "chunked": (post(CHUNKED, body=CHUNKS), 200),
    "chunked, capitals": (post("TRANSFER-ENCODING:\tChunked ", body=CHUNKS), 200),
    "chunked, extension": (post(CHUNKED, body=CHUNKS.replace(b"\r\n", b";a=b\r\n", 1)), 200),
    "chunked and length": (post(CHUNKED, LENGTH, body=CHUNKS), 400),
    "length and chunked": (post(LENGTH, CHUNKED, body=CHUNKS), 400),
    "chunked in HTTP/1.0": (post(CHUNKED, line="POST /v1/predict HTTP/1.0", body=CHUNKS), 400),
    "chunked, chunked": (post("Transfer-Encoding: chunked, chunked", body=CHUNKS), 400),
    "chunked twice": (post(CHUNKED, CHUNKED, body=CHUNKS), 400),
    "gzip, then chunked": (
        post("Transfer-Encoding: gzip", CHUNKED, body=CHUNKS), 400
    ),
    "chunked, then gzip": (
        post(CHUNKED, "Transfer-Encoding: gzip", body=CHUNKS), 400
    ),
    "gzip, chunked": (post("Transfer-Encoding: gzip, chunked", body=CHUNKS), 400),
    "chunked, gzip": (post("Transfer-Encoding: chunked, gzip", body=CHUNKS), 400),
    "identity, chunked": (post("Transfer-Encoding: identity, chunked", body=CHUNKS), 400),
    "identity": (post("Transfer-Encoding: identity", body=CHUNKS), 400),
    "xchunked": (post("Transfer-Encoding: xchunked", body=CHUNKS), 400),
    "chunked with a parameter": (post(CHUNKED + ";q=1", body=CHUNKS), 400),
    "chunked after a vertical tab": (post("Transfer-Encoding: \x0bchunked", body=CHUNKS), 400),
    "blank before the colon": (post("Transfer-Encoding : chunked", body=CHUNKS), 400),
    "no transfer encoding": (post("Transfer-Encoding:", body=CHUNKS), 400),
    "chunk in hexadecimal of C": (post(CHUNKED, body=b"0x" + CHUNKS), 400),
    "chunk with a sign": (post(CHUNKED, body=b"+" + CHUNKS), 400),
    "chunk longer than it says": (post(CHUNKED, body=b"1\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk beyond 64 bits": (post(CHUNKED, body=b"f" * 17 + b"\r\n"), 400),
    "chunk, bare line feeds": (post(CHUNKED, body=b"1\nx\n0\n\n"), 400),
    # lines
    "folded header": (post(LENGTH, "X-A: a", "\tb"), 400),
    "folded transfer encoding": (post("Transfer-Encoding:", " chunked", body=CHUNKS), 400),
    "blank after the first line": (post(LENGTH, host=(" Host: x",)), 400),
    "bare line feeds": (b"GET /livez HTTP/1.1\nHost: x\n\n", 400),
    "bare carriage return": (b"GET /livez HTTP/1.1\r\nHost: x\rX-A: a\r\n\r\n", 400),
    "NUL in a header": (get("/livez", host=("Host: x", "X-A: a\0b")), 400),
    "header without a name": (get("/livez", host=("Host: x", ": a")), 400),
    "header without a colon": (get("/livez", host=("Host: x", "X-A")), 400),
    "header beyond ASCII": (get("/livez", host=("Host: x", "X-A: \xe9")), 200),
    "empty lines before": (b"\r\n\r\n" + get("/livez"), 200),
    # the host
    "no host": (get("/livez", host=()), 400),
    "no host in HTTP/1.0": (get("/livez", version="HTTP/1.0", host=()), 200),
    "two hosts": (get("/livez", host=("Host: x", "Host: y")), 400),
    "the same host twice": (get("/livez", host=("Host: x", "host: x")), 400),
    "two hosts in HTTP/1.0": (get("/livez", version="HTTP/1.0", host=("Host: x", "Host: y")), 400),
    "empty host": (get("/livez", host=("Host:",)), 200),
    "host in capitals": (get("/livez", host=("HOST: X:80",)), 200),
    # the first line
    "small method": (get("/livez", method="get"), 400),
    "unknown method": (get("/livez", method="BREW"), 400),
    "method not allowed": (get("/livez", method="DELETE"), 405),
    "CONNECT": (get("x:443", method="CONNECT"), 400),
    "no version": (b"GET /livez\r\n\r\n", 400),
    "HTTP/0.9": (get("/livez", version="HTTP/0.9"), 400),
    "HTTP/1.2": (get("/livez", version="HTTP/1.2"), 400),
    "HTTP/2.0": (get("/livez", version="HTTP/2.0"), 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "small version": (get("/livez", version="http/1.1"), 400),
    "blank behind the version": (get("/livez", version="HTTP/1.1 "), 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    # the target
    "absolute": (get("http://elsewhere.example/livez"), 200),
    "absolute without a path": (get("http://elsewhere.example"), 404),
    "asterisk": (get("*", method="OPTIONS"), 404),
    "no slash first": (get("livez"), 400),
    "slash last": (get("/livez/"), 200),
    "slashes last": (get("/livez//"), 200),
    "root": (get("/"), 404),
    "slashes": (get("///"), 404),
    "slashes first": (get("//livez"), 404),
    "another host's name first": (get("//elsewhere.example/livez"), 404),
    "slashes within": (get("/v1//model"), 404),
    "encoded letter": (get("/live%7A"), 200),
    "encoded slash": (get("/v1%2Fmodel"), 404),
    "encoded slash, small": (get("/v1%2fmodel"), 404),
    "encoded slash first": (get("/%2Flivez"), 404),
    "encoded twice": (get("/v1%252Fmodel"), 404),
    "encoded badly": (get("/v1%zz"), 404),
    "encoded NUL": (get("/livez%00"), 404),
    "dots": (get("/v1/../livez"), 404),
    "backslash": (get("/v1\\model"), 404),
    "letters of another case": (get("/LIVEZ"), 404),
    "parameter in the path": (get("/livez;a=b"), 404),
    "query": (get("/livez?a=b&a"), 200),
    "beyond ASCII": (get("/\xe9"), 400),
    "HEAD": (get("/livez", method="HEAD"), 200),
    "HEAD of nothing": (get("/nothing", method="HEAD"), 404),
    "HEAD of a prediction": (get("/v1/predict", method="HEAD"), 405),
    # another protocol
    "upgrade to HTTP/2": (post(*H2C, LENGTH), 200),
    "upgrade to HTTP/2, chunked": (post(*H2C, CHUNKED, body=CHUNKS), 200),
    "upgrade to HTTP/2, no body": (request("GET /livez HTTP/1.1", "Host: x", *H2C), 200),
    "upgrade in other letters": (post("CONNECTION: UPGRADE", "UPGRADE: H2C", LENGTH), 200),
    "two upgrades": (post(*H2C, "Upgrade: TLS/1.3", LENGTH), 200),
    "upgrade without a connection": (post("Upgrade: h2c", LENGTH), 200),
    "WebSocket": (
        request(
            "GET /v1/model HTTP/1.1",
            "Host: x",
            "Connection: keep-alive, Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ),
        200,
    ),
    "upgrade without a host": (request("GET /livez HTTP/1.1", *H2C), 400),
    "upgrade, chunked and length": (post(*H2C, CHUNKED, LENGTH, body=CHUNKS), 400),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_request_on_the_wire(server, name):
    sent, status = TABLE[name]
    # HTTP/1.0 and refusals of what is not HTTP end the connection.
    goes_on = status != 400 and b"HTTP/1.0\r\n" not in sent
    assert statuses(server, sent, LAST) == ([status, 200] if goes_on else [status])


def test_a_declined_upgrade_arrives_in_any_pieces(server):
    sent = post(*H2C, LENGTH) + post(*H2C, CHUNKED, body=CHUNKS) + get("/v1/model") + LAST
    for size in (1, 7, 100, len(sent)):
        pieces = [sent[at : at + size] for at in range(0, len(sent), size)]
        assert statuses(server, *pieces) == [200] * 4


def test_no_answer_of_the_public_port_is_a_redirect(server):
    for path in ("/v1/predict", "/v1/model", "/v2", "/v2/models/tiny", "/livez", "/openapi.json"):
        for method in ("GET", "POST", "HEAD"):
            for target in (path + "/", path + "//", "/" + path):
                sent = get(target, method=method, host=("Host: elsewhere.example",))
                found = answers(server, sent, LAST)
                assert not found.startswith(b"HTTP/1.1 3")
                assert b"location" not in found.lower()


GETS = (
    "/livez",
    "/readyz",
    "/v1/model",
    "/openapi.json",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/tiny",
    "/v2/models/tiny/ready",
)
ADMIN = {
    "/livez": 200,
    "/readyz": 200,
    "/metrics": 200,
    "/livez/": 404,
    "/reload/": 404,
    "/console/about/": 404,
}


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_a_body(server, path):
    head, _, body = answers(server, get(path), LAST).partition(b"\r\n\r\n")
    alone, _, rest = answers(server, get(path, method="HEAD"), LAST).partition(b"\r\n\r\n")
    assert body
    assert rest.startswith(b"HTTP/1.1 200")

    def lines(head: bytes) -> list[bytes]:
        own = (b"x-request-id", b"date")
        return [line for line in head.split(b"\r\n") if not line.startswith(own)]

    assert lines(alone) == lines(head)


def test_the_admin_port_answers_head_and_redirects_nobody(server):
    host, port = server.admin.removeprefix("http://").split(":")
    for path, status in ADMIN.items():
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            sent = request(f"HEAD {path} HTTP/1.1", f"Host: {host}", "Connection: close")
            connection.sendall(sent)
            assert connection.recv(65536).startswith(b"HTTP/1.1 %d" % status), path


def test_allow_names_head(server):
    found = answers(server, get("/livez", method="DELETE"), LAST)
    assert b"\r\nallow: GET, HEAD\r\n" in found
    assert b"\r\nallow: POST\r\n" in answers(server, get("/v1/predict"), LAST)


def test_a_refusal_says_what_is_wrong(server):
    for sent, says in (
        (get("/livez", host=()), "request has 0 Host headers; it must have one"),
        (get("/livez", version="HTTP/2.0"), "unsupported HTTP version 2.0; allowed: 1.1, 1.0"),
        (post("Transfer-Encoding: gzip, chunked", body=CHUNKS),
         "unsupported Transfer-Encoding 'gzip, chunked'; allowed: chunked, with HTTP/1.1"),
        (get("/livez", method="get"), "not an HTTP/1.1 request"),
    ):  # fmt: skip
        body = answers(server, sent).partition(b"\r\n\r\n")[2]
        assert json.loads(body)["detail"] == says
