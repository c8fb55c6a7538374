"""When the stages of one prediction began and ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from app.telemetry.metrics import Stage


class Stages(NamedTuple):
    """Times of one clock, in seconds, and what the batcher measured of its part.

    Attributes:
        start: the request came.
        read: its body was there.
        decode_start: its images were charged.
        decoded: their pixels were there.
        back: its probabilities were.
        end: its answer was written.
        queue_s, infer_s, defend_s: of the batch, between `decoded` and `back`.
    """

    start: float
    read: float
    decode_start: float
    decoded: float
    back: float
    end: float
    queue_s: float
    infer_s: float
    defend_s: float

    def spans(self) -> Iterator[tuple[Stage, float, float]]:
        """Name, begin and end of each stage.

        The batch is laid out backwards from its end. Of a request in several batches the times are
        sums, which its own time bounds.
        """
        defend = max(self.decoded, self.back - self.defend_s)
        infer = max(self.decoded, defend - self.infer_s)
        queue = max(self.decoded, infer - self.queue_s)
        yield "read", self.start, self.read
        yield "decode", self.decode_start, self.decoded
        yield "queue", queue, infer
        yield "infer", infer, defend
        yield "defend", defend, self.back
        yield "encode", self.back, self.end
