"""A defense of one's own: `FILE.py:Class`."""

import sys

import numpy as np
import pytest

from scumble.attacker.oracle import HttpOracle
from scumble.defenses import DefenseError, make, user_file

QUARTER = """
from dataclasses import dataclass

from scumble.defenses.base import Defense


@dataclass(frozen=True, kw_only=True)
class Quarter(Defense):
    share: float = 0.25

    def __post_init__(self):
        self._check_number("share", 0, 1)

    def __call__(self, probs, inputs):
        return (1 - self.share) * probs + self.share / probs.shape[1]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "quarter.py"
    path.write_text(QUARTER)
    return path


def test_it_is_made_and_checked_like_any_other(file):
    defense = make(f"{file}:Quarter", share=0.5)
    np.testing.assert_allclose(defense(np.array([[1.0, 0.0]]), None), [[0.75, 0.25]])
    assert repr(defense) == "Quarter(share=0.5)"
    assert type(make(f"{file}:Quarter")) is type(defense)
    guarded = make(f"{file}:Quarter", keep_top1=True)
    np.testing.assert_allclose(guarded(np.array([[1.0, 0.0]]), None).argmax(1), [0])
    with pytest.raises(DefenseError, match="has no parameter 'shares'; allowed: share, keep_top1"):
        make(f"{file}:Quarter", shares=1)
    with pytest.raises(DefenseError, match="share must be a number from 0 to 1, got 2"):
        make(f"{file}:Quarter", share=2)


def test_it_may_import_what_lies_beside_it_and_each_file_has_its_own_neighbours(tmp_path):
    found = []
    for share in (0.25, 0.5):
        folder = tmp_path / str(share)
        for package in ("parts", "plain"):
            (folder / package).mkdir(parents=True)
        (folder / "parts" / "__init__.py").write_text("from parts.more import SHARE")
        (folder / "parts" / "more.py").write_text("from plain.more import SHARE")
        (folder / "plain" / "more.py").write_text(f"SHARE = {share}")
        (folder / "helper.py").write_text("from parts import SHARE")
        text = QUARTER.replace("share: float = 0.25", "share: float = SHARE")
        (folder / "quarter.py").write_text(f"from helper import SHARE\n{text}")
        found.append(make(f"{folder}/quarter.py:Quarter").share)
        names = {source.name for source in user_file.load(f"{folder}/quarter.py").sources}
        assert names == {"helper.py", "__init__.py", "more.py"}
    assert found == [0.25, 0.5]
    assert not {"helper", "parts", "parts.more", "plain", "plain.more"} & set(sys.modules)


def test_it_may_be_part_of_a_package(tmp_path):
    """Relative and absolute imports; another package of the same name is another one."""
    found = []
    for share in (0.25, 0.5):
        package = tmp_path / str(share) / "shaken"
        (package / "core").mkdir(parents=True)
        (package / "__init__.py").write_text("LOADED = []")
        (package / "core" / "__init__.py").write_text(f"SHARE = {share}")
        (package / "more.py").write_text("from . import LOADED\nfrom shaken.core import SHARE")
        text = QUARTER.replace("share: float = 0.25", "share: float = SHARE")
        imports = "from ..more import SHARE\nfrom .. import LOADED\nLOADED.append(__name__)\n"
        (package / "core" / "quarter.py").write_text(f"{imports}{text}")
        file = f"{package}/core/quarter.py"
        found.append(make(f"{file}:Quarter").share)
        loaded = user_file.load(file)
        assert len(loaded.module.LOADED) == 1
        names = {source.relative_to(package).as_posix() for source in loaded.sources}
        assert names == {"__init__.py", "more.py", "core/__init__.py"}
    assert found == [0.25, 0.5]
    assert not [name for name in sys.modules if name.partition(".")[0] == "shaken"]
    with pytest.raises(DefenseError, match="cannot be loaded: FileNotFoundError"):
        make(f"{package}/core/none.py:X")


def test_what_is_no_defense_is_refused(file, tmp_path):
    with pytest.raises(DefenseError, match="has no subclass of Defense named 'Half'"):
        make(f"{file}:Half")
    with pytest.raises(DefenseError, match="has no subclass of Defense named 'dataclass'"):
        make(f"{file}:dataclass")
    with pytest.raises(DefenseError, match="cannot be loaded: FileNotFoundError"):
        make(f"{tmp_path}/none.py:X")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(DefenseError, match="cannot be loaded: ZeroDivisionError"):
        make(f"{tmp_path}/broken.py:X")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    with pytest.raises(DefenseError, match="cannot be loaded: SystemExit: 3"):
        make(f"{tmp_path}/ends.py:X")
    with pytest.raises(DefenseError, match=r"unknown defense .*or FILE\.py:Class"):
        make("dcb")


@pytest.mark.server
def test_every_worker_serves_it(file, serve):
    server = serve(workers=2, defense=f"{file}:Quarter", defense_params={"share": 1.0})
    with HttpOracle(server.url, budget=40, batch=1, transport="pixels") as oracle:
        answers = oracle(np.random.default_rng(0).random((40, 3, 8, 8), np.float32))
    np.testing.assert_allclose(answers, 0.25, atol=1e-6)
