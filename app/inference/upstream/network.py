"""The network of a V2 server as a bundle's card describes it: images to its input, outputs to rows.

    x = (pixels / 255 - mean) / std, in the layout of the card; UINT8 inputs take the pixels

A row is checked before it is used: a row that is not finite, or not a distribution where the card
says so, is marked as invalid and replaced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from app.inference.bundle import Card, Sent
from app.inference.engines import Batch, Probs
from app.inference.upstream.protocol import OtherNetwork, Tensor, Tensors, write_request
from scumble.defenses.base import canonical
from scumble.defenses.evidence import Evidence, Score
from scumble.defenses.scores import Whitener, energy

SUM_TOLERANCE = 0.01  # of FP16 rows over many classes
ROUNDING = 1e-5


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


@dataclass(frozen=True)
class Network:
    """Writes the requests for batches and reads the answers.

    Attributes:
        classes: K.
        sent: how the server takes images and gives rows.
    """

    classes: int
    sent: Sent

    @classmethod
    def of(cls, card: Card) -> Network:
        """The network of a card that has one.

        Raises:
            ValueError: the card describes no network of another server.
        """
        if card.upstream is None:
            raise ValueError(f"card of {card.name} names no network of another server")
        return cls(len(card.labels), card.upstream)

    @property
    def scores(self) -> frozenset[Score]:
        """Scores that its outputs have."""
        found: set[Score] = set()
        if self.sent.logits_output is not None:
            found.add("energy")
        if self.sent.features is not None:
            found.add("residual")
        return frozenset(found)

    def request(self, batch: Batch) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the request for a batch."""
        sent = self.sent
        inputs = {sent.input: (sent.datatype, self.tensor(batch))}
        return write_request(inputs, sent.outputs, binary=sent.binary)

    def tensor(self, batch: Batch) -> Tensor:
        """The input of uint8 (N, H, W, C) pixels or float32 (N, C, H, W) in [0, 1]."""
        sent = self.sent
        planar = sent.layout == "NCHW"
        if sent.datatype == "UINT8":
            pixels: Tensor = canonical(batch)
            if sent.bgr:
                pixels = pixels[..., ::-1]
            return self._shaped(pixels.transpose(0, 3, 1, 2) if planar else pixels)
        if batch.dtype == np.uint8:
            values = batch.transpose(0, 3, 1, 2) if planar else batch
            full = np.float64(255)
        else:
            values = batch if planar else batch.transpose(0, 2, 3, 1)
            full = np.float64(1)
        channels = 1 if planar else -1
        if sent.bgr:
            values = np.flip(values, channels)
        found: Tensor = values.astype(np.float32, order="C")
        mean, std = np.array(sent.mean), np.array(sent.std)
        sides = (-1, 1, 1) if planar else (-1,)
        if (full * std != 1).any():
            found /= (full * std).astype(np.float32).reshape(sides)
        if mean.any():
            found -= (mean / std).astype(np.float32).reshape(sides)
        return self._shaped(found)

    def read(self, answer: Tensors, n: int) -> Found:
        """Check and convert the answer for `n` images.

        Raises:
            OtherNetwork: another version, or an output is missing or has another shape or type.
        """
        sent = self.sent
        version = answer.version
        if sent.version and version and version != sent.version:
            raise OtherNetwork(f"version is {version[:64]!r}, the card has {sent.version!r}")
        given = self._output(answer, sent.output, n, self.classes)
        logits = None
        if sent.logits_output == sent.output:
            logits = given
        elif sent.logits_output is not None:
            logits = self._output(answer, sent.logits_output, n, self.classes)
        features = None
        if sent.features is not None:
            features = self._output(answer, sent.features, n, None)
        with np.errstate(all="ignore"):
            rows = softmax(given) if sent.answers == "logits" else given.astype(np.float32)
            total = rows.sum(axis=1, dtype=np.float64)
            valid = (np.abs(total - 1) <= SUM_TOLERANCE) & (rows.min(axis=1) >= -SUM_TOLERANCE)
            for more in (logits, features):
                if more is not None:
                    valid &= np.isfinite(more).all(axis=1)
        if not valid.all():
            rows[~valid] = np.float32(1 / self.classes)
            total[~valid] = 1
            if logits is not None:
                logits = np.where(valid[:, np.newaxis], logits, 0)
            if features is not None:
                features = np.where(valid[:, np.newaxis], features, 0)
        if (np.abs(total - 1) > ROUNDING).any() or rows.min() < 0:
            np.maximum(rows, 0, out=rows)
            rows /= rows.sum(axis=1, keepdims=True)
        return Found(rows, None if valid.all() else valid, logits, features)

    def _shaped(self, values: Tensor) -> Tensor:
        shape = self.sent.shape
        return values.reshape(len(values), *shape) if shape else values

    @staticmethod
    def _output(answer: Tensors, name: str, n: int, width: int | None) -> Tensor:
        found = answer.outputs.get(name)
        if found is None:
            raise OtherNetwork(
                f"it has no output {name!r}; it has {', '.join(answer.outputs) or 'none'}"[:200]
            )
        if found.dtype.kind != "f":
            raise OtherNetwork(f"output {name!r} is {found.dtype}, not FP16, FP32 or FP64")
        if found.ndim < 1 or len(found) != n or (width or 1) * n > found.size:
            raise OtherNetwork(f"output {name!r} has shape {list(found.shape)} for {n} images")
        flat = found.reshape(n, math.prod(found.shape[1:]))
        if width is not None and flat.shape[1] != width:
            raise OtherNetwork(
                f"output {name!r} has {flat.shape[1]} values of an image, the card {width} labels"
            )
        return flat.astype(np.float32)


def softmax(logits: Tensor) -> Probs:
    """Probabilities (N, K) of logits, computed in double precision."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    np.exp(wide, out=wide)
    wide /= wide.sum(axis=1, keepdims=True)
    return wide.astype(np.float32)
