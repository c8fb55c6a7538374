"""A copy of the served bundle: all workers serve the same one, whatever happens to its folder.

A worker that is replaced loads the model again. Without a copy it would take whatever the folder
holds by then: another version than its neighbours, half of one, or nothing that can be served.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from app.errors import ConfigError
from app.inference.bundle import ONNX_FILE, open_bundle
from app.settings import Settings


def take(settings: Settings, folder: Path) -> Settings:
    """Settings that serve a copy of the bundle as it is now.

    Args:
        settings: which bundle.
        folder: where the copy goes; made.

    Raises:
        BundleError: there is none, a file that is needed is missing, or one is not what its card
            says.
        ConfigError: it cannot be copied, as to a full disk.
    """
    try:
        return _take(settings, folder)
    except OSError as exc:
        raise ConfigError(
            f"model {settings.model!r} cannot be copied to {str(folder)!r}: {exc.strerror or exc}"
        ) from exc


def _take(settings: Settings, folder: Path) -> Settings:
    bundle = open_bundle(settings.model_dir, settings.model)
    target = folder / settings.model
    target.mkdir(parents=True)
    shutil.copyfile(bundle.folder / "card.json", target / "card.json")
    needed = {ONNX_FILE[settings.precision], "golden.json"}
    for name in bundle.card.files:
        # Hashed before it is written. Who needs one that is missing says so.
        if name in needed or (bundle.folder / name).exists():
            (target / name).write_bytes(bundle.read(name))
    return settings.model_copy(update={"model_dir": folder})
