"""The result of a run, `result.json`; validated when it is written and read."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scumble.attacker.errors import BadResult

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Part(BaseModel):
    """Frozen; unknown members are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Victim(Part):
    """What was attacked.

    `sha256`, `precision` and `defense` are known only where its owner gave the admin port's URL.
    """

    url: str
    name: str
    version: str
    labels: Annotated[int, Field(ge=2)]
    shape: tuple[int, int, int]
    document_sha256: Sha256
    sha256: Sha256 | None
    precision: str | None
    defense: str | None


class Chosen(Part):
    """An attack or a modifier with all its settings."""

    name: str
    settings: dict[str, Any]


class Data(Part):
    """A data set as it was used; `sha256` is of pixels and labels."""

    name: str
    images: Count
    sha256: Sha256


class Student(Part):
    """The copy."""

    name: str
    parameters: Count
    started_from: str | None
    file: str
    sha256: Sha256


class Ledgers(Part):
    """What was asked, in images, counted on both sides; `test` is not part of the budget.

    `ended` says why the service gave no more, where its own budget was spent.
    `difference` is the attacker's count less the service's: 0 but for images whose answers were
    lost on the way and that the service had not counted. Both are None without the admin port.
    """

    budget: Count
    answered: Count
    lost: Count
    replayed: Count
    spent: Count
    refused_requests: Count
    sent_bytes: Count
    received_bytes: Count
    server: Count | None
    difference: int | None
    test: Count
    ended: str | None = None


class Timing(Part):
    """Seconds of the last start, all and those spent on answers; images per second of these."""

    wall_s: float
    asking_s: float
    queries_per_s: float | None


class Scores(Part):
    """On the test set: the served model's accuracy, the copy's, and how often both say the same."""

    victim_accuracy: Share
    accuracy: Share
    agreement: Share


class Point(Part):
    """The copy after a number of queries."""

    queries: Count
    accuracy: Share
    agreement: Share


class Machine(Part):
    """Where it ran; `gpu` is None where networks ran on the processor."""

    processor: str
    threads: Count
    torch: str
    gpu: str | None = None


class Result(Part):
    """One run."""

    format: Literal["scumble-attack/1"] = "scumble-attack/1"
    scumble: str
    command: str
    started: datetime
    victim: Victim
    attack: Chosen
    profile: str
    adapt: tuple[Chosen, ...]
    transport: str
    step: float
    seeds: dict[str, int]
    files: dict[str, Sha256] = {}
    queries: Data | None
    test: Data
    student: Student
    ledger: Ledgers
    timing: Timing
    scores: Scores
    curve: tuple[Point, ...]
    machine: Machine


def write(result: Result, path: Path) -> None:
    """Write it as JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(result.model_dump_json(indent=2) + "\n")
    part.replace(path)


def read(path: Path) -> Result:
    """Read and check a result.

    Raises:
        BadResult: it cannot be read, or is not what `Result` asks for.
    """
    try:
        return Result.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as exc:
        raise BadResult(f"{str(path)!r} is not a result of an attack: {exc}") from exc
