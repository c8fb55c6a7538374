"""Writes a page of the tutorial as a Jupyter notebook, with the outputs that the page shows.

python -m docs.generators.notebook
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "tutorial" / "photos.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
# A block of commands, and the output below it.
BLOCK = re.compile(r"^```sh\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """The document of a notebook: text as Markdown, commands as cells of bash."""
    cells: list[dict[str, Any]] = []
    at = 0
    for block in BLOCK.finditer(page):
        cells.append(_cell("markdown", page[at : block.start()]))
        printed = [_output(block[2])] if block[2] else []
        code = _cell("code", f"%%bash\n{block[1]}")
        cells.append({**code, "execution_count": None, "outputs": printed})
        at = block.end()
    cells.append(_cell("markdown", page[at:]))
    cells = [cell for cell in cells if cell["source"]]
    return {
        "cells": [{"id": f"cell-{i}", **cell} for i, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def text(page: str) -> str:
    """The notebook's file."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, source: str) -> dict[str, Any]:
    lines = source.strip("\n").splitlines(keepends=True)
    return {"cell_type": kind, "metadata": {}, "source": lines}


def _output(printed: str) -> dict[str, Any]:
    return {
        "name": "stdout",
        "output_type": "stream",
        "text": printed.splitlines(keepends=True),
    }


if __name__ == "__main__":
    NOTEBOOK.write_text(text(PAGE.read_text()))
