"""The claims under test, each with its rule, its verdict and its figures.

The rules are fixed before the figures are known, so a verdict depends on the records alone. "Labels
only" is the bound: a defense that keeps the top class cannot push an attacker who trains on the top
class alone below it. An attack that failed on its own is listed, but does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from scumble.evaluation.summary import Line, best

Verdict = Literal["held", "held in part", "did not hold", "not measured"]
Bench = dict[str, Any]
Finding = tuple[bool | None, str]
"""(whether the rule is met, the figures); None where the attack failed."""

ANSWERS = {True: "yes", False: "no", None: "attack failed"}
POINT = 0.01
TIE = 2 * POINT  # less than this between two copies of one seed each says nothing
REDUCED = 10 * POINT  # a copy that falls by less has not been defended against


@dataclass(frozen=True)
class Claim:
    """A sentence under test.

    Attributes:
        words: the claim.
        rule: when it holds.
        judge: the findings, one per model and defense.
    """

    words: str
    rule: str
    judge: Callable[[list[Line], Bench], list[Finding]]

    def __call__(self, lines: list[Line], bench: Bench) -> tuple[Verdict, list[str]]:
        """The verdict over all that was measured, and its figures."""
        found = self.judge(lines, bench)
        held = [ok for ok, _ in found if ok is not None]
        verdict: Verdict = "held in part"
        if not held:
            verdict = "not measured"
        elif all(held):
            verdict = "held"
        elif not any(held):
            verdict = "did not hold"
        return verdict, [f"{ANSWERS[ok]}: {words}" for ok, words in found]


def groups(lines: Iterable[Line]) -> list[list[Line]]:
    """The lines of each served model, in the order in which they come."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault(line.model, []).append(line)
    return list(found.values())


def undefended(lines: Iterable[Line], attacker: str | None = None) -> Line | None:
    """The line with the most accurate copy of the undefended model, by one attacker or by any."""
    return strongest(
        line
        for line in lines
        if line.defense.name == "none" and attacker in (None, line.attacker)
    )  # fmt: skip


def labels_only(lines: Iterable[Line]) -> Line | None:
    """The most accurate copy made of labels alone."""
    return strongest(line for line in lines if line.defense.name == "label")


def labels_of_same_effort(line: Line, group: list[Line]) -> Line | None:
    """The most accurate copy made of labels alone, by an attacker who tried no harder.

    Tuned copies count only beside a line that is.
    """
    return labels_only(other for other in group if line.tuned or not other.tuned)


def strongest(lines: Iterable[Line]) -> Line | None:
    """The line with the most accurate copy of those that count (`summary.best`)."""
    usable = (line for line in lines if line.failed is None and not line.own_kind)
    return max(usable, key=lambda line: line.stolen.mean, default=None)


def against(attack: str, adapted: str = "") -> Callable[[list[Line], Bench], list[Finding]]:
    """Whether dcp takes at least `REDUCED` from an attack.

    Args:
        attack: as published; so it steals the undefended model.
        adapted: the modifier with which it steals the defended one, " + NAME"; empty for none.
    """

    def judge(lines: list[Line], bench: Bench) -> list[Finding]:
        del bench
        found: list[Finding] = []
        for group in groups(lines):
            free = undefended(group, attack)
            bare = [o for o in group if (o.defense.name, o.attacker) == ("label", attack)]
            beside = f"; labels only {bare[0].stolen}" if adapted and bare else ""
            for line in group:
                named = line.attacker.removesuffix(f" with {line.setting}")
                if free is None or (line.defense.name, named) != ("dcp", attack + adapted):
                    continue
                fell = free.stolen.mean - line.stolen.mean
                spread = noise(line, free) if adapted else 0
                found.append(
                    (
                        None if line.failed else fell >= REDUCED + spread,
                        f"{model(line)}, {line.defense}, {line.attacker}: "
                        f"{free.stolen} undefended, {line.stolen} defended{reason(line)}{beside}",
                    )
                )
        return found

    return judge


def below_labels(lines: list[Line], bench: Bench) -> list[Finding]:
    """Whether the best of all attackers on dcp gets less than from labels alone."""
    del bench
    found: list[Finding] = []
    for group in groups(lines):
        for line in best((line for line in group if line.defense.name == "dcp"), tried=2):
            same = [o for o in group if o.defense == line.defense]
            tried = {o.attacker for o in same if not o.failed and not o.own_kind}
            reference = labels_of_same_effort(line, group)
            if reference is None:
                continue
            found.append(
                (
                    line.stolen.mean < reference.stolen.mean - noise(line, reference),
                    f"{model(line)}, {line.defense}: {line.stolen} by {line.attacker}, the best of "
                    f"{len(tried)} attackers; labels only {reference.stolen}{tie(line, reference)}",
                )
            )
    return found


def noise(one: Line, other: Line) -> float:
    """How far two copies may be apart by the seeds alone."""
    return max(one.stolen.half or 0, other.stolen.half or 0, TIE)


def tie(one: Line, other: Line) -> str:
    """The words ", a tie" where the seeds explain the difference; empty where they do not."""
    apart = abs(one.stolen.mean - other.stolen.mean)
    return f", a tie (within {noise(one, other):.1%})" if apart <= noise(one, other) else ""


def policy(name: str, share: float, *, slack: bool) -> Callable[[list[Line], Bench], list[Finding]]:
    """Whether the best attacker on answers of a policy gets at most `share` of what labels give.

    Args:
        name: of the defense.
        share: of the most accurate copy made of labels alone.
        slack: add what the seeds may explain; else the copy must be further below than that.
    """

    def judge(lines: list[Line], bench: Bench) -> list[Finding]:
        del bench
        found: list[Finding] = []
        for group in groups(lines):
            for line in best(line for line in group if line.defense.name == name):
                reference = labels_of_same_effort(line, group)
                if reference is None:
                    continue
                spread = noise(line, reference)
                bound = share * reference.stolen.mean + (spread if slack else -spread)
                found.append(
                    (
                        line.stolen.mean <= bound,
                        f"{model(line)}, {line.defense}: {line.stolen} by {line.attacker}; labels "
                        f"only {reference.stolen}{tie(line, reference)}",
                    )
                )
        return found

    return judge


def harmless(lines: list[Line], bench: Bench) -> list[Finding]:
    """Whether honest users lose at most one point under dcp."""
    del bench
    return [
        (
            line.lost <= POINT,
            f"{model(line)}, {line.defense}: {line.clean.mean:.1%} clean, {line.served.mean:.1%} "
            f"served, {line.top1_changed.mean:.1%} of the labels changed, L1 "
            f"{line.l1_test.mean:.2f}",
        )
        for line in one_per_strength(lines)
    ]


def one_per_strength(lines: Iterable[Line]) -> list[Line]:
    """A line of dcp for each model and strength; what users get does not depend on the attack."""
    seen: dict[tuple[object, ...], Line] = {}
    for line in lines:
        if line.defense.name == "dcp":
            seen.setdefault((*line.model, line.defense.strength), line)
    return list(seen.values())


def alike(lines: list[Line], bench: Bench) -> list[Finding]:
    """Whether what dcp takes from an attacker is the same for int8 within `REDUCED` / 2."""
    del bench
    found: list[Finding] = []
    twins = {(o.victim, str(o.defense), o.attacker): o for o in lines if o.precision == "int8"}
    for line in lines:
        twin = twins.get((line.victim, str(line.defense), line.attacker))
        if line.precision == "int8" or line.defense.name != "dcp" or twin is None:
            continue
        found.append(
            (
                None
                if line.failed or twin.failed
                else abs(line.stolen.mean - twin.stolen.mean) <= REDUCED / 2,
                f"`{line.victim}`, {line.defense}, {line.attacker}: {line.stolen} float32, "
                f"{twin.stolen} int8{reason(line) or reason(twin)}",
            )
        )
    return found


def faster(lines: list[Line], bench: Bench) -> list[Finding]:
    """Whether the published forms of mad and grad2 add 37 times as much latency as dcp."""
    del lines
    return [
        (
            case["over_dcp"] >= 37,
            f"`{case['model']}` {case['precision']}, batch {case['batch']}: "
            f"{case['defense'].removesuffix('_reference')} as published adds "
            f"{case['over_dcp']:.0f} times what dcp adds",
        )
        for case in bench.get("cases", [])
        if case["defense"].endswith("_reference")
    ]


def faster_than_ours(lines: list[Line], bench: Bench) -> list[Finding]:
    """The same for the closed and forward-mode forms that this service runs."""
    del lines
    return [
        (
            case["over_dcp"] >= 37,
            f"`{case['model']}` {case['precision']}, batch {case['batch']}: {case['defense']} "
            f"written for speed adds {case['over_dcp']:.0f} times what dcp adds",
        )
        for case in bench.get("cases", [])
        if case["defense"] in ("mad", "grad2")
    ]


def cheap(*defenses: str) -> Callable[[list[Line], Bench], list[Finding]]:
    """Whether defenses add at most 5 % to inference at batch 1 and 1 % at batch 32."""

    def rule(lines: list[Line], bench: Bench) -> list[Finding]:
        del lines
        return [
            (
                case["over_inference"] <= (0.05 if case["batch"] == 1 else 0.01),
                f"`{case['model']}` {case['precision']}, batch {case['batch']}: {defense} in the "
                f"graph adds {case['over_inference']:.1%}",
            )
            for defense in defenses
            for case in bench.get("cases", [])
            if case["defense"] == f"{defense}_in_graph"
        ]

    return rule


CLAIMS = [
    Claim(
        "It defends against KnockoffNets.",
        "the copy of the published attack falls by at least 10 points",
        against("knockoff"),
    ),
    Claim(
        "It defends against the data-free attack DFME.",
        "the copy of the published attack falls by at least 10 points",
        against("dfme"),
    ),
    Claim(
        "It defends against DFME that inverts the answers.",
        "the copy falls by at least 10 points below that of the published attack undefended, by "
        "more than the spread of the seeds (not a claim of the paper)",
        against("dfme", " + invert"),
    ),
    Claim(
        "It defends against the data-free attack MAZE.",
        "the copy of the published attack falls by at least 10 points",
        against("maze"),
    ),
    Claim(
        "It works for quantized CNNs as for float ones.",
        "the same attacker's copies of both differ by at most 5 points",
        alike,
    ),
    Claim(
        "Its impact on accuracy is low.",
        "honest users lose at most one point of accuracy",
        harmless,
    ),
    Claim(
        "It is 37 times as fast as the state of the art.",
        "mad and grad2 in their published form add at least 37 times the latency of dcp",
        faster,
    ),
    Claim(
        "It is 37 times as fast as the same defenses written for speed.",
        "mad in closed form and grad2 in forward mode add at least 37 times the latency of dcp "
        "(not a claim of the paper)",
        faster_than_ours,
    ),
    Claim(
        "It costs next to nothing beside inference.",
        "inside the network's graph it adds at most 5 % at batch 1 and 1 % at batch 32 (not a "
        "claim of the paper)",
        cheap("dcp"),
    ),
    Claim(
        "It protects more than labels alone would, against attackers who adapt.",
        "the best of all attackers gets a worse copy than from labels only with the same effort, "
        "by more than the spread of the seeds (not a claim of the paper)",
        below_labels,
    ),
    Claim(
        "Codebook is worth no more to an attacker than labels.",
        "the best attacker on its answers, each of which has the label, gets no better copy than "
        "the best from labels with the same effort, within the spread of the seeds (not a claim of "
        "the paper)",
        policy("codebook", 1, slack=True),
    ),
    Claim(
        "Withhold halves what labels give away.",
        "the best attacker with foreign images gets a copy at most half as accurate as the best "
        "from labels with the same effort, by more than the spread of the seeds (not a claim of "
        "the paper)",
        policy("withhold", 0.5, slack=False),
    ),
    Claim(
        "Codebook and withhold cost next to nothing beside inference.",
        "inside the network's graph each adds at most 5 % at batch 1 and 1 % at batch 32 (not a "
        "claim of the paper)",
        cheap("codebook", "withhold"),
    ),
]  # fmt: skip


def model(line: Line) -> str:
    """Victim and precision, in Markdown."""
    return f"`{line.victim}` {line.precision}"


def reason(line: Line) -> str:
    """Why the attack of a line failed, in parentheses; empty if it did not."""
    return f" ({line.failed}{line.repeated})" if line.failed else ""


@dataclass(frozen=True)
class Advice:
    """What one strength of dcp is good for.

    Attributes:
        victim: name of the bundle.
        beta: strength.
        lost: accuracy that honest users lose, by precision.
        l1: of honest users' answers, the larger of the precisions.
        held: attackers whose copy stays below labels only on every precision, by more than the
            seeds may explain, with the best copy. Tuned copies are compared with tuned ones from
            labels, the others with the others.
        broken: those whose copy is better by more than that on a precision.
        ties: the others. Failed attacks are in none of these.
    """

    victim: str
    beta: float
    lost: dict[str, float]
    l1: float
    held: dict[str, float]
    broken: dict[str, float]
    ties: dict[str, float] = field(default_factory=dict)

    @property
    def recommended(self) -> bool:
        """Whether honest users keep their accuracy within one point."""
        return max(self.lost.values()) <= POINT


def default_strengths(found: Iterable[Advice]) -> dict[str, float]:
    """Strength of dcp that the service uses by default, by victim.

    Of the recommended strengths, the one that the most attackers were measured not to break; the
    strongest of several.
    """
    best_of: dict[str, Advice] = {}
    for one in found:
        known = best_of.get(one.victim)
        rank = (len(one.held), one.beta)
        if one.recommended and (known is None or rank > (len(known.held), known.beta)):
            best_of[one.victim] = one
    return {victim: one.beta for victim, one in best_of.items()}


def advice(lines: list[Line]) -> list[Advice]:
    """For each victim and strength of dcp: the price, and who is kept out."""
    found = []
    for victim in dict.fromkeys(line.victim for line in lines):
        own = [line for line in lines if line.victim == victim]
        references: dict[tuple[str, bool], Line | None] = {
            (line.precision, line.tuned): labels_only(o for o in group if o.tuned == line.tuned)
            for group in groups(own)
            for line in group
        }
        strengths = sorted({o.defense.strength for o in own if o.defense.name == "dcp"})
        for beta in strengths:
            at = [o for o in own if o.defense.name == "dcp" and o.defense.strength == beta]
            held: dict[str, float] = {}
            broken: dict[str, float] = {}
            ties: dict[str, float] = {}
            worked = [line for line in at if line.failed is None and not line.own_kind]
            for attacker in dict.fromkeys(line.attacker for line in worked):
                by = [line for line in worked if line.attacker == attacker]
                places = [place(o, references[o.precision, o.tuned]) for o in by]
                found_at = (
                    held if all(n < 0 for n in places) else broken if max(places) > 0 else ties
                )
                found_at[attacker] = max(o.stolen.mean for o in by)
            found.append(
                Advice(
                    victim,
                    beta,
                    {line.precision: line.lost for line in at},
                    max(line.l1_test.mean for line in at),
                    held,
                    broken,
                    ties,
                )
            )
    return found


def place(line: Line, reference: Line | None) -> int:
    """-1 for a copy below another, 1 for one above it, 0 where the seeds explain the difference.

    A copy is above one that was not made.
    """
    if reference is None:
        return 1
    apart = line.stolen.mean - reference.stolen.mean
    return 0 if abs(apart) <= noise(line, reference) else 1 if apart > 0 else -1
