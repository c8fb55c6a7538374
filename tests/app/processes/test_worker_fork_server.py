"""The fork server: it stays single-threaded, and its end interrupts nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from loadtest.peers.processes import stat
from scumble.evaluation.local_server import Server, children, start, variables
from tests.app.test_faults import blocking_server, busy, post  # noqa: F401  # a fixture

pytestmark = pytest.mark.server


def wait_for(what, seconds=30):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def serve(serve_from_scratch):
    """`serve(workers=2)` -> a server whose workers are all there; for ready one is enough."""

    def start_all(**settings):
        server = serve_from_scratch(**settings)
        if isinstance(workers := settings.get("workers"), int):
            wait_for(lambda: len(server.workers()) == workers)
        return server

    return start_all


def ready(server) -> bool:
    return httpx2.get(f"{server.admin}/readyz").status_code == 200


def test_it_has_one_thread_so_that_forks_copy_no_held_lock(serve):
    server = serve(workers=2, defense="dcp", defense_params={"beta": 1.2})
    (forker,) = server.forkers()
    assert len(list(Path(f"/proc/{forker}/task").iterdir())) == 1
    assert len(server.workers()) == 2


def test_workers_share_the_memory_of_what_it_imported(serve):
    server = serve(workers=1)
    (worker,) = server.workers()
    lines = Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()
    kib = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    assert kib["Shared_Dirty:"] > 15 * 1024


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_does_not_end_it(blocking_server, how):  # noqa: F811  # the fixture
    server = blocking_server(batch__execution="thread")
    (forker,) = server.forkers()
    with busy(server):
        for pid in [*server.workers(), forker]:
            os.kill(pid, how)
        assert Path(f"/proc/{forker}").exists()
    if how != signal.SIGTERM:  # which ends a worker, and another comes
        assert post(server).status_code == 200
    assert server.stop() == 0


def test_a_request_is_answered_when_all_are_told_to_end(blocking_server):  # noqa: F811  # the fixture
    server = blocking_server(workers=2, batch__execution="thread")
    with busy(server):  # its answer must come
        for pid in [server.process.pid, *server.forkers(), *server.workers()]:
            os.kill(pid, signal.SIGTERM)
    assert server.wait() == 0


def test_when_it_is_killed_workers_continue_and_another_forks_new_ones(serve):
    server = serve(workers=2)
    before, (forker,) = server.workers(), server.forkers()
    os.kill(forker, signal.SIGKILL)
    wait_for(lambda: server.forkers() not in ([forker], []))  # another is started at once
    assert [post(server).status_code for _ in range(4)] == [200] * 4
    assert ready(server)
    assert all(Path(f"/proc/{pid}").exists() for pid in before)
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: len(server.workers()) == 1 and ready(server))
    assert [post(server).status_code for _ in range(4)] == [200] * 4
    assert server.stop() == 0
    wait_for(lambda: stat(before[1]) is None)


def events(server) -> str:
    return " ".join(entry["event"] for entry in server.log)


@contextlib.contextmanager
def stopped(pid):
    """The process is stopped while the context is open."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_while_it_is_stopped_requests_are_answered_and_it_is_replaced_when_needed(serve):
    server = serve(workers=2)
    before, (forker,) = server.workers(), server.forkers()
    with stopped(forker):
        os.kill(before[0], signal.SIGKILL)
        codes = set()
        while "replacing it" not in events(server) or server.forkers() == [forker]:
            codes |= {post(server).status_code, httpx2.get(f"{server.admin}/livez").status_code}
        wait_for(lambda: ready(server))
        assert codes == {200}
        assert stat(forker) is None
        assert Path(f"/proc/{before[1]}").exists()
        assert "did not respond within" in events(server)
        assert server.stop() == 0


def test_while_it_is_stopped_sigterm_ends_all(serve):
    server = serve(workers=2)
    workers, (forker,) = server.workers(), server.forkers()
    with stopped(forker):
        assert server.stop() == 0
        wait_for(lambda: not any(map(stat, [*workers, forker])))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_while_it_is_stopped_before_its_first_fork_a_signal_ends_all(models, how):
    server = start({"model_dir": models, "model": "tiny", "workers": 2})
    wait_for(server.forkers)
    (forker,) = server.forkers()
    with stopped(forker):
        wait_for(lambda: len(list(Path(f"/proc/{server.process.pid}/task").iterdir())) > 1)
        assert server.stop(how) == 0
        assert "Traceback" not in events(server)
        assert stat(forker) is None


def test_when_it_is_killed_another_imports_before_a_worker_is_needed(serve):
    server = serve(workers=1)
    (forker,) = server.forkers()
    os.kill(forker, signal.SIGKILL)
    wait_for(lambda: server.forkers() not in ([], [forker]))
    assert post(server).status_code == 200


CANNOT_FORK = """
import sys
from app.processes import worker_fork_server
calls, fork = [], worker_fork_server.WorkerForkServer.fork
async def sometimes(self, *args):
    calls.append(args)
    if len(calls) in map(int, sys.argv[1].split()):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return await fork(self, *args)
worker_fork_server.WorkerForkServer.fork = sometimes
from scumble.cli import main
main(["serve"])
"""


def start_that_cannot_fork(models, *calls: int) -> Server:
    settings = {"model_dir": models, "model": "tiny", "workers": 2}
    return start_script([CANNOT_FORK, " ".join(map(str, calls))], settings)


def start_script(arguments, settings, *, new_session=False) -> Server:
    """Start a script that serves, with settings, on free ports."""
    process = subprocess.Popen(
        [sys.executable, "-c", *arguments],
        env={**os.environ, **variables({"port": 0, "admin_port": 0, **settings})},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
    )
    server = Server(process, time.perf_counter())
    threading.Thread(target=server.read_log, args=(process.stderr,), daemon=True).start()
    return server


@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_fork_at_the_start_is_logged_and_exits_1(models, call):
    server = start_that_cannot_fork(models, call)
    assert server.wait() == 1
    text = " ".join(entry["event"] for entry in server.log)
    assert "worker cannot be forked: BlockingIOError" in text
    assert "Traceback" not in text


def test_a_failed_fork_of_a_replacement_is_retried(models):
    server = start_that_cannot_fork(models, 3, 4)
    server.wait_ready()
    os.kill(server.workers()[0], signal.SIGKILL)
    wait_for(lambda: sum("cannot be forked" in entry["event"] for entry in server.log) == 2)
    wait_for(lambda: ready(server) and len(server.workers()) == 2)
    assert server.stop() == 0


def test_a_failed_fork_in_a_reload_changes_nothing_and_the_next_reload_works(models):
    server = start_that_cannot_fork(models, 4)
    server.wait_ready()
    before = server.workers()
    assert httpx2.post(f"{server.admin}/reload", timeout=30).status_code == 500
    wait_for(lambda: server.workers() == before)
    assert httpx2.post(f"{server.admin}/reload", timeout=30).status_code == 200
    assert not set(server.workers()[-2:]) & set(before)
    assert server.stop() == 0


NEVER_LOADS = """
from app.processes.serve import serve
from app.settings import load_settings
raise SystemExit(serve(load_settings(), load_s=1))
"""


def test_a_worker_that_never_loads_is_killed(models, tmp_path):
    defense = tmp_path / "endless.py"
    defense.write_text("import time\ntime.sleep(3600)\n")
    settings = {"model_dir": models, "model": "tiny", "workers": 1, "defense": f"{defense}:Defense"}
    server = start_script([NEVER_LOADS], settings)
    assert server.wait() == 1
    assert "has not loaded within 1 s" in events(server)


def test_modules_in_the_current_folder_are_not_imported(models, tmp_path):
    """Many a service is a file `app.py`."""
    (tmp_path / "app.py").write_text("raise SystemExit('not this one')")
    process = subprocess.Popen(
        [Path(sys.executable).with_name("scumble"), "serve"],
        cwd=tmp_path,
        env={
            **os.environ,
            **variables({"model_dir": models, "model": "tiny", "port": 0, "admin_port": 0}),
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Server(process, time.perf_counter())
    threading.Thread(target=server.read_log, args=(process.stderr,), daemon=True).start()
    server.wait_ready()
    assert post(server).status_code == 200
    assert server.stop() == 0


SLOW_DISK = """
import sys, time
from app.processes import serve
def copy_bundle(settings, folder):
    print("reading the model", file=sys.stderr, flush=True)
    time.sleep(3600)
serve.copy_bundle = copy_bundle
from scumble.cli import main
main(["serve"])
"""


def test_ctrl_c_while_the_model_is_read_exits_130_without_a_traceback(models):
    settings = {"model_dir": models, "model": "tiny", "workers": 2}
    server = start_script([SLOW_DISK], settings, new_session=True)
    wait_for(lambda: "reading the model" in events(server))
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.wait() == 130
    assert "Traceback" not in events(server)


def test_a_folder_for_its_socket_that_is_too_deep_is_named(models, tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    server = start({"model_dir": models, "model": "tiny"})
    assert server.wait() == 1
    text = " ".join(entry["event"] for entry in server.log)
    assert str(deep) in text
    assert "Traceback" not in text


def test_nothing_is_left_when_the_supervisor_is_killed(serve):
    server = serve(workers=2)
    all_of_them = [*children(server.process.pid), *server.workers()]
    server.stop(signal.SIGKILL)
    wait_for(lambda: not any(map(stat, all_of_them)))


def test_a_worker_told_to_end_while_it_loads_ends(models):
    server = start({"model_dir": models, "model": "tiny", "workers": 2})
    wait_for(lambda: len(children(server.process.pid)) > 1 and server.workers())
    assert server.stop() == 0
    assert not [entry for entry in server.log if "kill" in entry["event"]]


def test_the_engine_tells_nobody_that_it_is_used(tmp_path):
    """OpenVINO's own package does, at each import."""
    code = (
        "import sys, threading, app.inference.engines.openvino;"
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
