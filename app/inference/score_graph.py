"""Finds the logits and features of a network and adds its scores as outputs of the graph.

A network ends in a Softmax, preceded by its last linear layer (Gemm, or MatMul with an Add) and
possibly by quantization nodes. The features are the input of that layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from app.errors import ConfigError
from app.inference.engines import FAST, Batch, Engine, Probs
from scumble.defenses.evidence import Evidence
from scumble.defenses.scores import Whitener, energy_nodes

if TYPE_CHECKING:
    import onnx

    from app.inference.graph import Appender

SCORED = "scored"  # output of `with_scores`: clean rows, then the energy, then the residual
PASSED = {"Identity", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Head:
    """The end of a network.

    Attributes:
        logits: name of the input of the softmax; None if the rows are not a softmax.
        features: name of the input of the last linear layer; None if there is none.
        width: d, number of features.
    """

    logits: str | None
    features: str | None = None
    width: int = 0


def head_of(graph: onnx.GraphProto, rows: str) -> Head:
    """Find logits and features in the graph that computes `rows`."""
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}

    def maker(name: str) -> onnx.NodeProto | None:
        node = makers.get(name)
        while node is not None and node.op_type in PASSED:
            node = makers.get(node.input[0])
        return node

    def weights(name: str) -> tuple[int, ...]:
        while name not in constants:
            if name not in makers or makers[name].op_type not in PASSED:
                return ()
            name = makers[name].input[0]
        return constants[name]

    softmax = maker(rows)
    if softmax is None or softmax.op_type != "Softmax":
        return Head(None)
    logits = softmax.input[0]
    layer = maker(logits)
    if layer is not None and layer.op_type == "Add":  # of a bias
        layer = next((found for name in layer.input if (found := maker(name)) is not None), None)
    if layer is None or layer.op_type not in ("Gemm", "MatMul"):
        return Head(logits)
    attributes = {a.name: a.i for a in layer.attribute}
    shape = weights(layer.input[1])
    if len(shape) != 2 or attributes.get("transA"):
        return Head(logits)
    return Head(logits, layer.input[0], shape[1] if attributes.get("transB") else shape[0])


def tap(op: Appender, graph: onnx.GraphProto, name: str) -> str:
    """A name by which more nodes can use `name`.

    Engines fuse a DequantizeLinear with the one node that uses it: another gets one of its own.
    """
    for node in graph.node:
        if name in node.output and node.op_type == "DequantizeLinear":
            attributes = {a.name: a.i for a in node.attribute}
            return op("DequantizeLinear", *node.input, **attributes)
    return name


def with_scores(model: bytes, whitener: Whitener | None) -> bytes:
    """The same network with one output (N, K + 1), or (N, K + 2) with a whitener.

    Its columns are the clean rows, the energy, and the residual.

    Raises:
        ConfigError: not an ONNX model, its operators are too old, its rows are not a softmax, or it
            has no such features as the whitener was fitted to.
    """
    proto, op, logits = _tapped(model)
    columns = [op.clean, energy_nodes(op, logits)]
    if whitener is not None:
        if op.features is None or op.width != len(whitener.mean):
            raise ConfigError(
                f"the whitener is for {len(whitener.mean)} features, the network's last linear "
                f"layer takes {op.width or 'none that is recognised'}; run `scumble calibrate`"
            )
        columns.append(whitener.nodes(op, op.features))
    return _ending_in(proto, columns, len(columns) - 1)


def with_head(model: bytes) -> bytes:
    """The same network with one output (N, 2 K + d), to fit a whitener and thresholds to.

    Its columns are the clean rows, the logits and the features; d is 0 where none are recognised.

    Raises:
        ConfigError: not an ONNX model, its operators are too old, or its rows are not a softmax.
    """
    proto, op, logits = _tapped(model)
    columns = [op.clean, logits]
    if op.features is not None:
        columns.append(op.features)
    return _ending_in(proto, columns, op.classes + op.width)


class ScoredEngine:
    """An engine whose one call gives clean rows and scores; loaded when a defense first needs it.

    Args:
        load: makes an engine from ONNX bytes.
        model: the undefended network.
        whitener: gives what the score `residual` needs; None for the energy alone.
        largest: images of the largest batch.
    """

    def __init__(
        self,
        load: Callable[[bytes], Engine],
        model: bytes,
        whitener: Callable[[], Whitener | None],
        largest: int = 1,
    ) -> None:
        self._load = load
        self._model = model
        self._whitener = whitener
        self._scores = 0
        self._largest = largest
        self._engine: Engine | None = None
        self._example: Evidence | None = None
        self._lock = threading.Lock()

    @property
    def made(self) -> bool:
        """Whether it is loaded."""
        return self._engine is not None

    def require(self, images: Batch) -> Evidence:
        """Load it if it is not; gives the evidence of the example images with which it was loaded.

        Keys are loaded while batches run, and an engine does not run on two threads: so it runs
        here before it is shown to batches, and never again.

        Raises:
            ConfigError: see `with_scores`.
        """
        with self._lock:
            if self._example is None:
                whitener = self._whitener()
                self._scores = 1 if whitener is None else 2
                engine = self._load(with_scores(self._model, whitener))
                engine.prepare(size for size in FAST if size <= self._largest)
                _, self._example = self._run(engine, images)
                self._engine = engine
            return self._example

    def __call__(self, batch: Batch) -> tuple[Probs, Evidence]:
        """Clean rows and evidence; `require` comes first."""
        assert self._engine is not None  # noqa: S101  # asked for by `made`
        return self._run(self._engine, batch)

    def prepare(self, sizes: Iterable[int]) -> None:
        """Compile for batches of these sizes."""
        assert self._engine is not None  # noqa: S101  # same
        self._engine.prepare(sizes)

    def _run(self, engine: Engine, batch: Batch) -> tuple[Probs, Evidence]:
        columns = engine(batch)
        scores = self._scores
        rows = np.ascontiguousarray(columns[:, :-scores])
        energy, residual = columns[:, -scores], columns[:, -1] if scores > 1 else None
        return rows, Evidence(np.maximum.reduce(rows, axis=1), energy, residual)


def _tapped(model: bytes) -> tuple[onnx.ModelProto, Appender, str]:
    """The network, what appends nodes to it, and its logits."""
    from app.inference.graph import appender_behind, parse

    proto = parse(model)
    op = appender_behind(proto)
    if op is None or op.logits is None:
        raise ConfigError(
            "the network has no logits to take the energy of: it must end in Softmax, and have "
            "the operators of opset 18"
        )
    return proto, op, op.logits


def _ending_in(proto: onnx.ModelProto, columns: Sequence[str], more: int) -> bytes:
    """The network with these columns, `more` than classes, as its one output."""
    import onnx

    proto.graph.node.append(onnx.helper.make_node("Concat", columns, [SCORED], SCORED, axis=1))
    (output,) = proto.graph.output
    output.name = SCORED
    output.type.tensor_type.shape.dim[1].dim_value += more
    return proto.SerializeToString()
