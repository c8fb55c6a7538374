"""The service's HTTP contract as values: how requests are built and answers are read.

There is no network here, so `Client` and `AsyncClient` share all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from os import PathLike
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import httpx2
import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from scumble.client.errors import BadAnswer, BadImage, Refused
from scumble.png import encode_png, to_image

Sendable: TypeAlias = bytes | str | PathLike[str] | Image.Image | npt.NDArray[np.uint8]
T = TypeVar("T")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Choice:
    """One class of a top-k answer."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the service says of one image.

    Attributes:
        label: the most probable class.
        index: its place among the model's labels.
        probability: its probability.
        probabilities: all K of them, in the order of the labels; None if `top_k` was asked for.
        top: the `top_k` most probable classes, best first; None if `top_k` was not asked for.
        abstained: the service does not answer this image: all classes are equally probable, and
            `label` is merely the first.
    """

    label: str
    index: int
    probability: float
    probabilities: tuple[float, ...] | None = None
    top: tuple[Choice, ...] | None = None
    abstained: bool = False


@dataclass(frozen=True)
class Answer:
    """The answer to one request: a prediction for each image, in the order sent."""

    model: str
    version: str
    id: str
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class InputShape:
    """What the model sees; the service resizes other images."""

    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class Limits:
    """What the service accepts at most."""

    max_body_bytes: int
    max_images: int
    max_pixels: int


@dataclass(frozen=True)
class ModelInfo:
    """What the service tells about its model."""

    name: str
    version: str
    labels: tuple[str, ...]
    input: InputShape
    formats: tuple[str, ...]
    limits: Limits


@dataclass(frozen=True)
class Call(Generic[T]):
    """One exchange with the service.

    Attributes:
        method: of HTTP.
        path: below the service's URL.
        options: the rest of httpx2's `build_request`.
        parse: the answer's body to its value; ValueError if it is not one.
    """

    method: str
    path: str
    options: dict[str, Any]
    parse: Callable[[bytes], T]

    def request(self, http: httpx2.Client | httpx2.AsyncClient) -> httpx2.Request:
        """The request, with what `http` adds to each."""
        return http.build_request(self.method, self.path, **self.options)

    def read(self, response: httpx2.Response) -> T:
        """The value in an answer.

        Raises:
            Refused: the status says so.
            BadAnswer: any other answer without the value.
        """
        url, status = shown(response.request.url), response.status_code
        if status >= HTTPStatus.BAD_REQUEST:
            problem = _problem(response.content)
            detail = problem.get("detail") or problem.get("title") or response.reason_phrase
            raise Refused(url, status, str(detail), problem)
        if status != HTTPStatus.OK:
            # Not followed: the images would go to a host that the user did not name.
            target = response.headers.get("location")
            pointer = f" (it points to {target})" if target else ""
            raise BadAnswer(f"{url} answered {status}, neither result nor refusal{pointer}")
        try:
            return self.parse(response.content)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "body"
            raise BadAnswer(f"{url} answered {status}, but {place}: {first['msg']}") from exc
        except ValueError as exc:
            raise BadAnswer(f"{url} answered {status}, but {exc}") from exc


def predict(
    images: Sendable | Iterable[Sendable], *, top_k: int | None, request_id: str | None
) -> Call[Answer]:
    """`POST /v1/predict` with one image as the body, or several as multipart form data.

    Raises:
        BadImage: an image cannot be sent, or there is none.
        OSError: a file cannot be read.
        ValueError: the request id has other characters or is longer than the service takes.
    """
    parts = [encode(image) for image in _several(images)]
    options: dict[str, Any] = {"headers": {}}
    match parts:
        case []:
            raise BadImage("there are no images to send")
        case [(content, media_type)]:
            options["content"] = content
            options["headers"]["content-type"] = media_type
        case _:
            # Starlette takes a part for a file only if it bears a file name.
            options["files"] = [("image", (f"image-{i}", *part)) for i, part in enumerate(parts)]
    if top_k is not None:
        options["params"] = {"top_k": top_k}
    if request_id is not None:
        if not REQUEST_ID.fullmatch(request_id):
            raise ValueError(f"request_id is {request_id!r}; allowed: {REQUEST_ID.pattern}")
        options["headers"]["x-request-id"] = request_id

    def parse(body: bytes) -> Answer:
        answer = _ANSWER.validate_json(body, strict=True)
        if len(answer.predictions) != len(parts):
            raise ValueError(f"with {len(answer.predictions)} predictions for {len(parts)} images")
        return answer

    return Call("POST", "/v1/predict", options, parse)


def model() -> Call[ModelInfo]:
    """`GET /v1/model`."""
    return Call("GET", "/v1/model", {}, lambda body: _MODEL.validate_json(body, strict=True))


def encode(image: Sendable) -> tuple[bytes, str]:
    """The bytes to send and their media type; pixels become a PNG, which loses nothing.

    Args:
        image: PNG, JPEG, WebP, AVIF or HEIC bytes, the path of such a file, a Pillow image, or
            a uint8 array (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        BadImage: none of these.
        OSError: the file cannot be read.
    """
    match image:
        case bytes():
            return image, _media_type(image, f"{len(image)} bytes")
        case str() | PathLike():
            content = Path(image).read_bytes()
            return content, _media_type(content, repr(str(image)))
        case Image.Image():
            return _png(image), "image/png"
        case np.ndarray():
            return _png(_picture(image)), "image/png"
        case _:
            raise BadImage(
                f"an image is {type(image).__name__}; allowed: bytes, a path, "
                "a Pillow image or a uint8 array"
            )


def shown(url: httpx2.URL) -> str:
    """`url` for messages: without a user's name and password."""
    return str(url.copy_with(userinfo=b""))


def typed(url: str) -> str:
    """Quotes an invalid URL for a message; hides it if it may contain a password."""
    return "'***'" if "@" in url else repr(url)


def _several(images: Sendable | Iterable[Sendable]) -> Iterable[Sendable]:
    if isinstance(images, np.ndarray):
        return images if images.ndim == 4 else [images]  # (N, H, W, C)
    if isinstance(images, bytes | str | PathLike | Image.Image) or not isinstance(images, Iterable):
        return [images]
    return images


def _media_type(content: bytes, name: str) -> str:
    for start, media_type in MEDIA_TYPES.items():
        if start.match(content):
            return media_type
    raise BadImage(f"{name}: not a PNG, JPEG, WebP, AVIF or HEIC image")


def _picture(pixels: npt.NDArray[Any]) -> Image.Image:
    form = pixels.shape[2:] if pixels.ndim in (2, 3) and pixels.size else None
    if pixels.dtype != np.uint8 or form not in ((), (1,), (3,)):
        raise BadImage(
            f"an array is {pixels.dtype} {pixels.shape}; "
            "allowed: uint8 (H, W), (H, W, 1) or (H, W, 3)"
        )
    return to_image(pixels)


def _png(picture: Image.Image) -> bytes:
    try:
        return encode_png(picture)
    except (OSError, ValueError) as exc:
        raise BadImage(f"{picture}: {exc}; .convert('RGB') makes it sendable") from exc


def _problem(body: bytes) -> dict[str, Any]:
    """The members of a problem, none if `body` is not one: a proxy may refuse with a page."""
    try:
        problem = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return problem if isinstance(problem, dict) else {}


_ANSWER = TypeAdapter(Answer)
_MODEL = TypeAdapter(ModelInfo)

# how the file starts -> its media type
MEDIA_TYPES = {
    re.compile(rb"\x89PNG\r\n\x1a\n"): "image/png",
    re.compile(rb"\xff\xd8\xff"): "image/jpeg",
    re.compile(rb"RIFF....WEBP", re.DOTALL): "image/webp",
    re.compile(rb"....ftypavi[fs]", re.DOTALL): "image/avif",
    re.compile(rb"....ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL): "image/heic",
}
