"""Prints the installed size of each dependency, for `docs/explanation/dependencies.md`.

python -m docs.generators.sizes         prints name, release and megabytes
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
MB = 2**20


def dependencies() -> list[str]:
    """Names of all distributions that the project needs, but for its own development."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    groups = [project["dependencies"]]
    groups += [group for extra, group in project["optional-dependencies"].items() if extra != "dev"]
    names = {re.split(r"[\[><=!;~ ]", each, maxsplit=1)[0] for group in groups for each in group}
    return sorted(names - {"scumble"})


def megabytes(name: str) -> float:
    """Size of the files that a distribution has installed, without bytecode."""
    files = metadata.distribution(name).files or ()
    paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.exists()) / MB


if __name__ == "__main__":
    for each in dependencies():
        print(f"{each:42} {metadata.version(each):12} {megabytes(each):8.1f} MB")  # noqa: T201  # its purpose
