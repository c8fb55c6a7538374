"""`withhold` in front of another server: the energy is of logits which that server exposes."""

import numpy as np
import orjson
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.errors import ConfigError
from app.inference.bundle import Bundle, golden_inputs, write_card
from app.main import create_app
from app.settings import Settings
from tests.app.inference.upstream.fake import FakeUpstream, running
from tests.app.inference.upstream.fake_api import JsonApi, template
from tests.app.inference.upstream.test_template import run
from tests.app.inference.upstream.test_upstream import bundle
from tests.pictures import encoded
from tests.tiny import LABELS, SHAPE

IMAGES = golden_inputs(SHAPE)
ROWS, LOGITS, _ = FakeUpstream(datatype="UINT8", layout="NHWC").network(IMAGES)
ENERGY = np.log(np.exp(LOGITS.astype(np.float64)).sum(axis=1))
THRESHOLD = float(np.median(ENERGY))
DEFENSE = {
    "defense": "withhold",
    "defense_params": {"on": "gate", "loss": 0.5, "score": "energy", "answers": ["label", {}]},
    "secret": "a-key-of-16-bytes",
}
# What the server exposes, and the sentence at start where that has no energy.
OUTPUTS = {
    "logits as the output": {"answers": "logits"},
    "logits as another output": {"logits": "z"},
    "no logits": {},
}


def calibrate(folder) -> None:
    """Thresholds between the energies of the golden images."""
    gate = {"losses": [0.01, 0.5], "thresholds": {"energy": [[THRESHOLD, THRESHOLD]]}}
    gate |= {"weight": 0, "whitener": None, "shares": {}}
    (folder / "gate.float32.json").write_bytes(orjson.dumps(gate))
    write_card(folder, Bundle(folder).card.model_dump(exclude={"files", "format"}))


def withheld(settings) -> None:
    """Ask for the golden images in one request, and check each answer."""
    files = [("image", (f"{i}.png", encoded(Image.fromarray(x)))) for i, x in enumerate(IMAGES)]
    with TestClient(create_app(settings)) as client:
        answer = client.post("/v1/predict", files=files)
        metrics = client.app.state.service.metrics.registry
        count = metrics.get_sample_value("scumble_withheld_images_total", {"answer": "abstained"})
    assert answer.status_code == 200, answer.text
    found = answer.json()["predictions"]
    below = ENERGY < THRESHOLD
    assert 0 < below.sum() < len(IMAGES)
    assert [each.get("abstained", False) for each in found] == below.tolist()
    assert count == below.sum()
    expected = np.where(below[:, np.newaxis], 1 / len(LABELS), np.eye(len(LABELS))[ROWS.argmax(1)])
    np.testing.assert_allclose([each["probabilities"] for each in found], expected, atol=1e-6)


@pytest.mark.parametrize("case", OUTPUTS)
def test_images_of_low_energy_are_withheld_where_the_server_has_logits(tmp_path, case):
    sent = OUTPUTS[case]
    with running(answers=sent.get("answers", "probabilities")) as fake:
        settings = Settings(
            model_dir=bundle(tmp_path, fake, **sent),
            model="front",
            engine="upstream",
            upstream=fake.url,
            **DEFENSE,
        )
        calibrate(tmp_path / "front")
        if case != "no logits":
            withheld(settings)
            return
        said = "no output for: energy; `scumble connect` takes --logits for the energy"
        with pytest.raises(ConfigError, match=said):
            create_app(settings)


@pytest.mark.parametrize("name", ["numbers", "base64"])
def test_images_of_low_energy_are_withheld_where_an_api_gives_logits(tmp_path, name):
    api = JsonApi(name)
    api.start()
    try:
        done = run(api, tmp_path, text=template(name))
        assert done.exit_code == 0, done.output
        calibrate(tmp_path / "front")
        settings = Settings(
            model_dir=tmp_path,
            model="front",
            engine="upstream",
            upstream=api.url,
            upstream_template=tmp_path / "api.toml",
            **DEFENSE,
        )
        if name == "numbers":
            withheld(settings)
            return
        said = 'no output for: energy; an API whose answers are logits, scale = "logits", has the'
        with pytest.raises(ConfigError, match=said):
            create_app(settings)
    finally:
        api.stop()
