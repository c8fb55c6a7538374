"""The demo and the figures' cells, small, against real servers."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from scumble.attacker.result import read
from scumble.data.image_sets import load
from scumble.evaluation import demo, steal
from scumble.evaluation.local_server import serving

ROOT = Path(__file__).parents[3]


@pytest.mark.server
def test_the_demo_steals_from_all_servers(tmp_path):
    (tmp_path / "undefended").mkdir()
    for left in ("undefended.sqlite", "undefended/journal.sqlite"):
        (tmp_path / left).write_bytes(b"of a run that was interrupted")
    words = ["--out", str(tmp_path), "--queries", "100", "--epochs", "1", "--data", "nowhere"]
    done = CliRunner().invoke(demo.main, words)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "demo.json").read_text())
    assert [line["name"] for line in report["attacks"]] == [name for name, *_ in demo.ATTACKS]
    for line in report["attacks"]:
        assert line["queries"] == [100, 100]
        assert 0 <= line["stolen"]["digits"] <= 1
        assert line["name"] in done.output
    servers = report["servers"]
    assert list(servers) == ["undefended", "defended", "recommended"]
    assert servers["undefended"]["accuracy"]["digits"] > 0.9
    assert servers["undefended"]["l1"]["digits"] == 0
    assert servers["defended"]["l1"]["digits"] > 0.5
    withheld = {name: side["withheld"]["digits"] for name, side in servers.items()}
    assert set(withheld.values()) == {0}
    assert 0 < servers["recommended"]["l1"]["digits"] < servers["defended"]["l1"]["digits"]
    assert min(side["latency_ms"] for side in servers.values()) > 0
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size[0] > 600
    # Nobody's digit is in both sets.
    asked, test = (load(str(tmp_path / f"{name}.parquet")) for name in ("queries", "test"))
    assert len(asked) == 100
    assert not {p.tobytes() for p in asked.images} & {p.tobytes() for p in test.images}
    # What an earlier run left does not count.
    refused = {"budget": 20, "answered": 20, "refused": 10}
    assert report["visits"] == dict.fromkeys(servers, refused)


@pytest.mark.server
def test_the_demo_steals_from_servers_that_run_and_says_what_it_sent(tmp_path):
    with (
        serving(model="mnist", precision="int8", workers=1) as undefended,
        serving(model="mnist", precision="int8", workers=1, **demo.DCP) as defended,
        serving(
            model="mnist", precision="int8", workers=1, **demo.recommended_settings()
        ) as recommended,
    ):
        servers = {"undefended": undefended, "defended": defended, "recommended": recommended}
        words = ["--out", str(tmp_path), "--queries", "100", "--epochs", "1", "--data", "nowhere"]
        words += [f"--{name}={server.url}" for name, server in servers.items()]
        done = CliRunner().invoke(demo.main, words)
        assert done.exit_code == 0, done.output
        report = json.loads((tmp_path / "demo.json").read_text())
        assert [line["queries"] for line in report["attacks"]] == len(demo.ATTACKS) * [[100, None]]
        for name, server in servers.items():
            sent = report["servers"][name]["images"] + sum(
                line["images"] for line in report["attacks"] if line["server"] == name
            )
            counted = server.metrics()
            assert sent == sum(v for k, v in counted.items() if k.startswith("scumble_images_tot"))
            assert report["servers"][name]["settings"] is None
    assert "not asked" in done.output


def test_the_demo_asks_no_other_host_without_consent(tmp_path):
    words = ["--out", str(tmp_path), "--undefended=http://victim:8000"]
    others = ["--defended=http://defended:8000", "--recommended=http://recommended:8000"]
    done = CliRunner().invoke(demo.main, [*words, *others])
    assert done.exit_code == 1
    assert "--i-have-the-owners-consent" in done.output
    assert not list(tmp_path.iterdir())
    done = CliRunner().invoke(demo.main, words)
    assert done.exit_code == 2
    assert "belong together" in done.output


def test_the_table_of_the_demo_is_whole_in_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    report = json.loads((ROOT / "docs/results/records/demo.json").read_text())
    served = {name: demo.ServerFigures(**side) for name, side in report["servers"].items()}
    lines = [demo.Line(**line) for line in report["attacks"]]
    demo.show(served, lines, {}, Path("runs"), report["seconds"])
    shown = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert all(word in shown for line in lines for word in line.name.split())
    assert all(f"{line.stolen['mnist']:.1%}" in shown for line in lines)


@pytest.mark.server
@pytest.mark.data
def test_a_cell_leaves_a_checked_result(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("models").symlink_to(ROOT / "models")
    changes = ("attack.batch=8", "attack.width=8", "attack.views=2")
    cells = {"small": steal.Cell("mnist", attack="dfme", budget=200, changes=changes)}
    steal.run_cells(cells, ROOT.parent / "shared" / "data", threads=1, out=steal.RESULTS)
    assert capsys.readouterr().out.startswith("small\n")
    result = read(steal.RESULTS / "small.json")
    assert result.command == "python -m scumble.evaluation.steal small"
    assert (result.ledger.spent, result.ledger.difference) == (168, 0)
    assert len(result.curve) == 2
    steal.run_cells(cells, Path("no data"), threads=1, out=steal.RESULTS)
    assert capsys.readouterr().out == ""  # nothing is left to do


def test_cells_name_what_is_there():
    for cell in steal.CELLS.values():
        assert (ROOT / "models" / cell.victim / "card.json").is_file()
        assert cell.budget <= 2_000_000
