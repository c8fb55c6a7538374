"""Open Inference Protocol v2: a tensor of images in, one of probabilities out, as JSON or bytes.

    body = JSON header [+ the input's bytes, row-major, little-endian]
    Inference-Header-Content-Length = bytes of the JSON, where bytes follow; 0: the body is one file

One input, see `app.http.protocols.v2_tensors`. One output, `probabilities`: FP32 (N, K), or, where
the request has `classification: k`, BYTES (N, k) of `probability:index:label`, the most probable
first. Either is sent as bytes if the request has `binary_data`.

Source: the protocol's REST specification, and Triton's extensions for binary tensors and for
classification.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from app.errors import BadFraming, NotFound, Unprocessable
from app.http.bodies import (
    INLINE_BYTES,
    Headers,
    brief,
    load_json,
    read_buffer,
    refuse_encoding,
    small_number,
)
from app.http.prediction import Flags
from app.http.protocols.v2_tensors import FILES, PIXELS, PREFIX, read_tensor, shapes
from app.inference.bundle import Card
from app.inference.deadline import Deadline
from app.inference.engines import Batch, Probs
from app.inference.executor import BoundedExecutor
from app.settings import LimitSettings

HALF = re.compile(rb"FP16|BF16")
LENGTH = "inference-header-content-length"
OUTPUT = "probabilities"


@dataclass(frozen=True)
class InferRequest:
    """A parsed request.

    Attributes:
        images: pixels of all images, or their encoded files.
        id: its id, if it has one.
        binary: whether the output is sent as bytes.
        classes: number of classes to send instead of all probabilities; 0 for all probabilities.
    """

    images: Batch | list[bytes]
    id: str | None = None
    binary: bool = False
    classes: int = 0


@dataclass(frozen=True)
class V2:
    """The codec of `POST /v2/models/{model}/infer`.

    Attributes:
        card: the model's.
        limits: of a request.
        executor: parses large JSON, and widens large tensors of half precision.
    """

    card: Card
    limits: LimitSettings
    executor: BoundedExecutor

    async def read(self, request: Request, headers: Headers, deadline: Deadline) -> InferRequest:
        """Read the input tensor and what is asked of the output.

        Raises:
            RequestError: the path names another model, or the body is invalid.
        """
        self.check_path(request)
        refuse_encoding(headers)
        body = await read_buffer(headers, request.receive, self.limits.max_body_bytes)
        length = json_length(headers, body)
        small = len(body) <= INLINE_BYTES
        if length <= INLINE_BYTES and (small or HALF.search(body, 0, length) is None):
            return read_infer(headers, body, self.card, self.limits)
        task = partial(read_infer, headers, body, self.card, self.limits)
        (asked,) = await self.executor([task], len(body), deadline)
        return asked

    def write(
        self,
        asked: InferRequest,
        probabilities: Probs,
        request_id: str,
        abstained: Flags | None = None,
    ) -> Response:
        """The output tensor; the id in it is the one in the body of the request.

        The protocol has no place to say what is abstained: the row is uniform.
        """
        del request_id, abstained
        body, headers = write_infer(self.card, asked, probabilities)
        return Response(body, headers=headers)

    def check_path(self, request: Request) -> None:
        """Refuse other models and versions. Hot routes have no parameters, only the served model.

        Raises:
            NotFound: the path names another model or version.
        """
        name = request.path_params.get("model", self.card.name)
        if name != self.card.name:
            raise NotFound(f"unknown model {name[:64]!r}; available: {self.card.name!r}")
        version = request.path_params.get("version", self.card.version)
        if version != self.card.version:
            raise NotFound(
                f"unknown version {version[:64]!r} of {name!r}; available: {self.card.version!r}"
            )


def metadata(card: Card, *, floats: bool) -> dict[str, Any]:
    """Inputs and outputs of the model; a request has one of the inputs."""
    kinds = {kind: shape for kind, shape in shapes(card).items() if floats or kind == "UINT8"}
    inputs = [
        (FILES, "BYTES", [-1]),
        *((PIXELS, kind, [-1, *side]) for kind, side in kinds.items()),
    ]
    outputs = [(OUTPUT, "FP32", [-1, len(card.labels)])]
    names = ("name", "datatype", "shape")
    return {
        "name": card.name,
        "versions": [card.version],
        "platform": "onnx_onnxv1",
        "inputs": [dict(zip(names, tensor, strict=True)) for tensor in inputs],
        "outputs": [dict(zip(names, tensor, strict=True)) for tensor in outputs],
    }


def json_length(headers: Headers, body: bytes | bytearray) -> int:
    """The length of the JSON at the start of the body.

    Raises:
        BadFraming: its header is not a number, or exceeds the body.
    """
    found = headers.get(LENGTH.encode())
    if found is None:
        return len(body)
    text = found.decode("latin-1")
    length = small_number(text)
    if length is None or length > len(body):
        raise BadFraming(f"{LENGTH} is {brief(text)}; allowed: 0 to the body's {len(body)}")
    return length


def read_infer(
    headers: Headers, body: bytes | bytearray, card: Card, limits: LimitSettings
) -> InferRequest:
    """Parse and check an infer request.

    Raises:
        BadFraming: the JSON, its length or the tensor's bytes are invalid.
        Unprocessable: the input, datatype, shape or a value does not fit the model.
        TooLarge: too many images.
    """
    length = json_length(headers, body)
    if length == 0 and LENGTH.encode() in headers:
        return InferRequest([bytes(body)], binary=True)
    document, tail = split_body(body, length)
    tensor = _the_input(document)
    output = _the_output(document)
    request_id = request_id_of(document)
    whole = flag(document, "binary_data_output", default=False)
    return InferRequest(
        images=read_tensor(tensor, tail, card, limits),
        id=request_id,
        # A flag on the requested output overrides the one on the request.
        binary=flag(output, "binary_data", default=whole),
        classes=min(_classification(output), len(card.labels)),
    )


def write_infer(
    card: Card, request: InferRequest, probabilities: Probs
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the response."""
    texts = _classified(probabilities, request.classes, card.labels) if request.classes else None
    output: dict[str, Any] = {
        "name": OUTPUT,
        "datatype": "FP32" if texts is None else "BYTES",
        "shape": [len(probabilities), request.classes or len(card.labels)],
    }
    answer = {"model_name": card.name, "model_version": card.version, "outputs": [output]}
    if request.id is not None:
        answer["id"] = request.id
    if not request.binary:
        output["data"] = probabilities.reshape(-1) if texts is None else texts
        body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return body, {"Content-Type": "application/json"}
    raw = (
        np.ascontiguousarray(probabilities, "<f4").tobytes()
        if texts is None
        else b"".join(map(_prefixed, texts))
    )
    output["parameters"] = {"binary_data_size": len(raw)}
    header = orjson.dumps(answer)
    return header + raw, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(header)),
    }


def request_id_of(document: dict[str, Any]) -> str | None:
    """The id of a request, if it has one.

    Raises:
        BadFraming: it is neither a string nor an integer.
    """
    request_id = document.get("id")
    if type(request_id) is int:
        return str(request_id)  # the protocol has strings in responses
    if request_id is not None and not isinstance(request_id, str):
        raise BadFraming(f"id is {brief(request_id)}; allowed: a string or an integer")
    return request_id


def split_body(body: bytes | bytearray, length: int) -> tuple[dict[str, Any], memoryview]:
    """The JSON object at the start of a body, and the bytes after it.

    Raises:
        BadFraming: the JSON is invalid, or no object.
    """
    view = memoryview(body)
    document = load_json(view[:length])
    if not isinstance(document, dict):
        raise BadFraming("body must be a JSON object")
    return document, view[length:]


def _the_input(document: dict[str, Any]) -> dict[str, Any]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(row, dict) for row in inputs[:2]):
        raise BadFraming("inputs must be a list of tensors")
    names = [row.get("name") for row in inputs[:2]]
    if names not in ([FILES], [PIXELS]):
        raise Unprocessable(
            f"the {len(inputs)} inputs begin with {brief(names)}; "
            f"the model takes one, {FILES!r} or {PIXELS!r}"
        )
    tensor: dict[str, Any] = inputs[0]
    return tensor


def _the_output(document: dict[str, Any]) -> dict[str, Any]:
    """The requested output; empty if none is named."""
    outputs = document.get("outputs")
    if outputs is None:
        return {}
    if not isinstance(outputs, list) or not all(isinstance(row, dict) for row in outputs[:2]):
        raise BadFraming("outputs must be a list of requested outputs")
    names = [row.get("name") for row in outputs[:2]]
    if outputs and names != [OUTPUT]:
        raise Unprocessable(
            f"the {len(outputs)} outputs begin with {brief(names)}; the model gives one, {OUTPUT!r}"
        )
    return outputs[0] if outputs else {}


def parameters_of(owner: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a request or a tensor; some clients send null for none.

    Raises:
        BadFraming: they are not an object.
    """
    parameters = owner.get("parameters")
    if not isinstance(parameters, dict | None):
        raise BadFraming("parameters must be an object")
    return parameters or {}


def flag(owner: dict[str, Any], name: str, *, default: bool) -> bool:
    """A parameter that is true or false.

    Raises:
        BadFraming: it is something else.
    """
    value = parameters_of(owner).get(name, default)
    if not isinstance(value, bool):
        raise BadFraming(f"parameter {name} must be true or false")
    return value


def _classification(output: dict[str, Any]) -> int:
    value = parameters_of(output).get("classification", 0)
    if type(value) is not int or value < 0:
        raise BadFraming("parameter classification must be a number of classes")
    return value


def _classified(probabilities: Probs, count: int, labels: list[str]) -> list[str]:
    """`probability:index:label` of the `count` most probable classes of each image.

    The digits are the same as in JSON output, as orjson writes both.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(probabilities, order, axis=1).reshape(-1)
    digits = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY).decode()[1:-1].split(",")
    return [
        f"{digit}:{k}:{labels[k]}"
        for digit, k in zip(digits, order.reshape(-1).tolist(), strict=True)
    ]


def _prefixed(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(PREFIX, "little") + raw
