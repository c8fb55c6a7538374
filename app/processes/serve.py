"""`scumble serve`: opens ports and temporary folders, and releases them after the workers ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from app.errors import ConfigError
from app.http.tls import open_certificate
from app.processes.snapshot import copy_bundle
from app.processes.worker_fork_server import WorkerForkServer
from app.settings import Settings
from app.system.descriptors import raise_limit
from app.system.temporary import temporary_folder
from app.telemetry import logs

LOAD_S = 300.0  # limit for a worker to load


def serve(settings: Settings, *, load_s: float = LOAD_S) -> int:
    """Serve until SIGTERM or Ctrl-C, and return the exit code.

    Raises:
        ConfigError: a port cannot be bound, the certificate cannot be used, or no process can be
            started.
    """
    logs.configure(settings.log_level, settings.log_format)
    raise_limit()  # before any process is started: child processes inherit it
    open_certificate(settings)  # workers open it themselves; this reports a bad one once
    signal.signal(signal.SIGTERM, _end)  # until the supervisor handles it; folders are removed
    with temporary_folder("scumble-run-") as folder:
        metrics, copies = folder / "metrics", folder / "models"
        metrics.mkdir()
        # prometheus_client reads this when it is imported, and only workers shall use it.
        fork_server = WorkerForkServer(settings, {"PROMETHEUS_MULTIPROC_DIR": str(metrics)})
        # Imported here, while the fork server imports what workers need.
        from app.processes.supervisor import Supervisor

        served = copy_bundle(settings, copies / "0")
        with public_socket(settings) as public:
            admin = bind(settings.admin_host, settings.admin_port)
            supervisor = Supervisor(
                settings, served, public, admin, str(metrics), copies, fork_server, load_s
            )
            return asyncio.run(supervisor.run())


@contextmanager
def public_socket(settings: Settings) -> Iterator[socket.socket]:
    """The bound public socket; the file of a Unix socket is removed at the end.

    Raises:
        ConfigError: the socket cannot be bound.
    """
    if settings.uds is None:
        yield bind(settings.host, settings.port)
        return
    path = settings.uds.absolute()
    listener = bind_unix(path)
    ours = path.lstat()
    try:
        yield listener
    finally:
        with suppress(FileNotFoundError):
            if os.path.samestat(ours, path.lstat()):  # it does not belong to another server
                path.unlink()


def _end(*_: object) -> NoReturn:
    """Handle SIGTERM before serving begins: clean up as for Ctrl-C, but exit with 0."""
    raise SystemExit(0)


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket without listening: connections are refused until a worker is ready.

    Raises:
        ConfigError: the address is in use or not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without IPPROTO_TCP, asyncio would leave Nagle's algorithm on: 40 ms for two writes.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot bind {host} port {port}: {exc.strerror or exc}") from exc
    return listener


def bind_unix(path: Path) -> socket.socket:
    """Bind a Unix socket for its user and group, replacing one that a killed server left behind.

    Raises:
        ConfigError: the path is in use, too long or not writable.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        before = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot bind Unix socket {str(path)!r}: {exc.strerror or exc}") from exc
    return listener


def _remove_stale(path: Path) -> None:
    """Remove a socket that no process listens on."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(None, "the path exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise FileExistsError(None, "another server is listening on it")
