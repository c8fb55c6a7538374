"""Files of labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scumble.training.errors import ExportError


def read_labels(path: Path) -> list[str]:
    """The labels of a text file, one a line, or of a JSON file.

    JSON is a list, or an object from the numbers to names; of a pair such as
    `["n01440764", "tench"]` the last is the name. A byte order mark and empty lines at the end are
    skipped.

    Raises:
        ExportError: not such a file, or an empty label in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ExportError(f"labels {str(path)!r} are not text in UTF-8: {exc}") from exc
    if path.suffix.lower() == ".json":
        labels = _from_json(path, text)
    else:
        labels = [line.strip() for line in text.rstrip().splitlines()]
    if not labels or not all(labels):
        raise ExportError(f"labels {str(path)!r} have an empty one; needed: a name for each class")
    return labels


def _from_json(path: Path, text: str) -> list[str]:
    refusal = ExportError(
        f"labels {str(path)!r} are neither a JSON list of names nor an object from 0, 1, ... to "
        "names"
    )
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError as exc:
        raise refusal from exc
    if isinstance(found, dict):
        try:
            found = [found[str(k)] for k in range(len(found))]
        except KeyError as exc:
            raise refusal from exc
    if not isinstance(found, list):
        raise refusal
    names = [each[-1] if isinstance(each, list) and each else each for each in found]
    if not all(isinstance(name, str) for name in names):
        raise refusal
    return [str(name).strip() for name in names]


def distinct(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels that differ, and those that did not: they get their number, as `crane (134)`."""
    double = [label for label, count in Counter(labels).items() if count > 1]
    made = [f"{label} ({k})" if label in double else label for k, label in enumerate(labels)]
    return made, double
