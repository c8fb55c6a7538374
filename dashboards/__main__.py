"""`python -m dashboards`: write every dashboard into the folder that Grafana reads."""

from __future__ import annotations

from pathlib import Path

from dashboards.boards import BOARDS
from dashboards.build import render

FOLDER = Path(__file__).parent.parent / "docker" / "grafana" / "dashboards"


def main() -> None:
    """Write the dashboards."""
    for board in BOARDS:
        (FOLDER / f"{board.uid}.json").write_text(render(board))


if __name__ == "__main__":
    main()
