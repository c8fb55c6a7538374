"""The certificate of the public port; it is loaded again when its files change.

The supervisor dispatches plain sockets; each worker does the TLS handshakes of its connections.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from app.errors import ConfigError
from app.settings import Settings
from app.system.file_watcher import FileName, LastGood, WatchedFile

NONE: Mapping[FileName, LastGood] = {}


def open_certificate(
    settings: Settings, last_good: Mapping[FileName, LastGood] = NONE
) -> WatchedFile[ssl.SSLContext] | None:
    """The TLS context for new connections, kept current; None for plain HTTP.

    Args:
        settings: name the certificate and its key.
        last_good: used if the files cannot be loaded.

    Raises:
        ConfigError: one file without the other, or files that cannot be used.
    """
    if settings.tls_cert is None and settings.tls_key is None:
        return None
    if settings.tls_cert is None or settings.tls_key is None:
        missing = "SCUMBLE_TLS_CERT" if settings.tls_cert is None else "SCUMBLE_TLS_KEY"
        raise ConfigError(f"{missing} is not set: TLS needs both, a certificate and its key")
    cert, key = settings.tls_cert, settings.tls_key

    def read() -> tuple[bytes, ...]:
        with _named(cert, key):
            return cert.read_bytes(), key.read_bytes()

    def build(parts: tuple[bytes, ...]) -> ssl.SSLContext:
        with _named(cert, key):
            return _context(*parts)

    return WatchedFile("tls", read, build, last_good=last_good.get("tls"))


def _context(cert: bytes, key: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # The ssl module only takes files, and these may have changed since they were read.
    with _in_memory(cert) as cert_file, _in_memory(key) as key_file:
        # An empty password fails; without one, OpenSSL would ask on the terminal.
        context.load_cert_chain(cert_file, key_file, password="")
    return context


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The path of an anonymous file with this content."""
    with os.fdopen(os.memfd_create("scumble"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


@contextmanager
def _named(cert: Path, key: Path) -> Iterator[None]:
    """Name the settings in errors about their files."""
    try:
        yield
    except OSError as exc:  # includes ssl.SSLError
        raise ConfigError(
            f"SCUMBLE_TLS_CERT {str(cert)!r} and SCUMBLE_TLS_KEY {str(key)!r} cannot be used: "
            f"{_reason(exc)}"
        ) from exc


def _reason(exc: OSError) -> str:
    if not isinstance(exc, ssl.SSLError):
        return exc.strerror or str(exc)
    if exc.reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return (
        "they must be PEM files, the certificate followed by those that signed it, "
        f"the key without a password ({exc.reason or exc})"
    )
