"""Who may import whom, and what the base install must not load."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_contracts_hold(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


@pytest.mark.parametrize("heavy", ["torch", "torchvision", "sklearn", "pyarrow", "onnx"])
def test_the_service_does_not_load(heavy):
    assert run(f"import sys, app.main; print({heavy!r} in sys.modules)") == "False"


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_is_loaded_only_when_chosen(engine):
    assert run(f"import sys, app.main; print({engine!r} in sys.modules)") == "False"


def test_a_broken_image_does_not_make_pillow_load_its_other_formats():
    code = """
from PIL import Image
from app.bundle import InputShape, Preprocessing
from app.decode import decode
from app.errors import Unprocessable
try:
    decode(b"P6 8 8 255", InputShape(height=8, width=8, channels=3), Preprocessing(), 100)
except Unprocessable:
    print("EPS" in Image.OPEN)
"""
    assert run(code) == "False"
