"""The process that workers are forked from: what it must not be, and what its end means."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from scumble.local import children, start
from tests.app.test_faults import busy, post, stubborn  # noqa: F401  # a fixture

pytestmark = pytest.mark.server


def wait_for(what, seconds=30):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ready(server) -> bool:
    return httpx2.get(f"{server.admin}/readyz").status_code == 200


def test_it_has_one_thread_or_a_fork_could_take_a_lock_along(serve):
    server = serve(workers=2, defense="dcp", defense_params={"beta": 1.2})
    (forker,) = server.forkers()
    assert len(list(Path(f"/proc/{forker}/task").iterdir())) == 1
    assert len(server.workers()) == 2


def test_workers_hold_less_than_they_would_alone(serve):
    server = serve(workers=1)
    (worker,) = server.workers()
    lines = Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()
    kib = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    assert kib["Shared_Dirty:"] > 15 * 1024


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_does_not_end_it(stubborn, how):  # noqa: F811  # the fixture
    server = stubborn(batch__execution="thread")
    (forker,) = server.forkers()
    with busy(server):
        for pid in [*server.workers(), forker]:
            os.kill(pid, how)
        assert Path(f"/proc/{forker}").exists()
    if how != signal.SIGTERM:  # which ends a worker, and another comes
        assert post(server).status_code == 200
    assert server.stop() == 0


def test_a_request_is_answered_when_all_are_told_to_end(stubborn):  # noqa: F811  # the fixture
    server = stubborn(workers=2, batch__execution="thread")
    with busy(server):  # its answer must come
        for pid in [server.process.pid, *server.forkers(), *server.workers()]:
            os.kill(pid, signal.SIGTERM)
    assert server.wait() == 0


def test_when_it_is_killed_there_is_another_with_new_workers(serve):
    server = serve(workers=2)
    before, (forker,) = server.workers(), server.forkers()
    assert post(server).status_code == 200
    os.kill(forker, signal.SIGKILL)
    wait_for(lambda: len(set(server.workers()) - set(before)) == 2 and ready(server))
    assert server.forkers() != [forker]
    assert post(server).status_code == 200
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))


def test_nothing_is_left_when_the_supervisor_is_killed(serve):
    server = serve(workers=2)
    all_of_them = [*children(server.process.pid), *server.workers()]
    server.stop(signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in all_of_them))


def test_a_worker_told_to_end_while_it_loads_ends(models):
    server = start({"model_dir": models, "model": "tiny", "workers": 2})
    wait_for(lambda: len(children(server.process.pid)) > 1 and server.workers())
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 10


def test_the_engine_tells_nobody_that_it_is_used(tmp_path):
    """OpenVINO's own package does, at each import."""
    code = (
        "import sys, threading, app.engines.openvino;"
        "print('openvino_telemetry' in sys.modules, threading.active_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False 1\n"
    assert not list(tmp_path.iterdir())  # it leaves an identifier there
