"""Servers of this machine are asked directly, whatever proxies the environment names."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import click
import httpx2
import pytest
from click.testing import CliRunner

from app.commands.serve import reload
from scumble import AsyncClient, Client
from scumble.attacker.errors import OracleUnavailable
from scumble.attacker.oracle import HttpOracle
from scumble.client.commands import predict
from scumble.client.proxies import is_loopback
from tests.pictures import PNG

VARIABLES = ("http_proxy", "HTTPS_PROXY", "ALL_PROXY")
MODEL = {
    "name": "m",
    "version": "1",
    "labels": ["a", "b"],
    "input": {"height": 1, "width": 1, "channels": 1},
    "formats": ["image/png"],
    "limits": {"max_body_bytes": 1, "max_images": 1, "max_pixels": 1, "max_tensor_images": 1},
}
ANSWER = {
    "model": "m",
    "version": "1",
    "id": "x",
    "predictions": [{"label": "a", "index": 0, "probability": 1.0, "probabilities": [1.0, 0.0]}],
}


class Service(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(MODEL)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(ANSWER)

    def answer(self, document):
        self.server.asked.append(self.path)
        body = json.dumps(document).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def make_server():
    made = []

    def make(status=200) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
        server.asked, server.status = [], status
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.append(server)
        return server

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture
def service(make_server):
    return make_server()


@pytest.fixture(params=["http://127.0.0.1:{}", "socks5://127.0.0.1:{}"], ids=["http", "socks"])
def proxy(make_server, monkeypatch, request):
    """A proxy that the environment names, which must not be asked."""
    proxy = make_server(status=502)
    for name in VARIABLES:
        monkeypatch.setenv(name, request.param.format(proxy.server_port))
    return proxy


HOSTS = ("127.0.0.1", "localhost")


@pytest.mark.parametrize("host", HOSTS)
def test_clients_ask_loopback_directly(service, proxy, host):
    url = f"http://{host}:{service.server_port}"
    with Client(url) as client:
        assert client.predict(PNG).model == "m"

    async def ask():
        async with AsyncClient(url) as client:
            return await client.model()

    assert asyncio.run(ask()).name == "m"
    assert service.asked == ["/v1/predict", "/v1/model"]
    assert proxy.asked == []


def test_the_oracle_asks_loopback_directly(service, proxy):
    with HttpOracle(f"http://127.0.0.1:{service.server_port}", budget=1, transport="png") as oracle:
        assert oracle.labels == 2
    assert proxy.asked == []


def run(command: click.Command, *arguments: str):
    return CliRunner().invoke(command, arguments)


def test_the_predict_command_asks_loopback_directly(service, proxy, tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    result = run(predict, f"http://127.0.0.1:{service.server_port}", str(tmp_path / "x.png"))
    assert result.exit_code == 0, result.output
    assert proxy.asked == []


# Addresses of 127.0.0.0/8 are this machine, and so is the admin port, whatever its address.
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])  # noqa: S104  # asked, not bound
def test_the_reload_command_asks_the_admin_port_directly(service, proxy, monkeypatch, host):
    monkeypatch.setenv("SCUMBLE_ADMIN_HOST", host)
    result = run(reload, "--admin-port", str(service.server_port))
    assert (result.exit_code, result.output) == (0, "reloaded\n")
    assert service.asked == ["/reload"]
    assert proxy.asked == []


def test_an_admin_port_that_is_something_else_is_a_sentence(make_server):
    other = make_server(status=502)
    result = run(reload, "--admin-port", str(other.server_port))
    assert result.exit_code == 1
    assert "unexpected answer (502)" in result.output


def test_other_hosts_are_asked_through_a_proxy(make_server, monkeypatch):
    proxy = make_server()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    with Client("http://scumble.test") as client:
        assert client.model().name == "m"
    assert proxy.asked == ["http://scumble.test/v1/model"]


@pytest.mark.skipif(find_spec("socksio") is not None, reason="the extra for SOCKS is installed")
def test_a_socks_proxy_without_its_extra_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=r"pip install 'httpx2\[socks\]'"):
            kind("http://scumble.test")
    (tmp_path / "x.png").write_bytes(PNG)
    result = run(predict, "http://scumble.test", str(tmp_path / "x.png"))
    assert result.exit_code == 1
    assert "pip install 'httpx2[socks]'" in result.output
    with pytest.raises(OracleUnavailable, match="SOCKS"):
        HttpOracle("http://scumble.test", budget=1, transport="png")


LOCAL = {
    "http://localhost:1": True,
    "http://LOCALHOST.": True,
    "http://a.localhost": True,
    "http://127.0.0.1": True,
    "http://127.8.9.10:80": True,
    "http://[::1]": True,
    "http://[::ffff:127.0.0.1]": True,
    "http://10.0.0.1": False,
    "http://0.0.0.0": False,
    "http://[::2]": False,
    "http://localhost.example": False,
    "http://127.0.0.1.example": False,
    "http://127.1": False,
}


@pytest.mark.parametrize("url", LOCAL)
def test_loopback(url):
    assert is_loopback(httpx2.URL(url)) == LOCAL[url]
