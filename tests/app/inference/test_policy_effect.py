"""`scumble check --images`: what a policy does to the owner's own images."""

import pytest
from click.testing import CliRunner

from app.inference import engines
from scumble.cli import main
from tests.app import probe_defenses
from tests.pictures import encoded, picture


@pytest.fixture
def check(models, tmp_path, monkeypatch):
    """`check(defense)` -> the lines about a folder of 40 images, one in a folder of its own."""
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    for i in range(40):
        place = folder / "deep" if i == 0 else folder
        (place / f"{i}.png").write_bytes(encoded(picture(seed=i)))
    (folder / "notes.txt").write_text("no image")
    monkeypatch.setenv("SCUMBLE_MODEL_DIR", str(models))
    monkeypatch.setenv("SCUMBLE_MODEL", "tiny")

    def run(defense, *words):
        done = CliRunner().invoke(
            main, ["check", "--defense", defense, "--images", str(folder), *words]
        )
        assert done.exit_code == 0, done.output
        return [line.split(None, 1) for line in done.output.splitlines() if line]

    run.folder = folder
    return run


@pytest.mark.parametrize(
    ("defense", "changed", "l1"),
    [
        ("none", "0.00%", "0.000,"),
        ("label", "0.00%", None),
        (probe_defenses.OPPOSITE, "100.00%", None),
    ],
)
def test_labels_and_distance(check, defense, changed, l1):
    lines = check(defense)
    assert ["images", f"40 in {check.folder}"] in lines
    assert ["labels", f"{changed} changed by the defense"] in lines
    (distance,) = [rest for name, rest in lines if name == "L1"]
    assert l1 is None or distance.startswith(l1)
    assert not any(name == "withheld" for name, _ in lines)
    warned = any("of these labels; label, codebook" in rest for _, rest in lines)
    assert warned is (changed == "100.00%")


def test_files_that_the_service_refuses_are_named(check):
    (check.folder / "folder.png").mkdir()
    (check.folder / "a.png").write_bytes(b"\x89PNG nothing more")
    lines = check("label")
    assert ["images", f"40 in {check.folder}"] in lines
    (refused,) = [rest for name, rest in lines if name == "refused"]
    assert refused.startswith("1 images, the first is a.png: ")


def test_a_folder_without_images_is_refused(models, tmp_path):
    words = ["check", "--model-dir", str(models), "--model", "tiny", "--images", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert f"no image in {str(tmp_path)!r} can be answered" in done.output
    assert "Traceback" not in done.output


def test_withheld_answers_are_no_changed_labels(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(28, 28, "L", seed=i)))
    words = ["check", "--model", "mnist", "--defense", "withhold", "--images", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "withheld  100.00% of the answers" in done.output  # noise is not a digit
    assert "labels    0.00% changed" in done.output


def test_the_model_is_not_loaded_again_for_the_images(check, monkeypatch):
    loaded, load = [], engines.load

    def counting(*args, **more):
        loaded.append(args)
        return load(*args, **more)

    monkeypatch.setattr(engines, "load", counting)
    check("label")
    with_images = len(loaded)
    loaded.clear()
    done = CliRunner().invoke(main, ["check", "--defense", "label"])
    assert done.exit_code == 0
    assert len(loaded) == with_images > 0
