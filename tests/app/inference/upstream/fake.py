"""A model server that speaks just enough of the V2 protocol, and fails as it is told.

It runs on a thread of its own. Its network is `tiny`'s, by ONNX Runtime. A fault is a function of
the complete answer that gives what is sent instead; `DROP` closes the connection.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.tiny import network

DROP = b""
KINDS = {"FP32": "<f4", "FP16": "<f2", "FP64": "<f8", "UINT8": "u1"}
Fault = Callable[["Reply"], bytes]


@dataclass
class Reply:
    """A complete answer, which a fault may change.

    Attributes:
        outputs: tensors by name.
        datatypes: of the outputs.
        version: of the model.
        status: of HTTP.
        headers: more of them.
    """

    outputs: dict[str, np.ndarray]
    datatypes: dict[str, str] = field(default_factory=dict)
    version: str | None = "1"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def document(self) -> tuple[dict[str, Any], bytes]:
        """The JSON header and the bytes after it."""
        tail, described = b"", []
        for name, values in self.outputs.items():
            datatype = self.datatypes.get(name, "FP32")
            raw = values.astype(KINDS[datatype]).tobytes()
            described.append(
                {
                    "name": name,
                    "datatype": datatype,
                    "shape": list(values.shape),
                    "parameters": {"binary_data_size": len(raw)},
                }
            )
            tail += raw
        document = {"model_name": "net", "outputs": described}
        if self.version is not None:
            document["model_version"] = self.version
        return document, tail

    def bytes(self) -> bytes:
        """The whole answer."""
        document, tail = self.document()
        header = json.dumps(document).encode()
        return http(
            self.status,
            header + tail,
            {**self.headers, "Inference-Header-Content-Length": str(len(header))},
        )


def length(header: bytes) -> dict[str, str]:
    """The header that says where the bytes begin."""
    return {"Inference-Header-Content-Length": str(len(header))}


def http(status: int, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """An HTTP answer."""
    lines = [f"HTTP/1.1 {status} Any", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class FakeUpstream:
    """The server.

    Attributes:
        fault: what is done to the answers; None for nothing.
        faults: how many answers it is done to; then none.
        answers: probabilities or logits.
        inputs: datatype, layout and extra scale of the input.
        outputs: names of what can be asked for.
        delay_s: before each answer.
        version: of the model.
        seed: of the network's weights.
        requests: the headers of all inference requests.
        batches: the images of all inference requests.
        token: that a request must have.
        binary: whether it understands the binary extension.
        max_batch_size: of its configuration; None without one, as servers other than Triton.
    """

    def __init__(self, **options: Any) -> None:
        self.fault: Fault | None = None
        self.faults = math.inf
        self.answers = "probabilities"
        self.datatype = "FP32"
        self.output_datatype = "FP32"
        self.layout = "NCHW"
        self.scale = 1.0
        self.delay_s = 0.0
        self.version: str | None = "1"
        self.seed = 7
        self.token: str | None = None
        self.binary = True
        self.max_batch_size: int | None = None
        self.requests: list[dict[str, str]] = []
        self.batches: list[int] = []
        self.ssl = None
        self.port = 0
        for name, value in options.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self._sessions: dict[int, ort.InferenceSession] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        scheme = "http" if self.ssl is None else "https"
        return f"{scheme}://localhost:{self.port}/v2/models/net"

    def start(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)))
        self._thread.start()
        assert started.wait(10)

    def stop(self) -> None:
        """Close the port and every connection, as a killed process does."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join()
            self._loop = None

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        server = await asyncio.start_server(
            self._connection, "127.0.0.1", self.port, ssl=self.ssl, reuse_address=True
        )
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._ending.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                answer = await self._answer(method, path, headers, body)
                if answer == DROP:
                    writer.transport.abort()
                    return
                writer.write(answer)
                await writer.drain()
                if b"Connection: close" in answer:
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            return http(401, b'{"error":"unauthorized"}')
        if method == "GET":
            document = self._document(path)
            if document is None:
                return http(404, b'{"error":"no such route"}')
            return http(200, json.dumps(document).encode())
        self.requests.append(headers)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        reply = self._infer(headers, body)
        if isinstance(reply, bytes):
            return reply
        if self.fault is not None and self.faults > 0:
            self.faults -= 1
            return self.fault(reply)
        return reply.bytes() if self.binary else self._json(reply)

    def _document(self, path: str) -> dict[str, Any] | None:
        if path.endswith("/config"):
            size = self.max_batch_size
            return None if size is None else {"name": "net", "max_batch_size": size}
        sides = [3, 8, 8] if self.layout == "NCHW" else [8, 8, 3]
        return {
            "name": "net",
            "platform": "fake",
            "versions": [self.version] if self.version else [],
            "inputs": [{"name": "x", "datatype": self.datatype, "shape": [-1, *sides]}],
            "outputs": [{"name": "y", "datatype": self.output_datatype, "shape": [-1, 4]}],
        }

    def _infer(self, headers: dict[str, str], body: bytes) -> Reply | bytes:
        length = headers.get("inference-header-content-length")
        if length is not None and not self.binary:
            return http(400, b'{"error":"bytes are not supported"}')
        document = json.loads(body[: int(length)] if length else body)
        (tensor,) = document["inputs"]
        assert tensor["datatype"] == self.datatype
        kind = KINDS[self.datatype]
        raw = np.frombuffer(body[int(length) :], kind) if length else tensor["data"]
        x = np.array(raw, kind).reshape(tensor["shape"])
        self.batches.append(len(x))
        rows, logits, features = self.network(x)
        known = {"y": logits if self.answers == "logits" else rows, "z": logits, "h": features}
        asked = [output["name"] for output in document["outputs"]]
        outputs = {name: known[name] for name in asked}
        return Reply(outputs, dict.fromkeys(asked, self.output_datatype), self.version)

    def _json(self, reply: Reply) -> bytes:
        document, _ = reply.document()
        for tensor in document["outputs"]:
            del tensor["parameters"]
            tensor["data"] = reply.outputs[tensor["name"]].ravel().tolist()
        return http(200, json.dumps(document).encode())

    def network(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, logits and features of an input as this server takes it."""
        if self.seed not in self._sessions:
            model = network(4, seed=self.seed)
            model.graph.output.extend(
                [
                    type(model.graph.output[0])(name="logits"),
                    type(model.graph.output[0])(name="f"),
                ]
            )
            self._sessions[self.seed] = ort.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        values = x.astype(np.float64)
        if self.datatype != "UINT8":
            values = values * self.scale * 255
        if self.layout == "NCHW":
            values = values.transpose(0, 2, 3, 1)
        pixels = np.rint(values).clip(0, 255).astype(np.uint8)
        rows, logits, features = self._sessions[self.seed].run(
            ["probabilities", "logits", "f"], {"pixels": np.ascontiguousarray(pixels)}
        )
        return rows, logits, features


@contextmanager
def running(**options: Any) -> Iterator[FakeUpstream]:
    """A fake server on a free port."""
    fake = FakeUpstream(**options)
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()
