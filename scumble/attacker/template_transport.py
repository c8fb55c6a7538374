"""A transport for other people's APIs, which a template describes (`scumble/api_template.py`)."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from scumble.api_template import Document, InvalidTemplate, Response, read_template
from scumble.attacker.errors import BadTemplate, OracleRefused
from scumble.attacker.transports import Images, Message, Probs


class TemplateTransport:
    """The way of asking that a file describes.

    Labels that an answer omits get 0, and the others keep their values.
    """

    def __init__(self, stem: str, document: Document) -> None:
        self.name = f"template:{stem}"
        self.step = 0.0 if document.request.encoding == "floats" else 1 / 255
        self._document = document
        self._places = {label: i for i, label in enumerate(document.model.labels)}

    def pack(self, model: str, images: Images) -> Message:
        """Images in the template's encoding."""
        del model
        request = self._document.request
        content, headers = request.encode(images)
        return Message(request.target, content, headers, request.method)

    def unpack(self, headers: Any, content: bytes, labels: int) -> Probs:
        """The answers that the template's path leads to."""
        del headers
        try:
            answers = self._document.answers(orjson.loads(content))
            rows = [row_of(self._document.response, each, self._places) for each in answers]
        except ValueError as exc:
            raise OracleRefused(f"the answer does not follow {self.name}: {exc}") from exc
        return np.array(rows, np.float32).reshape(len(rows), labels)

    def largest(self, limits: dict[str, int]) -> int:
        """As many images as the API takes and its longest body holds."""
        del limits  # the template's own
        return self._document.largest


@dataclass(frozen=True)
class Template:
    """What `HttpOracle` needs to query another API.

    Attributes:
        transport: how images and answers travel.
        model: what `/v1/model` would have told.
    """

    transport: TemplateTransport
    model: dict[str, Any]


def load(path: Path) -> Template:
    """The template in a file.

    Raises:
        BadTemplate: it cannot be read, or a field of it is not what is allowed.
    """
    try:
        document = read_template(path)
    except InvalidTemplate as exc:
        raise BadTemplate(str(exc)) from exc
    model = document.model
    described = {
        "name": model.name,
        "version": "",
        "labels": list(model.labels),
        "input": dict(zip(("channels", "height", "width"), model.shape, strict=True)),
        "limits": {"max_body_bytes": model.max_body_bytes, "max_images": document.request.batch},
    }
    return Template(TemplateTransport(path.stem, document), described)


def row_of(response: Response, answer: Any, places: Mapping[str, int]) -> Probs:
    """An answer as probabilities (K,).

    Raises:
        ValueError: it is not what the template says.
    """
    scores = response.scores(answer, list(places))
    if odd := [x for x in scores.values() if type(x) not in (int, float)]:
        raise ValueError(f"not numbers: {reprlib.repr(odd)}")
    probs = np.array(list(scores.values()), np.float64)
    if response.scale == "percent":
        probs /= 100
    elif response.scale == "logits":
        with np.errstate(over="ignore"):  # a difference of -inf is a probability of 0
            probs = np.exp(probs - probs.max(initial=-np.inf))
        probs /= probs.sum()
    if not ((probs > -1e-6) & (probs < 1 + 1e-6)).all():
        raise ValueError(f"no {response.scale}: {reprlib.repr(scores)}")
    row = np.zeros(len(places), np.float32)
    row[[places[label] for label in scores]] = probs
    return row
