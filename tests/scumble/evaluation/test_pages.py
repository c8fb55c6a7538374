"""Verdicts by rules worked by hand, tables, and the committed page against its records."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from docs.generators import results
from scumble.evaluation.claims import CLAIMS, Advice, advice, default_strengths
from scumble.evaluation.experiment import Defended
from scumble.evaluation.failures import equal
from scumble.evaluation.plans import dcp
from scumble.evaluation.plots import PLOTS
from scumble.evaluation.scores import Spread
from scumble.evaluation.summary import Line, attacker_of, best, load, own_kind, summarise
from scumble.evaluation.tables import (
    advised,
    compared,
    everything,
    latency,
    ordered,
    policies,
    strong,
)

ROOT = Path(__file__).parents[3]
NONE, LABEL, WITHHOLD = Defended(), Defended("label"), Defended("withhold")


def line(
    defense,
    attacker,
    stolen,
    *,
    victim="mnist",
    precision="float32",
    served=0.99,
    clean=0.99,
    recipe=None,
) -> Line:
    one = lambda value: Spread(value, None)  # noqa: E731  # a short name for a table of numbers
    return Line(
        victim=victim,
        precision=precision,
        defense=defense,
        attacker=attacker,
        adapt=tuple(attacker.split(" + ")[1:]),
        budget=1000,
        transport="pixels",
        seeds=(0,),
        files=(f"{victim}-{precision}-{defense.name}-{attacker}.json".replace(" ", "_"),),
        served=one(served),
        clean=one(clean),
        stolen=one(stolen),
        agreement=one(stolen),
        agreement_transfer=one(stolen),
        l1_test=one(0.5),
        l1_max=one(1.5),
        l1_transfer=one(0.6),
        top1_changed=one(0.01),
        calibration_error=one(0.1),
        kl=one(0.2),
        added_p50_ms=one(0.01),
        added_p99_ms=one(-0.02),
        recipe=recipe,
    )


LINES = [
    line(NONE, "knockoff", 0.80),
    line(NONE, "knockoff centred", 0.95),
    line(dcp(1.0), "knockoff", 0.75),
    line(dcp(1.2), "knockoff", 0.40, served=0.97),
    line(dcp(1.2), "knockoff centred + invert", 0.94, served=0.97),
    line(LABEL, "knockoff", 0.70),
    line(NONE, "knockoff", 0.80, precision="int8"),
    line(dcp(1.2), "knockoff", 0.46, precision="int8", served=0.985),
    line(LABEL, "knockoff", 0.71, precision="int8"),
    line(NONE, "dfme", 0.9),
    line(dcp(1.2), "dfme", 0.3, served=0.97),
    line(dcp(1.0), "dfme + invert", 0.85),
    line(dcp(1.2), "dfme + invert", 0.6, served=0.97),
    line(LABEL, "knockoff (mnist-labels)", 0.6, recipe="mnist-labels"),
    line(Defended("codebook"), "knockoff (mnist-mixed)", 0.615, recipe="mnist-mixed"),
    line(WITHHOLD, "knockoff (mnist-mixed)", 0.27, recipe="mnist-mixed"),
    line(LABEL, "knockoff (mnist-labels)", 0.6, precision="int8", recipe="mnist-labels"),
    line(WITHHOLD, "knockoff (mnist-mixed)", 0.34, precision="int8", recipe="mnist-mixed"),
]


def case(defense, batch, over_dcp, over_inference):
    return {
        "model": "mnist",
        "precision": "int8",
        "batch": batch,
        "defense": defense,
        "ms_per_image": over_inference / 10,
        "over_dcp": over_dcp,
        "over_inference": over_inference,
    }


BENCH = {
    "command": "scumble bench defenses",
    "cases": [
        case("inference", 1, 5, 1.0),
        case("dcp", 1, 1, 0.2),
        case("mad", 1, 11, 2.2),
        case("grad2", 1, 40, 8.0),
        case("dcp_in_graph", 1, 0.2, 0.04),
        case("withhold_in_graph", 1, 0.6, 0.12),
        case("mad_reference", 1, 50, 10.0),
        case("grad2_reference", 1, 36, 7.0),
    ],
}
VERDICTS = {
    "It defends against KnockoffNets.": "held in part",  # 1.0: 5 points; 1.2: 40 and 34
    "It defends against the data-free attack DFME.": "held",
    "It defends against DFME that inverts the answers.": "held in part",  # 85 and 60 of 90
    "It defends against the data-free attack MAZE.": "not measured",
    "It works for quantized CNNs as for float ones.": "did not hold",  # 40 and 46
    "Its impact on accuracy is low.": "held in part",  # 1.2 in float32: 2 points
    "It is 37 times as fast as the state of the art.": "held in part",  # 50 and 36
    "It is 37 times as fast as the same defenses written for speed.": "held in part",  # 11 and 40
    "It costs next to nothing beside inference.": "held",
    "It protects more than labels alone would, against attackers who adapt.": "did not hold",
    "Codebook is worth no more to an attacker than labels.": "held",  # 61.5 and 60
    "Withhold halves what labels give away.": "held in part",  # 27 of 70, and 34 of 71 in int8
    "Codebook and withhold cost next to nothing beside inference.": "did not hold",  # 12 %
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.words)
def test_verdicts(claim):
    verdict, figures = claim(LINES, BENCH)
    assert verdict == VERDICTS[claim.words]
    assert bool(figures) == (verdict != "not measured")
    assert {figure.split(": ")[0] for figure in figures} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("copy", "half", "verdict", "end"),
    [
        (0.67, None, "yes", "labels only 70.0%"),
        (0.69, None, "no", "labels only 70.0%, a tie (within 2.0%)"),
        (0.66, 0.05, "no", "labels only 70.0%, a tie (within 5.0%)"),
        (0.64, 0.05, "yes", "labels only 70.0%"),
        (0.73, None, "no", "labels only 70.0%"),
    ],
)
def test_a_difference_that_seeds_explain_is_a_tie(copy, half, verdict, end):
    judged = replace(line(dcp(1.0), "knockoff + argmax", 0), stolen=Spread(copy, half))
    lines = [judged, line(dcp(1.0), "knockoff", 0.1), line(LABEL, "knockoff", 0.70)]
    claim = next(claim for claim in CLAIMS if claim.words.startswith("It protects more"))
    _, (found,) = claim(lines, {})
    assert found.startswith(f"{verdict}: ")
    assert found.endswith(end)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.words)
def test_what_was_not_measured_is_not_judged(claim):
    assert claim([], {}) == ("not measured", [])


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ({1.0: (0.0, 1), 1.2: (0.005, 3), 1.5: (0.008, 2)}, {"mnist": 1.2}),
        ({1.0: (0.0, 2), 1.2: (0.005, 2)}, {"mnist": 1.2}),
        ({1.0: (0.0, 1), 1.2: (0.02, 3)}, {"mnist": 1.0}),
        ({1.0: (0.02, 1)}, {}),
    ],
    ids=["most attackers", "strongest of equals", "users lose too much", "none"],
)
def test_the_default_strength_is_the_recommended_one_that_most_attackers_fail_at(
    strengths, expected
):
    found = [
        Advice("mnist", beta, {"float32": lost}, 1.0, {str(i): 0.1 for i in range(held)}, {})
        for beta, (lost, held) in strengths.items()
    ]
    assert default_strengths(found) == expected


def test_advice_says_whom_a_strength_keeps_out():
    weak, hard = advice(LINES)
    assert (weak.beta, weak.recommended, weak.held) == (1.0, True, {})
    assert weak.broken == {"knockoff": 0.75, "dfme + invert": 0.85}
    assert (hard.beta, hard.recommended) == (1.2, False)  # 2 points in float32
    assert hard.held == {"knockoff": 0.46, "dfme": 0.3, "dfme + invert": 0.6}
    assert hard.broken == {"knockoff centred + invert": 0.94}
    assert hard.ties == {}
    (near,) = advice([line(dcp(1.2), "knockoff + argmax", 0.69), line(LABEL, "knockoff", 0.7)])
    assert (near.held, near.broken, near.ties) == ({}, {}, {"knockoff + argmax": 0.69})
    table = advised([weak, hard])
    assert "| `mnist` | 1.2 | 2.00 float32, 0.50 int8 | 0.50 | no |" in table


def test_a_victim_of_recipes_alone_has_the_plot_over_answers():
    tuned = line(LABEL, "knockoff", 0.5, victim="mnist-outliers", recipe="mnist-labels")
    lines = [line(LABEL, "knockoff", 0.5, victim="gtsrb"), tuned, line(LABEL, "knockoff", 0.5)]
    assert results.victims(lines) == ["mnist", "mnist-outliers", "gtsrb"]
    assert list(results.plots(lines, "mnist-outliers")) == ["answers"]
    assert results.plots(lines, "mnist") == results.plots(lines, "gtsrb") == PLOTS
    assert [one.victim for one in ordered(lines)] == ["mnist", "mnist-outliers", "gtsrb"]


def test_the_best_attacker_is_bold():
    table = compared([o for o in ordered(LINES) if o.model == ("mnist", "float32")])
    rows = table.splitlines()
    assert rows[0].count("|") == rows[2].count("|")
    (row,) = [row for row in rows if row.startswith("| dcp (beta 1.2")]
    assert "**94.0%**" in row
    assert row.count("**") == 2


def test_a_policy_that_keeps_all_labels_is_worth_no_less_than_they_are():
    """An attacker may train on the labels alone; one who did so was run against `label`."""
    kept = line(Defended("codebook"), "knockoff (mnist-mixed)", 0.615, recipe="mnist-mixed")
    kept = replace(kept, top1_changed=Spread(0.0, None))
    masked = line(WITHHOLD, "knockoff + oracle_mask", 0.25)
    own = replace(line(WITHHOLD, "knockoff with images of the victim's kind", 0.97), own_kind=True)
    lines = [kept, masked, own, line(LABEL, "knockoff", 0.7), line(dcp(1.2), "knockoff", 0.4)]
    cells = {row.split(" | ")[1]: row.split(" | ") for row in policies(lines).splitlines()}
    assert cells["codebook"][7:9] == ["—", "70.0% by knockoff"]
    assert cells["withhold"][8:] == ["25.0% by knockoff + oracle_mask", "1,000", "25.0%", "97.0% |"]
    assert cells["dcp (beta 1.2, gamma 0.2)"][7:9] == ["40.0%", "40.0% by knockoff"]


def test_the_table_of_recipes_has_who_got_a_better_copy_without_one():
    lines = [
        line(LABEL, "knockoff (mnist-labels)", 0.6, recipe="mnist-labels"),
        line(LABEL, "knockoff", 0.7),
        line(LABEL, "knockoff + average", 0.5),
        line(dcp(1.2), "knockoff", 0.4),
    ]
    table = strong(lines)
    assert "| knockoff | 1,000 | 100.0% | — | **70.0%** |" in table
    assert "| knockoff (mnist-labels) | 1,000 | 100.0% | — | 60.0% |" in table
    assert "average" not in table
    assert "dcp" not in table


@pytest.mark.parametrize(
    ("copies", "reason"),
    [
        ([0.0973] * 3, "copies on 3 defenses have the same accuracy, 9.73%"),
        ([0.0973] * 2 + [0.0974], None),
        ([0.5] * 3, None),  # labels that a defense keeps make the same copy
        ([0.001] * 3, None),  # what misleading answers teach
    ],
)
def test_equal_copies_at_chance_level_are_failed_attacks(copies, reason):
    named = [(name, copy, 10) for name, copy in zip("abc", copies, strict=True)]
    assert equal(copies[0], named) == reason
    assert equal(copies[0], named[:1] * 3) is None  # seeds of one defense


def test_every_line_leads_to_its_records():
    table = everything(LINES)
    for one in LINES:
        assert f"[0](../results/records/cells/{one.files[0]})" in table


def test_seeds_show_as_intervals():
    many = replace(LINES[3], l1_test=Spread(0.5, 0.04), stolen=Spread(0.4, 0.021))
    assert "| 40.0% ± 2.1 |" in everything([many])
    assert "| 0.50 ± 0.04 |" in everything([many])


def test_latency_is_a_row_per_model_and_batch():
    rows = latency(BENCH).splitlines()
    assert len(rows) == 3
    assert "20.0 µs, 20.0%" in rows[2]
    assert "50.0 ×" in rows[2]


def test_the_committed_page_is_what_the_records_say():
    records, bench = load(results.CELLS), results.read_bench()
    path = ROOT / "docs" / "explanation" / "results.md"
    page = path.read_text()
    assert results.results(records, bench) == page, "run: python -m docs.generators.results"
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_report_has_the_verdicts_of_the_records():
    records, bench = load(results.CELLS), results.read_bench()
    lines = ordered(results.summarise(records))
    report = results.report(records, bench)
    for claim in CLAIMS:
        assert results.card(claim, *claim(lines, bench)) in report
    assert "src=" not in report
    # On a phone a plot scrolls: scaled to its width, its words would be 4 pixels high.
    assert re.search(r"figure \{[^}]*overflow-x: auto", report)
    assert re.search(r"figure svg \{[^}]*min-width: 44rem", report)
    assert report.index("Which policy should I run?") < report.index("What held, what did not")
    page = re.sub(r"<svg.*?</svg>", "", report, flags=re.DOTALL)
    assert "`" not in page
    for link in re.findall(r"href=['\"]([^'\"#]+)", page):
        assert (results.DOCS / "results" / link).resolve().is_file(), link
    for place in re.findall("href='#(\\w+)'", report):
        assert f"id={place}>" in report


def test_the_bench_is_of_this_form():
    bench = json.loads(results.BENCH.read_text())
    assert {"command", "cores", "processor", "packages", "cases"} <= set(bench)


FAILED = "the copy stays at chance level at all 20 checkpoints"
CREDITED = [line(NONE, "dfme", 0.9), line(LABEL, "knockoff", 0.7), line(dcp(1.2), "dfme", 0.097)]
NOT_CREDITED = [*CREDITED[:2], replace(CREDITED[2], failed=FAILED)]


@pytest.mark.parametrize(
    ("lines", "verdict", "figure"),
    [
        (CREDITED, "held", "yes: `mnist` float32, dcp (beta 1.2, gamma 0.2), dfme"),
        (NOT_CREDITED, "not measured", "attack failed: `mnist` float32, dcp"),
    ],
)
def test_a_failed_attack_is_no_merit_of_the_defense(lines, verdict, figure):
    claim = next(claim for claim in CLAIMS if "DFME" in claim.words)
    found, figures = claim(lines, {})
    assert found == verdict
    assert [text for text in figures if text.startswith(figure)] == figures
    assert any(FAILED in text for text in figures) == (verdict == "not measured")


def test_a_failed_attack_is_neither_held_nor_broken_nor_the_best():
    (one,) = advice(CREDITED)
    assert one.held == {"dfme": 0.097}
    (one,) = advice(NOT_CREDITED)
    assert (one.held, one.broken) == ({}, {})
    assert [found.attacker for found in best(NOT_CREDITED)] == ["dfme", "knockoff"]


@pytest.mark.parametrize("table", [compared, everything])
def test_tables_mark_a_failed_attack(table):
    assert "(failed)" not in table(CREDITED)
    assert "| 9.7% (failed) |" in table(NOT_CREDITED)


def test_a_line_is_marked_by_its_record_or_by_the_curve_of_an_old_one():
    records = [record for record in load(results.CELLS) if record.attack.attack.name == "dfme"]
    defended = [one for one in records if one.cell["defense"]["name"] == "dcp"]
    plain = [one for one in defended if not one.cell["adapt"]]
    flat = [one for one in plain if one.attack_failed is None]
    assert flat
    assert all(one.failed == FAILED for one in summarise(flat))
    assert all(one.failed for one in summarise(plain))
    inverting = [one for one in defended if one.cell["adapt"]]
    assert [one.failed for one in summarise(inverting)] == [None]
    free = [one for one in records if one.cell["defense"]["name"] == "none"]
    assert [one.failed for one in summarise(free)] == [None, None]
    marked = free[0].model_copy(update={"attack_failed": "one class"})
    assert [one.failed for one in summarise([marked])] == ["one class"]


def test_an_attacker_with_images_of_the_victims_kind_is_a_line_of_its_own():
    own = replace(line(dcp(1.2), "knockoff with images of the victim's kind", 0.97), own_kind=True)
    lines = [*LINES, own]
    assert own not in best(lines)
    assert "97.0%" in compared([one for one in lines if one.precision == "float32"])
    claim = next(claim for claim in CLAIMS if claim.words.startswith("It protects more"))
    assert claim(lines, {}) == claim(LINES, {})


def test_no_row_of_a_plot_is_empty():
    axis = Figure().subplots()
    lines = [line(WITHHOLD, "knockoff (mnist-mixed)", 0.98), line(NONE, "knockoff", 0.6)]
    PLOTS["defenses"].panel(axis, lines, [str(one.defense) for one in lines])
    shown = {(float(x), y) for each in axis.lines for x, y in zip(*each.get_data(), strict=True)}
    assert {(98.0, 0), (60.0, 1)} <= shown


def test_rows_of_policies_are_the_same_for_each_precision():
    """The panels share an axis; a policy that was measured in float32 alone must not shift it."""
    lines = [
        line(defense, "knockoff", stolen, precision=precision)
        for precision in ("float32", "int8")
        for defense, stolen in ((NONE, 0.9), (WITHHOLD, 0.3), (LABEL, 0.6))
        if (defense, precision) != (WITHHOLD, "int8")
    ]
    figure = PLOTS["defenses"](lines, "mnist")
    for panel in figure.axes:
        names = panel.yaxis.get_major_formatter().format_ticks(range(3))
        drawn = {names[y]: x for x, y in points(panel)}
        assert drawn == {"none": 90, "label": 60} | (
            {"withhold": 30} if "float32" in panel.get_title(loc="left") else {}
        )
    plt.close(figure)


def points(panel):
    """The hollow dots of a panel."""
    for drawn in panel.lines:
        if drawn.get_marker() == "o" and drawn.get_markerfacecolor() == "white":
            yield from zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)


@pytest.mark.parametrize("name", PLOTS)
def test_the_line_of_own_images_stands_in_every_plot(name):
    own = replace(line(WITHHOLD, "knockoff with images of the victim's kind", 0.97), own_kind=True)
    undefended = replace(own, defense=NONE, stolen=Spread(0.98, None))
    failed = replace(own, stolen=Spread(0.99, None), failed="one class")
    drawn = {}
    for lines in (LINES, [*LINES, own, undefended, failed]):
        figure = Figure()
        axis = figure.subplots()
        PLOTS[name].panel(axis, [one for one in lines if one.model == ("mnist", "float32")], [])
        handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        drawn[len(lines)] = handles.get("own images as queries, any policy")
    without, with_own = drawn.values()
    assert without is None
    data = with_own.get_xdata() if name == "defenses" else with_own.get_ydata()
    assert data[0] == pytest.approx(97)


@pytest.mark.parametrize(
    ("cell", "name", "own"),
    [
        ({}, "knockoff", False),
        ({"recipe": "mnist-labels", "changes": []}, "knockoff (mnist-labels)", False),
        (
            {"recipe": "gtsrb-mixed", "changes": ["attack.curve=[]", "fit.loss=soft"]},
            "knockoff (gtsrb-mixed, soft)",
            False,
        ),
        (
            {"queries": "fashion_mnist[:9],fashion_mnist@outlines[9:]"},
            "knockoff from fashion_mnist, fashion_mnist@outlines",
            False,
        ),
        ({"queries": "strokes[:99]"}, "knockoff from strokes", False),
        ({"queries": "mnist:test[:99]"}, "knockoff with images of the victim's kind", True),
        (
            {"victim": "mnist-outliers", "test": "mnist", "queries": "mnist[:99]"},
            "knockoff with images of the victim's kind",
            True,
        ),
        (
            {"victim": "cifar100", "test": "cifar100-split", "queries": "cifar100-split"},
            "knockoff with images of the victim's kind",
            True,
        ),
        ({"victim": "mnist", "test": "digits", "queries": "digits"}, "knockoff", False),
    ],
)
def test_attackers_are_named_by_what_makes_them_different(cell, name, own):
    records = load(results.CELLS)
    plain = next(
        one for one in records if one.cell["victim"] == "mnist" and attacker_of(one) == "knockoff"
    )
    record = plain.model_copy(update={"cell": {**plain.cell, **cell}})
    assert (attacker_of(record), own_kind(record)) == (name, own)


def test_rounds_of_inversion_are_part_of_the_name():
    one = next(one for one in load(results.CELLS) if one.attack.attack.settings.get("rounds") == 2)
    assert attacker_of(one).endswith(" + invert in 2 rounds")
