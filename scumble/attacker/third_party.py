"""Attacks and modifiers from files of one's own: `FILE.py:Class`, as defenses are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from scumble.attacker.errors import AttackError
from scumble.data.image_sets import DatasetError
from scumble.defenses import user_file


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
    try:
        module = user_file.load(file).module
    except (Exception, SystemExit) as exc:
        raise AttackError(f"{file} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        raise AttackError(f"{file} has no class {attribute!r}")
    return found


@contextmanager
def blamed(*names: str) -> Iterator[None]:
    """Make what code of `names` that stands in a file raises an error that says whose it is.

    Raises:
        AttackError: it raised something else, or ended the process.
    """
    try:
        yield
    except (AttackError, DatasetError):
        raise
    except (Exception, SystemExit) as exc:
        files = [name for name in names if is_file(name)]
        if not files:
            raise
        what = f"{type(exc).__name__}: {exc}"
        raise AttackError(f"{', '.join(files)} failed with {what}") from exc


def has(kind: type, *methods: str) -> bool:
    """Whether a dataclass has methods, of its own or inherited."""
    own = {name for each in kind.__mro__ for name in vars(each)}
    return is_dataclass(kind) and own.issuperset(methods)


def make(kind: Any, name: str, /, **fields: Any) -> Any:
    """An instance of a class of a third party.

    Raises:
        AttackError: whatever its constructor raises, or asks for in vain.
    """
    try:
        return kind(**fields)
    except AttackError:
        raise
    except Exception as exc:
        raise AttackError(f"{name} cannot be made: {type(exc).__name__}: {exc}") from exc


def hashes(name: str) -> dict[str, str]:
    """SHA-256 by file: of `FILE.py:Class`, its neighbours, and the packages that it imports.

    Empty for another name. A file that cannot be loaded is hashed without its packages.
    """
    if not is_file(name):
        return {}
    file = Path(name.rpartition(":")[0])
    files = {file, *file.parent.glob("*.py")}
    with suppress(Exception, SystemExit):  # whoever uses the class says what is wrong
        folder = file.resolve().parent
        imported = user_file.load(str(file)).sources
        beside = (os.path.relpath(source, folder) for source in imported)
        files |= {Path(os.path.normpath(file.parent / each)) for each in beside}
    return {
        str(each): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in sorted(files)
        if each.is_file()
    }
