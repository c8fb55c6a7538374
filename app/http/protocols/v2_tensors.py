"""The input tensor of a V2 request -> images: pixels as an array, or files to decode.

    image    BYTES (N,) or (N, 1): files of the formats that /v1/predict takes
    pixels   UINT8 (N, H, W, C), or FP32, FP16 or BF16 (N, C, H, W) in [0, 1]

In JSON a file is a base64 string; as bytes it follows its length, 4 bytes little-endian. Pixels as
bytes are not copied: the array is a view of the request's body. FP16 and BF16 have no form in JSON,
as in the protocol, and become float32.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import numpy as np

from app.errors import BadFraming, TooLarge, Unprocessable
from app.http.bodies import brief, unbase64
from app.inference.bundle import Card
from app.inference.engines import Batch
from app.settings import LimitSettings

FILES, PIXELS = "image", "pixels"
WIDTHS = {"UINT8": 1, "FP32": 4, "FP16": 2, "BF16": 2}  # bytes of an element
HALVES = ("FP16", "BF16")
HEAD = 1024  # bytes of a request beside its pixels
PREFIX = 4  # bytes of the length before a file


def shapes(card: Card) -> dict[str, tuple[int, int, int]]:
    """The shape of an image for each datatype of `pixels`."""
    h, w, c = card.input.height, card.input.width, card.input.channels
    return {kind: (h, w, c) if kind == "UINT8" else (c, h, w) for kind in WIDTHS}


def most_images(datatype: str, card: Card, limits: LimitSettings) -> int:
    """Images of `pixels` that a request may have: as many as its body has room for."""
    image = math.prod(shapes(card)[datatype]) * WIDTHS[datatype]
    return max(1, min(limits.max_tensor_images, (limits.max_body_bytes - HEAD) // image))


def read_tensor(
    tensor: dict[str, Any], tail: memoryview, card: Card, limits: LimitSettings
) -> Batch | list[bytes]:
    """Parse and check the one input of a request.

    Args:
        tensor: its description.
        tail: the bytes after the request's JSON.
        card: of the model.
        limits: of a request.

    Raises:
        BadFraming: the data does not match its description.
        Unprocessable: the datatype, shape or a value does not fit the model.
        TooLarge: too many images.
    """
    if tensor["name"] == FILES:
        return _files(tensor, tail, limits.max_images)
    return _pixels(tensor, tail, card, limits.max_tensor_images)


def _files(tensor: dict[str, Any], tail: memoryview, max_images: int) -> list[bytes]:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype != "BYTES":
        raise Unprocessable(f"datatype is {brief(datatype)}; allowed for {FILES}: BYTES")
    if not (_is_shape(shape) and shape[1:] in ([], [1])):
        raise Unprocessable(f"shape is {brief(shape)}; allowed for {FILES}: [N] or [N, 1]")
    _check_count(shape[0], max_images)
    size = _binary_size(tensor)
    if size not in (None, len(tail)):
        raise BadFraming(f"binary_data_size is {brief(size)}; {len(tail)} bytes follow the JSON")
    if size is None:
        _check_tail(tail, 0)
        return _files_from_json(tensor.get("data"), shape[0])
    return _files_from_bytes(tail, shape[0])


def _files_from_json(data: object, count: int) -> list[bytes]:
    """Base64 strings, nested or flat."""
    if not isinstance(data, list) or len(data) != count:
        raise BadFraming(f"data does not hold {count} base64 strings, nested or flat")
    texts = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in data]
    return [unbase64(f"data[{i}]", text) for i, text in enumerate(texts)]


def _files_from_bytes(tail: memoryview, count: int) -> list[bytes]:
    """Files, each after its length, that fill `tail`."""
    files: list[bytes] = []
    at = 0
    while len(files) < count and at + PREFIX <= len(tail):
        start = at + PREFIX
        at = start + int.from_bytes(tail[at:start], "little")
        files.append(bytes(tail[start:at]))
    if len(files) < count or at != len(tail):
        raise BadFraming(f"{len(tail)} bytes are not {count} files, each after its length")
    return files


def _pixels(tensor: dict[str, Any], tail: memoryview, card: Card, max_images: int) -> Batch:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str) or datatype not in WIDTHS:
        allowed = ", ".join(WIDTHS)
        raise Unprocessable(f"datatype is {brief(datatype)}; allowed for {PIXELS}: {allowed}")
    image = shapes(card)[datatype]
    if not (_is_shape(shape) and tuple(shape[1:]) == image):
        allowed = ", ".join(map(str, image))
        raise Unprocessable(f"shape is {brief(shape)}; allowed for {datatype}: [N, {allowed}]")
    _check_count(shape[0], max_images)
    size = _binary_size(tensor)
    needed = 0 if size is None else math.prod(shape) * WIDTHS[datatype]
    if size not in (None, needed):
        raise BadFraming(f"binary_data_size is {brief(size)}; {datatype} {shape} has {needed}")
    _check_tail(tail, needed)
    batch = (
        _pixels_from_json(tensor.get("data"), datatype, shape)
        if size is None
        else _pixels_from_bytes(tail, datatype).reshape(shape)
    )
    if datatype != "UINT8" and not (batch.min() >= 0 and batch.max() <= 1):  # false for NaN too
        raise Unprocessable(f"{datatype} pixels must lie in [0, 1]")
    return batch


def _pixels_from_bytes(tail: memoryview, datatype: str) -> Batch:
    if datatype == "UINT8":
        return np.frombuffer(tail, np.uint8)
    if datatype == "FP32":
        return np.frombuffer(tail, "<f4")
    if datatype == "FP16":
        return np.frombuffer(tail, "<f2").astype(np.float32)
    wide = np.frombuffer(tail, "<u2").astype(np.uint32)
    wide <<= 16  # BF16 is the upper half of a float32
    return wide.view(np.float32)


def _pixels_from_json(data: object, datatype: str, shape: list[int]) -> Batch:
    """Numbers, nested or flat."""
    if datatype in HALVES:
        raise Unprocessable(
            f"{datatype} has no form in JSON; allowed: its bytes after the JSON "
            "(binary_data_size), or FP32"
        )
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


def _is_shape(shape: object) -> TypeGuard[list[int]]:
    """Up to four whole numbers, the first of them positive."""
    return (
        isinstance(shape, list)
        and 0 < len(shape) <= 4
        and all(type(side) is int for side in shape)
        and shape[0] > 0
    )


def _check_count(count: int, max_images: int) -> None:
    if count > max_images:
        raise TooLarge(f"the tensor has {count} images; allowed: {max_images}")


def _binary_size(tensor: dict[str, Any]) -> object:
    """The declared number of bytes; None if the data is in the JSON."""
    parameters = tensor.get("parameters")
    return parameters.get("binary_data_size") if isinstance(parameters, dict) else None


def _check_tail(tail: memoryview, needed: int) -> None:
    if len(tail) != needed:
        raise BadFraming(f"{len(tail)} bytes follow the JSON; the tensor needs {needed}")
