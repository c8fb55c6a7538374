"""What an upstream's network is to the service: it writes requests and reads answers.

A row is checked before it is used: a row that is not finite, or not a distribution where it should
be one, is marked as invalid and replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from app.inference.engines import Batch, Probs
from scumble.defenses.evidence import Evidence, Score
from scumble.defenses.scores import Whitener, energy

if TYPE_CHECKING:
    from app.inference.upstream.client import Answer

SUM_TOLERANCE = 0.01  # of FP16 rows over many classes
ROUNDING = 1e-5

Tensor = npt.NDArray[Any]


class InvalidAnswer(Exception):
    """What the upstream sent is not the answer that the protocol or the template prescribes."""


class OtherNetwork(InvalidAnswer):
    """A valid answer, but of another network than the bundle's card describes."""


class Found(NamedTuple):
    """What the network says of a batch.

    Attributes:
        rows: (N, K) clean probabilities; uniform where `valid` is false.
        valid: (N,) whether the server gave a distribution; None if it did for all.
        logits: (N, K); None where the server has no such output.
        features: (N, d); None where the server has no such output.
    """

    rows: Probs
    valid: npt.NDArray[np.bool_] | None = None
    logits: Tensor | None = None
    features: Tensor | None = None

    def part(self, first: int, last: int) -> Found:
        """What it says of some of the images."""
        return Found._make(None if column is None else column[first:last] for column in self)

    def evidence(self, whitener: Whitener | None) -> Evidence:
        """The scores that these outputs have."""
        residual = None
        if self.features is not None and whitener is not None:
            residual = whitener.residual(self.features)
        return Evidence(
            np.maximum.reduce(self.rows, axis=1),
            None if self.logits is None else energy(self.logits),
            residual,
        )


class Network(Protocol):
    """Writes the requests for batches and reads the answers."""

    @property
    def inline_values(self) -> int:
        """Values of a batch up to which its request is written on the event loop."""
        ...

    @property
    def score_hint(self) -> str:
        """How the upstream comes to have the scores that it lacks."""
        ...

    @property
    def classes(self) -> int:
        """K."""
        ...

    @property
    def max_batch(self) -> int:
        """Images of the largest request."""
        ...

    @property
    def method(self) -> str:
        """Method of the requests."""
        ...

    @property
    def path(self) -> str:
        """Path of the requests, below the URL of a replica."""
        ...

    @property
    def version(self) -> str:
        """Version that the answers must have; empty for any."""
        ...

    @property
    def output(self) -> str:
        """Where its rows are, for messages."""
        ...

    @property
    def answers(self) -> Literal["probabilities", "logits"]:
        """What its rows are."""
        ...

    @property
    def scores(self) -> frozenset[Score]:
        """Scores that its outputs have."""
        ...

    def request(self, batch: Batch) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the request for a batch."""
        ...

    def read(self, answer: Answer, n: int, *, any_version: bool = False) -> Found:
        """Parse, check and convert the answer for `n` images.

        Raises:
            InvalidAnswer: it is not what the protocol or the template says.
            OtherNetwork: it is of another network.
        """
        ...

    def version_of(self, answer: Answer) -> str:
        """The version that an answer names; empty if it names none.

        Raises:
            InvalidAnswer: it is not what the protocol says.
        """
        ...


def checked(
    given: Tensor,
    kind: Literal["probabilities", "logits"],
    *,
    logits: Tensor | None = None,
    features: Tensor | None = None,
) -> Found:
    """What a network says, with rows that are not distributions marked and replaced.

    Args:
        given: (N, K) of its output.
        kind: what that output is.
        logits: (N, K), if it has them.
        features: (N, d), if it has them.
    """
    classes = given.shape[1]
    with np.errstate(all="ignore"):
        rows = softmax(given) if kind == "logits" else given.astype(np.float32)
        total = rows.sum(axis=1, dtype=np.float64)
        valid = (np.abs(total - 1) <= SUM_TOLERANCE) & (rows.min(axis=1) >= -SUM_TOLERANCE)
        for more in (logits, features):
            if more is not None:
                valid &= np.isfinite(more).all(axis=1)
    if not valid.all():
        rows[~valid] = np.float32(1 / classes)
        total[~valid] = 1
        if logits is not None:
            logits = np.where(valid[:, np.newaxis], logits, 0)
        if features is not None:
            features = np.where(valid[:, np.newaxis], features, 0)
    if (np.abs(total - 1) > ROUNDING).any() or rows.min() < 0:
        np.maximum(rows, 0, out=rows)
        rows /= rows.sum(axis=1, keepdims=True)
    return Found(rows, None if valid.all() else valid, logits, features)


def softmax(logits: Tensor) -> Probs:
    """Probabilities (N, K) of logits, computed in double precision."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    np.exp(wide, out=wide)
    wide /= wide.sum(axis=1, keepdims=True)
    return wide.astype(np.float32)
