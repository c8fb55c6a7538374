"""Docs cannot go stale: what the code has, the docs have under a heading of its own."""

import json
import re
from pathlib import Path

import pytest
from starlette.routing import Route

from app.errors import RequestError
from app.settings import Settings, variables
from app.telemetry.metrics import STAGES
from docs.generators import policies
from docs.generators.cli import FILE, PAGE, outlines, page
from docs.generators.sizes import dependencies, megabytes
from scumble.attacker.adapt import MODIFIERS
from scumble.attacker.attacks import ATTACKS
from scumble.attacker.result import read
from scumble.attacker.students import STUDENTS
from scumble.attacker.transports import TRANSPORTS
from scumble.cli import COMMANDS
from scumble.data.image_sets import DIGITS, TORCHVISION
from scumble.defenses import available
from scumble.evaluation.steal import CELLS
from tests.exported import metric_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECORDS = DOCS / "results" / "records"
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if path.parent.name != "generators"
)


def headings(name: str) -> set[str]:
    return set(re.findall(r"^#+ `(.+)`$", (DOCS / name).read_text(), re.MULTILINE))


def test_every_setting_has_its_heading_and_no_other_has():
    assert headings("reference/settings.md") == set(variables())


@pytest.mark.parametrize("name", sorted(set(variables()) - {"SCUMBLE_CONFIG", "SCUMBLE_SECRET"}))
def test_the_documented_default_is_the_real_one(name):
    text = (DOCS / "reference/settings.md").read_text()
    documented = re.search(rf"^## `{name}`\n\nDefault: `(.*)`\.$", text, re.MULTILINE)[1]
    value = Settings()
    for part in name.removeprefix("SCUMBLE_").lower().split("__"):
        value = getattr(value, part)
    shown = value.name if isinstance(value, Path) else str(value)
    assert documented == shown


def test_every_metric_has_its_heading_and_no_other_has():
    assert headings("reference/metrics.md") == metric_names()


def test_every_stage_is_explained():
    text = (DOCS / "reference/metrics.md").read_text()
    assert all(f"| `{stage}` |" in text for stage in STAGES)


def test_every_route_has_its_heading_and_no_other_has(client):
    routes = {
        f"{method} {route.path}"
        for route in client.app.routes
        if isinstance(route, Route) and route.path != "/openapi.json"
        for method in route.methods - {"HEAD"}
    }
    assert headings("reference/api.md") == routes


def test_every_error_is_in_the_table():
    text = (DOCS / "reference/api.md").read_text()
    for kind in RequestError.__subclasses__():
        assert re.search(rf"^\| {kind.status} \|.*`{kind.reason}` \|$", text, re.MULTILINE)


def test_every_defense_has_its_heading():
    assert set(available()) <= headings("reference/defenses.md")


def test_every_attack_and_modifier_has_its_heading_and_no_other_has():
    assert headings("reference/attacks.md") == {*ATTACKS, *MODIFIERS}


def test_every_transport_student_and_data_set_is_named():
    text = (DOCS / "reference/attacks.md").read_text()
    assert all(f"| `{name}` |" in text for name in TRANSPORTS)
    assert all(f"`{name}`" in text for name in (*STUDENTS, *TORCHVISION, DIGITS))


@pytest.mark.torch
def test_every_command_and_option_is_in_the_reference():
    assert PAGE.read_text().split() == page().split(), "run python -m docs.generators.cli"
    known, made = (
        {name: [one["help"].split(), one["parameters"]] for name, one in each.items()}
        for each in (json.loads(FILE.read_text()), outlines())
    )
    assert known == made, "run python -m docs.generators.cli"


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert all(f"scumble {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_the_index_lists_the_page(page):
    path = DOCS / page
    assert page == "index.md" or f"]({page})" in (DOCS / "index.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", ["../README.md", *PAGES])
def test_no_block_leaves_variables_in_the_shell_it_is_pasted_into(page):
    text = (DOCS / page).read_text()
    for block in re.findall(r"(?ms)^```(?:sh|bash|text)\n(.*?)^```$", text):
        outside = re.sub(r"(?ms)^\(\n.*?^\)$", "", block)  # of a shell of its own
        assert not re.search(r"(?m)^export ", outside), block


@pytest.mark.parametrize("name", ["tutorial/photos.md", "how-to/recipes.md", "how-to/training.md"])
def test_the_share_of_labels_of_1000_classes_is_that_of_the_record(name):
    record = json.loads(policies.IMAGENET.read_text())
    assert record["crops"] == {"images": 96, "pictures": 8}
    text = " ".join((DOCS / name).read_text().split())
    (said,) = re.findall(r"(\d+) % of those (?:of|that EfficientNet-Lite0, .* gives) 96", text)
    assert said == f"{100 * record['defenses']['dcp']['changed']:.0f}"


def test_the_proxy_of_the_recipe_takes_bodies_that_the_service_takes():
    pages = [*DOCS.rglob("*.md"), *(ROOT / "deploy").rglob("*"), *(ROOT / "docker").rglob("*")]
    text = "\n".join(path.read_text() for path in pages if path.suffix in {".md", ".yaml", ".yml"})
    limits = re.findall(r"client_max_body_size (\w+);|proxy-body-size: \W?(\w+)", text)
    assert [a or b for a, b in limits] == [f"{Settings().limits.max_body_bytes // 2**20}m"]


def test_every_promise_of_the_threat_model_names_tests_that_exist():
    text = (DOCS / "explanation/threat-model.md").read_text()
    promises = text.partition("## Promises")[2].partition("## What is not promised")[0]
    named = r"`(tests/\S+\.py)::(\w+)`"
    for promise in re.findall(r"^- .*(?:\n  .*)*", promises, re.MULTILINE):
        assert re.search(named, promise), promise
    for file, name in re.findall(named, text):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), name


def test_no_image_set_is_committed():
    """Only the handful of digits from scikit-learn's wheel; no other pictures, no Parquet."""
    pictures = [
        p.relative_to(ROOT).as_posix()
        for kind in ("png", "jpg", "jpeg", "webp", "ppm", "parquet", "npy", "npz")
        for p in ROOT.rglob(f"*.{kind}")
        if not any(part.startswith(".") or part == "runs" for part in p.relative_to(ROOT).parts)
    ]
    assert all(p.startswith("docs/") for p in pictures), pictures


def cards() -> dict[str, dict]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted((ROOT / "models").glob("*/card.json"))
    }


def models_table() -> str:
    rows = [
        "| bundle | network input | classes | float32 | int8 | int8 made by | int8 file |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, card in cards().items():
        shape = card["input"]
        accuracy = {key: f"{figure['value']:.2%}" for key, figure in card["accuracy"].items()}
        chosen = card["quantization"]
        rows.append(
            f"| `{name}` | {shape['height']} x {shape['width']} x {shape['channels']} "
            f"| {len(card['labels'])} | {accuracy['float32']} | {accuracy['int8']} "
            f"| {chosen['method'].upper()}, {chosen['preset']} | {chosen['ratio']:.2f} of float |"
        )
    return "\n".join(rows)


def latency_table() -> str:
    document = json.loads((ROOT / "loadtest" / "latency.json").read_text())
    rows = [
        "| model | p50, no defense | p50, `dcp` | ratio | worker memory | start to ready |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{case['model']}` {case['precision']} | {case['p50_ms']['off']:.2f} ms "
        f"| {case['p50_ms']['on']:.2f} ms | {case['dcp_over_none_p50']:.3f} "
        f"| {case['worker_resident_mb']:.0f} MB "
        f"| {case['process_start_to_ready_s']:.1f} s |"
        for case in document["cases"]
    ]
    return "\n".join(rows)


def steal_table() -> str:
    """Every cell's result; cells without one are missing."""
    rows = [
        "| cell | queries | served | stolen | agreement | on the way |",
        "|---|---|---|---|---|---|",
    ]
    for name in CELLS:
        result = read(ROOT / "docs" / "results" / "records" / "steal" / f"{name}.json")
        way = "; ".join(f"{p.queries:,}: {p.accuracy:.1%}" for p in milestones(result.curve))
        rows.append(
            f"| `{name}` | {result.ledger.spent:,} | {result.scores.victim_accuracy:.1%} "
            f"| {result.scores.accuracy:.1%} | {result.scores.agreement:.1%} | {way} |"
        )
    return "\n".join(rows)


def milestones(curve):
    """At most three points before the last."""
    before = curve[:-1]
    step = max(1, len(before) // 3)
    return before[step - 1 :: step][:3]


def demo_table() -> str:
    document = json.loads((RECORDS / "demo.json").read_text())
    servers = document["servers"]
    rows = [
        "| attack | copy, mnist | served, mnist | copy, digits | served, digits | agreement "
        "| L1, mnist | p50 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in document["attacks"]:
        side = servers[line["server"]]
        figures = [
            f"{value:.1%}"
            for test in ("mnist", "digits")
            for value in (line["stolen"][test], side["accuracy"][test])
        ]
        rows.append(
            f"| {line['name']} | {' | '.join(figures)} | {line['agreement']:.1%} "
            f"| {side['l1']['mnist']:.2f} | {side['latency_ms']:.2f} ms |"
        )
    return "\n".join(rows)


TABLES = {
    "models": (models_table, "docs/reference/models.md"),
    "latency": (latency_table, "docs/reference/models.md"),
    "demo": (demo_table, "docs/explanation/demo.md"),
    "steal": (steal_table, "docs/reference/attacks.md"),
}


@pytest.mark.parametrize("path", [policies.README, policies.INDEX], ids=lambda path: path.name)
def test_readme_and_index_have_the_measured_costs_of_policies(path):
    assert policies.pages()[path] == path.read_text(), "run: python -m docs.generators.policies"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", policies.pages()[path]):
        assert (path.parent / target).exists(), target


def test_the_table_of_policies_follows_the_record_of_1000_classes():
    record = json.loads(policies.IMAGENET.read_text())["defenses"]
    made = policies.committed()
    assert made.startswith("| threat | users need | classes | policy |")
    assert f"{record['dcp']['changed']:.0%} of the labels change" in made
    for name in ("label", "codebook", "dcp, keep_top1", "withhold"):
        assert re.search(rf"1,000 classes: .*L1 0?{policies.short(record[name]['l1'])}", made), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", TABLES)
def test_the_docs_show_the_measured_figures(name):
    table, page = TABLES[name]
    assert table() in (ROOT / page).read_text(), f"expected in {page}:\n{table()}"


def test_every_dependency_has_a_reason_and_a_size():
    page = (ROOT / "docs" / "explanation" / "dependencies.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for name in dependencies():
        (*_, row) = [row for row in rows if f"`{name}`" in row]
        assert re.search(r"\| [\d.]+ \|$", row), row
        assert megabytes(name) > 0
