"""Servers that are forked from a process which has imported the libraries.

A server spends most of its start importing libraries, once in the supervisor and once in the fork
server of its workers. Here both are forked from one process that has them already. Nothing of the
service itself is imported before the fork, and the processes are those of `scumble serve`:
supervisor, fork server, workers. Tests of how processes start use `serving` instead.
"""

import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing import util
from pathlib import Path

from scumble.evaluation.local_server import Server, variables, without_settings

ROOT = Path(__file__).parent.parent
# Without prometheus_client, which reads the environment of its process when it is imported.
LIBRARIES = (
    "anyio._backends._asyncio",
    "click",
    "fastapi",
    "multiprocessing.forkserver",
    "numpy",
    "openvino",
    "orjson",
    "PIL.Image",
    "pydantic_settings",
    "pythonjsonlogger.orjson",
    "starlette.responses",
    "uvicorn",
    "uvloop",
)
LAST_DESCRIPTOR = 1 << 20
HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE)


class Forked:
    """A forked server, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, code: int, stderr: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stderr = os.fdopen(stderr)
        self._code = code
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        return self._end(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._end(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"server {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self, timeout: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._code], [], [], timeout)[0]:
                self.returncode = int(os.read(self._code, 16) or b"-9")
                os.close(self._code)
        return self.returncode


class Preloaded:
    """The process that servers are forked from."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # `Server.forkers` looks for the word "forkserver" in the command.
            command = "from tests.preloaded import fork_servers; fork_servers({})  # forkserver"
            self._process = subprocess.Popen(
                [sys.executable, "-c", command.format(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=without_settings(os.environ)
                | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def start(self, settings: dict[str, object]) -> Server:
        """As `local_server.start`."""
        settings = {"port": 0, "admin_port": 0, **settings}
        started = time.perf_counter()
        request = {
            "environment": without_settings(os.environ) | variables(settings),
            "folder": str(Path.cwd()),
        }
        (stderr, their_stderr), (code, their_code) = os.pipe(), os.pipe()
        socket.send_fds(self._control, [json.dumps(request).encode()], [their_stderr, their_code])
        os.close(their_stderr)
        os.close(their_code)
        process = Forked(int(self._control.recv(16)), code, stderr)
        server = Server(process, started)
        threading.Thread(target=server.read_log, args=(process.stderr,), daemon=True).start()
        return server

    @contextmanager
    def serving(self, **settings: object) -> Iterator[Server]:
        """As `local_server.serving`."""
        server = self.start(settings)
        try:
            server.wait_ready()
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()
            server.wait()

    def close(self) -> None:
        """End the process; servers that still run go on."""
        self._control.close()
        self._process.wait(30)


def fork_servers(control: int) -> None:
    """Fork a server for each request, and report its exit code; until the other end is closed."""
    for library in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(library)
    gc.freeze()
    requests = socket.socket(fileno=control)
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    pid, code = key.data
                    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with suppress(BrokenPipeError):
                        os.write(code, str(exit_code).encode())
                    os.close(code)
                    continue
                message, (stderr, code) = _receive(requests)
                pid = os.fork()
                if not pid:
                    _serve(json.loads(message), stderr)
                os.close(stderr)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, code))
                requests.send(str(pid).encode())


def _receive(requests: socket.socket) -> tuple[bytes, list[int]]:
    message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
    if not message:
        os._exit(0)
    return message, descriptors


def _serve(request: dict, stderr: int) -> None:
    """Become `scumble serve`; raises SystemExit."""
    os.dup2(stderr, 2)
    os.closerange(3, LAST_DESCRIPTOR)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None
    util.spawnv_passfds = _fork_the_fork_server
    from scumble.cli import main

    main(["serve"])


_spawn = util.spawnv_passfds


def _fork_the_fork_server(path: bytes, args: list[str], descriptors: list[int]) -> int:
    """`spawnv_passfds` for the fork server of workers, without importing the libraries again."""
    command = args[-1]
    if "multiprocessing.forkserver" not in command:
        return _spawn(path, args, descriptors)
    pid = os.fork()
    if pid:
        return pid
    try:
        for before, after in pairwise(sorted({2, *descriptors, LAST_DESCRIPTOR})):
            os.closerange(before + 1, after)
        signal.set_wakeup_fd(-1)
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(command, {"__name__": "__main__"})  # noqa: S102  # as `python -c` does
    finally:
        os._exit(1)
