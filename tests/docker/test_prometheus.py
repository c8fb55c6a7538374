"""Prometheus accepts the configuration, its rules do what they say, every alert has a runbook."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from starlette.routing import Route

from app.settings import Settings
from app.telemetry.metrics import SECONDS
from tests.exported import metric_names

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "prometheus"
PAGE = ROOT / "docs" / "how-to" / "monitoring.md"
PREDICTIONS = "/v1/predict|.+/infer"
PROMTOOL = shutil.which("promtool")

promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus)"
)


def rules() -> list[dict]:
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


@promtool
@pytest.mark.parametrize(
    "words",
    [
        "check config prometheus.yml",
        "check config demo.yml",
        "check rules rules.yml",
        "test rules rules_test.yml",
    ],
)
def test_promtool_is_content(words):
    done = subprocess.run(
        [PROMTOOL, *words.split()],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried():
    text = (FOLDER / "rules_test.yml").read_text()
    fired = {
        case["alertname"]
        for test in yaml.safe_load(text)["tests"]
        for case in test.get("alert_rule_test", [])
        if case.get("exp_alerts")
    }
    assert fired == set(alerts())


def test_every_alert_has_its_heading_and_no_other_has():
    headings = re.findall(r"^### `(Scumble\w+)`$", PAGE.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(alerts())


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_how_urgent_it_is_and_where_to_read_on(name):
    alert = alerts()[name]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert alert["annotations"]["runbook"] == f"docs/how-to/monitoring.md#{name.lower()}"


def test_rules_name_only_what_is_exported_or_recorded():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        for name in re.findall(r"[\w:]*scumble_[\w:]+", rule["expr"]):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name in recorded or base in metric_names(), name


def test_the_numbers_in_the_rules_are_those_of_the_service(client):
    text = (FOLDER / "rules.yml").read_text()
    assert set(re.findall(r'le="([\d.]+)"', text)) == {"0.1"}
    assert 0.1 in SECONDS
    assert alerts()["ScumbleQueueSaturated"]["expr"].endswith("> 1024")
    assert Settings().limits.max_queue == 4 * 1024
    assert set(re.findall(r'route=~"([^"]+)"', text)) == {PREDICTIONS}
    for route in client.app.routes:
        if isinstance(route, Route):
            predicts = re.fullmatch(PREDICTIONS, route.path) is not None
            assert predicts == ("POST" in route.methods), route.path
