"""TLS on the public port: real servers, certificates made up here."""

import asyncio
import socket
import ssl
import time
from types import SimpleNamespace

import httpx2
import pytest
import trustme
import uvloop
from click.testing import CliRunner
from fastapi import FastAPI

from app.errors import ConfigError
from app.http.prediction import State
from app.http.tls import open_certificate
from app.processes.worker import WorkerServer
from app.settings import Settings
from scumble import AsyncClient, Client, Unreachable
from scumble.cli import main
from scumble.evaluation.local_server import start
from tests.pictures import PNG


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def issue(authority, tmp_path):
    """`issue(name)` -> settings with a certificate for loopback; the same files each time."""

    def write(*names: str) -> dict:
        issued = authority.issue_cert(*(names or ("127.0.0.1", "localhost")))
        for file, blobs in (
            ("cert.pem", issued.cert_chain_pems),
            ("key.pem", [issued.private_key_pem]),
        ):
            (tmp_path / "new").write_bytes(b"".join(blob.bytes() for blob in blobs))
            (tmp_path / "new").rename(tmp_path / file)
        return {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}

    return write


@pytest.fixture
def ca_file(authority, tmp_path):
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def trusting(authority):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def address(server) -> tuple[str, int]:
    url = httpx2.URL(server.url)
    return url.host, url.port


def shake(server, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(address(server), timeout=10)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.server
def test_clients_verify_and_are_answered(serve, issue, ca_file, tmp_path):
    server = serve(workers=2, **issue())
    assert server.url.startswith("https://127.0.0.1:")
    assert server.admin.startswith("http://")
    with Client(server.url, ca_file=ca_file) as client:
        expected = client.predict(PNG).predictions
        assert client.predict([PNG] * 30).predictions == expected * 30

    async def ask():
        async with AsyncClient(server.url, ca_file=str(ca_file)) as client:
            return (await client.predict(PNG)).predictions

    assert asyncio.run(ask()) == expected
    with (
        Client(server.url, retries=0) as untrusting,
        pytest.raises(Unreachable, match="certificate verify failed"),
    ):
        untrusting.model()
    plain = server.url.replace("https", "http")
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{plain}/livez")
    (tmp_path / "x.png").write_bytes(PNG)
    arguments = ["predict", server.url, str(tmp_path / "x.png")]
    assert CliRunner().invoke(main, [*arguments, "--ca-file", str(ca_file)]).exit_code == 0
    assert CliRunner().invoke(main, arguments).exit_code == 1
    wrong = CliRunner().invoke(main, [*arguments, "--ca-file", str(tmp_path / "x.png")])
    assert wrong.exit_code == 2
    assert "--ca-file" in wrong.output


@pytest.mark.server
def test_old_versions_are_refused_and_1_2_is_spoken(serve, issue, trusting):
    server = serve(workers=1, **issue())
    with shake(server, trusting) as connection:
        assert connection.version() == "TLSv1.3"
    trusting.maximum_version = ssl.TLSVersion.TLSv1_2
    with shake(server, trusting) as connection:
        assert connection.version() == "TLSv1.2"
    trusting.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        trusting.minimum_version = trusting.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake(server, trusting)


@pytest.mark.server
def test_a_client_that_does_not_shake_hands_is_cut_off(serve, issue, trusting):
    server = serve(workers=2, tls_handshake_timeout_s=0.5, **issue())
    idle = [socket.create_connection(address(server), timeout=10) for _ in range(9)]
    for connection in idle[:3]:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    for connection in idle:
        while connection.recv(100):  # raises TimeoutError if it is never cut off
            pass
        connection.close()
    with httpx2.Client(verify=trusting) as client:
        assert client.get(f"{server.url}/livez").status_code == 200
    assert not [entry for entry in server.log if "Traceback" in str(entry["event"])]
    assert not [entry for entry in server.log if entry.get("level") == "ERROR"]


class CountingChannel:
    ended = 0

    def count_closed(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"", None])
def test_a_handshake_that_fails_is_counted_as_ended(issue, sent):
    """Or its worker would seem to have a connection more than it has, for ever."""
    channel = CountingChannel()
    settings = Settings(**issue(), tls_handshake_timeout_s=0.2)
    app = FastAPI()
    app.state.service = SimpleNamespace(metrics=SimpleNamespace(rejections={}), state=State())

    async def run() -> None:
        server = WorkerServer(settings, app, channel, None, None, open_certificate(settings))
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        with ours:
            if sent is not None:
                ours.sendall(sent)
                ours.shutdown(socket.SHUT_WR)
            await server._open(theirs)

    uvloop.run(run())
    assert channel.ended == 1


@pytest.mark.server
def test_a_new_certificate_is_used_for_new_connections(serve, issue, trusting):
    server = serve(workers=1, **issue())
    with httpx2.Client(verify=trusting) as old:
        assert old.get(f"{server.url}/livez").status_code == 200
        with shake(server, trusting) as connection:
            before = connection.getpeercert()["serialNumber"]
        issue()
        deadline = time.monotonic() + 10
        after = before
        while after == before and time.monotonic() < deadline:
            time.sleep(0.2)
            with shake(server, trusting) as connection:
                after = connection.getpeercert()["serialNumber"]
        assert after != before
        assert old.get(f"{server.url}/livez").status_code == 200


def test_half_a_change_keeps_the_old_pair(issue):
    files = issue()
    certificate = open_certificate(Settings(**files))
    first = certificate.value
    assert not certificate.check()
    old_key = files["tls_key"].read_bytes()
    issue()
    new_key = files["tls_key"].read_bytes()
    files["tls_key"].write_bytes(old_key)
    with pytest.raises(ConfigError, match="the key is not the certificate's"):
        certificate.check()
    files["tls_key"].unlink()
    with pytest.raises(ConfigError, match="No such file"):
        certificate.check()
    assert certificate.value is first
    files["tls_key"].write_bytes(new_key)
    assert certificate.check()
    assert certificate.value is not first


@pytest.mark.parametrize(
    ("cert", "key", "sentence"),
    [
        ("cert.pem", None, "SCUMBLE_TLS_KEY is not set"),
        (None, "key.pem", "SCUMBLE_TLS_CERT is not set"),
        ("cert.pem", "other.pem", "the key is not the certificate's"),
        ("none.pem", "key.pem", "No such file"),
        ("key.pem", "cert.pem", "they must be PEM files"),
        ("cert.pem", "locked.pem", "they must be PEM files"),
    ],
)
def test_a_wrong_pair_is_a_sentence(issue, tmp_path, cert, key, sentence):
    issue()
    (tmp_path / "key.pem").rename(tmp_path / "other.pem")
    issue()
    (tmp_path / "locked.pem").write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    with pytest.raises(ConfigError, match=sentence):
        open_certificate(
            Settings(tls_cert=cert and tmp_path / cert, tls_key=key and tmp_path / key)
        )


@pytest.mark.server
def test_a_wrong_pair_stops_the_start(models, issue):
    files = issue()
    server = start({"model_dir": models, "model": "tiny", **files, "tls_key": files["tls_cert"]})
    assert server.wait() == 1
    assert "cannot be used" in server.log[-1]["event"]
    assert "Traceback" not in " ".join(entry["event"] for entry in server.log)
