"""Commands that make bundles show what policies do to the owner's pictures."""

import re
from itertools import islice

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from app.errors import ConfigError
from app.inference.assembly import load_pipeline
from app.inference.bundle import Bundle
from app.inference.policy_effect import images_of
from app.settings import default_model_dir
from scumble.training.import_command import import_onnx
from scumble.training.policy_table import policies_of, policy_table, settings_of, show_folder
from tests.app import probe_defenses
from tests.pictures import encoded, picture
from tests.scumble.training.test_import import network
from tests.tiny import SHAPE


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 pictures and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        (folder / f"{i:02}.png").write_bytes(encoded(picture(seed=i)))
    (folder / "zz.png").write_bytes(b"\x89PNG nothing more")
    return folder


def rows(text):
    """The first cells of the table's rows, with the figures: name -> (changed, withheld, L1)."""
    cells = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {row[0].strip(): tuple(part.strip() for part in row[1:]) for row in cells}


def test_a_new_bundle_is_tried_on_the_owners_pictures(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("SCUMBLE_DEFENSE", probe_defenses.OPPOSITE)
    onnx.save(network(), tmp_path / "net.onnx")
    words = [str(tmp_path / "net.onnx"), "net", "--normalize", "0..1"]
    words += ["--models", str(tmp_path / "m"), "--images", str(pictures)]
    done = CliRunner().invoke(import_onnx, words)
    assert done.exit_code == 0, done.output
    found = rows(done.output)
    assert found["Opposite()"][:2] == ("100.00%", "0.00%")
    assert found["Label()"][:2] == ("0.00%", "0.00%")
    assert any(name.startswith("DCP(beta=1.2") for name in found)
    assert "40 images in" in done.output
    assert "note: 1 images are refused, the first is zz.png: " in done.output
    shown = re.findall(r"^(\S+\.png): (\S+), \d+\.\d%$", done.output, re.MULTILINE)
    made = Bundle(tmp_path / "m" / "net")
    settings = settings_of(tmp_path / "m", "net", defense="none")
    first = list(islice(images_of(pictures, made.card, settings.limits, []), 5))
    answers = load_pipeline(settings, made).engine(np.stack([pixels for _, pixels in first]))
    files = [file.name for file, _ in first]
    assert files == ["00.png", "01.png", "02.png", "03.png", "04.png"]
    labels = [made.card.labels[i] for i in answers.argmax(1)]
    assert shown == list(zip(files, labels, strict=True))


def test_the_policies_are_the_served_one_the_recommended_one_and_dcp(models):
    settings = settings_of(models, "tiny", defense="none")
    found = policies_of(settings, Bundle(models / "tiny"))
    assert [name.partition("(")[0] for name in found] == ["Label", "DCP"]
    settings = settings_of(models, "tiny", defense="dcp", defense_params={"beta": 0.5})
    found = policies_of(settings, Bundle(models / "tiny"))
    assert [name[:12] for name in found] == ["DCP(beta=0.5", "Label()"]


def test_a_calibrated_bundle_has_its_withheld_answers_counted(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(encoded(picture(28, 28, "L")))  # noise is not a digit
    settings = settings_of(default_model_dir(), "mnist", precision="int8", defense="withhold")
    show_folder(settings, tmp_path)
    found = rows(capsys.readouterr().out)
    assert found["Withhold(on='both', loss=0.01,"][:2] == ("0.00%", "100.00%")


def test_what_cannot_be_compared_is_a_note_as_the_bundle_is_made(models, tmp_path, capsys):
    show_folder(settings_of(models, "tiny"), tmp_path)
    assert f"compared: no image in {str(tmp_path)!r}" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    show_folder(settings_of(models, "tiny", defense="codebook"), tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("a.png: ")
    assert "note: no policies are compared: defense 'codebook': " in said
    with pytest.raises(ConfigError, match="SCUMBLE_DEFENSE"):
        settings_of(models, "tiny", defense_params="beta")


def test_each_picture_is_seen_once_by_the_network(models, monkeypatch):
    from app.inference import engines

    seen, load = [], engines.load

    def counting(*args, **more):
        engine = load(*args, **more)

        class Counting:
            def __call__(self, batch):
                seen.append(len(batch))
                return engine(batch)

        return Counting()

    monkeypatch.setattr(engines, "load", counting)
    images = [picture(SHAPE.width, SHAPE.height, seed=i) for i in range(40)]
    settings, bundle = settings_of(models, "tiny"), Bundle(models / "tiny")
    pipeline = load_pipeline(settings, bundle)
    policy_table(settings, bundle, pipeline, map(np.asarray, images), "here")
    assert seen == [32, 8]
