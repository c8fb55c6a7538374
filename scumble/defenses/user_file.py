"""Modules from a user's files: each is loaded once, and may import what lies beside it."""

from __future__ import annotations

import hashlib
import importlib
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
    package = _package(path)
    name = f"scumble_user_file_{hashlib.sha256(str(package or path).encode()).hexdigest()[:16]}"
    folders = list(dict.fromkeys([path.parent, (package or path).parent]))
    known = set(sys.modules)
    sys.path[:0] = map(str, folders)
    try:
        module = _imported(name, path, package)
    except BaseException:
        for other in _inside(name) - known:
            del sys.modules[other]
        raise
    finally:
        for folder in folders:
            sys.path.remove(str(folder))
        # Another user's file may have a neighbour of the same name.
        outside = [other for folder in folders for other in _beside(folder, known)]
        beside = {other: sys.modules.pop(other) for other in dict.fromkeys(outside)}
    inside = [sys.modules[other] for other in _inside(name)]
    files = {
        Path(file) for other in (*beside.values(), *inside)
        if other is not module and (file := getattr(other, "__file__", None))
    }  # fmt: skip
    return UserFile(module, tuple(sorted(files)))


def _package(path: Path) -> Path | None:
    """The outermost package that a file is in; None if its folder is none."""
    found = None
    for folder in path.parents:
        if not (folder / "__init__.py").is_file():
            break
        found = folder
    return found


def _imported(name: str, path: Path, package: Path | None) -> ModuleType:
    """The module of `path`; `name` is the one of its package, or its own."""
    if package is None:
        return _executed(name, path)
    path.stat()  # the error of a file that is not there
    if name not in sys.modules:
        _executed(name, package / "__init__.py", [str(package)])
    parts = path.relative_to(package).with_suffix("").parts
    return importlib.import_module(".".join([name, *(p for p in parts if p != "__init__")]))


def _executed(name: str, path: Path, search: list[str] | None = None) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    assert spec is not None  # noqa: S101  # its name ends in .py
    assert spec.loader is not None  # noqa: S101  # same
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while they are created
    spec.loader.exec_module(module)
    return module


def _inside(name: str) -> set[str]:
    """Names of a module, and of those inside it, that have been imported."""
    return {other for other in sys.modules if other == name or other.startswith(f"{name}.")}


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
