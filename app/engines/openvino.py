"""OpenVINO: the fastest engine measured. Loads the same ONNX files, int8 included.

Two compiled forms of a model of pixels: any batch, and the static batch of one that most requests
are, which is the quicker call.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import properties as key

from app.engines import Batch, Probs
from app.errors import ConfigError
from app.precision import Precision

# OpenVINO would take bf16 for float32 on processors that have it; int8 layers stay int8 under f32.
HINTS: dict[Precision, ov.Type] = {
    "float32": ov.Type.f32,
    "int8": ov.Type.f32,
    "bf16": ov.Type.bf16,
}


class OpenVino:
    """A model for any batch, and beside it one for single images or None, for one thread."""

    def __init__(self, any_size: ov.CompiledModel, single: ov.CompiledModel | None) -> None:
        self._any = any_size.create_infer_request()
        self._single = None if single is None else single.create_infer_request()
        if self._single is not None:
            # Views of the request's own memory, filled and read in place: no tensor for each call.
            self._image = self._single.get_input_tensor().data
            self._answer = self._single.get_output_tensor().data

    def __call__(self, batch: Batch, /) -> Probs:
        """Probabilities of each image."""
        if self._single is not None and len(batch) == 1:
            self._image[...] = batch
            self._single.infer()
            probs: Probs = self._answer.copy()
            return probs
        # The tensor does not keep its array alive, and does not borrow read-only memory.
        lent = np.require(batch, requirements=["C", "W"])
        self._any.set_input_tensor(ov.Tensor(lent, shared_memory=True))
        self._any.infer()
        answer: Probs = self._any.get_output_tensor().data.copy()
        return answer


def load(model: bytes, /, *, threads: int, precision: Precision) -> OpenVino:
    """Compile for one stream of `threads` threads.

    Raises:
        ConfigError: OpenVINO cannot read or compile the model.
    """
    config = {
        key.hint.performance_mode: key.hint.PerformanceMode.LATENCY,
        key.hint.inference_precision: HINTS[precision],
        key.inference_num_threads: threads,
        key.num_streams: 1,
        # Pinned threads of several worker processes would share the first core.
        key.hint.enable_cpu_pinning: False,
    }
    try:
        core = ov.Core()
        network = core.read_model(model)
        any_size = core.compile_model(network, "CPU", config)
        single = None
        if network.input().element_type == ov.Type.u8:
            # Image files come one by one, float tensors in batches: not worth another copy there.
            shape = network.input().partial_shape
            shape[0] = 1
            network.reshape(shape)
            single = core.compile_model(network, "CPU", config)
    except RuntimeError as exc:
        raise ConfigError(f"openvino cannot load the model: {exc}") from exc
    return OpenVino(any_size, single)
