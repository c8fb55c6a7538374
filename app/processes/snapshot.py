"""A private copy of the bundle, so that all workers serve the same files.

A restarted worker loads the model again. Without a copy, it would load whatever the model folder
contains by then: another version, a half-written one, or nothing usable.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from app.errors import ConfigError
from app.inference.bundle import GOLDEN_FILE, open_bundle
from app.settings import Settings


def copy_bundle(settings: Settings, folder: Path) -> Settings:
    """Copy the bundle and return settings that serve the copy.

    Args:
        settings: which bundle.
        folder: where the copy goes; it is created.

    Raises:
        BundleError: the bundle is missing, incomplete or does not match its card.
        ConfigError: the copy cannot be written, for example because the disk is full.
    """
    try:
        return _copy(settings, folder)
    except OSError as exc:
        raise ConfigError(
            f"model {settings.model!r} cannot be copied to {str(folder)!r}: {exc.strerror or exc}"
        ) from exc


def _copy(settings: Settings, folder: Path) -> Settings:
    bundle = open_bundle(settings.model_dir, settings.model)
    target = folder / settings.model
    target.mkdir(parents=True)
    shutil.copyfile(bundle.folder / "card.json", target / "card.json")
    needed = {bundle.card.served_file(settings.precision), GOLDEN_FILE}
    for name in bundle.card.files:
        # read() checks the hash. An optional file may be missing; its user reports that.
        if name in needed or (bundle.folder / name).exists():
            (target / name).write_bytes(bundle.read(name))
    return settings.model_copy(update={"model_dir": folder})
