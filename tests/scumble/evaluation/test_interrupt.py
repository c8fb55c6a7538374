"""Ctrl-C or SIGTERM ends an evaluation with its servers, and says how to continue."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scumble.evaluation.commands import end_processes

ROOT = Path(__file__).parents[3]
WORDS = ["evaluate", "--defense", "label", "--queries", "digits", "--test", "digits", "--no-beside"]
MORE = ["--jobs", "1", "--seeds", "3", "--budget", "100000"]
LIMIT_S = 240

pytestmark = [pytest.mark.server, pytest.mark.torch]


def descendants(pid):
    """Process ids of the children of a process, and of theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(child)]
    return found


def test_a_cell_that_does_not_end_takes_its_server_along():
    """A busy machine may need more than a second to end a server."""
    here, there = multiprocessing.Pipe()

    def stubborn():
        server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        there.send(server.pid)
        time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=stubborn)
    process.start()
    server = here.recv()
    try:
        end_processes([process])
        assert process.exitcode == -signal.SIGKILL
        deadline = time.monotonic() + LIMIT_S
        while runs(server):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


def runs(pid):
    """Whether there is such a process that is no zombie."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("how", ["Ctrl-C in a terminal", "SIGTERM"])
def test_both_end_the_evaluation_and_its_servers(tmp_path, how):
    command = [sys.executable, "-m", "scumble.cli", *WORDS, *MORE]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + LIMIT_S
    try:
        while not list(tmp_path.glob("runs/evaluate/*/progress")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = descendants(process.pid)
        if how == "SIGTERM":
            process.terminate()
        else:  # it reaches all processes of the terminal
            os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; 0 of 3 cells are recorded" in said
    assert "run the same command to continue" in said
    assert "Traceback" not in said
    while [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
