"""OpenVINO: the fastest engine measured. It loads the same ONNX files, int8 included.

A network with a dynamic batch size is set up again whenever the size changes, which takes as long
as several images. Instead, a form of the network is compiled for each of the sizes `FAST`, and a
batch of another size runs in parts. `prepare` decides which forms are compiled and when; after it,
no batch compiles a form, as batches may run on the event loop. If it is never called, each form is
compiled when it is first needed.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

# `import openvino` also imports its converter, which is not needed here and which reports the
# import to an analytics service, on a thread and in a forked process.
CONVERTER = "openvino.tools.ovc"
if "openvino" not in sys.modules:
    sys.modules[CONVERTER] = None  # type: ignore[assignment]  # makes its import fail
try:
    import openvino as ov
    from openvino import properties as key
finally:
    if sys.modules.get(CONVERTER, sys) is None:
        del sys.modules[CONVERTER]  # other code may still import it

from app.errors import ConfigError  # noqa: E402  # see above
from app.inference.engines import FAST, Batch, Probs, size_within  # noqa: E402  # see above
from app.inference.processor import adds_int8_exactly  # noqa: E402  # see above
from app.precision import Precision  # noqa: E402  # see above

log = logging.getLogger("scumble")

# By default OpenVINO computes float32 in bf16 on some processors; int8 layers stay int8 under f32.
HINTS: dict[Precision, ov.Type] = {
    "float32": ov.Type.f32,
    "int8": ov.Type.f32,
    "bf16": ov.Type.bf16,
}


LENT_FROM = 1 << 20  # bytes of a batch from which it costs less to lend than to copy


class Form:
    """A network of one batch size."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        self._images = self._request.get_input_tensor().data
        self._answers: Probs = self._request.get_output_tensor().data

    def __call__(self, batch: Batch) -> Probs:
        """Probabilities of each image; `batch` is contiguous and writable."""
        if self._images.nbytes < LENT_FROM:
            return self.filled(batch)
        return self.lent(batch)

    def filled(self, batch: Batch) -> Probs:
        """The same for images that are copied to the form's input tensor.

        A form whose images are lent once is never filled again.
        """
        self._images[...] = batch
        self._request.infer()
        return self._answers

    def lent(self, batch: Batch) -> Probs:
        """The same without copying the images, which pays for large batches.

        Args:
            batch: contiguous and writable, as OpenVINO shares no other memory.
        """
        self._request.set_input_tensor(ov.Tensor(batch, shared_memory=True))
        self._request.infer()
        return self._answers


class OpenVino:
    """An engine for batches of any size.

    Args:
        compiled_for: compiles the network for a batch size.
        forms: the forms that are compiled already, by batch size.
    """

    def __init__(
        self, compiled_for: Callable[[int], ov.CompiledModel], forms: dict[int, Form]
    ) -> None:
        self._compiled_for = compiled_for
        self._forms = forms
        self._refused: set[int] = set()
        self._compiling = threading.Lock()
        self._prepared = False

    def __call__(self, batch: Batch, /) -> Probs:
        """Probabilities of each image."""
        n = len(batch)
        if n < FAST[-1] and n in self._forms:
            return self._forms[n].filled(batch).copy()
        lent = np.require(batch, requirements=["C", "W"])
        rows: list[Probs] = []
        first = 0
        while first < n:
            size = self._size(n - first)
            form, part = self._forms[size], lent[first : first + size]
            rows.append((form(part) if size == FAST[-1] else form.filled(part)).copy())
            first += size
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def prepare(self, sizes: Iterable[int], /) -> None:
        """Compile the forms of these sizes."""
        self._prepared = True
        with self._compiling:
            for size in sizes:
                self._compile(size)

    @property
    def sizes(self) -> list[int]:
        """The sizes that are compiled."""
        return sorted(self._forms)

    def _size(self, n: int) -> int:
        """The size of the largest form that `n` images fill."""
        size = size_within(n)
        if not self._prepared:
            with self._compiling:
                self._compile(size)
        return next(less for less in reversed(FAST) if less <= size and less in self._forms)

    def _compile(self, size: int) -> None:
        """Compile one form, holding the lock; if that fails, smaller forms do its work."""
        if size in self._forms or size in self._refused:
            return
        try:
            self._forms[size] = Form(self._compiled_for(size))
        except RuntimeError as exc:
            self._refused.add(size)
            log.error("openvino cannot run %d images at a time: %s", size, exc)


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
    if precision == "int8" and not adds_int8_exactly():
        log.warning(
            "int8 saturates in openvino on this processor, which has no VNNI; "
            "the engine onnxruntime computes exactly"
        )
    try:
        core = ov.Core()
        network = core.read_model(model)
    except RuntimeError as exc:
        raise ConfigError(f"openvino cannot load the model: {exc}") from exc
    shape = network.input().partial_shape

    def compiled_for(size: int) -> ov.CompiledModel:
        shape[0] = size
        network.reshape(shape)
        return core.compile_model(network, "CPU", config)

    try:
        return OpenVino(compiled_for, {1: Form(compiled_for(1))})
    except RuntimeError as exc:
        raise ConfigError(f"openvino cannot run the model: {exc}") from exc
