"""`scumble` commands that are forked from a process which has imported the libraries.

A command that trains a network spends most of its processor time importing libraries: torch, what
its optimizers import, and scikit-learn. Shells that run the docs' commands find the program
`scumble` made here. It hands its words, environment, folder and terminal to a process that has the
libraries already and forks. Nothing of Scumble itself is imported before the fork. `scumble serve`
is the real program.
"""

import atexit
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from scumble.evaluation.local_server import without_settings

ROOT = Path(__file__).parent.parent
LIBRARIES = (
    "fastapi",
    "httpx2",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "PIL.Image",
    "pyarrow.parquet",
    "pydantic_settings",
    "rich.progress",
    "rich.table",
    "sklearn.datasets",
    "torch",
    "torch._dynamo",
    "torchvision.transforms.v2",
)
LAST_DESCRIPTOR = 1 << 20
LONGEST = 1 << 17
PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1:2] == ["serve"]:
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
asked = {{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
command = int(server.recv(16))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(command, number))
code = int(server.recv(16))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class PreloadedCommands:
    """The process that commands are forked from, and the folder of the program that asks it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        address = str(folder / "socket")
        program = self.folder / "scumble"
        real = str(Path(sys.executable).with_name("scumble"))
        program.write_text(PROGRAM.format(python=sys.executable, real=real, address=address))
        program.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(address)
        listener.listen()
        # The process ends once this end is closed.
        self._open, theirs = socket.socketpair()
        with listener, theirs:
            ends = listener.fileno(), theirs.fileno()
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "import sys; from tests.preloaded_commands import fork_commands\n"
                    "fork_commands(*map(int, sys.argv[1:]))",
                    *map(str, ends),
                ],
                pass_fds=ends,
                env=without_settings(os.environ) | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """End the process; commands that still run go on."""
        self._open.close()
        self._process.wait(30)


def fork_commands(listening: int, end: int) -> None:
    """Fork a command for each connection, and report its exit code; until the end is closed."""
    for library in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(library)
    gc.freeze()
    listener = socket.socket(fileno=listening)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(end, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == end:
                    os._exit(0)
                if key.data is not None:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    pid, connection = key.data
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with connection, suppress(BrokenPipeError):
                        connection.send(str(code).encode())
                    continue
                connection, _ = listener.accept()
                message, terminal, _, _ = socket.recv_fds(connection, LONGEST, 3)
                pid = os.fork()
                if not pid:
                    _run(json.loads(message), terminal)
                for descriptor in terminal:
                    os.close(descriptor)
                connection.send(str(pid).encode())
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))


def _run(asked: dict, terminal: list[int]) -> None:
    """Be `scumble WORDS`, up to its end."""
    for number, descriptor in enumerate(terminal):
        os.dup2(descriptor, number)
    os.closerange(3, LAST_DESCRIPTOR)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.path[:] = [place for place in sys.path if place not in ("", str(ROOT))]
    sys.path[:0] = filter(None, asked["environment"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path.append(str(ROOT))
    sys.argv = ["scumble", *asked["words"]]
    signal.set_wakeup_fd(-1)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("scumble", "tests")]:
        del sys.modules[name]
    from scumble.cli import main

    code: object = 1
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  # shown, as Python does at its end
        traceback.print_exc()
    # Without the destructors of libraries, some of which fail after a fork.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
