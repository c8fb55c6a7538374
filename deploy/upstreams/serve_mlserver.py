r"""MLServer with a bundle's network.

    python -m venv runs/upstreams/mlserver
    runs/upstreams/mlserver/bin/pip install -r loadtest/peers/mlserver/requirements.txt \
        -r deploy/upstreams/requirements.txt
    cd deploy/upstreams
    ../../runs/upstreams/mlserver/bin/python serve_mlserver.py ../../models/cifar10/float32.onnx

The model takes `pixels` UINT8 (N, H, W, C) and gives `probabilities`.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor
from network import load


class Classifier(MLModel):
    """The classifier."""

    async def load(self) -> bool:
        """Load the network of the settings' `uri`."""
        self.network = load(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The probabilities of a batch."""
        pixels = NumpyCodec.decode_input(payload.inputs[0])
        outputs = [NumpyCodec.encode_output("probabilities", self.network(pixels))]
        return InferenceResponse(
            model_name=self.name, model_version=self.version, id=payload.id, outputs=outputs
        )


async def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description="MLServer with one network")
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--name", default="cifar10")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ports", default="8000,8001,8002", help="HTTP, gRPC, metrics")
    given = parser.parse_args()
    http, grpc, metrics = (int(port) for port in given.ports.split(","))
    settings = Settings(
        host=given.host,
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        parallel_workers=0,
        load_models_at_startup=False,
        debug=False,
    )
    network = load(str(given.onnx))
    model = ModelSettings(
        name=given.name,
        implementation=Classifier,
        parameters=ModelParameters(uri=str(given.onnx), version="1"),
        platform="onnx_onnxv1",
        inputs=[MetadataTensor(name="pixels", datatype="UINT8", shape=[-1, *network.size])],
        outputs=[
            MetadataTensor(name="probabilities", datatype="FP32", shape=[-1, network.classes])
        ],
    )
    await MLServer(settings).start([model])  # made in the loop that it needs


if __name__ == "__main__":
    asyncio.run(main())
