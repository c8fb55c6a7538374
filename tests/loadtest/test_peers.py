"""The comparison with peers, without the peers: wrk, processes, figures, and what lies where."""

import json
import os
import shutil
import sys
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from app.inference.bundle import open_bundle
from loadtest import wrk
from loadtest.peers import run
from loadtest.peers.figures import Story, Visit, entry, ratios
from loadtest.peers.processes import Running, running, stat
from loadtest.wrk import Load, load, parse

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent.name for path in run.HERE.glob("*/serve.py"))
PRINTED = (
    '{"requests": 1200, "us": 2000000, "p50": 1500.0, "p99": 9000.0, "max": 20000.0, '
    '"status": 200, "socket": 3}'
)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder that is all of the path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def fake(folder, lines):
    """A program `wrk` that runs Python lines; its arguments are `sys.argv`."""
    program = folder / "wrk"
    program.write_text("\n".join([f"#!{sys.executable}", "import sys, pathlib", *lines]))
    program.chmod(0o755)


def post(url="http://127.0.0.1:9/", **options):
    plain = {"body": b"x", "content_type": "image/png", "connections": 4, "seconds": 2}
    return load(url, **{**plain, **options})


# wrk


def test_figures_of_wrk_are_read_and_errors_are_no_answers():
    found = parse(f"Running 2s test\n  1 threads\n\n{PRINTED}\n")
    assert found == Load(
        rps=500, p50_ms=1.5, p99_ms=9, max_ms=20, requests=1200, errors=203, seconds=2
    )
    with pytest.raises(RuntimeError, match="no figures: Running"):
        parse("Running 2s test\n")


def test_wrk_gets_load_body_and_headers(path):
    log = path / "log"
    fake(
        path,
        [
            "words = sys.argv[1:]",
            "body = pathlib.Path(words[words.index('--') + 1]).read_bytes()",
            f"pathlib.Path({str(log)!r}).open('a').write(repr((words, body)) + '\\n')",
            f"print('\\n' + {PRINTED!r})",
        ],
    )
    found = post(body=b"\x00png", warmup=1, headers={"X-One": "two"})
    assert found.errors == 2 * 203  # those of the warm-up too
    assert found.requests == 1200
    calls = [literal_eval(line) for line in log.read_text().splitlines()]
    assert [words[2] for words, _ in calls] == ["-d1s", "-d2s"]
    for words, body in calls:
        assert words[:2] == ["-t1", "-c4"]
        assert words[-4:] == ["Content-Type", "image/png", "X-One", "two"]
        assert body == b"\x00png"


def test_what_wrk_complains_of_is_told(path):
    with pytest.raises(RuntimeError, match="install the package `wrk`"):
        post()
    fake(path, ["print('unable to connect', file=sys.stderr)", "sys.exit(1)"])
    with pytest.raises(RuntimeError, match="wrk: unable to connect"):
        post()


@pytest.mark.server
@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_the_real_wrk_loads_a_server_and_counts_refusals(serve):
    server = serve()
    image = (ROOT / "docs" / "digits" / "3.png").read_bytes()
    good = post(f"{server.url}/v1/predict", body=image, seconds=1, warmup=0)
    assert good.errors == 0
    assert good.requests > 10
    assert 0 < good.p50_ms <= good.p99_ms <= good.max_ms
    paused = post(f"{server.url}/v1/predict", body=image, seconds=2, warmup=0, pause_ms=49.5)
    assert 20 < paused.requests <= 4 * 2000 / 49.5 + 8  # on four connections
    assert paused.p50_ms < 49
    refused = post(f"{server.url}/v1/predict", body=b"no image", seconds=1, warmup=0)
    assert refused.errors == refused.requests > 10
    assert refused.rps == 0


# Processes


def start(lines, tmp_path):
    """`running` for a server of Python lines."""
    return running([sys.executable, "-c", "\n".join(lines)], os.environ, tmp_path / "x" / "log")


def wait_for_line(server: Running, word):
    while word not in server.log.read_text():
        assert server.leader.poll() is None, server.last_words()


def test_a_server_ends_with_its_children(tmp_path):
    # The child has a session of its own and ignores SIGTERM, as the leader does.
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); "
    lines = [
        "import signal, subprocess, sys, time",
        "signal.signal(15, signal.SIG_IGN)",
        f"words = [sys.executable, '-c', {child + 'time.sleep(60)'!r}]",
        "subprocess.Popen(words, start_new_session=True)",
        "time.sleep(60)",
    ]
    with start(lines, tmp_path) as server:
        wait_for_line(server, "up")
        alive = server.alive()
        assert len(alive) == 2
        assert 5 < server.memory_mb() < 200
        server.stop(term_s=0.2)
        assert server.ended_by == "SIGKILL"
        assert not server.alive()
        assert not any(stat(process.pid) for process in alive)


def test_a_polite_server_ends_on_sigterm(tmp_path):
    with start(["import time", "print('up', flush=True)", "time.sleep(60)"], tmp_path) as server:
        wait_for_line(server, "up")
    assert server.ended_by == "SIGTERM"
    assert server.leader.returncode == -15


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path):
    with (
        start(["print('no such port')", "raise SystemExit(3)"], tmp_path) as server,
        pytest.raises(RuntimeError, match=r"ended with 3: no such port"),
    ):
        run.wait_ready(server, "http://127.0.0.1:9", run.Post("/", b"", "image/png"))


# Figures


def measured(rps, gap):
    loads = {8: Load(rps, 1000 / rps, 3000 / rps, 9, 100, 2, 1)}
    return Visit(rps, gap, memory_mb=1, processes=2, ended_by="SIGTERM", loads=loads)


def story(name, setting, *rates, gap=0.0):
    return Story(name, setting, {n: measured(rate, gap) for n, rate in enumerate(rates, 1) if rate})


def test_medians_and_ratios_are_taken_within_rounds():
    # A slow second round hits both: the ratio of medians would be 3, the rounds say 2.
    ours = {"undefended": story("scumble", "undefended", 200, 20, 300)}
    theirs = story("peer", "stock", 100, 10, 150)
    assert ratios(ours["undefended"], theirs, 8) == {"rps": 2, "p50_ms": 0.5, "p99_ms": 0.5}
    found = entry(theirs, ours, [8])
    assert found["ready_s"] == 100
    assert found["rounds"] == 3
    assert found["answers_equal"]
    assert found["loads"] == [
        {
            "connections": 8,
            "rps": 100,
            "p50_ms": 10,
            "p99_ms": 30,
            "requests": 300,
            "errors": 6,
            "scumble_over_it": {"undefended": {"rps": 2, "p50_ms": 0.5, "p99_ms": 0.5}},
        }
    ]
    assert "scumble_over_it" not in entry(ours["undefended"], ours, [8])["loads"][0]


def test_rounds_that_one_of_them_missed_do_not_count_in_ratios():
    ours, theirs = story("scumble", "undefended", 200, 0, 300), story("peer", "stock", 0, 7, 100)
    assert ratios(ours, theirs, 8)["rps"] == 3
    assert ratios(ours, story("peer", "stock", 0, 7), 8) == {}


def test_a_server_that_never_ran_has_errors_only():
    failed = story("peer", "stock")
    failed.failures.append("round 1: no")
    ours = {"undefended": story("scumble", "undefended", 100)}
    assert entry(failed, ours, [8]) == {
        "server": "peer",
        "setting": "stock",
        "failures": ["round 1: no"],
    }


def test_another_answer_than_the_bundles_shows():
    ours = {"undefended": story("scumble", "undefended", 100)}
    found = entry(story("peer", "tuned", 100, gap=0.01), ours, [8])
    assert not found["answers_equal"]
    assert found["largest_gap"] == 0.01


# What lies where


def test_every_peer_has_a_folder_and_a_line():
    assert sorted(run.PEERS) == FOLDERS
    for name, peer in run.PEERS.items():
        wanted = (run.HERE / name / "requirements.txt").read_text()
        lines = [line.partition("#")[0].strip() for line in wanted.splitlines()]
        assert all("==" in line for line in lines if line)
        assert any(line.startswith(peer.package) for line in lines)


@pytest.mark.parametrize("name", FOLDERS)
def test_peers_know_both_settings_and_listen_on_loopback(name):
    text = (run.HERE / name / "serve.py").read_text()
    compile(text, name, "exec")
    assert "loadtest.peers.classifier" in text
    assert "0.0.0.0" not in text  # noqa: S104 - it must not be there
    assert "ports()" in text


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("setting", run.SETTINGS)
def test_requests_carry_the_image(name, setting):
    png = (ROOT / "docs" / "digits" / "3.png").read_bytes()
    built = run.PEERS[name].post(png, setting)
    assert built.path.startswith("/")
    if built.content_type == "application/json":
        assert json.loads(built.body)["inputs"][0]["data"]
    else:
        assert png in built.body


def test_answers_are_read_as_each_peer_gives_them():
    probs = [i / 8 for i in range(10)]
    said = {
        "plain": {"probabilities": probs},
        "litserve": {"probabilities": probs},
        "bentoml": [probs],
        "mlserver": {"outputs": [{"data": probs}]},
        "rayserve": {"probabilities": probs},
    }
    for name, answer in said.items():
        assert run.PEERS[name].read(json.dumps(answer).encode()) == probs
    binary = b'{"outputs": []}' + np.array(probs, "<f4").tobytes()
    assert run.PEERS["triton"].read(binary) == probs


def test_unknown_peers_and_settings_are_refused():
    for words in (["--peers", "plain,tensorflow"], ["--settings", "fast"], ["--connections", "a"]):
        done = CliRunner().invoke(run.main, words)
        assert done.exit_code == 2, done.output


@pytest.mark.torch
def test_the_torch_file_has_the_bundles_weights(tmp_path):
    from loadtest.peers.weights import TOLERANCE, write

    out = tmp_path / "a" / "cifar10.pt"
    assert write(open_bundle(ROOT / "models", "cifar10"), out) < TOLERANCE
    assert out.stat().st_size > 6_000_000


def test_the_script_of_wrk_counts_every_kind_of_error():
    for kind in ("status", "connect", "read", "write", "timeout"):
        assert f"e.{kind}" in wrk.SCRIPT
