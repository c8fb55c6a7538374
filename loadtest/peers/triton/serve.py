"""NVIDIA Triton through PyTriton: two instances of a Python callable, dynamic batches."""

import os
import sysconfig

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from loadtest.peers.classifier import decode, load, ports, setting

# Its backend would load the system's libpython, perhaps of another release than this one.
os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
# Stock: the figure of its quick start. Triton batches what waits; its default window is 0.
BATCH = {"stock": 128, "tuned": 32}[setting()]


class Instance:
    """One copy of the classifier."""

    def __init__(self) -> None:
        self.classify = load()

    @batch
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Probabilities of a batch of image files, (N, 1) bytes."""
        return {"probabilities": self.classify(np.stack([decode(png) for png in image[:, 0]]))}


if __name__ == "__main__":
    http, grpc, metrics = ports()
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=http,
        grpc_address="127.0.0.1",
        grpc_port=grpc,
        metrics_address="127.0.0.1",
        metrics_port=metrics,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="cifar10",
            infer_func=[Instance(), Instance()],
            inputs=[Tensor(name="image", dtype=np.bytes_, shape=(1,))],
            outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(10,))],
            config=ModelConfig(max_batch_size=BATCH),
        )
        triton.serve()
