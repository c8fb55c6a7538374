"""`scumble serve`: what is opened before any worker is, and given back after all have ended."""

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
from app.processes.snapshot import take
from app.processes.worker_fork_server import WorkerForkServer
from app.settings import Settings
from app.system.descriptors import raise_limit
from app.system.temporary import temporary_folder
from app.telemetry import logs


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C; gives the exit code.

    Raises:
        ConfigError: a port cannot be bound, the certificate cannot be used, or no process started.
    """
    logs.configure(settings.log_level)
    raise_limit()  # before any process is started: they have the same
    open_certificate(settings)  # the workers open it themselves; a wrong one is better said once
    signal.signal(signal.SIGTERM, _end)  # until the supervisor takes over: folders are removed
    with temporary_folder("scumble-run-") as folder:
        metrics, copies = folder / "metrics", folder / "models"
        metrics.mkdir()
        # prometheus_client reads it when it is imported: here, in no process but the workers'.
        fork_server = WorkerForkServer(settings.engine, {"PROMETHEUS_MULTIPROC_DIR": str(metrics)})
        from app.processes.supervisor import (
            Supervisor,  # here: what workers need is imported meanwhile
        )

        served = take(settings, copies / "0")
        with public_socket(settings) as public:
            admin = bind(settings.admin_host, settings.admin_port)
            supervisor = Supervisor(
                settings, served, public, admin, str(metrics), copies, fork_server
            )
            return asyncio.run(supervisor.run())


@contextmanager
def public_socket(settings: Settings) -> Iterator[socket.socket]:
    """The socket of the public port; a Unix socket's file is removed at the end.

    Raises:
        ConfigError: it cannot be bound.
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
            if os.path.samestat(ours, path.lstat()):  # and not another server's
                path.unlink()


def _end(*_: object) -> NoReturn:
    """SIGTERM before anything serves: end as from Ctrl-C, but with 0."""
    raise SystemExit(0)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: connections are refused until a worker is ready.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Said to be TCP, or asyncio leaves Nagle's delay on: 40 ms for an answer in two writes.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot bind {host} port {port}: {exc.strerror or exc}") from exc
    return listener


def bind_unix(path: Path) -> socket.socket:
    """A bound Unix socket, for its user and group, in place of one that a killed server left.

    Raises:
        ConfigError: the path is taken, too long, or not ours to write.
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
    """Remove a socket that nobody listens on."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(None, "there is a file that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise FileExistsError(None, "another server is listening there")
