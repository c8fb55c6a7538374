"""Checks that the changelog and the package version agree: `python -m docs.generators.releases`.

A version has a heading `## [1.2.0] - 2026-11-29`, the newest first, below `## [Unreleased]`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = re.compile(r"^## +(.*?) *$", re.MULTILINE)
RELEASED = re.compile(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d{2}-\d{2})")
LINK = re.compile(r"^\[([^\]]+)\]: *(\S+)$", re.MULTILINE)
SECTIONS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def problems(changelog: str, version: str) -> list[str]:
    """What is wrong, a sentence each.

    Args:
        changelog: text of CHANGELOG.md.
        version: of the package.
    """
    found, releases, days = [], [], []
    headings = HEADING.findall(changelog)
    if headings[:1] != ["[Unreleased]"]:
        found.append(f"the first heading is {headings[:1]}; allowed: [Unreleased]")
    for heading in headings[1:]:
        release = RELEASED.fullmatch(heading)
        if release is None or not _is_day(release[4]):
            found.append(f"the heading {heading!r} is not of the form [1.2.0] - 2026-11-29")
            continue
        releases.append(tuple(map(int, release.groups()[:3])))
        days.append(release[4])
    if releases != sorted(set(releases), reverse=True) or days != sorted(days, reverse=True):
        found.append("the versions are not in order, the newest first")
    if releases and _text(releases[0]) != version:
        found.append(f"the newest version is {_text(releases[0])}, the package's is {version}")
    sections = set(re.findall(r"^### +(.*?) *$", changelog, re.MULTILINE))
    found += [
        f"the section {section!r} is not one of {', '.join(SECTIONS)}"
        for section in sorted(sections.difference(SECTIONS))
    ]
    links = dict(LINK.findall(changelog))
    names = ["Unreleased", *map(_text, releases)]
    if links and list(links) != names:
        found.append(f"the links are of {', '.join(links)}; allowed: {', '.join(names)}")
    for name, newer in zip(names[1:], names, strict=False):
        if links and f"v{name}" not in links.get(newer, "") + links.get(name, ""):
            found.append(f"the links of {newer} and {name} do not name the tag v{name}")
    return found


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def version() -> str:
    """The version of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return str(project["project"]["version"])


if __name__ == "__main__":
    wrong = problems((ROOT / "CHANGELOG.md").read_text(), version())
    sys.exit("\n".join(wrong))
