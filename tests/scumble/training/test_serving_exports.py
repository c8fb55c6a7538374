"""A network that the project has never seen goes from its name to served predictions."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from scumble.training.export_command import export
from tests.pictures import encoded, picture

pytestmark = pytest.mark.torch


def test_an_imagenet_sized_network_is_exported_and_served(tmp_path):
    torch.manual_seed(0)
    arguments = ["mobile", "--torchvision", "mobilenet_v2", "--models", str(tmp_path)]
    done = CliRunner().invoke(export, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    app = create_app(Settings(model_dir=tmp_path, model="mobile", batch={"max_size": 8}))
    with TestClient(app) as client:
        photo = encoded(picture(640, 480), "JPEG")
        answer = client.post(
            "/v1/predict", content=photo, headers={"Content-Type": "image/jpeg"}
        ).json()
        model = client.get("/v1/model").json()
    probabilities = np.array(answer["predictions"][0]["probabilities"])
    assert probabilities.shape == (1000,)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert model["input"] == {"height": 224, "width": 224, "channels": 3}
