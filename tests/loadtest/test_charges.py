"""Charges are really counted, at once by several processes."""

import json

import pytest
from click.testing import CliRunner

from loadtest.charges import main
from tests.redis_server import needs_redis


@needs_redis
@pytest.mark.server
def test_a_short_run_measures_both_numbers_of_connections(tmp_path):
    out = tmp_path / "charges.json"
    words = ["--rounds", "1", "--seconds", "0.3", "--processes", "2", "--out", str(out)]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(out.read_text())["connections"]
    assert list(found) == ["2", "32"]
    for row in found.values():
        assert row["per_second"] > 10
        assert 0 < row["p50_ms"] <= row["p99_ms"]
