"""A bundle is replaced by a complete one or not at all."""

import shutil

import pytest

from app.errors import BundleError
from app.inference.bundle import Bundle, open_bundle, write_card
from scumble.training.staging import staged, write_file
from tests.tiny import make_bundle


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def changed(folder):
    """Another int8 file, and the card that knows it."""
    card = Bundle(folder).card.model_dump(exclude={"files", "format"})
    shutil.copy(folder / "float32.onnx", folder / "int8.onnx")
    return write_card(folder, card)


@pytest.fixture
def folder(tmp_path):
    return make_bundle(tmp_path / "models")


def test_a_complete_bundle_takes_the_place_of_the_one_before(folder):
    before = content(folder)
    with staged(folder) as work:
        changed(work)
        assert content(folder) == before
    assert content(folder)["int8.onnx"] == before["float32.onnx"]
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


def test_a_first_bundle_is_made(tmp_path, folder):
    with staged(tmp_path / "new" / "models" / "other") as work:
        shutil.copytree(folder, work, dirs_exist_ok=True)
    assert Bundle(tmp_path / "new" / "models" / "other").card.name == "tiny"


@pytest.mark.parametrize("name", ["raises", "interrupted", "no card", "another file"])
def test_whatever_fails_the_bundle_is_what_it_was(folder, name):
    before = content(folder)

    def work_in(work):
        changed(work)
        if name == "raises":
            raise ValueError
        if name == "interrupted":
            raise KeyboardInterrupt
        if name == "no card":
            (work / "card.json").unlink()
        else:
            (work / "int8.onnx").write_bytes(b"of another network")

    with pytest.raises((ValueError, KeyboardInterrupt, BundleError)), staged(folder) as work:
        work_in(work)
    assert content(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


def test_a_bundle_that_is_being_made_is_in_no_list(folder):
    with staged(folder) as work:
        with pytest.raises(BundleError, match=r"available: tiny$"):
            open_bundle(folder.parent, "none")
        changed(work)


def test_the_folder_behind_a_link_is_replaced(folder, tmp_path):
    link = tmp_path / "served"
    link.symlink_to(folder)
    with staged(link) as work:
        changed(work)
    assert link.is_symlink()
    assert content(folder)["int8.onnx"] == content(folder)["float32.onnx"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.onnx"
    write_file(path, b"one")
    with pytest.raises(TypeError):
        write_file(path, "no bytes")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
