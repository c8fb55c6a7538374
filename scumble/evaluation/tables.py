"""Tables of the results page: Markdown made of lines, so that a reader compares at a glance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scumble.evaluation.claims import Advice
from scumble.evaluation.plans import MANY, dcp, sigmoid
from scumble.evaluation.scores import Spread
from scumble.evaluation.summary import Line, best

VICTIMS = ("mnist", "mnist-outliers", "cifar10", "gtsrb", "gtsrb-outliers", "cifar100")
RECORDS = "../results/records/cells"
# What the table of policies compares: these, and others at one strength.
POLICIES = ("none", "label", "modelguard_w", "codebook", "withhold")
STRENGTHS = (dcp(1.2), MANY, sigmoid(0.64))

# of the list of all cells: what the reader sees and how it is said
COLUMNS: dict[str, Callable[[Line], str]] = {
    "victim": lambda line: f"`{line.victim}` {line.precision}",
    "defense": lambda line: str(line.defense),
    "attack": lambda line: line.attacker,
    "queries": lambda line: f"{line.budget:,} {line.transport}",
    "served": lambda line: str(line.served),
    "stolen": lambda line: stolen(line),
    "agreement, test": lambda line: str(line.agreement),
    "agreement, queries": lambda line: str(line.agreement_transfer),
    "L1, users": lambda line: plain(line.l1_test),
    "largest": lambda line: plain(line.l1_max),
    "L1, attacker": lambda line: plain(line.l1_transfer),
    "labels changed": lambda line: str(line.top1_changed),
    "KL": lambda line: plain(line.kl),
    "calibration error": lambda line: plain(line.calibration_error),
    "p50 added, ms": lambda line: plain(line.added_p50_ms),
    "p99 added, ms": lambda line: plain(line.added_p99_ms),
    "minutes": lambda line: f"{line.minutes:.0f}",
}


def stolen(line: Line) -> str:
    """The accuracy of the copy, marked if the attack failed."""
    return f"{line.stolen} (failed)" if line.failed else str(line.stolen)


def plain(value: Spread) -> str:
    """A number that is not a share, with its interval if there is one."""
    return f"{value.mean:.2f}" + ("" if value.half is None else f" ± {value.half:.2f}")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def ordered(lines: Iterable[Line]) -> list[Line]:
    """By victim, precision, defense and strength, attacker; undefended first and labels last."""
    place = {"none": 0, "dcp": 1, "label": 3}
    return sorted(
        lines,
        key=lambda line: (
            VICTIMS.index(line.victim) if line.victim in VICTIMS else len(VICTIMS),
            line.precision,
            place.get(line.defense.name, 2),
            line.defense.name,
            line.defense.strength,
            len(line.adapt),
            line.attacker,
        ),
    )


def compared(lines: Sequence[Line]) -> str:
    """One row per defense, one column per attacker: the accuracy of its copy; best in bold."""
    attackers = sorted({line.attacker for line in lines}, key=lambda name: (name.count("+"), name))
    strongest = best(lines)
    rows = []
    for defense in dict.fromkeys(str(line.defense) for line in lines):
        own = {line.attacker: line for line in lines if str(line.defense) == defense}
        one = next(iter(own.values()))
        cells = [
            (f"**{stolen(own[a])}**" if own[a] in strongest else stolen(own[a]))
            if a in own
            else "—"
            for a in attackers
        ]
        rows.append([defense, f"{one.served.mean:.1%}", f"{one.l1_test.mean:.2f}", *cells])
    return markdown(["defense", "served", "L1", *attackers], rows)


def policies(lines: Iterable[Line]) -> str:
    """One row per policy: what users keep, and the copies that attackers make."""
    head = [
        *("victim", "policy", "users' accuracy", "answered", "L1", "ECE", "AUC"),
        *("as published", "best attacker", "its answers", "oracle mask", "own images"),
    ]
    lines = list(lines)
    groups: dict[tuple[object, ...], list[Line]] = {}
    labels = {line.model: line for line in best(lines) if line.defense.name == "label"}
    for line in lines:
        if is_policy(line):
            groups.setdefault((*line.model, str(line.defense)), []).append(line)
    return markdown(head, [row(group, labels.get(group[0].model)) for group in groups.values()])


def is_policy(line: Line) -> bool:
    """Whether the line is of a policy that the table compares."""
    return line.defense.name in POLICIES or line.defense in STRENGTHS


def row(group: list[Line], labels: Line | None) -> list[str]:
    """Of a policy; where it keeps all labels, an attacker may train on these alone."""
    one = group[0]
    kept = one.top1_changed.mean == 0 and one.answered == 1 and one.defense.name != "none"
    usable = [*best(group), *([labels] if labels and kept else [])]
    top = max(usable, key=lambda line: line.stolen.mean, default=None)
    masked = [line for line in group if "oracle_mask" in line.adapt]
    own = [line for line in group if line.own_kind]
    said = [line for line in group if line.ranking is not None]
    return [
        f"`{one.victim}` {one.precision}",
        str(one.defense),
        f"{one.served.mean:.2%}",
        f"{one.answered:.1%}",
        f"{one.l1_test.mean:.3f}",
        f"{one.calibration_error.mean:.3f}",
        optional(said[0].ranking if said else None, ".3f"),
        copied([line for line in group if line.attacker == "knockoff"]),
        f"{top.stolen} by {top.attacker}" if top else "—",
        f"{top.answered_transfer * top.budget:,.0f}" if top else "—",
        copied(masked),
        copied(own),
    ]


def copied(lines: Iterable[Line]) -> str:
    """The most accurate of these copies; a dash where there is none."""
    top = max(lines, key=lambda line: line.stolen.mean, default=None)
    return "—" if top is None else stolen(top)


def strong(lines: Iterable[Line]) -> str:
    """One row per tuned attacker, and per other attacker who gets a better copy."""
    head = ["victim", "policy", "attacker", "queries", "answered", "bits", "copy", "minutes"]
    lines = list(lines)
    strongest = best(lines)
    judged = {(*line.model, str(line.defense)) for line in lines if line.tuned}
    rows = [
        [
            f"`{line.victim}` {line.precision}",
            str(line.defense),
            line.attacker,
            f"{line.budget:,}",
            f"{line.answered_transfer:.1%}",
            optional(line.bits, ".1f"),
            f"**{stolen(line)}**" if line in strongest else stolen(line),
            f"{line.minutes:.0f}",
        ]
        for line in lines
        if line.tuned or (line in strongest and (*line.model, str(line.defense)) in judged)
    ]
    return markdown(head, rows)


def optional(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "—" if value is None else format(value, form)


def everything(lines: Iterable[Line]) -> str:
    """One row per cell with all its scores and its files."""
    rows = [
        [*(cell(line) for cell in COLUMNS.values()), links(line)] for line in lines
    ]  # fmt: skip
    return markdown([*COLUMNS, "records by seed"], rows)


def links(line: Line) -> str:
    """Where the figures of a line are."""
    pairs = zip(line.seeds, line.files, strict=True)
    return " ".join(f"[{seed}]({RECORDS}/{file})" for seed, file in pairs)


def advised(found: Iterable[Advice]) -> str:
    """Strengths of dcp: what they cost and whom they keep out."""
    rows = [
        [
            f"`{one.victim}`",
            f"{one.beta:g}",
            ", ".join(f"{100 * lost:.2f} {name}" for name, lost in one.lost.items()),
            f"{one.l1:.2f}",
            "yes" if one.recommended else "no",
            said(one.held),
            said(one.ties),
            said(one.broken),
        ]
        for one in found
    ]
    head = ["victim", "beta", "points lost by users", "L1", "within a point"]
    return markdown([*head, "copies worse than from labels", "ties", "better"], rows)


def said(copies: dict[str, float]) -> str:
    """Attackers with their best copy."""
    return ", ".join(f"{name} {share:.1%}" for name, share in copies.items()) or "—"


def latency(bench: dict[str, Any]) -> str:
    """The latency bench: one row per model, precision and batch; cells are ratios."""
    cases = bench["cases"]
    defenses = [d for d in dict.fromkeys(case["defense"] for case in cases) if d != "inference"]
    by = {(c["model"], c["precision"], c["batch"], c["defense"]): c for c in cases}
    rows = []
    for where in dict.fromkeys(key[:3] for key in by):
        model, precision, batch = where
        row = [f"`{model}` {precision}", str(batch)]
        row.append(f"{1000 * by[*where, 'inference']['ms_per_image']:.0f}")
        for defense in defenses:
            case = by[*where, defense]
            row.append(
                f"{1000 * case['ms_per_image']:.1f} µs, {case['over_inference']:.1%}"
                if defense == "dcp" or defense.endswith("_in_graph")
                else f"{case['over_dcp']:.1f} ×"
            )
        rows.append(row)
    return markdown(["model", "batch", "inference, µs", *defenses], rows)
