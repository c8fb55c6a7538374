"""The code blocks of README and docs run as tests.

`python` blocks run in one namespace per file; `bash` blocks run in a shell with `scumble` on its
path. `localhost:8000` and `localhost:9000` stand for a real server on free ports; 8001 and 9001 are
free ports for a server that a block starts itself. A block that cannot run here is preceded by
`<!--- skip: next, reason="..." -->`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from scumble.evaluation.local_server import serving, without_settings
from tests.ports import free_ports
from tests.preloaded_commands import PreloadedCommands

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """A folder for the path of a shell, with a `scumble` that is forked."""
    process = PreloadedCommands(tmp_path_factory.mktemp("commands"))
    yield process.folder
    process.close()


@pytest.fixture(scope="session")
def docs_server():
    """The default model, as `make serve` serves it."""
    with serving() as server:
        yield server


def _localized(example: Example) -> str:
    server = example.namespace["docs_server"]
    text = str(example.parsed)
    for name in ("localhost", "127.0.0.1"):
        for port, url in ((8000, server.url), (9000, server.admin)):
            text = text.replace(f"{name}:{port}", url.removeprefix("http://"))
    for name, port in zip(("8001", "9001"), free_ports(2), strict=True):
        text = text.replace(name, str(port))
    return text


def run_python(example: Example) -> None:
    """Execute a block; what it defines is there for the next ones of its file."""
    source = "\n" * (example.line + example.parsed.line_offset) + _localized(example)
    exec(compile(source, example.path, "exec"), example.namespace)  # noqa: S102  # our own docs


def run_bash(example: Example) -> None:
    """Run a block as a user would paste it; every command must succeed."""
    programs = example.namespace["commands"], Path(sys.executable).parent
    done = subprocess.run(  # noqa: S603  # our own docs
        ["bash", "-euo", "pipefail", "-c", _localized(example)],  # noqa: S607  # the bash on the path, as a user has it
        cwd=ROOT,
        env={
            **without_settings(os.environ),
            "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # noqa: S101  # pytest's verb


pytest_collect_file = Sybil(
    parsers=[
        CodeBlockParser("python", run_python),
        CodeBlockParser("bash", run_bash),
        SkipParser(),
    ],
    patterns=["README.md", "docs/**/*.md"],
    fixtures=["commands", "docs_server"],
).pytest()
