r"""NVIDIA Triton, through PyTriton, with a bundle's network.

    python -m venv runs/upstreams/triton
    runs/upstreams/triton/bin/pip install -r loadtest/peers/triton/requirements.txt \
        -r deploy/upstreams/requirements.txt
    runs/upstreams/triton/bin/python deploy/upstreams/serve_triton.py models/cifar10/float32.onnx

It serves four models: NAME takes `pixels` UINT8 (N, H, W, C) and gives `probabilities`; NAME-float
takes `pixels` FP32 (N, C, H, W) in [0, 1] and gives `logits`; NAME-all is NAME with both outputs;
NAME-files takes `image` BYTES (N, 1), files that Pillow decodes, and gives `probabilities`.
"""

from __future__ import annotations

import argparse
import io
import os
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
from network import Network, load, logits
from PIL import Image
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

# Its backend would load the system's libpython, perhaps of another release than this one.
os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")

Outputs = dict[str, np.ndarray]


def decode(file: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of an image file, (H, W, 3)."""
    with Image.open(io.BytesIO(file)) as picture:
        return np.array(picture.convert("RGB"))


def bind(triton: Triton, name: str, network: Network, instances: int, largest: int) -> None:
    """The four models."""

    @batch
    def pixels(pixels: np.ndarray) -> Outputs:
        return {"probabilities": network(pixels)}

    @batch
    def floats(pixels: np.ndarray) -> Outputs:
        return {"logits": logits(network.floats(pixels))}

    @batch
    def everything(pixels: np.ndarray) -> Outputs:
        rows = network(pixels)
        return {"probabilities": rows, "logits": logits(rows)}

    @batch
    def files(image: np.ndarray) -> Outputs:
        return {"probabilities": network(np.stack([decode(each) for each in image[:, 0]]))}

    height, width, channels = network.size
    levels = Tensor(name="pixels", dtype=np.uint8, shape=network.size)
    planes = Tensor(name="pixels", dtype=np.float32, shape=(channels, height, width))
    pictures = Tensor(name="image", dtype=np.bytes_, shape=(1,))
    rows = {
        output: Tensor(name=output, dtype=np.float32, shape=(network.classes,))
        for output in ("probabilities", "logits")
    }
    config = ModelConfig(
        max_batch_size=largest,
        batcher=DynamicBatcher(max_queue_delay_microseconds=100),
    )
    for suffix, call, tensor, outputs in (
        ("", pixels, levels, ["probabilities"]),
        ("-float", floats, planes, ["logits"]),
        ("-all", everything, levels, ["probabilities", "logits"]),
        ("-files", files, pictures, ["probabilities"]),
    ):
        triton.bind(
            model_name=name + suffix,
            infer_func=[call] * instances,
            inputs=[tensor],
            outputs=[rows[output] for output in outputs],
            config=config,
        )


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description="NVIDIA Triton with one network")
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--name", default="cifar10")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ports", default="8000,8001,8002", help="HTTP, gRPC, metrics")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--max-batch-size", type=int, default=32)
    given = parser.parse_args()
    http, grpc, metrics = (int(port) for port in given.ports.split(","))
    config = TritonConfig(
        http_address=given.host,
        http_port=http,
        grpc_address=given.host,
        grpc_port=grpc,
        metrics_address=given.host,
        metrics_port=metrics,
    )
    network = load(str(given.onnx))
    with Triton(config=config) as triton:
        bind(triton, given.name, network, given.instances, given.max_batch_size)
        triton.serve()


if __name__ == "__main__":
    main()
