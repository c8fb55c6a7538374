"""The page of scaling shows the committed figures."""

import json
import re

import click
import pytest

from loadtest import scaling
from loadtest.budgets import OUT
from loadtest.pages import read
from tests.loadtest.test_pages import BENCH

COUNTED = {
    "command": "charges",
    "cores": 2,
    "processor": "p",
    "connections": {"32": {"per_second": 2500, "p50_ms": 9.5, "p99_ms": 21.25}},
}
SIMULATED = json.loads(OUT.read_text())
LARGER = read("simulation.json")
PAGE = scaling.PAGE.read_text()


def test_the_page_is_made_of_the_committed_figures():
    price = float(re.search(r"loadtest\.scaling --price ([\d.]+) -->", PAGE)[1])
    documents = (read("bench.json"), read("charges.json"), SIMULATED, LARGER)
    assert scaling.written(PAGE, price, *documents) == PAGE, (
        f"run: python -m loadtest.scaling --price {price:g}"
    )


def test_without_figures_the_page_says_so():
    page = scaling.written(PAGE, 0.04, {}, {}, SIMULATED, LARGER)
    assert "**Not measured yet.**" in page
    assert "**not measured yet**" in page


def test_figures_are_per_core():
    page = scaling.written(PAGE, 0.04, BENCH, COUNTED, SIMULATED, LARGER)
    # 910 and 900 images a second by two cores.
    assert "| `cifar10` int8 | 455 | 450 | 315 | 3.17 | 0.0353 |" in page
    assert "--price 0.04 -->" in page
    assert "| 32 | 2,500 | 9.50 / 21.25 |" in page
    assert "measured yet" not in page


def test_a_million_images():
    # 1,000 a second are 3.6 million an hour.
    assert scaling.cost(3.6, 1000, use=1) == pytest.approx(1)
    assert scaling.cost(3.6, 1000, use=0.5) == pytest.approx(2)


def test_a_page_without_its_place_is_refused():
    with pytest.raises(click.ClickException, match="0 places for capacity"):
        scaling.written("nothing", 0.04, {}, {}, SIMULATED, LARGER)
