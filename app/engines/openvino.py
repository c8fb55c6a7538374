"""OpenVINO: the fastest engine measured. Loads the same ONNX files, int8 included.

A network that takes any number of images prepares itself anew for each batch of another size than
the one before, which takes as long as several images do. So there is none: a form is compiled for
each of the sizes `FAST`, when it is first run, and a batch of another size is run in parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from openvino import properties as key

from app.engines import FAST, Batch, Probs, size_within
from app.errors import ConfigError
from app.precision import Precision

# OpenVINO would take bf16 for float32 on processors that have it; int8 layers stay int8 under f32.
HINTS: dict[Precision, ov.Type] = {
    "float32": ov.Type.f32,
    "int8": ov.Type.f32,
    "bf16": ov.Type.bf16,
}


class Form:
    """A network of one batch size."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        self._images = self._request.get_input_tensor().data
        self._answers: Probs = self._request.get_output_tensor().data

    def filled(self, batch: Batch) -> Probs:
        """Probabilities of each image, copied into the form's own memory: no tensor for a call."""
        self._images[...] = batch
        self._request.infer()
        return self._answers

    def lent(self, batch: Batch) -> Probs:
        """The same without a copy of the images, which pays where they are many.

        Args:
            batch: contiguous and writable: OpenVINO does not borrow other memory.
        """
        self._request.set_input_tensor(ov.Tensor(batch, shared_memory=True))
        self._request.infer()
        return self._answers


class OpenVino:
    """A model for any batch, with the forms that it begins with."""

    def __init__(
        self, compiled_for: Callable[[int], ov.CompiledModel], forms: dict[int, Form]
    ) -> None:
        self._compiled_for = compiled_for
        self._forms = forms

    def __call__(self, batch: Batch, /) -> Probs:
        """Probabilities of each image."""
        n = len(batch)
        if n in FAST[:-1]:
            return self._form(n).filled(batch).copy()
        lent = np.require(batch, requirements=["C", "W"])
        rows: list[Probs] = []
        first = 0
        while first < n:
            size = size_within(n - first)
            form, part = self._form(size), lent[first : first + size]
            rows.append((form.lent(part) if size == FAST[-1] else form.filled(part)).copy())
            first += size
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _form(self, size: int) -> Form:
        form = self._forms.get(size)
        if form is None:
            form = self._forms[size] = Form(self._compiled_for(size))
        return form


def load(model: bytes, /, *, threads: int, precision: Precision) -> OpenVino:
    """Compile for one stream of `threads` threads.

    Raises:
        ConfigError: OpenVINO cannot read or compile the model.
    """
    config: dict[str, Any] = {
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
    except RuntimeError as exc:
        raise ConfigError(f"openvino cannot load the model: {exc}") from exc
    shape = network.input().partial_shape

    def compiled_for(size: int) -> ov.CompiledModel:
        shape[0] = size
        try:
            network.reshape(shape)
            return core.compile_model(network, "CPU", config)
        except RuntimeError as exc:
            raise ConfigError(f"openvino cannot run {size} images at a time: {exc}") from exc

    return OpenVino(compiled_for, {1: Form(compiled_for(1))})
