"""Writes what the search for recipes found into `docs/reference/attacks.md`.

python -m docs.generators.searches
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.generators.marks import between
from scumble.evaluation.tables import markdown

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "attacks.md"
LOGS = ROOT / "docs" / "results" / "records" / "search"
BEGIN = "<!-- searches: python -m docs.generators.searches -->\n\n"
END = "\n\n<!-- end of searches -->"
HEAD = ("victim", "answers", "transfer set", "fit", "agreement", "minutes")


def rows(log: dict[str, Any], victim: str) -> Iterator[tuple[str, ...]]:
    """A row per candidate; the best of each kind of answers is bold."""
    candidates = log["candidates"]
    found = {row["kind"]: row for row in sorted(candidates, key=agreement)}
    for row in candidates:
        share = f"{row['agreement']:.1%}"
        best = row["agreement"] == found[row["kind"]]["agreement"]
        yield (
            f"`{victim}`",
            row["kind"],
            row["transfer set"],
            row["candidate"],
            f"**{share}**" if best else share,
            f"{row['seconds'] / 60:.1f}",
        )


def agreement(row: dict[str, Any]) -> float:
    """Of the copy with the validation victim, on its test images."""
    return float(row["agreement"])


def made() -> str:
    """The table of all searches, and where they ran."""
    logs = {path.stem: json.loads(path.read_text()) for path in sorted(LOGS.glob("*.json"))}
    lines = [
        f"- `{victim}`: `{log['command']}`, {log['processor']}; the validation victim is right on "
        f"{log['victim']['accuracy']:.1%} of the test images, the search took "
        f"{sum(row['seconds'] for row in log['candidates']) / 60:.0f} minutes."
        for victim, log in logs.items()
    ]
    table = markdown(list(HEAD), [list(row) for name in logs for row in rows(logs[name], name)])
    return (
        "\n".join(lines)
        + f"\n\n<details><summary>All candidates</summary>\n\n{table}\n\n</details>"
    )


def replaced(page: str) -> str:
    """The page with the table between its marks."""
    return between(page, BEGIN, made(), END)


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text()))
