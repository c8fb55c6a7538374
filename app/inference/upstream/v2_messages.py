"""The Open Inference Protocol V2 as a client speaks it, with the binary tensor extension.

    body = JSON header [+ the tensors' bytes, row-major, little-endian]
    Inference-Header-Content-Length = bytes of the JSON, where bytes follow

An answer is not trusted: every length, shape and datatype is checked before it is used.

Source: the protocol's REST specification, and Triton's extension for binary tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson

from app.inference.upstream.network_interface import InvalidAnswer, Tensor

LENGTH = "Inference-Header-Content-Length"
DATATYPES: dict[str, str] = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "UINT8": "u1"}
SHOWN = 60  # characters of an answer in a message
MOST_DIGITS = 15  # of a length


class Tensors(NamedTuple):
    """A parsed answer.

    Attributes:
        outputs: by name, views of the body.
        version: of the model; empty if the answer names none.
    """

    outputs: Mapping[str, Tensor]
    version: str


def write_request(
    inputs: Mapping[str, tuple[str, Tensor]], outputs: Iterable[str], *, binary: bool = True
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference request.

    Args:
        inputs: datatype and values of each tensor.
        outputs: names of the tensors to return.
        binary: send and ask for bytes; JSON otherwise.
    """
    described: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, (datatype, values) in inputs.items():
        tensor: dict[str, Any] = {
            "name": name,
            "shape": list(values.shape),
            "datatype": datatype,
        }
        if binary:
            raw = np.ascontiguousarray(values, DATATYPES[datatype]).tobytes()
            tensor["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            tensor["data"] = values.reshape(-1).tolist()
        described.append(tensor)
    asked: list[dict[str, Any]] = [
        {"name": name, "parameters": {"binary_data": True}} if binary else {"name": name}
        for name in outputs
    ]
    header = orjson.dumps({"inputs": described, "outputs": asked})
    if not binary:
        return header, {"Content-Type": "application/json"}
    return b"".join((header, *tail)), {
        "Content-Type": "application/octet-stream",
        LENGTH: str(len(header)),
    }


def read_answer(length: str | None, body: bytes) -> Tensors:
    """Parse the answer to an inference request.

    Args:
        length: the header `LENGTH`, if the answer has it.
        body: the whole answer.

    Raises:
        InvalidAnswer: not JSON, a length that does not fit, or a tensor that is not well formed.
    """
    at = len(body)
    if length is not None:
        known = length.isascii() and length.isdigit() and len(length) <= MOST_DIGITS
        if not known or int(length) > len(body):
            raise InvalidAnswer(f"{LENGTH} is {length[:SHOWN]!r}, the body has {len(body)} bytes")
        at = int(length)
    document = read_json(body[:at])
    described = document.get("outputs")
    if not isinstance(described, list) or not all(isinstance(each, dict) for each in described):
        raise InvalidAnswer("it has no list of outputs")
    outputs = {}
    for tensor in described:
        name, size = tensor.get("name"), _binary_size(tensor)
        if not isinstance(name, str):
            raise InvalidAnswer("an output has no name")
        if size is None:
            outputs[name] = _from_json(name, tensor)
            continue
        if at + size > len(body):
            raise InvalidAnswer(
                f"output {name!r} has {size} bytes, {len(body) - at} are left of the body"
            )
        outputs[name] = _from_bytes(name, tensor, memoryview(body)[at : at + size])
        at += size
    if at != len(body):
        raise InvalidAnswer(f"{len(body) - at} bytes follow its outputs")
    version = document.get("model_version")
    return Tensors(outputs, version if isinstance(version, str) else "")


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InvalidAnswer: it is something else.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        start = body[:SHOWN].decode("latin-1")
        raise InvalidAnswer(f"it is not JSON: it starts with {start!r}") from None
    if not isinstance(document, dict):
        raise InvalidAnswer("it is not a JSON object")
    return document


def _binary_size(tensor: Mapping[str, Any]) -> int | None:
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise InvalidAnswer(f"binary_data_size is {str(size)[:SHOWN]!r}")
    return size


def _shape(name: str, tensor: Mapping[str, Any]) -> tuple[str, list[int]]:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str):
        raise InvalidAnswer(f"output {name!r} has no datatype")
    if (
        not isinstance(shape, list)
        or len(shape) > 8
        or not all(type(side) is int and 0 <= side < 2**31 for side in shape)
    ):
        raise InvalidAnswer(f"output {name!r} has shape {str(shape)[:SHOWN]}")
    return datatype, shape


def _from_bytes(name: str, tensor: Mapping[str, Any], raw: memoryview) -> Tensor:
    datatype, shape = _shape(name, tensor)
    kind = DATATYPES.get(datatype)
    if kind is None:  # of an output that nobody asked for, perhaps
        return np.zeros(0, np.uint8)
    values = np.frombuffer(raw, np.uint8)
    if len(values) != math.prod(shape) * np.dtype(kind).itemsize:
        raise InvalidAnswer(f"output {name!r}, {datatype} {shape}, has {len(values)} bytes")
    return values.view(kind).reshape(shape)


def _from_json(name: str, tensor: Mapping[str, Any]) -> Tensor:
    datatype, shape = _shape(name, tensor)
    kind = DATATYPES.get(datatype)
    if kind is None:
        return np.zeros(0, np.uint8)
    try:
        # null stands for NaN in JSON; as a float64 it is one.
        values = np.array(tensor.get("data"), np.float64).reshape(shape)
    except (ValueError, TypeError, OverflowError):
        raise InvalidAnswer(f"output {name!r} does not hold {math.prod(shape)} numbers") from None
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(kind)
