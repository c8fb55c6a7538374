"""Other people's APIs: how to ask them and how to read their answers, in a TOML file.

    [model]
    name = "cifar"
    labels = ["cat", "dog"]           # in the order of a list of numbers
    shape = [3, 32, 32]               # channels, height, width
    max_body_bytes = 1_000_000        # optional

    [request]
    path = "/v1/models/cifar:predict"
    method = "POST"                   # or PUT
    headers = { x-api-key = "..." }   # the owner's token is added to these
    query = { verbose = "0" }
    encoding = "floats"               # or png (the body), multipart (`field` names the part),
                                      # base64 (`prefix` such as "data:image/png;base64,")
    layout = "NHWC"                   # or NCHW
    range = [0, 255]                  # what black and white become ...
    mean = [123.7, 116.3, 103.5]      # ... before this is taken off ...
    std = [58.4, 57.1, 57.4]          # ... and it is divided by this
    body = '{"instances": "$images"}' # "$image" is one image, "$images" a list of them
    item = '{"pixels": "$image"}'     # what an image is wrapped in; default nothing
    batch = 32                        # images of a request; more than 1 needs "$images"

    [response]
    path = "predictions.*.scores"     # "*" is each of a list, 0 its first, "" the whole
    form = "list"                     # or map {label: p}, or pairs [{label, score}], where
                                      # `label` and `score` are paths inside each
    scale = "logits"                  # or probabilities, percent

The path of the response leads to one answer, or where the body has "$images" to a list with one
answer for each. Labels that an answer omits get 0, and the others keep their values.
"""

from __future__ import annotations

import base64
import math
import reprlib
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import httpx2
import numpy as np
import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from scumble.attacker.errors import BadTemplate, OracleRefused
from scumble.attacker.transports import Images, Message, Probs, levels
from scumble.client import wire

# Who is asked, who asks and how long the body is are settled elsewhere.
TAKEN = {"authorization", "connection", "content-length", "host", "transfer-encoding"}
JSON = {"body", "item"}
OPTIONS = {
    "png": set[str](),
    "multipart": {"field"},
    "base64": JSON | {"prefix"},
    "floats": JSON | {"layout", "range", "mean", "std"},
}


def _json(text: str) -> str:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise ValueError(f"{reprlib.repr(text)} is not JSON: {exc}") from exc
    return text


Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Json = Annotated[Text, AfterValidator(_json)]
Local = Annotated[str, Field(pattern=r'^/([!"$-.0->@-~][!"$->@-~]*)?$', max_length=4000)]
Name = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$", max_length=200)]
Value = Annotated[str, Field(pattern=r"^([!-~]([ -~]*[!-~])?)?$", max_length=4000)]
Dotted = Annotated[str, Field(pattern=r"^([^.]+(\.[^.]+)*)?$", max_length=200)]
Size = Annotated[int, Field(ge=1, le=10_000)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Positive = Annotated[float, Field(ge=1e-6, le=1e6)]
Array = Field(strict=False)  # TOML has lists, which are tuples here


class Part(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(Part):
    """What the API does not tell of its model."""

    name: Text
    labels: Annotated[tuple[Text, ...], Array, Field(min_length=2)]
    shape: Annotated[tuple[Size, Size, Size], Array]
    max_body_bytes: Annotated[int, Field(ge=1, lt=2**63)] = 2**31

    @model_validator(mode="after")
    def _once(self) -> Self:
        if twice := [label for label, times in Counter(self.labels).items() if times > 1]:
            raise ValueError(f"labels has {reprlib.repr(twice)} twice; allowed: each once")
        return self


class Request(Part):
    """How images are sent."""

    path: Local
    method: Literal["POST", "PUT"] = "POST"
    headers: dict[Name, Value] = {}
    query: dict[Text, str] = {}
    batch: Size = 1
    encoding: Literal["png", "multipart", "base64", "floats"]
    field: Text = "image"
    body: Json = '"$image"'
    item: Json = '"$image"'
    prefix: Annotated[str, Field(max_length=1000)] = ""
    layout: Literal["NHWC", "NCHW"] = "NCHW"
    range: Annotated[tuple[Number, Number], Array] = (0, 1)
    mean: Annotated[tuple[Number, ...], Array] = (0,)
    std: Annotated[tuple[Positive, ...], Array] = (1,)

    @property
    def several(self) -> bool:
        """Whether a request holds a list of images."""
        return self.encoding in ("base64", "floats") and _has(self.body, "$images")

    @property
    def target(self) -> str:
        """Path and query."""
        return str(httpx2.URL(self.path, params=self.query)) if self.query else self.path

    def encode(self, images: Images) -> tuple[bytes, str]:
        """(N, C, H, W) -> a body and its media type; N is 1 unless `several`."""
        if self.encoding == "png":
            return _png(images)
        if self.encoding == "multipart":
            files = {self.field: ("image.png", *_png(images))}
            form = httpx2.Request("POST", "http://localhost", files=files)
            return form.read(), form.headers["content-type"]
        body, item = orjson.loads(self.body), orjson.loads(self.item)
        items = [_fill(item, "$image", self._value(image)) for image in images]
        body = _fill(body, "$images", items) if self.several else _fill(body, "$image", items[0])
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), "application/json"

    def longest(self, values: int) -> int:
        """An upper bound on an image's bytes; a PNG of noise is larger than its pixels."""
        png = values + values // 50 + 512
        extra = len(self.prefix.encode() + self.item.encode())
        # A float32 in decimals has at most 15 characters; then come commas and brackets.
        sizes = {"base64": png * 4 // 3 + extra, "floats": values * 20 + extra}
        return sizes.get(self.encoding, png)

    def _value(self, image: Images) -> object:
        """(C, H, W) as something that JSON can hold."""
        if self.encoding == "base64":
            return self.prefix + base64.b64encode(_png(image[None])[0]).decode()
        low, high = self.range
        mean, std = (np.array(x, np.float32).reshape(-1, 1, 1) for x in (self.mean, self.std))
        pixels = (low + image * (high - low) - mean) / std
        ordered = pixels if self.layout == "NCHW" else pixels.transpose(1, 2, 0)
        return np.ascontiguousarray(ordered, np.float32)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        known = OPTIONS[self.encoding]
        if odd := self.model_fields_set & set[str]().union(*OPTIONS.values()) - known:
            raise ValueError(f"{sorted(odd)} given; allowed with {self.encoding}: {sorted(known)}")
        own = TAKEN | ({"content-type"} if self.encoding == "multipart" else set())
        if taken := {name.lower() for name in self.headers} & own:
            raise ValueError(f"headers has {sorted(taken)}; allowed: all but {sorted(own)}")
        if self.several == _has(self.body, "$image"):
            raise ValueError(f'body is {self.body!r}; allowed: with either "$image" or "$images"')
        if not _has(self.item, "$image"):
            raise ValueError(f'item is {self.item!r}; allowed: with "$image"')
        if self.batch > 1 and not self.several:
            raise ValueError(f'batch is {self.batch}; allowed: 1, or body with "$images"')
        return self


class Response(Part):
    """Where the answers are and what they look like."""

    form: Literal["list", "map", "pairs"]
    path: Dotted = ""
    label: Dotted = "label"
    score: Dotted = "score"
    scale: Literal["probabilities", "percent", "logits"] = "probabilities"

    def row(self, answer: Any, places: Mapping[str, int]) -> Probs:
        """An answer as probabilities (K,).

        Raises:
            ValueError: it is not what the template says.
        """
        scores = self._scores(answer, list(places))
        if unknown := [label for label in scores if label not in places]:
            raise ValueError(f"unknown labels: {reprlib.repr(unknown)}")
        if odd := [x for x in scores.values() if type(x) not in (int, float)]:
            raise ValueError(f"not numbers: {reprlib.repr(odd)}")
        probs = np.array(list(scores.values()), np.float64)
        if self.scale == "percent":
            probs /= 100
        elif self.scale == "logits":
            with np.errstate(over="ignore"):  # a difference of -inf is a probability of 0
                probs = np.exp(probs - probs.max(initial=-np.inf))
            probs /= probs.sum()
        if not ((probs > -1e-6) & (probs < 1 + 1e-6)).all():
            raise ValueError(f"no {self.scale}: {reprlib.repr(scores)}")
        row = np.zeros(len(places), np.float32)
        row[[places[label] for label in scores]] = probs
        return row

    def _scores(self, answer: Any, labels: list[str]) -> dict[str, Any]:
        match self.form, answer:
            case "list", list() if len(answer) == len(labels):
                return dict(zip(labels, answer, strict=True))
            case "map", dict():
                return answer
            case "pairs", list():
                pairs = [(_follow(x, self.label), _follow(x, self.score)) for x in answer]
                scores = {str(label): score for label, score in pairs}
                if len(scores) == len(pairs):
                    return scores
        raise ValueError(f"no {self.form} of {len(labels)} labels: {reprlib.repr(answer)}")


class Document(Part):
    """The whole file."""

    model: Model
    request: Request
    response: Response

    @model_validator(mode="after")
    def _fit(self) -> Self:
        request, channels = self.request, self.model.shape[0]
        if request.encoding != "floats" and channels not in (1, 3):
            raise ValueError(f"model.shape has {channels} channels; allowed in a PNG: 1 or 3")
        if {len(request.mean), len(request.std)} - {1, channels}:
            raise ValueError(f"request.mean or std; allowed: 1 or {channels} numbers")
        try:
            _ = request.target, request.encode(np.zeros((1, channels, 1, 1), np.float32))
        except (TypeError, RecursionError, httpx2.InvalidURL) as exc:
            raise ValueError(f"request cannot be made: {exc}") from exc
        return self


class TemplateTransport:
    """The way of asking that a file describes."""

    def __init__(self, stem: str, document: Document) -> None:
        self.name = f"template:{stem}"
        self.step = 0.0 if document.request.encoding == "floats" else 1 / 255
        self._request = document.request
        self._response = document.response
        self._values = math.prod(document.model.shape)
        self._places = {label: i for i, label in enumerate(document.model.labels)}

    def pack(self, model: str, images: Images) -> Message:
        """Images in the template's encoding."""
        del model
        content, kind = self._request.encode(images)
        headers = {name.lower(): value for name, value in self._request.headers.items()}
        headers = {"content-type": kind, **headers}
        return Message(self._request.target, content, headers, self._request.method)

    def unpack(self, headers: Any, content: bytes, labels: int) -> Probs:
        """The answers that the template's path leads to."""
        del headers
        try:
            found = _follow(orjson.loads(content), self._response.path)
            answers = found if self._request.several else [found]
            if not isinstance(answers, list):
                raise ValueError(f"no list of answers: {reprlib.repr(answers)}")
            rows = [self._response.row(answer, self._places) for answer in answers]
        except ValueError as exc:
            raise OracleRefused(f"the answer does not follow {self.name}: {exc}") from exc
        return np.array(rows, np.float32).reshape(len(rows), labels)

    def largest(self, limits: dict[str, int]) -> int:
        """As many images as the API takes and its longest body holds."""
        room = limits["max_body_bytes"] // self._request.longest(self._values)
        return max(1, min(self._request.batch, room))


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
        document = Document.model_validate(tomllib.loads(path.read_text("utf-8")))
    except ValidationError as exc:
        raise BadTemplate(f"{path}: {_sentence(exc)}") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise BadTemplate(f"{path}: {exc}") from exc
    model = document.model
    described = {
        "name": model.name,
        "version": "",
        "labels": list(model.labels),
        "input": dict(zip(("channels", "height", "width"), model.shape, strict=True)),
        "limits": {"max_body_bytes": model.max_body_bytes, "max_images": document.request.batch},
    }
    return Template(TemplateTransport(path.stem, document), described)


def _sentence(invalid: ValidationError) -> str:
    """The first error as field, value and what is allowed."""
    error = invalid.errors(include_url=False)[0]
    place, found = ".".join(map(str, error["loc"])), error["input"]
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "extra_forbidden":
        table = TABLES[str(error["loc"][-2]) if error["loc"][1:] else ""]
        return f"{place} is {_shown(found)}; allowed here: {', '.join(table.model_fields)}"
    if error["type"] == "value_error":  # one of those above, with the value in it
        return f"{place}: {error['ctx']['error']}".removeprefix(": ")
    return f"{place} is {_shown(found)}; allowed: {error['msg'].removeprefix('Input should be ')}"


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer too long for decimals
        return "a long number"


def _follow(node: Any, path: str) -> Any:
    """What is at the end of a dotted path; ValueError if it ends before."""
    step, _, rest = path.partition(".")
    if step == "*" and isinstance(node, list):
        return [_follow(child, rest) for child in node]
    if step.isdecimal() and isinstance(node, list) and int(step) < len(node):
        return _follow(node[int(step)], rest)
    if step and (not isinstance(node, dict) or step not in node):
        raise ValueError(f"no {step!r} in {reprlib.repr(node)}")
    return _follow(node[step], rest) if step else node


def _png(images: Images) -> tuple[bytes, str]:
    (picture,) = levels(images)
    return wire.encode(picture)


def _has(text: str, word: str) -> bool:
    node = orjson.loads(text)
    return bool(_fill(node, word, None) != node)


def _fill(node: Any, word: str, value: object) -> Any:
    """A copy of the JSON `node` with `value` for every string `word`."""
    match node:
        case dict():
            return {name: _fill(child, word, value) for name, child in node.items()}
        case list():
            return [_fill(child, word, value) for child in node]
    return value if node == word else node


TABLES: dict[str, type[Part]] = {
    "": Document,
    "model": Model,
    "request": Request,
    "response": Response,
}
