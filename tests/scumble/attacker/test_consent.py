"""Whom one may attack: the table of hosts, the token, and no way out by a redirect."""

import ipaddress
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scumble.attacker.consent import LoopbackTransport, check, loopback
from scumble.attacker.errors import AttackError, NoConsent, OracleRefused
from scumble.attacker.oracle import HttpOracle
from scumble.attacker.transports import TRANSPORTS

OWN = [
    "http://localhost",
    "http://localhost:8000/base",
    "HTTPS://LocalHost",
    "http://model.localhost",
    "http://127.0.0.1:8000",
    "http://127.8.9.10",
    "http://[::1]",
    "http://[0:0:0:0:0:0:0:1]:80",
    "http://[::ffff:127.0.0.1]",
    "http://[::ffff:7f00:1]",
    "http://localhost/@evil.com",
    "http://localhost#@evil.com",
    "http://localhost?@evil.com",
]
FOREIGN = [
    "http://evil.com",
    "http://127.0.0.1.evil.com",
    "http://localhost.evil.com",
    "http://notlocalhost",
    "http://localhost.",
    "http://.localhost",
    "http://evil.com\\.localhost",
    "http://evil.com%2elocalhost",
    "http://evil.com%00.localhost",
    "http://evil.com;.localhost",
    "http://evil.com#.localhost",
    "http://evil.com?.localhost",
    "http://evil.com#@localhost",
    "http://%6cocalhost",
    "http://127.0.0.1%2eevil.com",
    "http://127.1",
    "http://2130706433",
    "http://0x7f000001",
    "http://0.0.0.0",
    "http://[::]",
    "http://[::127.0.0.1]",
    "http://[::1%25eth0]",
    "http://[fe80::1%25lo]",
    "http://[::ffff:8.8.8.8]",
    "http://10.0.0.1",
    "http://169.254.169.254",
    "http://xn--a",
    "https://bücher.example",
]
NONE = [
    "",
    "localhost",
    "localhost:8000",
    "//localhost",
    " http://localhost",
    "ftp://localhost",
    "file:///etc/passwd",
    "http://",
    "http:///x",
    "http://[::1",
    "http://::1",
    "http://local\nhost",
    "http://0177.0.0.1",
    "http://１２７.0.0.1",
    "http://127.0.0.1:99999",
    "http://localhost@evil.com",
    "http://127.0.0.1\\@evil.com",
    "http://user:password@localhost",
    "http://localhost:80@evil.com",
]


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    return path


@pytest.mark.parametrize("url", OWN)
def test_this_machine_needs_nothing(url, token):
    assert check(url, consent=False, token=None) == {}
    assert check(url, consent=False, token=token) == {"Authorization": "Bearer s3cret"}


@pytest.mark.parametrize("url", FOREIGN)
def test_another_machine_needs_both(url, token):
    for consent, given_token in [(False, None), (True, None), (False, token)]:
        with pytest.raises(NoConsent) as caught:
            check(url, consent=consent, token=given_token)
        assert "--i-have-the-owners-consent and --owner-token FILE" in str(caught.value)
        assert "s3cret" not in str(caught.value)
    assert check(url, consent=True, token=token) == {"Authorization": "Bearer s3cret"}


@pytest.mark.parametrize("url", NONE)
def test_what_is_no_url_is_refused_in_any_case(url, token):
    with pytest.raises(AttackError) as caught:
        check(url, consent=True, token=token)
    assert not isinstance(caught.value, NoConsent)
    assert "password" not in str(caught.value)


@given(st.text(alphabet="localhost127.0:/@#?[]\\%evil x", max_size=40).map("http://".__add__))
@example("http://localhost")
def test_what_needs_nothing_is_connected_to_here(url):
    try:
        own = loopback(url)
    except AttackError:
        return
    if own:
        connected, client = recorded(url)
        client.post("/x")
        assert all(host.is_loopback for host in connected)


def recorded(url: str):
    """A list of the addresses that are connected to, and a client of `url`."""
    hosts = []

    def answer(request):
        address = ipaddress.ip_address(request.url.host)
        hosts.append(getattr(address, "ipv4_mapped", None) or address)
        return httpx2.Response(200, text=request.headers["host"])

    inner = LoopbackTransport(httpx2.MockTransport(answer))
    return hosts, httpx2.Client(base_url=url, transport=inner)


@pytest.mark.parametrize("url", [*OWN, "http://evil.localhost", "https://a.b.localhost:1"])
def test_what_is_connected_to_is_a_loopback_address(url):
    """No name is left for a resolver, which might ask the network for it."""
    hosts, client = recorded(url)
    assert client.get("/x").text == httpx2.Request("GET", url).headers["host"]
    assert [host.is_loopback for host in hosts] == [True]


def test_a_name_of_this_machine_is_also_looked_for_on_ipv6():
    hosts = []

    def answer(request):
        hosts.append((request.url.host, request.extensions["sni_hostname"], request.read()))
        if request.url.host == "127.0.0.1":
            raise httpx2.ConnectError("refused")
        return httpx2.Response(200)

    inner = LoopbackTransport(httpx2.MockTransport(answer))
    with httpx2.Client(base_url="https://a.localhost", transport=inner) as client:
        assert client.post("/x", content=b"body").status_code == 200
    assert hosts == [("127.0.0.1", "a.localhost", b"body"), ("::1", "a.localhost", b"body")]


@pytest.mark.parametrize("url", FOREIGN)
def test_what_may_ask_this_machine_alone_asks_no_other(url):
    """Also where something follows a redirect."""
    hosts, client = recorded("http://localhost")
    with pytest.raises(httpx2.ConnectError, match="is not this machine"):
        client.get(url)
    assert hosts == []


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_a_name_below_localhost_is_asked_here_and_not_through_a_proxy(variable, monkeypatch):
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with listening(lambda here: here.send_response(204)) as (url, asked):
        named = url.replace("127.0.0.1", "evil.localhost")
        with (
            HttpOracle(named, budget=4, transport=TRANSPORTS["png"], model=MODEL) as oracle,
            pytest.raises(OracleRefused, match=r"evil\.localhost:.* answered 204"),
        ):
            oracle(np.zeros((2, 1, 2, 2), np.float32))
    assert len(asked) == 1


MODEL = {
    "name": "m",
    "labels": ["a", "b"],
    "input": {"height": 2, "width": 2, "channels": 1},
    "limits": {"max_body_bytes": 100_000, "max_images": 4},
}


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        (b"a", "a"),
        (b"a b~\r\n", "a b~"),
        (b"x" * 4096 + b"\n", "x" * 4096),
        (b"", None),
        (b"\n", None),
        (b" a", None),
        (b"a \n", None),
        (b"a\nb", None),
        (b"a\n\n", None),
        (b"a\rb", None),
        (b"a\tb", None),
        (b"a\0", None),
        ("ä".encode(), None),
        (b"x" * 4097, None),
        (b"x" * 4097 + b"\n", None),
        (b"x" * 5000, None),
    ],
)
@pytest.mark.parametrize("url", ["http://localhost", "http://example.com"])
def test_a_token_is_one_printable_line(content, sent, url, tmp_path):
    path = tmp_path / "token"
    path.write_bytes(content)
    if sent is not None:
        assert check(url, consent=True, token=path) == {"Authorization": f"Bearer {sent}"}
        return
    with pytest.raises(NoConsent, match="one line of at most 4096 printable") as caught:
        check(url, consent=True, token=path)
    assert "xxx" not in str(caught.value).replace(str(path), "")


def test_a_token_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in [tmp_path, tmp_path / "fifo", tmp_path / "absent", tmp_path / "nul\0"]:
        with pytest.raises(NoConsent, match="--owner-token is"):
            check("http://example.com", consent=True, token=path)


@contextmanager
def listening(answer):
    """`answer(handler)` at a port of this machine; gives its URL and the requests it got."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            answer(self)
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status):
    with listening(lambda there: there.send_response(200)) as (elsewhere, leaked):

        def redirect(here):
            here.send_response(status)
            here.send_header("Location", elsewhere)

        with listening(redirect) as (url, asked):
            headers = check(url, consent=False, token=None)
            with (
                HttpOracle(
                    url, budget=4, transport=TRANSPORTS["png"], model=MODEL, headers=headers
                ) as oracle,
                pytest.raises(OracleRefused, match=str(status)),
            ):
                oracle(np.zeros((2, 1, 2, 2), np.float32))
        assert (len(asked), leaked) == (1, [])
