"""Computes the figures in loadtest/peers.json from the measurements of all rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.wrk import Load

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Visit:
    """What one round found out about one server.

    Attributes:
        ready_s: from the start of its process to its first answer.
        gap: largest distance of a probability from the bundle's.
        memory_mb: PSS of all its processes under load.
        processes: how many they are.
        ended_by: the signal that it took to end them all.
        loads: by number of connections.
    """

    ready_s: float
    gap: float
    memory_mb: float
    processes: int
    ended_by: str
    loads: dict[int, Load]


@dataclass
class Story:
    """All rounds of one server: its visits by round, and the errors of those that failed."""

    name: str
    setting: str
    visits: dict[int, Visit] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def ratios(ours: Story, theirs: Story, connections: int) -> dict[str, float]:
    """Ratios of the first to the second server: medians over the rounds that both took part in."""
    pairs = [
        (ours.visits[number].loads[connections], theirs.visits[number].loads[connections])
        for number in ours.visits.keys() & theirs.visits.keys()
    ]
    found = {}
    for name in ("rps", "p50_ms", "p99_ms"):
        quotients = [getattr(a, name) / getattr(b, name) for a, b in pairs if getattr(b, name)]
        if quotients:
            found[name] = round(statistics.median(quotients), 3)
    return found


def row(story: Story, ours: Mapping[str, Story], connections: int) -> dict[str, Any]:
    """A server's figures at a number of connections."""
    loads = [visit.loads[connections] for visit in story.visits.values()]
    figures: dict[str, Any] = {"connections": connections}
    for name in ("rps", "p50_ms", "p99_ms"):
        figures[name] = round(statistics.median(getattr(one, name) for one in loads), 3)
    figures["requests"] = sum(one.requests for one in loads)
    figures["errors"] = sum(one.errors for one in loads)
    if story.name != "scumble":
        figures["scumble_over_it"] = {
            setting: ratios(scumble, story, connections) for setting, scumble in ours.items()
        }
    return figures


def entry(story: Story, ours: Mapping[str, Story], connections: Sequence[int]) -> dict[str, Any]:
    """All figures of a server; only its errors if it was never measured."""
    found: dict[str, Any] = {"server": story.name, "setting": story.setting}
    visits = list(story.visits.values())
    if visits:
        gap = max(one.gap for one in visits)
        found |= {
            "rounds": len(visits),
            "ready_s": round(statistics.median(one.ready_s for one in visits), 2),
            "memory_mb": round(statistics.median(one.memory_mb for one in visits), 1),
            "processes": max(one.processes for one in visits),
            "largest_gap": float(f"{gap:.1e}"),
            "answers_equal": gap <= TOLERANCE,
            "ended_by": sorted({one.ended_by for one in visits}),
            "loads": [row(story, ours, count) for count in connections],
        }
    return found | {"failures": story.failures}
