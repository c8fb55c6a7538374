"""What the handler inside every peer calls, so that only the servers differ.

Two settings: `stock` is the torch network as tutorials run it, `tuned` is an ONNX file of Scumble
with the engine set up as Scumble sets it up. Both take one thread. Nothing of Scumble is imported.

Variables choose another file than the int8 one of `cifar10` (`PEER_ONNX`), and ONNX Runtime
(`PEER_ENGINE`).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "runs" / "peers" / "cifar10.pt"
ONNX = Path(os.environ.get("PEER_ONNX", ROOT / "models" / "cifar10" / "int8.onnx"))
ENGINE = os.environ.get("PEER_ENGINE", "openvino")

Pixels: TypeAlias = npt.NDArray[np.uint8]
Probs: TypeAlias = npt.NDArray[np.float32]
Classify: TypeAlias = Callable[[Pixels], Probs]  # (N, H, W, 3) -> (N, K)


def setting() -> str:
    """`stock` or `tuned`, as the benchmark asked."""
    return os.environ["PEER_SETTING"]


def ports() -> list[int]:
    """Three free ports of loopback, for HTTP and for what else a peer listens on."""
    return [int(port) for port in os.environ["PEER_PORTS"].split(",")]


def decode(file: bytes, onnx: Path = ONNX) -> Pixels:
    """The pixels of an image file, (H, W, 3), brought to the network's input by Pillow."""
    with Image.open(io.BytesIO(file)) as picture:
        return np.array(fitted(picture.convert("RGB"), card_of(onnx)))


def fitted(picture: Image.Image, card: dict[str, Any]) -> Image.Image:
    """The centre of a picture of another size than the network's input."""
    size = card["input"]["width"], card["input"]["height"]
    if picture.size == size:
        return picture
    rule = card["preprocessing"]
    scale = min(picture.width / size[0], picture.height / size[1]) * rule["ratio"]
    x, y = picture.width / 2, picture.height / 2
    half_x, half_y = size[0] * scale / 2, size[1] * scale / 2
    box = (x - half_x, y - half_y, x + half_x, y + half_y)
    return picture.resize(size, Image.Resampling[rule["interpolation"].upper()], box=box)


@cache
def card_of(onnx: Path) -> dict[str, Any]:
    """The card beside an ONNX file."""
    found: dict[str, Any] = json.loads((onnx.parent / "card.json").read_text())
    return found


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
    """The ONNX file in the engine that is asked for."""
    return {"openvino": by_openvino, "onnxruntime": by_onnxruntime}[ENGINE](onnx)


def by_openvino(onnx: Path) -> Classify:
    """Compiled for single images and for any batch."""
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
    shape = network.input(0).partial_shape
    shape[0] = 1
    network.reshape(shape)
    single = core.compile_model(network, "CPU", config).create_infer_request()

    def classify(pixels: Pixels) -> Probs:
        request = single if len(pixels) == 1 else any_size
        request.infer([pixels])
        probs: Probs = request.get_output_tensor().data.copy()
        return probs

    return classify


def by_onnxruntime(onnx: Path) -> Classify:
    """One session for every batch size, with exact int8 sums."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def classify(pixels: Pixels) -> Probs:
        probs: Probs = session.run([output], {name: pixels})[0]
        return probs

    return classify
