"""The requests that fuzzing starts from, as files in `tests/corpus/`; the pictures are made up.

A file is a request as one would write it down: `METHOD PATH`, a header per line, an empty line, the
body. `python -m tests.seeds` regenerates them.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import app.inference.decode  # noqa: F401  # registers pillow-heif
from loadtest.boxed_files import file, grid
from loadtest.boxed_files import picture as boxed
from tests.pictures import encoded, picture

CORPUS = Path(__file__).parent / "corpus"
INFER = "/v2/models/tiny/infer"
LENGTH = "inference-header-content-length"


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = b""

    def written(self) -> bytes:
        lines = [f"{self.method} {self.target}".encode()]
        lines += [name + b": " + value for name, value in self.headers]
        return b"\n".join([*lines, b"", self.body])


def read(path: Path) -> Asked:
    head, _, body = path.read_bytes().partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, target = first.decode().split(" ")
    headers = tuple((name, value) for name, _, value in (line.partition(b": ") for line in lines))
    return Asked(method, target, headers, body)


def corpus() -> list[Asked]:
    """All committed seeds."""
    return [read(path) for path in sorted(CORPUS.glob("*.http"))]


def seeds() -> dict[str, Asked]:
    """Every form of every route once."""
    png = encoded(picture())
    found = {
        "png": raw(png),
        "png-grey": raw(encoded(picture(mode="L"))),
        "png-palette": raw(encoded(picture(mode="P"))),
        "png-alpha": raw(encoded(picture(mode="RGBA"))),
        "png-16-bit": raw(encoded(picture(mode="L").convert("I;16"))),
        "png-wide": raw(encoded(picture(21, 5))),
        "jpeg": raw(encoded(picture(), "JPEG"), "image/jpeg"),
        "jpeg-progressive": raw(encoded(picture(), "JPEG", progressive=True), "image/jpeg"),
        "jpeg-cmyk": raw(encoded(picture(mode="CMYK"), "JPEG"), "image/jpeg"),
        "webp": raw(encoded(picture(), "WEBP"), "image/webp"),
        "webp-lossless": raw(encoded(picture(), "WEBP", lossless=True), "image/webp"),
        "avif": raw(encoded(picture(), "AVIF"), "image/avif"),
        "avif-grid": raw(file(*grid(2, 2, 120, 120, boxed(64, 64))), "image/avif"),
        "heic": raw(encoded(picture(), "HEIF"), "image/heic"),
        "top-k": Asked("POST", "/v1/predict?top_k=2", ((b"content-type", b"image/png"),), png),
        "multipart": multipart(png, png),
        "base64": instances(png, png),
        "model": Asked("GET", "/v1/model", ()),
        "ready": Asked("GET", "/v2/health/ready", ()),
        "metadata": Asked("GET", "/v2/models/tiny/versions/1", ()),
    }
    pixels = np.asarray(picture())
    uint8 = {"name": "pixels", "datatype": "UINT8", "shape": [1, 8, 8, 3]}
    fp32 = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8]}
    planar = (pixels.transpose(2, 0, 1) / 255).astype("<f4")
    v2_file = struct.pack("<I", len(png)) + png
    text = base64.b64encode(png).decode()
    image = {"name": "image", "datatype": "BYTES", "shape": [1]}
    found |= {
        "v2-json": infer({**uint8, "data": pixels.reshape(-1).tolist()}),
        "v2-json-classes": infer(
            {**uint8, "data": pixels.tolist()},
            outputs=[{"name": "probabilities", "parameters": {"classification": 2}}],
        ),
        "v2-json-floats": infer({**fp32, "data": planar.round(2).reshape(-1).tolist()}),
        "v2-json-file": infer({**image, "data": [text]}),
        "v2-bytes": infer(uint8, pixels.tobytes(), id="a", parameters={"binary_data_output": True}),
        "v2-bytes-floats": infer(fp32, planar.tobytes()),
        "v2-bytes-halves": infer({**fp32, "datatype": "FP16"}, planar.astype("<f2").tobytes()),
        "v2-bytes-file": infer(image, v2_file),
        "v2-raw-file": Asked("POST", INFER, ((LENGTH.encode(), b"0"),), png),
    }
    return found


def raw(body: bytes, kind: str = "image/png") -> Asked:
    return Asked("POST", "/v1/predict", ((b"content-type", kind.encode()),), body)


def multipart(*files: bytes) -> Asked:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    body = b"".join(part + file + b"\r\n" for file in files) + b"--b--\r\n"
    kind = b"multipart/form-data; boundary=b"
    return Asked("POST", "/v1/predict", ((b"content-type", kind),), body)


def instances(*files: bytes) -> Asked:
    rows = [{"b64": base64.b64encode(file).decode()} for file in files]
    body = json.dumps({"instances": rows}).encode()
    return Asked("POST", "/v1/predict", ((b"content-type", b"application/json"),), body)


def infer(tensor: dict, data: bytes = b"", **members) -> Asked:
    if data:
        tensor = {**tensor, "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor], **members}).encode()
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)
    if data:
        headers = (
            (b"content-type", b"application/octet-stream"),
            (LENGTH.encode(), str(len(header)).encode()),
        )
    return Asked("POST", INFER, headers, header + data)


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for name, asked in seeds().items():
        (CORPUS / f"{name}.http").write_bytes(asked.written())
