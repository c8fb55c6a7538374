"""What can be refused before servers are started and attacks are run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from app.errors import ConfigError
from app.inference.auxiliary import Auxiliaries
from app.inference.bundle import ONNX_FILE, Bundle, open_bundle
from app.precision import Precision
from app.settings import default_model_dir
from scumble import defenses
from scumble.attacker.run import configure, part_of
from scumble.data.image_sets import require
from scumble.evaluation.experiment import Cell
from scumble.evaluation.referee import job

SECRET = b"only to try it, none of a server"


def check(cells: Iterable[Cell], root: Path | None) -> None:
    """Check that the cells can be run.

    Args:
        cells: what is to be run.
        root: folder with data sets by name.

    Raises:
        AttackError: an attack, a modifier, a setting or a transport is not allowed.
        ConfigError: there is no such model, or its defense cannot be made.
        DatasetError: a data set is not there.
    """
    cells = list(cells)
    for cell in cells:
        attack, _ = configure(job(cell, "", None, None, 1))
        attack.check(cell.budget, images=cell.queries is not None)
    for victim in {(c.victim, c.precision, str(c.defense)): c for c in cells}.values():
        check_victim(victim)
    parts = {part_of(cell.test or cell.victim, "test") for cell in cells}
    parts |= {part_of(cell.queries, "train") for cell in cells if cell.queries}
    for source, split in sorted(parts):
        require(source, split, root=root)


def check_victim(cell: Cell) -> None:
    """Check that the cell's model has its precision and that its defense can be made.

    Raises:
        ConfigError: no such model or precision, an unknown defense, or a parameter that is not
            allowed.
    """
    folder, precision = Path(cell.victim), cast("Precision", cell.precision)
    found = folder.is_dir() and (folder / "card.json").is_file()
    bundle = Bundle(folder) if found else open_bundle(default_model_dir(), cell.victim)
    if ONNX_FILE[precision] not in bundle.card.files:
        raise ConfigError(f"{cell.victim} has no {precision} file; it has {there(bundle)}")
    if cell.defense.url is None:
        auxiliaries = Auxiliaries(bundle, precision=precision)
        name = cell.defense.name
        try:
            params = bundle.card.defense_params(name, cell.defense.params)
            defenses.configure(name, params, bundle=auxiliaries, secret=SECRET)
        except defenses.DefenseError as exc:
            raise ConfigError(f"--defense: {exc}") from exc


def there(bundle: Bundle) -> str:
    """The precisions that a bundle has."""
    names = [name for name, file in ONNX_FILE.items() if file in bundle.card.files]
    return ", ".join(dict.fromkeys(name for name in names if name != "bf16"))
