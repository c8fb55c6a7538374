"""How images travel: as PNG files, as 8-bit pixels, or as float tensors.

The transport decides what an attack can say. `png` and `pixels` carry 256 levels a channel, so a
difference of less than half a level is lost; `tensor` carries float32. Every result names it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scumble.api_template import levels
from scumble.png import encode_png

Images = npt.NDArray[np.float32]
"""float32 (N, C, H, W) in [0, 1], whatever the transport makes of it."""

Probs = npt.NDArray[np.float32]
"""float32 (N, K)."""

HEADER = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Message:
    """What is sent: path, body, headers."""

    path: str
    content: bytes
    headers: dict[str, str]
    method: str = "POST"


class Transport(Protocol):
    """One way to ask."""

    name: str
    step: float
    """Smallest change of a value that arrives for sure; 0 where any does."""

    def pack(self, model: str, images: Images) -> Message:
        """Images as a request."""
        ...

    def unpack(self, headers: Any, content: bytes, labels: int) -> Probs:
        """A 200 answer as probabilities (N, K)."""
        ...

    def largest(self, limits: dict[str, int]) -> int:
        """Images that one request may hold."""
        ...


class Png:
    """What an ordinary client sends: PNG files in a multipart form."""

    name = "png"
    step = 1 / 255

    def pack(self, model: str, images: Images) -> Message:
        """A form with one part per image."""
        del model
        boundary = "scumble-attacker"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        ).encode()
        files = (encode_png(picture, compress_level=1) for picture in levels(images))
        body = b"".join(head + file + b"\r\n" for file in files) + f"--{boundary}--\r\n".encode()
        return Message(
            "/v1/predict", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )

    def unpack(self, headers: Any, content: bytes, labels: int) -> Probs:
        """The `probabilities` of every prediction."""
        del headers
        rows = [row["probabilities"] for row in json.loads(content)["predictions"]]
        return np.array(rows, np.float32).reshape(len(rows), labels)

    def largest(self, limits: dict[str, int]) -> int:
        """As many files as the service takes."""
        return limits["max_images"]


class Tensor:
    """The V2 infer call with raw bytes; UINT8 (N, H, W, C) or FP32 (N, C, H, W)."""

    def __init__(self, name: str, datatype: str, step: float) -> None:
        self.name = name
        self.step = step
        self._datatype = datatype

    def pack(self, model: str, images: Images) -> Message:
        """JSON, then the tensor's bytes."""
        array = levels(images) if self._datatype == "UINT8" else images.astype("<f4")
        tensor = {
            "name": "pixels",
            "datatype": self._datatype,
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        return Message(
            f"/v2/models/{model}/infer",
            head + np.ascontiguousarray(array).tobytes(),
            {"Content-Type": "application/octet-stream", HEADER: str(len(head))},
        )

    def unpack(self, headers: Any, content: bytes, labels: int) -> Probs:
        """The bytes behind the answer's JSON."""
        length = int(headers[HEADER])
        return np.frombuffer(content[length:], "<f4").reshape(-1, labels).astype(np.float32)

    def largest(self, limits: dict[str, int]) -> int:
        """As many images as the service takes; the body limit is the oracle's to keep."""
        return limits["max_tensor_images"]


TRANSPORTS: dict[str, Transport] = {
    "png": Png(),
    "pixels": Tensor("pixels", "UINT8", step=1 / 255),
    "tensor": Tensor("tensor", "FP32", step=0.0),
}
