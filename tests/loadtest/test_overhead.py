"""The cost of a request beside the engine is really measured, and compared with a baseline."""

import json
import shutil

import click
import pytest
from click.testing import CliRunner

from loadtest.overhead import FIGURES, at_size, main, worse

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs the program wrk")


def document(over_hello, processor="p", connections="64"):
    row = {"over_hello": over_hello}
    case = {"model": "m", "precision": "int8", "defense": "dcp", "connections": {connections: row}}
    return {"processor": processor, "cases": [case]}


@needs_wrk
@pytest.mark.server
def test_a_short_run_measures_all_figures(tmp_path):
    out = tmp_path / "overhead.json"
    words = ["--rounds", "1", "--seconds", "1", "--connections", "1,8", "--out", str(out)]
    done = CliRunner().invoke(main, [*words, "--cases", "linear:float32"], catch_exceptions=False)
    assert done.exit_code == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert case["errors"] == 0
    assert list(case["connections"]) == ["1", "8"]
    for row in case["connections"].values():
        assert tuple(row) == FIGURES
        assert row["whole_us"] > row["hello_us"] > 0
        assert row["engine_us"] > 0
        assert row["batch"] >= 1


def test_the_engine_at_a_mean_batch_size_lies_between_its_neighbours():
    assert at_size({1: 10.0, 8: 3.0, 4: 5.0}, 6) == 4.0
    assert at_size({1: 10.0, 8: 3.0}, 100) == 3.0


@pytest.mark.parametrize(
    ("now", "found"),
    [
        (document(2.0), []),
        (document(2.3), ["m int8, c=64: 2.0 -> 2.3"]),
        (document(1.0), []),
        (document(9.0, connections="8"), []),  # not measured in the baseline
        ({"processor": "p", "cases": []}, []),
    ],
    ids=["equal", "worse", "better", "other connections", "no case"],
)
def test_a_ratio_that_grew_is_found(now, found):
    assert worse(now, document(2.0), 0.1) == found


def test_a_case_that_the_baseline_lacks_is_not_compared():
    assert worse(document(9.0), {"processor": "p", "cases": []}, 0.1) == []


def test_the_baseline_of_another_processor_is_refused():
    with pytest.raises(click.ClickException, match="baseline is of 'q', this machine has 'p'"):
        worse(document(2.0), document(2.0, processor="q"), 0.1)
