"""A bundle small enough to make in every test run: 8 x 8 pixels, 4 classes, made-up weights.

It is written with `onnx` alone, so the service's tests need no torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import orjson
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from app.inference.bundle import InputShape, golden_inputs, write_card

SHAPE = InputShape(height=8, width=8, channels=3)
LABELS = ["red", "green", "blue", "grey"]


def make_bundle(
    folder: Path, *, name: str = "tiny", labels: list[str] = LABELS, auxiliary: bool = False
) -> Path:
    """Write the bundle `folder`/`name`, with auxiliary networks if asked; gives its folder."""
    target = folder / name
    target.mkdir(parents=True)
    onnx.save(network(len(labels)), target / "float32.onnx")
    quantize(target / "float32.onnx", target / "int8.onnx")
    pictures = golden_inputs(SHAPE)
    golden = {
        "probabilities": {
            "float32": answers(target / "float32.onnx", pictures).tolist(),
            "bf16": answers(target / "float32.onnx", pictures).tolist(),
            "int8": answers(target / "int8.onnx", pictures).tolist(),
        },
        "tolerance": {"float32": 1e-4, "bf16": 0.05, "int8": 0.05},
    }
    (target / "golden.json").write_bytes(orjson.dumps(golden))
    if auxiliary:
        onnx.save(network(len(labels), seed=8, scores=True), target / "surrogate.onnx")
        onnx.save(network(len(labels), seed=9), target / "misinformation.onnx")
    write_card(
        target,
        {"name": name, "version": "1", "labels": labels, "input": SHAPE.model_dump()},
    )
    return target


def network(classes: int, *, seed: int = 7, scores: bool = False) -> onnx.ModelProto:
    """pixels -> tensor -> convolution -> ReLU -> mean -> linear -> softmax.

    With `scores` a second output beside the probabilities, made up as well: another linear layer.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "scale": np.array(1 / 255, np.float32),
        "w1": rng.normal(0, 0.5, (6, 3, 3, 3)).astype(np.float32),
        "b1": rng.normal(0, 0.1, 6).astype(np.float32),
        "w2": rng.normal(0, 4, (6, classes)).astype(np.float32),
        "b2": rng.normal(0, 0.5, classes).astype(np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["planar"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planar"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["tensor"]),
        helper.make_node("Conv", ["tensor", "w1", "b1"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["logits"], "linear"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs = ["probabilities"]
    if scores:
        weights["w3"] = rng.normal(0, 40, (6, classes)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["f", "w3"], ["scores"]))
        outputs.append("scores")
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, ["N", classes]) for o in outputs],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name="tests"
    )


class _Calibration(CalibrationDataReader):
    def __init__(self) -> None:
        self._batches = iter([{"pixels": golden_inputs(SHAPE)}])

    def get_next(self):
        return next(self._batches, None)


def quantize(source: Path, target: Path) -> None:
    """Static quantization to QDQ."""
    quantize_static(
        source,
        target,
        _Calibration(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm"],
    )


def answers(model: Path, pictures: np.ndarray) -> np.ndarray:
    """Probabilities by ONNX Runtime."""
    session = ort.InferenceSession(model.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": pictures})[0]
