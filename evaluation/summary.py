"""Records of cells put together: one line per cell, mean and 95 % interval over its seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evaluation.cells import Defended
from evaluation.record import Record, read
from evaluation.scores import Spread, spread


@dataclass(frozen=True)
class Line:
    """All seeds of one cell.

    Attributes:
        victim: name of the bundle.
        precision: float32 or int8.
        defense: what defended it.
        attack: key of `ATTACKS`.
        adapt: modifiers.
        budget: queries.
        transport: how images travelled.
        seeds: which were run.
        served: accuracy of the service's answers.
        clean: of the same model undefended.
        stolen: accuracy of the copies.
        agreement: of the copies with the service, on the test set.
        agreement_transfer: the same on the transfer set.
        l1_test: mean L1 of honest users' answers.
        l1_transfer: mean L1 of the attacker's.
        top1_changed: share of honest users' answers whose label changed.
        added_p50_ms: median latency that the defense adds.
    """

    victim: str
    precision: str
    defense: Defended
    attack: str
    adapt: tuple[str, ...]
    budget: int
    transport: str
    seeds: tuple[int, ...]
    served: Spread
    clean: Spread
    stolen: Spread
    agreement: Spread
    agreement_transfer: Spread
    l1_test: Spread
    l1_transfer: Spread
    top1_changed: Spread
    added_p50_ms: Spread

    @property
    def attacker(self) -> str:
        """Attack and modifiers in a word."""
        return " + ".join([self.attack, *self.adapt])


def load(folder: Path) -> list[Record]:
    """All records in a folder, in the order of their names.

    Raises:
        BadRecord: one is broken.
    """
    return [read(path) for path in sorted(folder.glob("*.json"))]


def summarise(records: Iterable[Record]) -> list[Line]:
    """One line per cell; the seeds of a cell make its spread."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        same = {key: value for key, value in record.cell.items() if key != "seed"}
        groups[json.dumps(same, sort_keys=True)].append(record)
    return [_line(group) for group in groups.values()]


def _line(group: list[Record]) -> Line:
    cell = group[0].cell
    return Line(
        victim=Path(cell["victim"]).name,
        precision=cell["precision"],
        defense=Defended(**cell["defense"]),
        attack=cell["attack"],
        adapt=tuple(cell["adapt"]),
        budget=cell["budget"],
        transport=cell["transport"],
        seeds=tuple(sorted(record.cell["seed"] for record in group)),
        served=spread([record.served.accuracy for record in group]),
        clean=spread([record.served.clean_accuracy for record in group]),
        stolen=spread([record.attack.scores.accuracy for record in group]),
        agreement=spread([record.attack.scores.agreement for record in group]),
        agreement_transfer=spread([record.transfer.agreement for record in group]),
        l1_test=spread([record.served.l1_mean for record in group]),
        l1_transfer=spread([record.transfer.l1_mean for record in group]),
        top1_changed=spread([record.served.top1_changed for record in group]),
        added_p50_ms=spread([record.served.added_ms["p50"] for record in group]),
    )


def best(lines: Iterable[Line]) -> list[Line]:
    """Of all attackers on the same defended model, the one whose copy is the most accurate."""
    found: dict[tuple[object, ...], Line] = {}
    for line in lines:
        defense = (line.defense.name, json.dumps(line.defense.params, sort_keys=True))
        key = (line.victim, line.precision, *defense)
        if key not in found or line.stolen.mean > found[key].stolen.mean:
            found[key] = line
    return list(found.values())
