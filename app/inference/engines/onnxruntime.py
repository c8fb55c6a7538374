"""ONNX Runtime: the portable engine."""

from __future__ import annotations

from collections.abc import Iterable

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from app.errors import ConfigError
from app.inference.engines import Batch, Probs
from app.precision import Precision

# What a bad or unsupported file raises; the library has no common base class for them.
REFUSALS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NotImplemented,
    state.RuntimeException,
)
ERROR = 3  # log severity: warnings matter only to the author of a model


class OnnxRuntime:
    """A session on the CPU."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._run = session.run
        self._input = session.get_inputs()[0].name
        self._outputs = [session.get_outputs()[0].name]

    def __call__(self, batch: Batch, /) -> Probs:
        """Probabilities of each image."""
        probs: Probs = self._run(self._outputs, {self._input: batch})[0]
        return probs

    def prepare(self, sizes: Iterable[int], /) -> None:
        """Does nothing: a session takes batches of any size."""


def load(model: bytes, /, *, threads: int, precision: Precision) -> OnnxRuntime:
    """A session with `threads` threads.

    Raises:
        ConfigError: the precision is bf16, or ONNX Runtime cannot read or run the model.
    """
    if precision == "bf16":
        raise ConfigError(
            "precision is 'bf16'; the engine onnxruntime runs float32 and int8 (bf16: openvino)"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERROR
    # A spinning thread would take processor time from the other workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI int8 sums would saturate; this computes them exactly, in wider types if needed.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except REFUSALS as exc:
        raise ConfigError(f"onnxruntime cannot load the model: {exc}") from exc
    return OnnxRuntime(session)
