"""The JSON record of a cell; refused if a seed, hash, transport, ledger or L1 is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scumble.attacker.result import Count, Result, Sha256, Share

Percentile = Literal["p50", "p99"]
Distance = Annotated[float, Field(ge=0, le=2.001)]


class BadRecord(ValueError):
    """A file is not a record of a cell; the message says what is missing."""


class Part(BaseModel):
    """Frozen; unknown members are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Utility(Part):
    """How useful the answers are to honest users, compared with the same model undefended.

    `l1_*`, `kl` (nats) and `top1_changed` compare served and clean rows; `calibration_error` is of
    the served rows, `clean_*` of the undefended ones. Milliseconds are of single requests over
    `png`, taken by turns from both servers; `added` is the difference of the percentiles.
    A withheld answer is never right; `answered` is the share of the others, and what is said of
    confidence is said of them. `ranking` is the probability that a right answer is more confident
    than a wrong one, None where all are right. Older records lack the last three members.
    """

    images: Count
    accuracy: Share
    clean_accuracy: Share
    top1_changed: Share
    l1_mean: Distance
    l1_max: Distance
    kl: float
    calibration_error: Share
    clean_calibration_error: Share
    latency_ms: dict[Percentile, float]
    added_ms: dict[Percentile, float]
    answered: Share = 1.0
    ranking: Share | None = None
    clean_ranking: Share | None = None


class Transfer(Part):
    """What the attacker got: on a sample of its queries.

    `answered` is the share of answers that were not withheld, `true` of those that have the clean
    answer's label, `agreement` of those that have the copy's. `bits` is the entropy of the distinct
    answers: what one of them can tell at most, and at most log2 of the sample. Older records lack
    `answered`, `true` and `bits`.
    """

    images: Count
    l1_mean: Distance
    l1_max: Distance
    top1_changed: Share
    agreement: Share
    answered: Share = 1.0
    true: Share | None = None
    bits: float | None = None


class Record(Part):
    """The result of one cell.

    `attack_failed` is the reason why the attack counts as failed (`scumble.evaluation.failures`),
    None if it does not. Older records have no such member; their curve is judged when they are
    summarised. `secret` says where the secret of a keyed defense came from: the referee's servers
    draw one at their start, so no two records share it; that of a running service is unknown.
    """

    format: Literal["scumble-cell/1"] = "scumble-cell/1"
    command: str
    cell: dict[str, Any]
    model_sha256: Sha256
    transport: str
    seeds: Annotated[dict[str, int], Field(min_length=1)]
    served: Utility
    transfer: Transfer
    attack: Result
    attack_failed: str | None = None
    secret: Literal["drawn", "unknown"] | None = None


def read(path: Path) -> Record:
    """Read and check a record.

    Raises:
        BadRecord: it cannot be read, or is not what `Record` asks for.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as exc:
        raise BadRecord(f"{str(path)!r} is not a record of a cell: {exc}") from exc
