"""When the stages of one prediction began and ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from app.telemetry.metrics import Stage


class Stages(NamedTuple):
    """Times on one clock, in seconds, and the durations that the batcher measured.

    Attributes:
        start: the request arrived.
        read: its body was read.
        decode_start: its images were charged.
        decoded: its images were decoded.
        back: its probabilities were computed.
        end: its answer was written.
        queue_s, infer_s, defend_s: durations of the batch, between `decoded` and `back`.
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

        The stages of the batch are placed backwards from its end. For a request in several batches
        the durations are sums, bounded by the time of the request.
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
