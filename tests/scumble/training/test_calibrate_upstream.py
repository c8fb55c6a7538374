"""`scumble calibrate` of a bundle whose network another server runs."""

import numpy as np
import pytest

from app.inference.assembly import load_pipeline
from app.inference.bundle import Bundle
from scumble.data.image_sets import Dataset
from scumble.training.policy_table import policy_table, settings_of
from tests.app import probe_defenses
from tests.app.inference.upstream.fake import running
from tests.app.inference.upstream.fake_api import JsonApi
from tests.app.inference.upstream.test_template import run
from tests.app.inference.upstream.test_upstream import bundle
from tests.tiny import LABELS

pytestmark = pytest.mark.torch


def images(seed, fake, count=120) -> Dataset:
    """Random pictures, labelled as the network sees them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    pixels[::2] //= np.arange(1, 1 + count // 2, dtype=np.uint8)[:, None, None, None]
    rows, _, _ = fake.network(pixels)
    return Dataset(f"own{seed}", pixels, rows.argmax(1), tuple(LABELS), ("",) * count)


def test_codebook_and_gate_are_fitted_to_what_the_server_answers(tmp_path, monkeypatch):
    from scumble.training.calibrate import ship

    with running(datatype="UINT8", layout="NHWC", answers="logits") as fake:
        monkeypatch.setenv("SCUMBLE_UPSTREAM", fake.url)
        made = Bundle(bundle(tmp_path, fake) / "front")
        card = ship(made, images(0, fake), images(1, fake), {}, "scumble calibrate front")
    assert {"codebook.float32.json", "gate.float32.json"} <= card.files.keys()
    assert card.upstream == made.card.upstream
    assert card.auxiliary["codebook"]["float32"]["none"]["kept"] == 1
    assert max(fake.batches) == 8


@pytest.mark.parametrize(("name", "scores"), [("numbers", True), ("base64", False)])
def test_a_json_api_is_calibrated_and_without_logits_has_no_gate(
    tmp_path, monkeypatch, name, scores
):
    from scumble.training.calibrate import ship

    api = JsonApi(name)
    api.start()
    try:
        assert run(api, tmp_path).exit_code == 0
        monkeypatch.setenv("SCUMBLE_UPSTREAM", api.url)
        monkeypatch.setenv("SCUMBLE_UPSTREAM_TEMPLATE", str(tmp_path / "api.toml"))
        made = Bundle(tmp_path / "front")
        own, test = images(0, api, 40), images(1, api, 40)
        card = ship(made, own, test, {}, "scumble calibrate front")
    finally:
        api.stop()
    assert card.upstream == made.card.upstream
    assert "codebook.float32.json" in card.files
    assert ("gate.float32.json" in card.files) is scores
    said = str(card.auxiliary["gate"]["float32"])
    assert ('scale = "logits", has the energy' in said) is not scores


def test_policies_are_compared_on_what_the_server_answers(tmp_path, monkeypatch):
    with running(datatype="UINT8", layout="NHWC", answers="logits") as fake:
        monkeypatch.setenv("SCUMBLE_UPSTREAM", fake.url)
        monkeypatch.setenv("SCUMBLE_DEFENSE", probe_defenses.OPPOSITE)
        made = Bundle(bundle(tmp_path, fake) / "front")
        for precision in ("float32", "int8"):  # as the command asks for both
            settings = settings_of(tmp_path, "front", precision=precision, engine="upstream")
        settings = settings_of(tmp_path, "front", precision="float32", engine="upstream")
        asked = images(0, fake, 40).images
        table = policy_table(settings, made, load_pipeline(settings, made), asked, "of --test")
    columns = [list(column.cells) for column in table.columns]
    assert columns[0][:2] == ["Opposite()", "Label()"]
    assert columns[1][:2] == ["100.00%", "0.00%"]
    assert table.title == "40 images of --test, float32"


def test_withheld_answers_of_a_server_are_counted(tmp_path, monkeypatch):
    from scumble.training.calibrate import ship

    with running(datatype="UINT8", layout="NHWC", answers="logits") as fake:
        monkeypatch.setenv("SCUMBLE_UPSTREAM", fake.url)
        made = Bundle(bundle(tmp_path, fake) / "front")
        ship(made, images(0, fake), images(1, fake), {}, "scumble calibrate front")
        settings = settings_of(tmp_path, "front", engine="upstream", defense="withhold")
        asked = images(2, fake, 40).images
        made = Bundle(made.folder)
        table = policy_table(settings, made, load_pipeline(settings, made), asked, "of --test")
    names, changed, withheld, _ = (list(column.cells) for column in table.columns)
    assert names[0].startswith("Withhold(")
    assert changed[0] == "0.00%"
    assert 0 <= float(withheld[0].rstrip("%")) <= 100
