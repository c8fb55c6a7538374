"""A real Triton with one network, asked in three ways: `python triton_serves.py ONNX PORTS`.

Runs in an environment with nvidia-pytriton. A model of Triton's has fixed inputs, so each input of
ours is a model there: `image` takes files, `pixels` bytes, `planar` floats.
"""

import base64
import io
import os
import sys
import sysconfig

import numpy as np
import openvino as ov
from PIL import Image
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

# Its backend would load the system's libpython, perhaps of another release than this one.
os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")


def pixels_of(file: bytes) -> np.ndarray:
    """A file, or its base64 as JSON has it, -> (H, W, C)."""
    if not file.startswith(b"\x89PNG"):
        file = base64.b64decode(file, validate=True)
    return np.array(Image.open(io.BytesIO(file)).convert("RGB"))


def bind(triton: Triton, onnx: str) -> None:
    """The three models."""
    exact = {ov.properties.hint.inference_precision: ov.Type.f32}
    compiled = ov.Core().compile_model(onnx, "CPU", exact)
    _, height, width, channels = compiled.input(0).partial_shape
    size = [side.get_length() for side in (height, width, channels)]
    classes = compiled.output(0).partial_shape[1].get_length()

    def answer(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"probabilities": compiled(np.ascontiguousarray(pixels))[0]}

    @batch
    def image(image: np.ndarray) -> dict[str, np.ndarray]:
        return answer(np.stack([pixels_of(row) for row in image[:, 0]]))

    @batch
    def pixels(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return answer(pixels)

    @batch
    def planar(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return answer((pixels * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))

    inputs = {
        image: Tensor(name="image", dtype=np.bytes_, shape=(1,)),
        pixels: Tensor(name="pixels", dtype=np.uint8, shape=tuple(size)),
        planar: Tensor(name="pixels", dtype=np.float32, shape=(size[2], size[0], size[1])),
    }
    for call, tensor in inputs.items():
        triton.bind(
            model_name=call.__name__,
            infer_func=call,
            inputs=[tensor],
            outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(classes,))],
            config=ModelConfig(max_batch_size=16),
        )


if __name__ == "__main__":
    http, grpc, metrics = (int(port) for port in sys.argv[2].split(","))
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=http,
        grpc_address="127.0.0.1",
        grpc_port=grpc,
        metrics_address="127.0.0.1",
        metrics_port=metrics,
    )
    with Triton(config=config) as triton:
        bind(triton, sys.argv[1])
        triton.serve()
