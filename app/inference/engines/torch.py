"""Torch: an interpreter of ONNX graphs with a table of operators.

It is slower than the other engines and takes much longer to import. Tests compare the others with
it, and `scumble/training/qat.py` trains it as the differentiable form of a bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from app.errors import ConfigError
from app.inference.engines import Batch, Probs
from app.inference.graph import parse
from app.precision import Precision

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Step:
    """One node: `output` = op(*inputs, **attributes); an input named "" is omitted (None)."""

    op: Op
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


class Interpreter:
    """An ONNX graph as a sequence of torch calls.

    Attributes:
        constants: the initializers; replace them to run the graph with other weights.
        input: name of the graph's input.
        output: name of the graph's output.
    """

    def __init__(self, model: onnx.ModelProto, ops: dict[str, Op] | None = None) -> None:
        table = ops or OPS
        graph = model.graph
        unknown = sorted({n.op_type for n in graph.node} - set(table))
        if unknown:
            raise ConfigError(
                f"the engine torch does not support the operators {', '.join(unknown)}; "
                f"supported: {', '.join(sorted(table))}"
            )
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.constants: dict[str, Tensor] = {
            i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy())
            for i in graph.initializer
        }
        self.steps = [
            Step(
                table[n.op_type],
                tuple(n.input),
                n.output[0],
                {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute},
            )
            for n in graph.node
        ]

    def __call__(self, batch: Tensor, output: str | None = None) -> Tensor:
        """The tensor named `output` (by default the graph's output) for `batch`."""
        output = output or self.output
        values: dict[str, Tensor | None] = {"": None, **self.constants, self.input: batch}
        for step in self.steps:
            value = step.op(*(values[name] for name in step.inputs), **step.attributes)
            if step.output == output:
                return value
            values[step.output] = value
        raise KeyError(output)


class Torch:
    """The interpreter as an engine."""

    def __init__(self, network: Interpreter) -> None:
        self._network = network

    @torch.inference_mode()
    def __call__(self, batch: Batch, /) -> Probs:
        """Probabilities of each image."""
        probs: Probs = self._network(torch.from_numpy(np.array(batch))).numpy()
        return probs

    def prepare(self, sizes: Iterable[int], /) -> None:
        """Does nothing: tensors may have any number of images."""


def load(model: bytes, /, *, threads: int, precision: Precision) -> Torch:
    """An interpreter of the model; `threads` applies to the process, as torch has one thread pool.

    Raises:
        ConfigError: the precision is bf16, `model` is not an ONNX model, or an operator is not
            supported.
    """
    if precision == "bf16":
        raise ConfigError(
            "precision is 'bf16'; the engine torch runs float32 and int8 (bf16: openvino)"
        )
    network = Interpreter(parse(model))
    torch.set_num_threads(threads)
    return Torch(network)


def _conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    kernel_shape: list[int] | None = None,
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    dilations: tuple[int, ...] = (1, 1),
    group: int = 1,
    auto_pad: bytes = b"NOTSET",
) -> Tensor:
    del kernel_shape, auto_pad  # the weights have the shape; the exporter writes explicit pads
    x, padding = _pad(x, pads, 0.0)
    return F.conv2d(x, w, b, tuple(strides), padding, tuple(dilations), group)


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    dilations: tuple[int, ...] = (1, 1),
    ceil_mode: int = 0,
    storage_order: int = 0,
    auto_pad: bytes = b"NOTSET",
) -> Tensor:
    del storage_order, auto_pad
    whole = x if x.is_floating_point() else x.float()
    whole, padding = _pad(whole, pads, -float("inf"))
    out = F.max_pool2d(
        whole, tuple(kernel_shape), tuple(strides), padding, tuple(dilations), bool(ceil_mode)
    )
    return out.to(x.dtype)


def _pad(x: Tensor, pads: tuple[int, ...], value: float) -> tuple[Tensor, tuple[int, int]]:
    """(x, symmetric padding); if the four sides differ, x is padded here."""
    top, left, bottom, right = pads
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's name
    transB: int = 0,  # noqa: N803 - ONNX's name
) -> Tensor:
    out = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return out if c is None else out + beta * c


def _cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    del saturate
    return x.to(torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(to))).dtype)


def _axes(x: Tensor, axes: Tensor | None) -> list[int]:
    return list(range(x.ndim)) if axes is None else axes.tolist()


def _reduce(over: Callable[[Tensor, list[int], bool], Tensor]) -> Op:
    def op(
        x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        del noop_with_empty_axes
        return over(x, _axes(x, axes), bool(keepdims))

    return op


def _concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = shape.tolist()
    return x.reshape([x.shape[i] if s == 0 and not allowzero else s for i, s in enumerate(sizes)])


def along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """`values` reshaped to broadcast with `x`: one per slice of `axis`, or one for all."""
    return values.view([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def _quantize(
    x: Tensor, scale: Tensor, zero: Tensor, *, axis: int = 1, saturate: int = 1, **_: Any
) -> Tensor:
    del saturate
    kind = torch.iinfo(zero.dtype)
    levels = torch.round(x / along(scale, x, axis)) + along(zero, x, axis)
    return levels.clamp(kind.min, kind.max).to(zero.dtype)


def _dequantize(
    q: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, **_: Any
) -> Tensor:
    # Subtract the zero point in integers, as int32 biases may exceed a float's 24 bits.
    levels = q.int() if zero is None else q.int() - along(zero.int(), q, axis)
    return levels * along(scale, q, axis)


# The operators of this project's exports, torchvision's resnets and mobilenets, their int8 forms
# and the scores of `app.inference.score_graph`.
OPS: dict[str, Op] = {
    "Add": lambda a, b: a + b,
    "Cast": _cast,
    "Clip": lambda x, low=None, high=None: x.clamp(low, high),
    "Concat": _concat,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": lambda a, b: a / b,
    "Exp": lambda x: x.exp(),
    "Flatten": lambda x, axis=1: x.flatten(axis),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "Identity": lambda x: x,
    "Log": lambda x: x.log(),
    "MatMul": lambda a, b: a @ b,
    "MaxPool": _max_pool,
    "Mul": lambda a, b: a * b,
    "QuantizeLinear": _quantize,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": lambda x: x.relu(),
    "Reshape": _reshape,
    "Softmax": lambda x, axis=-1: x.softmax(axis),
    "Sqrt": lambda x: x.sqrt(),
    "Sub": lambda a, b: a - b,
    "Transpose": lambda x, perm: x.permute(perm),
}
