"""The drawn dashboards are of today's panels, small, and say that Grafana did not draw them."""

import json

import pytest
from PIL import Image

from dashboards.__main__ import FOLDER
from dashboards.boards import BOARDS
from dashboards.pictures import JOBS, NOTE, OUT, Series, draw, titles

each = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
SERVED = {"job": "victim", "defense": "none", "model": "tiny"}


def read(board) -> dict:
    return json.loads((FOLDER / f"{board.uid}.json").read_text())


def check(file, shown: dict) -> None:
    assert file.stat().st_size < 300_000
    with Image.open(file) as picture:
        picture.load()
        assert picture.info["Description"] == NOTE
        assert picture.info["Panels"].split("\n") == titles(shown), (
            "run python -m dashboards.pictures"
        )
        assert picture.width == 1400


@each
def test_the_committed_picture_is_of_todays_panels(board):
    check(OUT / f"{board.uid}.png", read(board))
    assert "not by Grafana" in NOTE


def test_no_other_picture_is_there():
    assert {file.stem for file in OUT.iterdir()} == {board.uid for board in BOARDS}


@each
def test_a_board_is_drawn_whatever_was_measured(board, tmp_path):
    shown = read(board)
    seconds = [0.0, 1.0, 2.0]
    lines = [Series(f"{job} {i}", job, seconds, [0.0, i, 2.0]) for job in JOBS for i in range(5)]
    rows = [Series(json.dumps(SERVED | {"job": job}), job, [0.0], [1.0]) for job in JOBS]
    figures = {
        panel["id"]: {"table": rows, "row": []}.get(panel["type"], lines)
        for panel in shown["panels"]
    }
    file = tmp_path / "board.png"
    draw(shown, figures, 2, file)
    check(file, shown)
