"""The committed dashboards are those of the code, fit the pinned Grafana, and show every metric.

Grafana's own types judge the JSON where they are:

    npm install --prefix runs/grafana-schema @grafana/schema@11.6.16 typescript@5.9.3
"""

import json
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dashboards import GRAFANA
from dashboards.__main__ import FOLDER
from dashboards.boards import BOARDS, PREDICTIONS
from dashboards.build import render
from tests.exported import metric_names

ROOT = Path(__file__).parents[2]
PROVISIONING = ROOT / "docker" / "grafana" / "provisioning"
TYPES = ROOT / "runs" / "grafana-schema" / "node_modules"

each = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


def read(board) -> dict:
    return json.loads((FOLDER / f"{board.uid}.json").read_text())


def cells(panel: dict) -> set[tuple[int, int]]:
    at = panel["gridPos"]
    return {
        (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    }


def test_no_other_dashboard_is_committed():
    assert {path.stem for path in FOLDER.iterdir()} == {board.uid for board in BOARDS}


@each
def test_the_committed_file_is_what_the_code_makes(board):
    made = render(board)
    assert (FOLDER / f"{board.uid}.json").read_text() == made, "run python -m dashboards"


@each
def test_panels_are_told_apart_and_do_not_overlap(board):
    panels = read(board)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [cell for panel in panels for cell in cells(panel)]
    assert len(set(taken)) == len(taken)
    assert all(0 <= x < 24 for x, _ in taken)
    for panel in panels:
        refs = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(refs)) == len(refs)


@each
def test_every_line_of_panels_is_full(board):
    widths = Counter()
    for panel in read(board)["panels"]:
        widths[panel["gridPos"]["y"]] += panel["gridPos"]["w"]
    assert set(widths.values()) == {24}


@each
def test_every_panel_is_explained_and_asks_the_chosen_source(board):
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in read(board)["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith(".")
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        if panel["type"] == "timeseries":
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_every_metric_is_in_a_panel_and_no_panel_names_another():
    text = "".join((FOLDER / f"{board.uid}.json").read_text() for board in BOARDS)
    expressions = " ".join(re.findall(r'"expr": "(.*)"', text))
    named = set(re.findall(r"scumble_\w+", expressions))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} == metric_names()


def test_panels_and_rules_mean_the_same_predictions():
    rules = (ROOT / "docker" / "prometheus" / "rules.yml").read_text()
    assert PREDICTIONS.partition(",")[2] in rules


def test_there_is_one_prometheus_and_the_folder_is_watched():
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    assert source["isDefault"]
    scraped = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "scumble.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


def test_the_builder_is_of_the_grafana_that_is_served():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (
        need
        for need in extras["optional-dependencies"]["dev"]
        if need.startswith("grafana-foundation-sdk")
    )
    built_for = pin.partition("!")[2].split(".")
    assert built_for[:2] == GRAFANA.split(".")[:2]


@each
@pytest.mark.skipif(
    not TYPES.is_dir() or shutil.which("node") is None,
    reason="there is no node, or no @grafana/schema in runs/grafana-schema: see this file's head",
)
def test_grafanas_own_types_accept_it(board):
    installed = json.loads((TYPES / "@grafana" / "schema" / "package.json").read_text())
    assert installed["version"] == GRAFANA
    source = TYPES.parent / f"{board.uid}.ts"
    source.write_text(
        'import type { Dashboard } from "@grafana/schema";\n'
        f"export const board: Dashboard = {render(board)};\n"
    )
    words = "--noEmit --strict --skipLibCheck --module esnext --moduleResolution bundler"
    done = subprocess.run(
        [TYPES / ".bin" / "tsc", *words.split(), source.name],
        cwd=TYPES.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
