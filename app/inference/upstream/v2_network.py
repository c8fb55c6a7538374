"""The network of a V2 server as a bundle's card describes it: images to its input, outputs to rows.

x = (pixels / 255 - mean) / std, in the layout of the card; UINT8 inputs take the pixels
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from app.inference.bundle import Card, Sent
from app.inference.engines import Batch
from app.inference.upstream.client import Answer
from app.inference.upstream.network_interface import Found, OtherNetwork, Tensor, checked
from app.inference.upstream.v2_messages import Tensors, read_answer, write_request
from scumble.defenses.base import canonical
from scumble.defenses.evidence import Score


@dataclass(frozen=True)
class V2Network:
    """Writes the requests for batches and reads the answers.

    Attributes:
        classes: K.
        sent: how the server takes images and gives rows.
    """

    classes: int
    sent: Sent
    inline_values: ClassVar[int] = 250_000
    score_hint: ClassVar[str] = (
        "`scumble connect` takes --logits for the energy and --features for the residual"
    )

    @classmethod
    def of(cls, card: Card) -> V2Network:
        """The network of a card that has one.

        Raises:
            ValueError: the card describes no network of another server.
        """
        if not isinstance(card.upstream, Sent):
            raise ValueError(f"card of {card.name} names no network of a V2 server")
        return cls(len(card.labels), card.upstream)

    @property
    def max_batch(self) -> int:
        """Images of the largest request."""
        return self.sent.max_batch

    @property
    def method(self) -> str:
        """Method of the requests."""
        return "POST"

    @property
    def path(self) -> str:
        """Path of the requests, below the URL of a replica."""
        return "/infer"

    @property
    def version(self) -> str:
        """Version that the answers must have; empty for any."""
        return self.sent.version

    @property
    def output(self) -> str:
        """Name of the output with the rows, for messages."""
        return f"output {self.sent.output!r}"

    @property
    def answers(self) -> Literal["probabilities", "logits"]:
        """What its rows are."""
        return self.sent.answers

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

    def read(self, answer: Answer, n: int, *, any_version: bool = False) -> Found:
        """Parse, check and convert the answer for `n` images.

        Raises:
            InvalidAnswer: it is not what the protocol says.
            OtherNetwork: another version, or an output is missing or has another shape or type.
        """
        tensors = read_answer(answer.length, answer.body)
        return self.read_tensors(tensors._replace(version="") if any_version else tensors, n)

    def version_of(self, answer: Answer) -> str:
        """The version that an answer names; empty if it names none.

        Raises:
            InvalidAnswer: it is not what the protocol says.
        """
        return read_answer(answer.length, answer.body).version

    def read_tensors(self, answer: Tensors, n: int) -> Found:
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
        return checked(given, sent.answers, logits=logits, features=features)

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
