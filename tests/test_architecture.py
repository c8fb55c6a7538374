"""Who may import whom, and what the base install must not load."""

import subprocess
import sys
from pathlib import Path

import pytest

from app.system.installation import install_command

ROOT = Path(__file__).parent.parent


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_contracts_hold():
    # A process of its own: the linter sets up logging, and switches off what others log.
    run("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")


@pytest.mark.parametrize(
    "heavy", ["torch", "torchvision", "sklearn", "pyarrow", "onnx", "redis", "opentelemetry.sdk"]
)
def test_the_service_does_not_load(heavy):
    assert run(f"import sys, app.main; print({heavy!r} in sys.modules)") == "False"


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_is_loaded_only_when_chosen(engine):
    assert run(f"import sys, app.main; print({engine!r} in sys.modules)") == "False"


def test_a_broken_image_does_not_make_pillow_load_its_other_formats():
    code = """
from PIL import Image
from app.inference.bundle import InputShape, Preprocessing
from app.inference.decode import decode
from app.errors import Unprocessable
try:
    decode(b"P6 8 8 255", InputShape(height=8, width=8, channels=3), Preprocessing(), 100)
except Unprocessable:
    print("EPS" in Image.OPEN)
"""
    assert run(code) == "False"


def test_the_base_install_serves(models):
    """Everything that only extras bring is made unimportable; the service answers all the same."""
    code = """
import sys
for name in (
    "torch", "torchvision", "pyarrow", "redis", "tqdm", "onnxscript", "sklearn", "pytest",
    "opentelemetry.sdk", "opentelemetry.exporter", "trustme", "cryptography", "pillow_heif",
):
    sys.modules[name] = None
from pathlib import Path
from starlette.testclient import TestClient
import scumble.cli, scumble.client.http_client, scumble.client.commands
from app.main import create_app
from app.settings import Settings
from app.processes.serve import serve
from tests.pictures import PNG
app = create_app(Settings(model_dir=Path(sys.argv[1]), model="tiny", precision="int8"))
with TestClient(app) as client:
    kind = {"Content-Type": "image/png"}
    print(client.post("/v1/predict", content=PNG, headers=kind).status_code)
"""
    assert run(code, str(models)) == "200"


def test_the_redis_store_without_redis_names_the_extra():
    code = """
import sys
sys.modules["redis"] = None
from app.errors import ConfigError
from app.access.stores import open_store
try:
    open_store("redis://:hunter2@localhost/0")
except ConfigError as exc:
    print(exc)
"""
    said = run(code)
    assert install_command("redis") in said
    assert "hunter2" not in said


def test_the_torch_engine_without_torch_names_the_extra():
    code = """
import sys
sys.modules["torch"] = None
from app.inference.engines import resolve
from app.errors import ConfigError
try:
    resolve("torch")
except ConfigError as exc:
    print(exc)
"""
    assert install_command("torch") in run(code)
