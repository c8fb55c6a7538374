"""A JSON API that runs `tiny`'s network, as people write them: without the V2 protocol."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from tests.app.inference.upstream.fake import FakeUpstream, http
from tests.tiny import LABELS

MODEL = f"[model]\nname = 'tiny'\nlabels = {LABELS}\nshape = [3, 8, 8]\n"
# What each API takes and gives; `answers` of `JsonApi` writes what the second part describes.
TEMPLATES = {
    "numbers": """
        [request]
        path = "/v1/models/net:predict"
        encoding = "floats"
        layout = "NHWC"
        range = [0, 255]
        body = '{"instances": "$images"}'
        batch = 4
        headers = { x-team = "vision" }
        [response]
        path = "predictions.*.scores"
        form = "list"
        scale = "logits"
    """,
    "base64": """
        [request]
        path = "/predict"
        query = { verbose = "0" }
        encoding = "base64"
        body = '{"image": {"b64": "$image"}}'
        [response]
        path = "result"
        form = "map"
    """,
    "file": """
        [request]
        path = "/classify"
        method = "PUT"
        encoding = "png"
        [response]
        form = "pairs"
        scale = "percent"
    """,
}


def template(name: str) -> str:
    """The text of the file."""
    lines = TEMPLATES[name].splitlines()
    return MODEL + "\n".join(line.strip() for line in lines)


class JsonApi(FakeUpstream):
    """The server of one of the templates.

    Attributes:
        changed: what is done to the answer, a JSON value, before it is sent; None for nothing.
        paths: method and target of all requests.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.changed: Any = None
        self.paths: list[tuple[str, str]] = []
        super().__init__(datatype="UINT8", layout="NHWC", **options)
        self.name = name

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            return http(401, b'{"detail":"unauthorized"}')
        self.paths.append((method, path))
        return await super()._answer("POST", path, headers, body)

    def _infer(self, headers: dict[str, str], body: bytes) -> bytes:
        pixels = self.pixels(body)
        self.batches.append(len(pixels))
        if self.fault is not None:
            return self.fault(None)
        document = self.document(*self.network(pixels)[:2])
        if self.changed is not None:
            document = self.changed(document)
        return http(200, json.dumps(document).encode())

    def pixels(self, body: bytes) -> np.ndarray:
        if self.name == "numbers":
            return np.rint(np.array(json.loads(body)["instances"])).astype(np.uint8)
        if self.name == "base64":
            body = base64.b64decode(json.loads(body)["image"]["b64"], validate=True)
        return np.asarray(Image.open(io.BytesIO(body)))[np.newaxis]

    def document(self, rows: np.ndarray, logits: np.ndarray) -> Any:
        if self.name == "numbers":
            return {"predictions": [{"scores": row} for row in logits.astype(float).tolist()]}
        row = dict(zip(LABELS, rows[0].astype(float).tolist(), strict=True))
        if self.name == "base64":
            return {"result": row}
        ordered = sorted(row, key=lambda label: -row[label])
        return [{"label": label, "score": 100 * row[label]} for label in ordered]
