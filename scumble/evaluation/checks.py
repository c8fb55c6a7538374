"""What can be refused before servers are started and attacks are run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

from app.errors import ConfigError
from app.inference.bundle import ONNX_FILE, Bundle, open_bundle
from app.inference.defense_artifacts import DefenseArtifacts
from app.precision import Precision
from app.settings import default_model_dir
from scumble import defenses
from scumble.attacker import recipes, third_party
from scumble.attacker.run import configure, require_data
from scumble.evaluation.experiment import Cell
from scumble.evaluation.referee import job

SECRET = b"only to try it, none of a server"


def check_settings(cells: Iterable[Cell]) -> None:
    """Check that the cells' attacks and defenses can be made.

    Raises:
        AttackError: an attack, a modifier, a setting or a transport is not allowed.
        ConfigError: there is no such model, or its defense cannot be made.
    """
    cells = list(cells)
    for cell in cells:
        attack, _ = configure(job(cell, "", None, None, 1))
        attack.check(cell.budget, images=cell.queries is not None)
    for victim in {(c.victim, c.precision, str(c.defense)): c for c in cells}.values():
        check_victim(victim)


def check_data(cells: Iterable[Cell], root: Path | None) -> None:
    """Check that the cells' data sets are there.

    Args:
        cells: what is to be run.
        root: folder with data sets by name.

    Raises:
        AttackError: a modifier needs a data set, and names none.
        DatasetError: a data set is not there.
    """
    wanted = {}
    for cell in cells:
        diluted = tuple(change for change in cell.changes if change.startswith("diluted."))
        sets = cell.test, cell.victim, cell.queries, cell.adapt, diluted
        wanted[sets] = job(cell, "", None, root, 1)
    for each in wanted.values():
        require_data(each, configure(each)[1])


def check_victim(cell: Cell) -> dict[str, str]:
    """Check that the cell's model has its precision and that its defense can be made.

    Returns:
        The SHA-256 of each file of the bundle that the defense reads.

    Raises:
        ConfigError: no such model or precision, an unknown defense, or a parameter that is not
            allowed.
    """
    precision = cast("Precision", cell.precision)
    bundle = ReadBundle(folder_of(cell.victim))
    if ONNX_FILE[precision] not in bundle.card.files:
        raise ConfigError(f"{cell.victim} has no {precision} file; it has {there(bundle)}")
    if cell.defense.url is None:
        artifacts = DefenseArtifacts(bundle, precision=precision)
        name = cell.defense.name
        try:
            params = bundle.card.defense_params(name, cell.defense.params)
            defenses.configure(name, params, bundle=artifacts, secret=SECRET)
        except defenses.DefenseError as exc:
            raise ConfigError(f"--defense: {exc}") from exc
    return bundle.hashes


def model_sha256(cell: Cell) -> str:
    """Of the file that is served for the cell, as its bundle has it now.

    Raises:
        ConfigError: no such model.
    """
    card = Bundle(folder_of(cell.victim)).card
    return card.files[card.served_file(cast("Precision", cell.precision))]


def folder_of(victim: str) -> Path:
    """The folder of a bundle that is given by it, or by its name.

    Raises:
        ConfigError: no such model.
    """
    folder = Path(victim)
    if folder.is_dir() and (folder / "card.json").is_file():
        return folder
    return open_bundle(default_model_dir(), victim).folder


def own_set(victim: str) -> str:
    """The data set that a bundle was trained on; its name where its card states none.

    Raises:
        ConfigError: no such model.
    """
    card = Bundle(folder_of(victim)).card
    return str(card.training.get("set", card.name))


def with_hashes(cell: Cell) -> Cell:
    """The cell with the hash of each file that no release fixes and that decides its result.

    Those are the files of third parties, their neighbours, the recipe, and what the defense reads
    from the bundle. An edited one makes another cell, so no record of the old one is taken for it.

    Raises:
        AttackError: no such recipe.
        ConfigError: no such model, or its defense cannot be made.
    """
    files = {
        file: digest
        for name in (cell.attack, *cell.adapt, cell.defense.name)
        for file, digest in third_party.hashes(name).items()
    }
    files |= recipes.hashes(cell.recipe)
    return replace(cell, files=files | (check_victim(cell) if cell.defense.url is None else {}))


class ReadBundle(Bundle):
    """A bundle that notes the hashes of what is read from it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.hashes: dict[str, str] = {}

    def read(self, file: str) -> bytes:
        """See `Bundle`."""
        content = super().read(file)
        self.hashes[f"{self.card.name}/{file}"] = hashlib.sha256(content).hexdigest()
        return content


def there(bundle: Bundle) -> str:
    """The precisions that a bundle has."""
    names = [name for name, file in ONNX_FILE.items() if file in bundle.card.files]
    return ", ".join(dict.fromkeys(name for name in names if name != "bf16"))
