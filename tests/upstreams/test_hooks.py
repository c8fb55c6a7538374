"""The files of docs/how-to/where-to-put-it.md answer under their servers as the defense does.

All but FastAPI have pins of their own, so they run in environments under runs/upstreams, or are
skipped. The reason of the skip has the command that makes the environment.
"""

import json
import re
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from PIL import Image

from scumble.defenses import make
from tests.pictures import encoded
from tests.ports import free_ports
from tests.upstreams.servers import MODEL, ROOT, answers, infer, interpreter, upstream

PAGE = ROOT / "docs" / "how-to" / "where-to-put-it.md"
BUNDLE = ROOT / "models" / "cifar10"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
PORTS = ("8000", "8001", "8002")

pytestmark = pytest.mark.server


def files() -> dict[str, str]:
    """The files that the page shows, by their names."""
    text = PAGE.read_text()
    found = re.findall(r"^```py\n(# (\w+\.py)\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (settings,) = re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {name: source for source, name in found} | {"model-settings.json": settings}


@pytest.fixture(scope="module")
def rows():
    """Clean and defended, of another run of the same network."""
    session = pytest.importorskip("onnxruntime").InferenceSession(BUNDLE / "int8.onnx")

    class Calibrated:
        def codebook(self):
            return json.loads((BUNDLE / "codebook.int8.json").read_text())["forms"]

    clean = session.run(["probabilities"], {"pixels": PIXELS})[0]
    return clean, make("codebook", bundle=Calibrated())(clean, PIXELS)


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels))


def each_picture(url: str) -> np.ndarray:
    """The rows of single pictures in forms."""
    found = []
    for picture in PIXELS:
        form = {"image": ("x.png", png(picture), "image/png")}
        answer = httpx2.post(f"{url}/predict", files=form, trust_env=False)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["probabilities"])
    return np.array(found)


def all_pictures(url: str) -> np.ndarray:
    """The rows of several pictures in one form."""
    form = [("images", ("x.png", png(picture), "image/png")) for picture in PIXELS]
    answer = httpx2.post(f"{url}/predict", files=form, trust_env=False)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json())


def each_array(url: str) -> np.ndarray:
    """The rows of single arrays in JSON."""
    found = []
    for picture in PIXELS:
        answer = httpx2.post(f"{url}/predict", json={"pixels": picture.tolist()}, trust_env=False)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["probabilities"])
    return np.array(found)


SERVERS = {
    "fastapi": (["uvicorn", "fastapi_app:app", "--port", "8000"], "/docs", each_picture),
    "triton": (
        ["python", "triton_app.py"],
        f"{MODEL}/ready",
        lambda url: infer(url + MODEL, PIXELS, binary=True),
    ),
    "mlserver": (
        ["mlserver", "start", "."],
        f"{MODEL}/ready",
        lambda url: infer(url + MODEL, PIXELS, binary=False),
    ),
    "bentoml": (
        ["bentoml", "serve", "bentoml_app:Classifier", "--port", "8000"],
        "/readyz",
        all_pictures,
    ),
    "litserve": (["python", "litserve_app.py"], "/health", each_array),
}


def test_the_file_of_triton_s_python_backend_sends_out_defended_rows(rows, tmp_path, monkeypatch):
    """With a stand-in for Triton's module, which exists only in the backend's own process."""
    for file, text in files().items():
        (tmp_path / file).write_text(text)
    (tmp_path / "models").symlink_to(ROOT / "models")
    backend = SimpleNamespace(
        Tensor=lambda name, values: SimpleNamespace(name=name, as_numpy=lambda: values),
        InferenceResponse=lambda outputs: SimpleNamespace(outputs=outputs),
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.delitem(sys.modules, "defended", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model = run_path(str(tmp_path / "model.py"))["TritonPythonModel"]()
    monkeypatch.delitem(sys.modules, "defended")
    requests = [{"pixels": backend.Tensor("pixels", part)} for part in (PIXELS[:2], PIXELS[2:])]
    responses = model.execute(requests)
    (names, values) = zip(
        *((output.name, output.as_numpy()) for each in responses for output in each.outputs),
        strict=True,
    )
    clean, defended = rows
    assert set(names) == {"probabilities"}
    np.testing.assert_allclose(np.concatenate(values), defended, atol=1e-6)
    assert np.abs(defended - clean).max() > 1e-3


@pytest.mark.parametrize("name", SERVERS)
def test_the_page_s_server_sends_out_defended_rows(rows, tmp_path, name):
    command, path, ask = SERVERS[name]
    python = Path(sys.executable) if name == "fastapi" else interpreter(name)
    ports = dict(zip(PORTS, map(str, free_ports(3)), strict=True))

    def local(text: str) -> str:
        for shown, free in ports.items():
            text = re.sub(rf"\b{shown}\b", free, text)
        return text

    for file, text in files().items():
        (tmp_path / file).write_text(local(text))
    (tmp_path / "models").symlink_to(ROOT / "models")
    http, grpc, metrics = ports.values()
    variables = {
        "MLSERVER_HTTP_PORT": http, "MLSERVER_GRPC_PORT": grpc, "MLSERVER_METRICS_PORT": metrics,
        "MLSERVER_PARALLEL_WORKERS": "0", "BENTOML_DO_NOT_TRACK": "True",
    }  # fmt: skip
    url = f"http://127.0.0.1:{http}"
    words = [python.parent / command[0], *map(local, command[1:])]
    with upstream(words, tmp_path, lambda: answers(url + path), variables):
        found = ask(url)
    clean, defended = rows
    np.testing.assert_allclose(found, defended, atol=1e-6)
    assert np.abs(found - clean).max() > 1e-3
