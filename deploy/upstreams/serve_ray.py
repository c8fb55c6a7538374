r"""Ray Serve with a bundle's network, which answers the V2 protocol itself, as Ray has none.

    python -m venv runs/upstreams/ray
    runs/upstreams/ray/bin/pip install -r loadtest/peers/rayserve/requirements.txt \
        -r deploy/upstreams/requirements.txt
    runs/upstreams/ray/bin/python deploy/upstreams/serve_ray.py models/cifar10/float32.onnx

The model takes `pixels` UINT8 (N, H, W, C) and gives `probabilities`, as JSON or as bytes.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

# Set before Ray is imported; otherwise it uses an external address and reports usage statistics.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import ray
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from network import load
from ray import serve

LENGTH = "Inference-Header-Content-Length"
app = FastAPI()


@app.exception_handler(HTTPException)
def refusal(request: Request, error: HTTPException) -> JSONResponse:
    """An error as the protocol has it."""
    del request
    return JSONResponse({"error": error.detail}, error.status_code)


@serve.deployment(num_replicas=1, max_ongoing_requests=64, logging_config={"log_level": "WARNING"})
@serve.ingress(app)
class Classifier:
    """The routes of one model."""

    def __init__(self, onnx: str, name: str) -> None:
        self.network = load(onnx)
        self.name = name

    @app.get("/v2/health/live")
    @app.get("/v2/health/ready")
    @app.get("/v2/models/{model}/ready")
    def ready(self, model: str | None = None) -> dict[str, Any]:
        """Health of the server or of the model."""
        if model is not None:
            self.check(model)
        return {"live": True, "ready": True}

    @app.get("/v2/models/{model}")
    def metadata(self, model: str) -> dict[str, Any]:
        """Input and output."""
        self.check(model)
        rows = {"name": "probabilities", "datatype": "FP32", "shape": [-1, self.network.classes]}
        pixels = {"name": "pixels", "datatype": "UINT8", "shape": [-1, *self.network.size]}
        return {
            "name": model,
            "versions": ["1"],
            "platform": "onnx_onnxv1",
            "inputs": [pixels],
            "outputs": [rows],
        }

    @app.post("/v2/models/{model}/infer")
    async def infer(self, model: str, request: Request) -> Response:
        """The probabilities of a batch."""
        self.check(model)
        body = await request.body()
        length = int(request.headers.get(LENGTH, len(body)))
        try:
            document = json.loads(body[:length])
            (tensor,) = document["inputs"]
            pixels = self.pixels(tensor, body[length:])
        except (KeyError, TypeError, ValueError) as error:
            raise HTTPException(400, f"invalid request: {error!r}") from error
        rows = self.network(pixels)
        output: dict[str, Any] = {"name": "probabilities", "datatype": "FP32"}
        output["shape"] = list(rows.shape)
        answer = {"model_name": model, "model_version": "1", "outputs": [output]}
        if "id" in document:
            answer["id"] = document["id"]
        if not self.wants_bytes(document):
            output["data"] = rows.reshape(-1).tolist()
            return JSONResponse(answer)
        raw = rows.astype("<f4").tobytes()
        output["parameters"] = {"binary_data_size": len(raw)}
        head = json.dumps(answer).encode()
        return Response(head + raw, headers={LENGTH: str(len(head))})

    def check(self, model: str) -> None:
        """Refuse other models."""
        if model != self.name:
            raise HTTPException(404, f"unknown model {model!r}")

    def pixels(self, tensor: dict[str, Any], tail: bytes) -> np.ndarray:
        """The pixels of a tensor, whose bytes may follow the JSON."""
        shape = tensor["shape"]
        if tensor["name"] != "pixels" or tuple(shape[1:]) != self.network.size:
            raise ValueError(f"{tensor['name']} {shape}")
        data = np.frombuffer(tail, np.uint8) if tail else np.array(tensor["data"], np.uint8)
        return data.reshape(shape)

    @staticmethod
    def wants_bytes(document: dict[str, Any]) -> bool:
        """Whether the output is asked for as bytes."""
        whole = (document.get("parameters") or {}).get("binary_data_output", False)
        (output,) = document.get("outputs") or [{}]
        return bool((output.get("parameters") or {}).get("binary_data", whole))


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description="Ray Serve with one network")
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--name", default="cifar10")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ports", default="8000", help="HTTP")
    given = parser.parse_args()
    # The replica imports this folder's modules.
    os.environ["PYTHONPATH"] = sys.path[0]
    ray.init(num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": given.host, "port": int(given.ports.split(",")[0])})
    serve.run(Classifier.bind(str(given.onnx.resolve()), given.name), route_prefix="/")
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
