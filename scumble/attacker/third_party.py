"""Attacks and modifiers from files of one's own: `FILE.py:Class`, as defenses are."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from scumble.attacker.errors import AttackError


def is_file(name: str) -> bool:
    """Whether a name has the form `FILE.py:Class`."""
    return name.rpartition(":")[0].endswith(".py")


def short(name: str) -> str:
    """What `--set` calls it: the class of `FILE.py:Class`, else the name itself."""
    return name.rpartition(":")[2] if is_file(name) else name


def load(name: str) -> Any:
    """The class of `FILE.py:Class`. The file may import its neighbours.

    Raises:
        AttackError: there is no such file, it cannot be loaded, or it has no such class.
    """
    file, _, attribute = name.rpartition(":")
    path = Path(file).resolve()
    module = f"scumble_attack_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None  # noqa: S101  # its name ends in .py
        assert spec.loader is not None  # noqa: S101  # same
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded  # dataclasses look their module up while it is made
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(loaded)
        except Exception as exc:
            del sys.modules[module]
            raise AttackError(f"{file} cannot be loaded: {type(exc).__name__}: {exc}") from exc
        finally:
            sys.path.remove(str(path.parent))
    found = getattr(sys.modules[module], attribute, None)
    if not (isinstance(found, type) and callable(found)):
        raise AttackError(f"{file} has no class {attribute!r}")
    return found


def hashes(name: str) -> dict[str, str]:
    """SHA-256 of the file of `FILE.py:Class` and of its neighbours; empty for another name."""
    if not is_file(name):
        return {}
    path = Path(name.rpartition(":")[0])
    files = sorted({path, *path.parent.glob("*.py")})
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }
