"""How this project was installed, for hints that match."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "scumble"


def install_command(extra: str, direct_url: str | None = None) -> str:
    """The command that adds an extra to this installation.

    Args:
        extra: of the distribution.
        direct_url: the text of the distribution's `direct_url.json`; read if not given.
    """
    folder = clone(installed_from() if direct_url is None else direct_url)
    if folder is None:
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install --editable '{folder}[{extra}]'"


def installed_from() -> str:
    """The text of `direct_url.json`; empty after an installation from an index."""
    try:
        return metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or ""
    except metadata.PackageNotFoundError:
        return ""


def clone(direct_url: str) -> Path | None:
    """The folder that is installed as editable; None if it is another kind of installation."""
    if not direct_url:
        return None
    document = json.loads(direct_url)
    if not document.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlsplit(document["url"]).path))


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed versions of distributions, `not installed` for those that are missing."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
