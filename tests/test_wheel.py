"""The wheel has the library and the service, and is a good guest in somebody else's project."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUFFIXES = {"", ".css", ".html", ".js", ".onnx", ".py", ".svg", ".toml", ".typed"}
BUNDLE = {"card.json", "golden.json"} | {
    f"{part}.{precision}.json" for part in ("codebook", "gate") for precision in ("float32", "int8")
}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.iterdir()
    return built


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))


@pytest.fixture
def python(wheel, tmp_path):
    """`python(*packages)` -> an interpreter with the wheel and these installed packages alone."""

    def make(*packages: str) -> Path:
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True
        )
        found = site_packages(tmp_path / "venv")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(found)
        installed = Path(sysconfig.get_path("purelib"))
        for package in packages:
            (path,) = [p for p in (installed / package, installed / f"{package}.py") if p.exists()]
            (found / path.name).symlink_to(path)
        return tmp_path / "venv" / "bin" / "python"

    return make


@pytest.fixture
def everything(python, tmp_path) -> Path:
    """An interpreter with the wheel, and all that is installed here."""
    interpreter = python()
    installed = site_packages(tmp_path / "venv") / "installed.pth"
    installed.write_text(sysconfig.get_path("purelib"))
    return interpreter


def test_the_wheel_has_two_packages_and_no_record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    metadata = "scumble-" + wheel.name.split("-")[1] + ".dist-info"
    assert {name.partition("/")[0] for name in names} == {"app", "scumble", metadata}
    files = [Path(name) for name in names if not name.startswith(metadata)]
    assert {f.suffix for f in files} <= SUFFIXES | {".json", ".txt"}
    others = [f for f in files if f.suffix in (".json", ".txt")]
    others.remove(Path("scumble/command_outlines.json"))
    assert {f.parent.as_posix() for f in others} == {"app/models/mnist"}
    assert {f.name for f in others if f.suffix == ".json"} == BUNDLE
    assert "scumble/py.typed" in names


ROUTE = """
import sys
from pathlib import Path
import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from app.model import answer
from scumble.defenses import make

application = FastAPI()
defense = make("dcp", beta=1.2)

@application.get("/classify")
def classify() -> list[float]:
    return defense(np.array([answer()], np.float32), None)[0].tolist()

sent = TestClient(application).get("/classify").json()
assert sent != answer(), sent
assert abs(sum(sent) - 1) < 1e-5, sent
assert not [name for name in sys.modules if name.startswith("app.") and name != "app.model"]
print("defended")
"""


def test_a_project_with_an_app_of_its_own_defends_its_route(everything, tmp_path):
    project = tmp_path / "project"
    (project / "app").mkdir(parents=True)
    (project / "app" / "__init__.py").touch()
    (project / "app" / "model.py").write_text("def answer():\n    return [0.9, 0.08, 0.02]\n")
    (project / "main.py").write_text(ROUTE)
    done = subprocess.run(
        [everything, "main.py"], cwd=project, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("defended\n", 0), done.stderr


def test_defenses_need_numpy_alone(python, tmp_path):
    code = (
        "import numpy as np, scumble.defenses as d\n"
        "print(d.make('dcp', beta=1.2)(np.array([[0.9, 0.1]]), None).shape)"
    )
    done = subprocess.run(
        [python("numpy", "numpy.libs"), "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("(1, 2)\n", 0), done.stderr


@pytest.mark.parametrize(
    ("command", "extra", "words"),
    [("serve", "serve", ""), ("predict", "client", "http://a a.png"), ("train", "train", "digits"),
     ("attack", "attack", "http://a --attack a --budget 1 --test a"), ("evaluate", "evaluate", "")],
)  # fmt: skip
def test_the_base_install_lists_commands_and_names_their_extras(
    python, tmp_path, command, extra, words
):
    scumble = [python("numpy", "numpy.libs", "click"), "-m", "scumble.cli"]
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    listed = subprocess.run([*scumble, "--help"], **run)
    assert f"\n  {command} " in listed.stdout
    hint = f"pip install 'scumble[{extra}]'"
    assert hint in subprocess.run([*scumble, command, "--help"], **run).stdout
    done = subprocess.run([*scumble, command, *words.split()], **run)
    assert done.returncode == 2
    assert hint in done.stderr


def test_the_installed_wheel_serves_its_model(everything, tmp_path):
    done = subprocess.run(
        [everything, "-m", "scumble.cli", "check", "--all"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{site_packages(tmp_path / 'venv')}/app/models" in done.stdout + done.stderr
