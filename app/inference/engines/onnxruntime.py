"""ONNX Runtime: the portable engine."""

from __future__ import annotations

from collections.abc import Iterable

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from app.errors import ConfigError
from app.inference.engines import Batch, Probs
from app.precision import Precision

# The library derives them from Exception only; these are what a bad or unsupported file raises.
REFUSALS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NotImplemented,
    state.RuntimeException,
)
ERROR = 3  # log severity: warnings are for whoever makes a model


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
        """Nothing: a session takes any number of images as it is."""


def load(model: bytes, /, *, threads: int, precision: Precision) -> OnnxRuntime:
    """A session with `threads` threads.

    Raises:
        ConfigError: bf16, or ONNX Runtime cannot read or run the model.
    """
    if precision == "bf16":
        raise ConfigError(
            "precision is 'bf16'; the engine onnxruntime runs float32 and int8 (bf16: openvino)"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERROR
    # A spinning thread would take the core from the other workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI int8 would saturate: exact sums, by wider steps where the processor needs them.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except REFUSALS as exc:
        raise ConfigError(f"onnxruntime cannot load the model: {exc}") from exc
    return OnnxRuntime(session)
