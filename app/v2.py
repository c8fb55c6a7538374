"""Open Inference Protocol v2: tensors in, probabilities out, as JSON or as raw bytes.

    body = JSON header [+ the input's bytes, row-major, little-endian]
    Inference-Header-Content-Length = bytes of the JSON, where bytes follow

One input, `pixels`: UINT8 (N, H, W, C), or FP32 (N, C, H, W) in [0, 1]. One output,
`probabilities`: FP32 (N, K), as bytes where the request says `binary_data`.

Source: the protocol's REST specification and Triton's binary tensor extension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from starlette.datastructures import Headers

from app.bodies import small_number
from app.bundle import Card
from app.engines import Batch, Probs
from app.errors import BadFraming, TooLarge, Unprocessable

LENGTH = "inference-header-content-length"
INPUT, OUTPUT = "pixels", "probabilities"
DTYPES = {"UINT8": 1, "FP32": 4}  # bytes of an element


@dataclass(frozen=True)
class InferRequest:
    """A parsed request: the images, its id if it has one, and whether bytes are asked for."""

    batch: Batch
    id: str | None
    binary: bool


def shapes(card: Card) -> dict[str, tuple[int, int, int]]:
    """An image's shape for each datatype."""
    h, w, c = card.input.height, card.input.width, card.input.channels
    return {"UINT8": (h, w, c), "FP32": (c, h, w)}


def read_infer(
    headers: Headers, body: bytes | bytearray, card: Card, max_images: int
) -> InferRequest:
    """Parse and check an infer request.

    Raises:
        BadFraming: the JSON, its length or the tensor's bytes are not what they say.
        Unprocessable: another input, datatype or shape than the model's, or values out of range.
        TooLarge: more than `max_images`.
    """
    document, tail = _split(headers, body)
    tensor = _the_input(document)
    batch = _tensor(tensor, tail, card, max_images)
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadFraming(f"id is {request_id!r}; it must be a string")
    return InferRequest(batch, request_id, _wants_binary(document))


def write_infer(
    card: Card, request: InferRequest, probabilities: Probs
) -> tuple[bytes, dict[str, str]]:
    """The answer's body and headers."""
    output: dict[str, Any] = {
        "name": OUTPUT,
        "datatype": "FP32",
        "shape": list(probabilities.shape),
    }
    answer = {"model_name": card.name, "model_version": card.version, "outputs": [output]}
    if request.id is not None:
        answer["id"] = request.id
    if not request.binary:
        output["data"] = probabilities.reshape(-1)
        body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return body, {"Content-Type": "application/json"}
    raw = np.ascontiguousarray(probabilities, "<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    header = orjson.dumps(answer)
    return header + raw, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(header)),
    }


def _split(headers: Headers, body: bytes | bytearray) -> tuple[dict[str, Any], memoryview]:
    text = headers.get(LENGTH)
    length = len(body) if text is None else small_number(text) or 0
    if text is not None and not 0 < length <= len(body):
        raise BadFraming(f"{LENGTH} is {text[:20]!r}; allowed: 1 to the body's {len(body)} bytes")
    view = memoryview(body)
    try:
        document = orjson.loads(view[:length])
    except orjson.JSONDecodeError as exc:
        raise BadFraming(f"the request's JSON is malformed: {exc}") from exc
    if not isinstance(document, dict):
        raise BadFraming("the request's JSON must be an object")
    return document, view[length:]


def _the_input(document: dict[str, Any]) -> dict[str, Any]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(row, dict) for row in inputs):
        raise BadFraming("inputs must be a list of tensors")
    names = [str(row.get("name"))[:40] for row in inputs]
    if names != [INPUT]:
        raise Unprocessable(f"the inputs are {names[:5]}; the model takes one, {INPUT!r}")
    tensor: dict[str, Any] = inputs[0]
    return tensor


def _tensor(tensor: dict[str, Any], tail: memoryview, card: Card, max_images: int) -> Batch:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise Unprocessable(f"datatype is {str(datatype)[:20]!r}; allowed: {', '.join(DTYPES)}")
    image = shapes(card)[datatype]
    if not (
        isinstance(shape, list)
        and len(shape) == 4
        and all(type(side) is int for side in shape)
        and tuple(shape[1:]) == image
        and shape[0] > 0
    ):
        allowed = ", ".join(map(str, image))
        raise Unprocessable(f"shape is {str(shape)[:60]}; allowed for {datatype}: [N, {allowed}]")
    if shape[0] > max_images:
        raise TooLarge(f"the tensor has {shape[0]} images; allowed: {max_images}")
    parameters = tensor.get("parameters", {})
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    needed = 0 if size is None else math.prod(shape) * DTYPES[datatype]
    if size not in (None, needed):
        raise BadFraming(f"binary_data_size is {str(size)[:20]}; {datatype} {shape} has {needed}")
    if len(tail) != needed:
        raise BadFraming(f"{len(tail)} bytes follow the JSON; the tensor needs {needed}")
    batch = (
        _from_json(tensor.get("data"), datatype, shape)
        if size is None
        else _from_bytes(tail, datatype).reshape(shape)
    )
    if datatype == "FP32" and not (batch.min() >= 0 and batch.max() <= 1):  # false for NaN too
        raise Unprocessable("FP32 pixels must lie in [0, 1]")
    return batch


def _from_bytes(tail: memoryview, datatype: str) -> Batch:
    if datatype == "UINT8":
        return np.frombuffer(tail, np.uint8)
    return np.frombuffer(tail, np.dtype("<f4"))


def _from_json(data: object, datatype: str, shape: list[int]) -> Batch:
    """Nested or flat numbers."""
    try:
        wide = np.array(data, np.float64).reshape(shape)
    except (ValueError, TypeError, OverflowError) as exc:
        raise BadFraming(f"data does not hold {math.prod(shape)} numbers, nested or flat") from exc
    if not ((wide >= 0) & (wide <= 255)).all():  # false for NaN too
        raise Unprocessable("pixels must be numbers from 0 to 255 (UINT8) or 0 to 1 (FP32)")
    if datatype == "FP32":
        return wide.astype(np.float32)
    if (wide % 1).any():
        raise Unprocessable("UINT8 pixels must be whole numbers")
    return wide.astype(np.uint8)


def _wants_binary(document: dict[str, Any]) -> bool:
    """A flag on the requested output overrides the one on the request."""
    outputs = document.get("outputs", [])
    if not isinstance(outputs, list) or not all(isinstance(row, dict) for row in outputs):
        raise BadFraming("outputs must be a list of requested outputs")
    names = [row.get("name") for row in outputs]
    if outputs and names != [OUTPUT]:
        raise Unprocessable(f"the outputs are {str(names)[:60]}; the model gives one, {OUTPUT!r}")
    whole = _flag(document, "binary_data_output", default=False)
    return _flag(outputs[0], "binary_data", default=whole) if outputs else whole


def _flag(owner: dict[str, Any], name: str, *, default: bool) -> bool:
    parameters = owner.get("parameters", {})
    value = parameters.get(name, default) if isinstance(parameters, dict) else None
    if not isinstance(value, bool):
        raise BadFraming(f"parameter {name} must be true or false")
    return value
