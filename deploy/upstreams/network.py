"""A bundle's ONNX file in ONNX Runtime, for the servers in this folder.

Their environments have no Scumble, so nothing of it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime


@dataclass(frozen=True)
class Network:
    """A network that maps uint8 (N, H, W, C) to probabilities float32 (N, K).

    Attributes:
        session: runs it.
        size: (H, W, C).
        classes: K.
    """

    session: onnxruntime.InferenceSession
    size: tuple[int, int, int]
    classes: int

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """The probabilities of a batch."""
        name = self.session.get_inputs()[0].name
        rows: npt.NDArray[np.float32] = self.session.run(None, {name: pixels})[0]
        return rows

    def floats(self, tensor: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The same of float32 (N, C, H, W) in [0, 1]."""
        levels = np.rint(tensor * 255).astype(np.uint8)
        return self(np.ascontiguousarray(levels.transpose(0, 2, 3, 1)))


def load(onnx: str) -> Network:
    """The network of a file, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    height, width, channels = session.get_inputs()[0].shape[1:]
    return Network(session, (height, width, channels), session.get_outputs()[0].shape[1])


def logits(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logits whose softmax the probabilities are."""
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
