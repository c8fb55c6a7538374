"""The certificate of the public port, from files, and anew when they change.

The supervisor deals plain sockets; each worker does the handshakes of its own connections.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from app.errors import ConfigError
from app.settings import Settings

LOOK_S = 1.0  # how often the files are looked at, if connections come
log = logging.getLogger("scumble")


class Certificate:
    """A certificate and its key, as they are on disk.

    Raises:
        ConfigError: they cannot be read, or do not belong together.
    """

    def __init__(
        self, cert: Path, key: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cert = cert
        self._key = key
        self._clock = clock
        self._looked = clock()
        self._seen = self._signature()
        self._context = _load(cert, key)

    def context(self) -> ssl.SSLContext:
        """For a new connection; the old one goes on while the files are not a pair."""
        now = self._clock()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._look()
        return self._context

    def _look(self) -> None:
        seen = self._signature()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._context = _load(self._cert, self._key)
        except ConfigError as exc:  # often only one of the two has been replaced so far
            log.error("the old TLS certificate stays: %s", exc)
        else:
            log.info("TLS certificate read anew")

    def _signature(self) -> list[tuple[int, int, int] | None]:
        return [_facts(self._cert), _facts(self._key)]


def open_certificate(settings: Settings) -> Certificate | None:
    """What the settings name; None for plain HTTP.

    Raises:
        ConfigError: one file without the other, or files that cannot be used.
    """
    if settings.tls_cert is None and settings.tls_key is None:
        return None
    if settings.tls_cert is None or settings.tls_key is None:
        missing = "SCUMBLE_TLS_CERT" if settings.tls_cert is None else "SCUMBLE_TLS_KEY"
        raise ConfigError(f"{missing} is not set: TLS needs both, a certificate and its key")
    return Certificate(settings.tls_cert, settings.tls_key)


def _load(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A password would be asked for on the terminal: with an empty one it fails instead.
        context.load_cert_chain(cert, key, password="")
    except OSError as exc:  # the ssl module's own errors are such, too
        raise ConfigError(
            f"SCUMBLE_TLS_CERT {str(cert)!r} and SCUMBLE_TLS_KEY {str(key)!r} cannot be used: "
            f"{_reason(exc)}"
        ) from exc
    return context


def _reason(exc: OSError) -> str:
    if not isinstance(exc, ssl.SSLError):
        return exc.strerror or str(exc)
    if exc.reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return (
        "they must be PEM files, the certificate followed by those that signed it, "
        f"the key without a password ({exc.reason or exc})"
    )


def _facts(path: Path) -> tuple[int, int, int] | None:
    """What a change of a file changes; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
