"""The scenario against a real server: nobody gets a 5xx, bad input is refused, the shape ends."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIO = Path(__file__).parents[2] / "loadtest" / "locustfile.py"


@pytest.mark.server
def test_the_scenario_runs_to_its_end(serve, tmp_path):
    server = serve(workers=1, defense="dcp", defense_params={"beta": 1.2})
    words = f"-f {SCENARIO} --headless --shape-speed 20"
    done = subprocess.run(
        [sys.executable, "-m", "locust", *words.split(), "--host", server.url, "--csv", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "run_stats.csv").open() as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    for name in ("/v1/predict", "/v2/models/{model}/infer", "/v1/predict (bad input)"):
        assert int(rows[name]["Request Count"]) > 0, name
        assert int(rows[name]["Failure Count"]) == 0, name
