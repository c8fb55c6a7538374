"""Modules from a user's files: each is loaded once, and may import what lies beside it."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

OURS = ("app", "scumble")


@dataclass(frozen=True)
class UserFile:
    """A file that was loaded.

    Attributes:
        module: made of it.
        sources: files of the modules beside it that it imported, packages with all of theirs.
    """

    module: ModuleType
    sources: tuple[Path, ...]


def load(file: str) -> UserFile:
    """Load a file that ends in .py, if that has not been done.

    Raises:
        Exception: whatever the file raises.
    """
    return _load(Path(file).resolve())


@cache
def _load(path: Path) -> UserFile:
    name = f"scumble_user_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # noqa: S101  # its name ends in .py
    assert spec.loader is not None  # noqa: S101  # same
    module = importlib.util.module_from_spec(spec)
    known = set(sys.modules)
    sys.modules[name] = module  # dataclasses look up their module while they are created
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
        # Another user's file may have a neighbour of the same name.
        beside = {other: sys.modules.pop(other) for other in _beside(path.parent, known)}
    files = {
        Path(file) for other in beside.values() if (file := getattr(other, "__file__", None))
    }  # fmt: skip
    return UserFile(module, tuple(sorted(files)))


def _beside(folder: Path, known: set[str]) -> list[str]:
    """Names of the modules of `folder` that have been imported since only `known` were."""
    found = []
    for name in sys.modules:
        top = name.partition(".")[0]
        if top in known or top in OURS:
            continue
        module = sys.modules.get(top)
        # A package without __init__.py has a path alone.
        homes = {getattr(module, "__file__", None), *getattr(module, "__path__", ())}
        if homes & {str(folder / f"{top}.py"), str(folder / top)}:
            found.append(name)
    return found
