"""The certificate of the public port, from files, and anew when they change.

The supervisor deals plain sockets; each worker does the handshakes of its own connections.
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
    """A context for new connections, as the files that the settings name say; None for plain HTTP.

    Args:
        settings: name the certificate and its key.
        last_good: what to use if these cannot be loaded.

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
    # The ssl module takes files only, and what was read is what must be used.
    with _in_memory(cert) as cert_file, _in_memory(key) as key_file:
        # A password would be asked for on the terminal: with an empty one it fails instead.
        context.load_cert_chain(cert_file, key_file, password="")
    return context


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A file with this content that no folder has."""
    with os.fdopen(os.memfd_create("scumble"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


@contextmanager
def _named(cert: Path, key: Path) -> Iterator[None]:
    """An error names the settings whose files it is about."""
    try:
        yield
    except OSError as exc:  # the ssl module's own errors are such, too
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
