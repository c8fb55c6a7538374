"""The network of a JSON API as a template describes it (`scumble/api_template.py`)."""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import orjson

from app.errors import ConfigError
from app.inference.bundle import Card, InputShape, Templated
from app.inference.engines import Batch
from app.inference.upstream.client import Answer
from app.inference.upstream.network_interface import Found, InvalidAnswer, OtherNetwork, checked
from scumble.api_template import Document, InvalidTemplate, read_template
from scumble.defenses.evidence import Score

SHOWN = 60  # bytes of an answer in a message
MOST_TEXT = 200  # characters of a message
NOT_NUMBERS = (b"NaN", b"Infinity")  # which some servers write, though JSON has no such numbers


@dataclass(frozen=True)
class TemplateNetwork:
    """Writes requests as a template says, and reads the answers.

    Attributes:
        template: of the API.
    """

    template: Document
    inline_values: ClassVar[int] = 10_000
    score_hint: ClassVar[str] = 'an API whose answers are logits, scale = "logits", has the energy'

    @classmethod
    def of(cls, card: Card, path: Path | None) -> TemplateNetwork:
        """The network of a card that `scumble connect --template` made.

        Raises:
            ConfigError: no file is given, it is not a template, or the card is of another one.
        """
        if path is None:
            raise ConfigError(
                f"SCUMBLE_UPSTREAM_TEMPLATE is not set; needed for {card.name}: the template that "
                "`scumble connect` made it with"
            )
        network = cls.load(path)
        if card.upstream != network.card or card.input != network.shape:
            raise ConfigError(
                f"SCUMBLE_UPSTREAM_TEMPLATE is {str(path)!r}; {card.name} was made with another "
                "template, or this file has changed: run `scumble connect --template --replace`"
            )
        if len(card.labels) != network.classes:
            raise ConfigError(
                f"{card.name} has {len(card.labels)} labels, {str(path)!r} has {network.classes}"
            )
        return network

    @classmethod
    def load(cls, path: Path) -> TemplateNetwork:
        """The network that a file describes.

        Raises:
            ConfigError: it is not a template, or not one of pictures.
        """
        try:
            template = read_template(path)
        except InvalidTemplate as exc:
            raise ConfigError(f"template {exc}") from exc
        if template.model.shape[0] not in (1, 3):
            raise ConfigError(
                f"template {path}: model.shape has {template.model.shape[0]} channels; "
                "allowed for images: 1 or 3"
            )
        return cls(template)

    @property
    def card(self) -> Templated:
        """What a card says of it."""
        return Templated(template=self.template.fingerprint, answers=self.answers)

    @property
    def shape(self) -> InputShape:
        """Of the images."""
        channels, height, width = self.template.model.shape
        return InputShape.model_validate({"height": height, "width": width, "channels": channels})

    @property
    def classes(self) -> int:
        """K."""
        return len(self.template.model.labels)

    @property
    def max_batch(self) -> int:
        """Images of the largest request."""
        return self.template.largest

    @property
    def method(self) -> str:
        """Method of the requests."""
        return self.template.request.method

    @property
    def path(self) -> str:
        """Path of the requests, below the URL of a replica."""
        return self.template.request.target

    @property
    def version(self) -> str:
        """Empty: answers name no version."""
        return ""

    @property
    def output(self) -> str:
        """Where its rows are, for messages."""
        path = self.template.response.path
        return f"{path!r} of the answer" if path else "the answer"

    @property
    def answers(self) -> Literal["probabilities", "logits"]:
        """What the answers are, once percent are divided by 100."""
        return "logits" if self.template.response.scale == "logits" else "probabilities"

    @property
    def scores(self) -> frozenset[Score]:
        """The energy, if the answers are logits."""
        return frozenset({"energy"} if self.answers == "logits" else ())

    def request(self, batch: Batch) -> tuple[bytes, dict[str, str]]:
        """Body and headers for uint8 (N, H, W, C) or float32 (N, C, H, W) in [0, 1]."""
        if batch.dtype == np.uint8:
            batch = batch.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        return self.template.request.encode(batch.astype(np.float32, copy=False))

    def read(self, answer: Answer, n: int, *, any_version: bool = False) -> Found:
        """Parse, check and convert the answer for `n` images.

        Raises:
            InvalidAnswer: it is not JSON, or has nothing where the template says.
            OtherNetwork: it has other labels, or another number of answers.
        """
        del any_version
        try:
            answers = self.template.answers(_parse(answer.body))
        except ValueError as exc:
            raise InvalidAnswer(str(exc)[:MOST_TEXT]) from None
        if len(answers) != n:
            raise OtherNetwork(f"it has {len(answers)} answers for {n} images")
        values = np.array([self._values(each) for each in answers], np.float64)
        if self.template.response.scale == "percent":
            values /= 100
        with np.errstate(over="ignore"):
            logits = values.astype(np.float32) if self.answers == "logits" else None
        return checked(values, self.answers, logits=logits)

    def version_of(self, answer: Answer) -> str:
        """Empty: answers name no version."""
        del answer
        return ""

    def _values(self, answer: Any) -> list[float]:
        """The numbers of an answer, in the order of the labels.

        Raises:
            OtherNetwork: there is not one number for each label.
        """
        labels = self.template.model.labels
        try:
            scores = self.template.response.scores(answer, labels)
        except ValueError as exc:
            raise OtherNetwork(str(exc)[:MOST_TEXT]) from None
        if len(scores) != len(labels):
            raise OtherNetwork(f"an answer has {len(scores)} of {len(labels)} labels")
        return [_number(scores[label]) for label in labels]


def _parse(body: bytes) -> Any:
    """A JSON document, in which numbers may be NaN or infinite.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        if any(word in body for word in NOT_NUMBERS):
            return json.loads(body)
        return orjson.loads(body)
    except (ValueError, RecursionError):
        start = body[:SHOWN].decode("latin-1")
        raise ValueError(f"it is not JSON: it starts with {start!r}") from None


def _number(value: Any) -> float:
    """A number of an answer; null stands for NaN, which JSON does not have.

    Raises:
        OtherNetwork: it is something else.
    """
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise OtherNetwork(f"an answer has {reprlib.repr(value)} where a number should be")
    try:
        return float(value)
    except OverflowError:
        return math.inf
