"""Starts and ends a server with all its child processes, and measures their memory. Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

TERM_S, KILL_S = 10.0, 5.0
GONE = "ZX"  # states of processes that only wait to be collected


@dataclass(frozen=True)
class Process:
    """A process; its start tells it from a later one with the same number."""

    pid: int
    started: int


@dataclass(frozen=True)
class Stat:
    """What /proc says of a process."""

    process: Process
    parent: int
    session: int


def stat(pid: int) -> Stat | None:
    """None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, _, session, *rest = text.rpartition(")")[2].split()
    if state in GONE:
        return None
    return Stat(Process(pid, int(rest[15])), int(parent), int(session))


def family(leader: int) -> set[Process]:
    """The living processes of a session, and those that their members started."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    stats = {found.process.pid: found for pid in pids if (found := stat(pid))}
    chosen = {pid for pid, one in stats.items() if one.session == leader}
    while more := {pid for pid, one in stats.items() if one.parent in chosen} - chosen:
        chosen |= more
    return {stats[pid].process for pid in chosen}


def proportional_mb(process: Process) -> float:
    """Its share of memory (PSS): a page shared by n processes counts 1/n in each."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


@dataclass
class Running:
    """A started server.

    Attributes:
        leader: the process that was started; leader of its session and process group.
        started: `time.perf_counter()` of that moment.
        log: the file with its output.
        seen: all its processes so far: some change their session or lose their parent.
        ended_by: the signal that ended the last of them, once stopped.
    """

    leader: subprocess.Popen[bytes]
    started: float
    log: Path
    seen: set[Process] = field(default_factory=set)
    ended_by: str = ""

    def alive(self) -> set[Process]:
        """Those of its processes that have not ended."""
        self.leader.poll()
        self.seen |= family(self.leader.pid)
        return {one for one in self.seen if (now := stat(one.pid)) and now.process == one}

    def memory_mb(self) -> float:
        """PSS of all its processes together, in MiB."""
        return sum(proportional_mb(one) for one in self.alive())

    def last_words(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, term_s: float = TERM_S) -> None:
        """SIGTERM to the leader, as a container gets it; later SIGKILL to all that is left.

        Raises:
            RuntimeError: something is still there.
        """
        self.alive()  # sees them all while their parents live
        self.leader.terminate()
        self.ended_by = "SIGTERM"
        if left := self._left_after(term_s):
            self.ended_by = "SIGKILL"
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            if left := self._left_after(KILL_S):
                raise RuntimeError(f"still running after SIGKILL: {left}")
        self.leader.wait()

    def _left_after(self, seconds: float) -> set[Process]:
        end = time.perf_counter() + seconds
        while (left := self.alive()) and time.perf_counter() < end:
            time.sleep(0.1)
        return left


@contextmanager
def running(command: list[str], env: Mapping[str, str], log: Path) -> Iterator[Running]:
    """Start a server in its own session; finally end all its processes.

    It runs in the folder of its log, where what it leaves behind does no harm.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        started = time.perf_counter()
        leader = subprocess.Popen(  # noqa: S603 - the benchmark's own servers
            command,
            env=env,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Running(leader, started, log)
    try:
        yield server
    finally:
        server.stop()
