"""The templates of docs/how-to/upstream.md put the service in front of the servers that it names.

The page's FastAPI application runs on a thread, as does a stand-in that takes and gives what
BentoML and TorchServe do. Both themselves run where runs/upstreams has an environment for them.
"""

import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager

import httpx2
import numpy as np
import pytest
import uvicorn
from click.testing import CliRunner
from fastapi import FastAPI, HTTPException, Request, UploadFile
from PIL import Image
from starlette.testclient import TestClient

from app.commands.connect import connect
from app.main import create_app
from app.settings import Settings
from scumble.api_template import read_template
from tests.pictures import encoded
from tests.ports import free_ports
from tests.upstreams.servers import READY_S, ROOT, answers, interpreter, upstream

DOCS = ROOT / "docs"
PAGE = DOCS / "how-to" / "upstream.md"
PETS = ["cat", "dog", "rabbit"]


def blocks(kind: str) -> dict[str, str]:
    """The files of the page, by the names in their first lines."""
    found = re.findall(
        rf"^```{kind}\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    return dict(found)


def pets(picture: np.ndarray) -> np.ndarray:
    """What the network of pets says: a distribution that depends on the picture."""
    weights = 1 + picture.reshape(-1, 3).mean(axis=0)
    return weights / weights.sum()


def stand_in(cifar10) -> FastAPI:
    """Takes and gives what BentoML and TorchServe do for the page's files."""
    app = FastAPI()

    @app.post("/bento/classify")
    def bento(images: list[UploadFile]) -> list[list[float]]:
        pixels = np.stack([np.asarray(Image.open(image.file)) for image in images])
        return cifar10(pixels).tolist()

    @app.post("/predictions/pets")
    async def torchserve(request: Request) -> dict[str, float]:
        picture = np.asarray(Image.open(io.BytesIO(await request.body())))
        if picture.shape != (256, 256, 3):
            raise HTTPException(500, f"cropped from {picture.shape}")
        row = dict(zip(PETS, pets(picture).tolist(), strict=True))
        return dict(sorted(row.items(), key=lambda item: -item[1]))

    return app


@contextmanager
def running(app):
    """The URL of an application that a thread serves."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def cifar10():
    """Pixels to the rows of the network that the page's applications run."""
    file = ROOT / "models" / "cifar10" / "float32.onnx"
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    return lambda pixels: session.run(["probabilities"], {"pixels": pixels})[0]


@pytest.fixture(scope="module")
def servers(cifar10):
    """URLs of the page's FastAPI application and of the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        scope = {}
        exec(compile(blocks("py")["classify.py"], "classify.py", "exec"), scope)  # noqa: S102  # our own docs
    with running(scope["app"]) as fastapi, running(stand_in(cifar10)) as others:
        yield {"classify": fastapi, "bento_classify": f"{others}/bento", "torchserve": others}


def served(url, name, folder, pictures, *words):
    """The rows of pictures, of the service in front of a server."""
    template = folder / f"{name}.toml"
    template.write_text(blocks("toml")[template.name])
    arguments = [url, "--name", "front", "--models", str(folder), "--template", str(template)]
    done = CliRunner().invoke(connect, [*arguments, *words])
    assert done.exit_code == 0, done.output
    settings = Settings(
        model_dir=folder,
        model="front",
        engine="upstream",
        upstream=url,
        upstream_template=template,
    )
    with TestClient(create_app(settings)) as client:
        end = time.monotonic() + READY_S  # a slow server is not checked yet when the service starts
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        files = [("image", (f"{i}.png", picture)) for i, picture in enumerate(pictures)]
        answer = client.post("/v1/predict", files=files)
    assert answer.status_code == 200, answer.text
    return np.array([each["probabilities"] for each in answer.json()["predictions"]])


@pytest.mark.parametrize("name", ["classify", "bento_classify"])
def test_the_rows_are_those_of_the_network(servers, cifar10, tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    pictures = [encoded(Image.fromarray(each)) for each in pixels]
    found = served(servers[name], name, tmp_path, pictures)
    np.testing.assert_allclose(found, cifar10(pixels), atol=1e-6)


def test_torchserve_gets_pictures_that_its_handler_does_not_resize(servers, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
    options = "--fit", "resize_crop", "--shorter", "256"
    picture_file = encoded(Image.fromarray(picture))
    found = served(servers["torchserve"], "torchserve", tmp_path, [picture_file], *options)
    np.testing.assert_allclose(found, [pets(picture[:, 22:278])], atol=1e-6)


@pytest.mark.server
def test_a_real_bentoml_answers_as_the_page_says(cifar10, tmp_path):
    python = interpreter("bentoml")
    (tmp_path / "bento_classify.py").write_text(blocks("py")["bento_classify.py"])
    (tmp_path / "models").symlink_to(ROOT / "models")
    (port,) = free_ports(1)
    command = [python.parent / "bentoml", "serve", "bento_classify:Classifier"]
    url = f"http://127.0.0.1:{port}"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    pictures = [encoded(Image.fromarray(each)) for each in pixels]
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    variables = {"BENTOML_DO_NOT_TRACK": "True"}
    with upstream(words, tmp_path, lambda: answers(f"{url}/readyz"), variables):
        found = served(url, "bento_classify", tmp_path, pictures)
    np.testing.assert_allclose(found, cifar10(pixels), atol=1e-5)


# A network of three classes, and its archive by TorchServe's own tool.
ARCHIVE = """
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 3))
torch.jit.trace(net.eval(), torch.zeros(1, 3, 224, 224)).save("pets.pt")
"""
ADDRESSES = "inference_address", "management_address", "metrics_address"
GRPC = "grpc_inference_port", "grpc_management_port"


@pytest.mark.server
def test_a_real_torchserve_answers_as_the_page_says(tmp_path):
    python = interpreter("torchserve")
    if shutil.which("java") is None:
        pytest.skip("TorchServe needs Java, which is not installed")
    (tmp_path / "all_classes.py").write_text(blocks("py")["all_classes.py"])
    (tmp_path / "index_to_name.json").write_text(json.dumps(dict(enumerate(PETS))))
    (tmp_path / "store").mkdir()
    subprocess.run([python, "-c", ARCHIVE], cwd=tmp_path, check=True)
    archive = "--model-name pets --version 1 --serialized-file pets.pt --handler all_classes.py"
    files = "--extra-files index_to_name.json --export-path store"
    archiver = python.parent / "torch-model-archiver"
    subprocess.run([archiver, *archive.split(), *files.split()], cwd=tmp_path, check=True)
    ports = free_ports(len(ADDRESSES) + len(GRPC))
    lines = [f"{key}=http://127.0.0.1:{ports.pop()}" for key in ADDRESSES]
    lines += [f"{key}={ports.pop()}" for key in GRPC]
    lines += ["default_workers_per_model=1"]
    (tmp_path / "config.properties").write_text("\n".join(lines))
    options = "--start --foreground --ncs --disable-token-auth --model-store store"
    chosen = "--models pets=pets.mar --ts-config config.properties"
    words = [python.parent / "torchserve", *options.split(), *chosen.split()]
    picture = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
    url = lines[0].partition("=")[2]
    cropped = encoded(Image.fromarray(np.ascontiguousarray(picture[:, 22:278])))

    def answer():
        try:
            return httpx2.put(
                f"{url}/predictions/pets", content=cropped, timeout=10, trust_env=False
            )
        except httpx2.TransportError:
            return None

    def ready():
        given = answer()
        return given is not None and given.status_code == 200

    path = {"PATH": f"{python.parent}:{os.environ['PATH']}"}  # it starts its workers by name
    with upstream(words, tmp_path, ready, path):
        options = "--fit", "resize_crop", "--shorter", "256"
        found = served(url, "torchserve", tmp_path, [encoded(Image.fromarray(picture))], *options)
        row = answer().json()
    np.testing.assert_allclose(found, [[row[name] for name in PETS]], atol=1e-6)


def test_all_templates_of_the_documentation_are_valid(tmp_path):
    found = 0
    for page in DOCS.rglob("*.md"):
        for text in re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            if "[request]" in text:
                file = tmp_path / "template.toml"
                file.write_text(text)
                read_template(file)
                found += 1
    assert found >= 5
