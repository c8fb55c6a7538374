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
answer for each. The attacker asks such an API, and the engine `upstream` serves one.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import reprlib
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from scumble.png import encode_png

# Who is asked, who asks and how long the body is are settled elsewhere.
TAKEN = {"authorization", "connection", "content-length", "host", "transfer-encoding"}
JSON = {"body", "item"}
OPTIONS = {
    "png": set[str](),
    "multipart": {"field"},
    "base64": JSON | {"prefix"},
    "floats": JSON | {"layout", "range", "mean", "std"},
}
BOUNDARY = "scumble-api-template"
LONGEST_TARGET = 60_000

Images = npt.NDArray[np.float32]
"""float32 (N, C, H, W) in [0, 1]."""


class InvalidTemplate(ValueError):
    """A file does not describe an API: which field, which value, what is allowed."""


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
        return f"{self.path}?{urlencode(self.query)}" if self.query else self.path

    def encode(self, images: Images) -> tuple[bytes, dict[str, str]]:
        """(N, C, H, W) -> a body and the headers; N is 1 unless `several`."""
        content, kind = self._body(images)
        headers = {name.lower(): value for name, value in self.headers.items()}
        return content, {"content-type": kind, **headers}

    def longest(self, values: int) -> int:
        """An upper bound on an image's bytes; a PNG of noise is larger than its pixels."""
        png = values + values // 50 + 512
        extra = len(self.prefix.encode() + self.item.encode())
        # A float32 in decimals has at most 15 characters; then come commas and brackets.
        sizes = {"base64": png * 4 // 3 + extra, "floats": values * 20 + extra}
        return sizes.get(self.encoding, png)

    def _body(self, images: Images) -> tuple[bytes, str]:
        if self.encoding == "png":
            return _png(images), "image/png"
        if self.encoding == "multipart":
            return _form(self.field, _png(images)), f"multipart/form-data; boundary={BOUNDARY}"
        body, item = orjson.loads(self.body), orjson.loads(self.item)
        items = [_fill(item, "$image", self._value(image)) for image in images]
        body = _fill(body, "$images", items) if self.several else _fill(body, "$image", items[0])
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), "application/json"

    def _value(self, image: Images) -> object:
        """(C, H, W) as something that JSON can hold."""
        if self.encoding == "base64":
            return self.prefix + base64.b64encode(_png(image[None])).decode()
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

    def scores(self, answer: Any, labels: Sequence[str]) -> dict[str, Any]:
        """What an answer has for each label; it may omit some, and the values are not checked.

        Raises:
            ValueError: it has another form, or labels that are not among these.
        """
        scores = self._scores(answer, labels)
        known = set(labels)
        if unknown := [label for label in scores if label not in known]:
            raise ValueError(f"unknown labels: {reprlib.repr(unknown)}")
        return scores

    def _scores(self, answer: Any, labels: Sequence[str]) -> dict[str, Any]:
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
        except (TypeError, RecursionError) as exc:
            raise ValueError(f"request cannot be made: {exc}") from exc
        if len(request.target) > LONGEST_TARGET:
            raise ValueError(
                f"request cannot be made: path and query have {len(request.target)} characters; "
                f"allowed: {LONGEST_TARGET}"
            )
        return self

    @property
    def largest(self) -> int:
        """Images that a request may have: as many as the API takes and its longest body holds."""
        room = self.model.max_body_bytes // self.request.longest(math.prod(self.model.shape))
        return max(1, min(self.request.batch, room))

    @property
    def fingerprint(self) -> str:
        """sha256 of all but the headers, which may have a key that changes."""
        told = self.model_dump(mode="json", exclude={"request": {"headers"}})
        return hashlib.sha256(orjson.dumps(told, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def answers(self, document: Any) -> list[Any]:
        """The answers of a parsed body, one for each image.

        Raises:
            ValueError: there are none where the template says.
        """
        found = _follow(document, self.response.path)
        answers = found if self.request.several else [found]
        if not isinstance(answers, list):
            raise ValueError(f"no list of answers: {reprlib.repr(answers)}")
        return answers


def read_template(path: Path) -> Document:
    """The template in a file.

    Raises:
        InvalidTemplate: it cannot be read, or a field of it is not what is allowed.
    """
    try:
        return Document.model_validate(tomllib.loads(path.read_text("utf-8")))
    except ValidationError as exc:
        raise InvalidTemplate(f"{path}: {_sentence(exc)}") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidTemplate(f"{path}: {exc}") from exc


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


def levels(images: Images) -> npt.NDArray[np.uint8]:
    """(N, C, H, W) in [0, 1] -> uint8 (N, H, W, C), rounded to the nearest level."""
    whole: npt.NDArray[np.uint8] = np.rint(images.clip(0, 1).transpose(0, 2, 3, 1) * 255).astype(
        np.uint8
    )
    return whole


def _png(images: Images) -> bytes:
    (picture,) = levels(images)
    return encode_png(picture)


def _form(field: str, file: bytes) -> bytes:
    """A form with one file."""
    name = re.sub(r'["\x00-\x1f]', lambda found: f"%{ord(found[0]):02X}", field)
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; '
        'filename="image.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    return b"".join((head.encode(), file, f"\r\n--{BOUNDARY}--\r\n".encode()))


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
