"""Records of cells put together: one line per cell, mean and 95 % interval over its seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from scumble.attacker.drawings import POOLS
from scumble.attacker.third_party import short
from scumble.attacker.transfer import TERM
from scumble.data.image_sets import named, whole
from scumble.evaluation.experiment import Cell, Defended
from scumble.evaluation.failures import REPEATED, equal, flat
from scumble.evaluation.record import Record, read
from scumble.evaluation.scores import Spread, spread


@dataclass(frozen=True)
class Line:
    """All seeds of one cell.

    Attributes:
        victim: name of the bundle.
        precision: float32 or int8.
        defense: what defended it.
        attacker: attack, its loss where that is not the paper's, and modifiers, in a few words.
        adapt: modifiers.
        budget: queries.
        transport: how images travelled.
        seeds: which were run.
        files: names of the records.
        served: accuracy of the service's answers.
        clean: of the same model undefended.
        stolen: accuracy of the copies.
        agreement: of the copies with the service, on the test set.
        agreement_transfer: the same on the transfer set.
        l1_test: mean L1 of honest users' answers.
        l1_max: the largest of them.
        l1_transfer: mean L1 of the attacker's.
        top1_changed: share of honest users' answers whose label changed.
        calibration_error: of honest users' answers.
        kl: of honest users' answers, nats.
        added_p50_ms: median latency that the defense adds.
        added_p99_ms: the same at the 99th percentile.
        failed: why the attack counts as failed, by the first seed that did; None if none did.
        own_kind: whether the attacker had images of the victim's own kind. No defense can stop such
            an attacker, so this line is never the best of all attackers.
        recipe: settings of the copy that stand in `recipes.toml`, if any.
        made_set: whether the transfer set was drawn by a program, changed or put together.
        setting: with which this attack repeats one that failed, such as `lr_s 0.01`.
        repeated: if the attack failed, with which settings it was repeated, in words.
        answered: share of honest users' answers that were not withheld.
        answered_transfer: the same of the attacker's.
        ranking: AUC of the confidence of honest users' answers.
        bits: of an answer to the attacker, at most.
        minutes: that the attack took, of one seed, on the machine that its record names.
    """

    victim: str
    precision: str
    defense: Defended
    attacker: str
    adapt: tuple[str, ...]
    budget: int
    transport: str
    seeds: tuple[int, ...]
    files: tuple[str, ...]
    served: Spread
    clean: Spread
    stolen: Spread
    agreement: Spread
    agreement_transfer: Spread
    l1_test: Spread
    l1_max: Spread
    l1_transfer: Spread
    top1_changed: Spread
    calibration_error: Spread
    kl: Spread
    added_p50_ms: Spread
    added_p99_ms: Spread
    failed: str | None = None
    own_kind: bool = False
    recipe: str | None = None
    made_set: bool = False
    setting: str = ""
    repeated: str = ""
    answered: float = 1.0
    answered_transfer: float = 1.0
    ranking: float | None = None
    bits: float | None = None
    minutes: float = 0.0

    @property
    def model(self) -> tuple[str, str]:
        """Victim and precision."""
        return self.victim, self.precision

    @property
    def tuned(self) -> bool:
        """Whether the attacker chose more than the published attack and its transfer set."""
        return self.recipe is not None or self.made_set

    @property
    def lost(self) -> float:
        """Accuracy that honest users lose to the defense, as a share."""
        return self.clean.mean - self.served.mean


def load(folder: Path) -> list[Record]:
    """All records in a folder, in the order of their names.

    Raises:
        BadRecord: one is broken.
    """
    return [read(path) for path in sorted(folder.glob("*.json"))]


def summarise(records: Iterable[Record]) -> list[Line]:
    """One line per cell; the seeds of a cell make its spread."""
    groups: dict[str, list[Record]] = defaultdict(list)
    records = marked(list(records))
    for record in records:
        same = {key: value for key, value in record.cell.items() if key != "seed"}
        groups[json.dumps(same, sort_keys=True)].append(record)
    cells = [record.cell for record in records]
    return [_line(sorted(group, key=lambda r: r.cell["seed"]), cells) for group in groups.values()]


def marked(records: list[Record]) -> list[Record]:
    """The records, those whose attack failed with the reason.

    Copies at chance level whose accuracy is the same to the last digit on several defenses of one
    victim are marked, too: they do not depend on the answers.
    """
    figures: dict[str, list[tuple[str, float, int]]] = defaultdict(list)
    for record in records:
        name = str(cell_of(record).defense)
        accuracy, classes = record.attack.scores.accuracy, record.attack.victim.labels
        figures[record.cell["victim"]].append((name, accuracy, classes))
    return [
        record.model_copy(
            update={
                "attack_failed": failed(record)
                or equal(record.attack.scores.accuracy, figures[record.cell["victim"]])
            }
        )
        for record in records
    ]


def repeats(record: Record, cells: list[dict[str, Any]]) -> str:
    """With which other settings a failed attack was repeated.

    Args:
        record: of the attack.
        cells: all that have records.
    """
    if not record.attack_failed or setting(record):
        return ""
    others = [cell for cell in cells if same_but_one_change(cell, record.cell)]
    if not others:
        return "; not yet repeated with other settings"
    return "; repeated with " + ", ".join(sorted(said(cell["changes"][-1]) for cell in others))


def same_but_one_change(cell: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a cell is the other one with one of the settings `REPEATED` added."""
    *rest, last = cell["changes"] or [""]
    return last.partition("=")[0] in REPEATED and {**cell, "changes": rest} == other


def setting(record: Record) -> str:
    """With which setting this attack is the repeat of one that failed: `lr_s 0.01`; else empty."""
    last = (record.cell["changes"] or [""])[-1]
    return said(last) if last.partition("=")[0] in REPEATED else ""


def said(change: str) -> str:
    """`attack.lr_s=0.01` in words."""
    name, _, value = change.partition("=")
    return f"{name.rpartition('.')[2]} {value}"


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(**{**record.cell, "defense": Defended(**record.cell["defense"])})


def attacker_of(record: Record) -> str:
    """Attack, loss or recipe, transfer set and modifiers in a few words.

    The papers' loss is not said, nor a transfer set that is a data set as it is.
    """
    name = short(record.attack.attack.name)
    loss = record.attack.attack.settings.get("fitting", {}).get("loss", "soft")
    if recipe := record.cell.get("recipe"):
        chosen = any(change.startswith("fit.loss=") for change in record.cell["changes"])
        name += f" ({recipe}, {loss})" if chosen else f" ({recipe})"
    elif loss != "soft":
        name += f" {loss}"
    if made_set(record):
        terms = terms_of(record.cell["queries"])
        made = [f"{term}@{variant}" if variant else term for term, variant in terms]
        name += f" from {', '.join(dict.fromkeys(made))}"
    elif own_kind(record):
        name += " with images of the victim's kind"
    name = " + ".join([name, *(short(part.name) for part in record.attack.adapt)])
    if rounds := record.attack.attack.settings.get("rounds"):
        name += f" in {rounds} rounds"
    return f"{name} with {repeated}" if (repeated := setting(record)) else name


def made_set(record: Record) -> bool:
    """Whether the transfer set is more than a data set as it is."""
    terms = terms_of(record.cell["queries"] or "")
    return len(terms) > 1 or any(variant or term in POOLS for term, variant in terms)


def own_kind(record: Record) -> bool:
    """Whether the attacker asked about images of the victim's own data set.

    That is the set that the victim is named after, or else the one that it was measured on.
    """
    victim = Path(record.cell["victim"]).name
    own = [victim]
    if not named(victim, "test"):
        own += [name for name, _ in terms_of(record.cell.get("test") or "")]
    asked = [name for name, _ in terms_of(record.cell["queries"] or "")]
    return not set(map(whole, own)).isdisjoint(map(whole, asked))


def terms_of(source: str) -> list[tuple[str, str | None]]:
    """(name, variant) of each term of a data set."""
    if Path(source).exists():
        return [(source, None)]
    matches = [TERM.match(term.strip()) for term in source.split(",")]
    return [(match["name"], match["variant"]) for match in matches if match]


def _line(group: list[Record], cells: list[dict[str, Any]]) -> Line:
    cell = cell_of(group[0])
    return Line(
        victim=Path(cell.victim).name,
        precision=cell.precision,
        defense=cell.defense,
        attacker=attacker_of(group[0]),
        adapt=tuple(cell.adapt),
        budget=cell.budget,
        transport=cell.transport,
        seeds=tuple(record.cell["seed"] for record in group),
        files=tuple(f"{cell_of(record).key}.json" for record in group),
        served=spread([record.served.accuracy for record in group]),
        clean=spread([record.served.clean_accuracy for record in group]),
        stolen=spread([record.attack.scores.accuracy for record in group]),
        agreement=spread([record.attack.scores.agreement for record in group]),
        agreement_transfer=spread([record.transfer.agreement for record in group]),
        l1_test=spread([record.served.l1_mean for record in group]),
        l1_max=spread([record.served.l1_max for record in group]),
        l1_transfer=spread([record.transfer.l1_mean for record in group]),
        top1_changed=spread([record.served.top1_changed for record in group]),
        calibration_error=spread([record.served.calibration_error for record in group]),
        kl=spread([record.served.kl for record in group]),
        added_p50_ms=spread([record.served.added_ms["p50"] for record in group]),
        added_p99_ms=spread([record.served.added_ms["p99"] for record in group]),
        failed=next((one.attack_failed for one in group if one.attack_failed), None),
        own_kind=own_kind(group[0]),
        recipe=cell.recipe,
        made_set=made_set(group[0]),
        setting=setting(group[0]),
        repeated=next((repeats(one, cells) for one in group if one.attack_failed), ""),
        answered=fmean(record.served.answered for record in group),
        answered_transfer=fmean(record.transfer.answered for record in group),
        ranking=group[0].served.ranking,
        bits=group[0].transfer.bits,
        minutes=fmean(record.attack.timing.wall_s for record in group) / 60,
    )


def failed(record: Record) -> str | None:
    """Why the attack of a record counts as failed, None if it does not."""
    attack, undefended = record.attack, cell_of(record).defense == Defended()
    return record.attack_failed or flat(attack.curve, attack.victim.labels, undefended=undefended)


def own_kind_line(lines: Iterable[Line]) -> Line | None:
    """The line with the most accurate copy by an attacker with images of the victim's own kind.

    The undefended model does not count: this is what gets through defenses.
    """
    usable = (
        line
        for line in lines
        if line.own_kind and line.failed is None and line.defense.name != "none"
    )
    return max(usable, key=lambda line: line.stolen.mean, default=None)


def best(lines: Iterable[Line], tried: int = 1) -> list[Line]:
    """The line with the most accurate copy of each defended model.

    Failed attacks and those with images of the victim's own kind do not count.

    Args:
        lines: of any models.
        tried: how many attackers there must be for one of them to be the best.
    """
    groups: dict[tuple[object, ...], list[Line]] = defaultdict(list)
    for line in lines:
        if line.failed is None and not line.own_kind:
            groups[*line.model, str(line.defense)].append(line)
    enough = (group for group in groups.values() if len(group) >= tried)
    return [max(group, key=lambda line: line.stolen.mean) for group in enough]
