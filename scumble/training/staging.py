"""Bundles are made beside the one that is there, and take its place when they are complete."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.inference.bundle import AUXILIARY_FILES, CODEBOOK_FILE, GATE_FILE, ONNX_FILE, Bundle


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A copy of the bundle `folder`, empty where there is none, to be changed.

    At the end the copy is read as the service reads it, and takes the place of `folder`. If
    anything fails, `folder` is what it was.

    Raises:
        BundleError: what was made is not a bundle.
        OSError: it cannot be written.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of a name with a dot and one level down, where no list of bundles finds it.
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        new, old = Path(scratch, folder.name), Path(scratch, "replaced")
        if folder.exists():
            shutil.copytree(folder, new)
        else:
            new.mkdir()
        yield new
        bundle = Bundle(new)
        for file in bundle.card.files:
            bundle.read(file)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def remove_derived(folder: Path) -> None:
    """Remove from a bundle what was made of its float network, before it gets another one."""
    calibrated = (*CODEBOOK_FILE.values(), *GATE_FILE.values())
    for derived in (ONNX_FILE["int8"], *AUXILIARY_FILES, *calibrated):
        (folder / derived).unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".making-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
