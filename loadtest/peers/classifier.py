"""What the handler inside every peer calls, so that only the servers differ.

Two settings: `stock` is the torch network as tutorials run it, `tuned` is Scumble's int8 file with
OpenVINO set up as Scumble sets it up. Both take one thread. Nothing of Scumble is imported.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "runs" / "peers" / "cifar10.pt"
ONNX = ROOT / "models" / "cifar10" / "int8.onnx"

Pixels: TypeAlias = npt.NDArray[np.uint8]
Probs: TypeAlias = npt.NDArray[np.float32]
Classify: TypeAlias = Callable[[Pixels], Probs]  # (N, 32, 32, 3) -> (N, 10)


def setting() -> str:
    """`stock` or `tuned`, as the benchmark asked."""
    return os.environ["PEER_SETTING"]


def ports() -> list[int]:
    """Three free ports of loopback, for HTTP and for what else a peer listens on."""
    return [int(port) for port in os.environ["PEER_PORTS"].split(",")]


def decode(png: bytes) -> Pixels:
    """The pixels of an image file, (32, 32, 3)."""
    with Image.open(io.BytesIO(png)) as picture:
        return np.array(picture.convert("RGB"))


def load() -> Classify:
    """The model of the setting."""
    return {"stock": stock, "tuned": tuned}[setting()]()


def stock(weights: Path = WEIGHTS) -> Classify:
    """The float32 torch network, eager."""
    # Here and not above: a tuned server should not pay for the memory of torch.
    import torch

    from loadtest.peers.net import loaded

    torch.set_num_threads(1)
    net = loaded(weights)

    def classify(pixels: Pixels) -> Probs:
        with torch.inference_mode():
            planar = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
            probs: Probs = net(planar).softmax(1).numpy()
        return probs

    return classify


def tuned(onnx: Path = ONNX) -> Classify:
    """The int8 file, compiled for single images and for any batch."""
    import openvino as ov
    from openvino import properties as key

    config = {
        key.hint.performance_mode: key.hint.PerformanceMode.LATENCY,
        key.hint.inference_precision: ov.Type.f32,
        key.inference_num_threads: 1,
        key.num_streams: 1,
        key.hint.enable_cpu_pinning: False,  # workers would share the first core
    }
    core = ov.Core()
    network = core.read_model(onnx)
    any_size = core.compile_model(network, "CPU", config).create_infer_request()
    network.reshape([1, 32, 32, 3])
    single = core.compile_model(network, "CPU", config).create_infer_request()

    def classify(pixels: Pixels) -> Probs:
        request = single if len(pixels) == 1 else any_size
        request.infer([pixels])
        probs: Probs = request.get_output_tensor().data.copy()
        return probs

    return classify
