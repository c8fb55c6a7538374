"""Changes ONNX files: another input, a single output, or a defense appended.

A bundle's graph starts with uint8 pixels, which it converts to float32 (N, C, H, W) in [0, 1], a
value named `tensor` (see `scumble/training/bundle_export.py`). For clients that send float tensors
instead of pixels, `tensor` becomes the input and the nodes before it are removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.errors import ConfigError
from app.inference.score_graph import head_of, tap
from scumble.defenses.base import Defense

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

TENSOR = "tensor"
ANSWERS = (
    "answers"  # output of `with_l1_output`: defended rows, and their distance as the last column
)
CLEAN = "clean"  # what was the output before a defense was put behind it
ABSTAINED = "abstained"  # output of a defended file: which rows are
OPSET = 18  # of the operators that defenses use


def parse(model: bytes) -> onnx.ModelProto:
    """ONNX bytes as a protobuf message.

    Raises:
        ConfigError: they are not an ONNX model.
    """
    # Imported here, as onnx takes a quarter of a second and most services never cut a graph.
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load_model_from_string(model)
    except DecodeError as exc:
        raise ConfigError(f"{len(model)} bytes are not an ONNX model: {exc}") from exc
    if not proto.graph.node:
        raise ConfigError(f"{len(model)} bytes are not an ONNX model: they contain no graph")
    return proto


def outside(model: bytes) -> str | None:
    """The first external file that a network stores weights in; None if all are in `model`.

    Raises:
        ConfigError: `model` is not an ONNX model.
    """
    return next(_locations(parse(model)), None)


def _locations(message: Message) -> Iterator[str]:
    """External files of all tensors in a message, including subgraphs and attributes."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if isinstance(value, Sequence) else [value]:
            if field.name == "external_data" and part.key == "location":
                yield part.value
            yield from _locations(part)


def tensor_input(model: bytes) -> bytes:
    """The same network with the input `tensor`, float32 (N, C, H, W) in [0, 1].

    Raises:
        ConfigError: `model` is not an ONNX model, has no value `tensor`, or uses the pixels after
            that value too.
    """
    import onnx

    proto = parse(model)
    graph = proto.graph
    if [i.name for i in graph.input] == [TENSOR]:
        return model
    if not any(TENSOR in node.output for node in graph.node):
        raise ConfigError(
            f"the graph has no value named {TENSOR!r}; make the bundle with `scumble export`"
        )
    kept, needed = behind(graph, TENSOR)
    pixels = graph.input[0]
    if pixels.name in needed:
        raise ConfigError(f"the graph uses {pixels.name!r} after {TENSOR!r} too")
    n, h, w, c = (d.dim_value or d.dim_param for d in pixels.type.tensor_type.shape.dim)
    cut = onnx.helper.make_graph(
        kept,
        graph.name,
        [onnx.helper.make_tensor_value_info(TENSOR, onnx.TensorProto.FLOAT, [n, c, h, w])],
        graph.output,
        [i for i in graph.initializer if i.name in needed],
    )
    proto.graph.CopyFrom(cut)
    return proto.SerializeToString()


def single_output(model: bytes, name: str) -> bytes:
    """The same network with the single output `name`, without nodes that only others need.

    Raises:
        ConfigError: `model` is not an ONNX model, or has no such output.
    """
    import onnx

    proto = parse(model)
    graph = proto.graph
    outputs = {output.name: output for output in graph.output}
    if list(outputs) == [name]:
        return model
    if name not in outputs:
        raise ConfigError(f"the graph has no output {name!r}; available: {', '.join(outputs)}")
    graph.ClearField("output")
    graph.output.append(outputs[name])
    kept, needed = behind(graph, "")
    cut = onnx.helper.make_graph(
        kept,
        graph.name,
        graph.input,
        graph.output,
        [i for i in graph.initializer if i.name in needed],
    )
    proto.graph.CopyFrom(cut)
    return proto.SerializeToString()


class Appender:
    """Implements `scumble.defenses.base.Nodes` for a graph.

    Args:
        graph: its rows are named `CLEAN`.
        classes: K.

    Attributes:
        width: number of features; 0 where none are recognised.
    """

    def __init__(self, graph: onnx.GraphProto, classes: int) -> None:
        self.classes = classes
        self.clean = CLEAN
        self._graph = graph
        self._count = 0
        head = head_of(graph, CLEAN)
        self.width = head.width
        self._head = head

    @cached_property
    def logits(self) -> str | None:
        """The logits; None if the rows are not a softmax."""
        return None if self._head.logits is None else tap(self, self._graph, self._head.logits)

    @cached_property
    def features(self) -> str | None:
        """The input of the last linear layer; None if there is none."""
        return None if self._head.features is None else tap(self, self._graph, self._head.features)

    def __call__(
        self, op: str, *inputs: str | float | npt.NDArray[Any], **attributes: int | str
    ) -> str:
        """Append one node and return the name of its result."""
        import onnx

        names = [i if isinstance(i, str) else self._constant(i) for i in inputs]
        result = self._name()
        node = onnx.helper.make_node(op, names, [result], result)
        node.attribute.extend(
            onnx.helper.make_attribute(key, value) for key, value in attributes.items()
        )
        self._graph.node.append(node)
        return result

    def _constant(self, value: float | npt.NDArray[Any]) -> str:
        import onnx

        array = value if isinstance(value, np.ndarray) else np.array(value, np.float32)
        name = self._name()
        self._graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def _name(self) -> str:
        self._count += 1
        return f"defense/{self._count}"


def defended(
    model: bytes, defense: Defense, described: Mapping[str, str] | None = None
) -> bytes | None:
    """The same network with the defense appended, for any ONNX runtime.

    The output keeps its name. If the defense withholds rows, a second output `abstained`, bool
    (N,), marks them.

    Args:
        model: the clean network.
        defense: the defense to append.
        described: metadata of the file.

    Returns:
        The new file; None if the defense cannot be written as nodes, or the network's operators are
        too old.

    Raises:
        ConfigError: `model` is not an ONNX model.
    """
    import onnx

    proto = parse(model)
    name = proto.graph.output[0].name
    found = _append(proto, defense)
    if found is None:
        return None
    op, rows, abstained = found
    proto.graph.node.append(onnx.helper.make_node("Identity", [rows], [name]))
    if abstained is not None:
        flags = onnx.helper.make_tensor_value_info(ABSTAINED, onnx.TensorProto.BOOL, ["N"])
        column = op("Squeeze", abstained, np.array([1]))
        proto.graph.node.append(onnx.helper.make_node("Identity", [column], [ABSTAINED]))
        proto.graph.output.append(flags)
    for key, value in (described or {}).items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def with_l1_output(model: bytes, defense: Defense) -> bytes | None:
    """The same network with the defense appended, and its effect as another column: (N, K + 1).

    The columns are the K defended probabilities and the L1 distance to the clean ones; then, if the
    defense withholds rows, 1 for abstained rows and 0 for the others.

    Returns:
        The new file, or None as in `defended`.

    Raises:
        ConfigError: `model` is not an ONNX model.
    """
    import onnx

    proto = parse(model)
    found = _append(proto, defense)
    if found is None:
        return None
    op, rows, abstained = found
    distance = op("ReduceSum", op("Abs", op("Sub", rows, CLEAN)), np.array([1]), keepdims=1)
    columns = [rows, distance]
    if abstained is not None:
        columns.append(op("Cast", abstained, to=onnx.TensorProto.FLOAT))
    proto.graph.node.append(onnx.helper.make_node("Concat", columns, [ANSWERS], ANSWERS, axis=1))
    (output,) = proto.graph.output
    output.name = ANSWERS
    output.type.tensor_type.shape.dim[1].dim_value += len(columns) - 1
    return proto.SerializeToString()


def _append(proto: onnx.ModelProto, defense: Defense) -> tuple[Appender, str, str | None] | None:
    """Append the defense to the output, renamed to `CLEAN`.

    Returns:
        What appended the nodes, the defended rows, and which are abstained.
    """
    op = appender_behind(proto)
    if op is None:
        return None
    found = defense.answer_nodes(op, CLEAN)
    return None if found is None else (op, *found)


def appender_behind(proto: onnx.ModelProto) -> Appender | None:
    """Rename the output to `CLEAN` and return what appends nodes; None if operators are too old."""
    if {opset.domain: opset.version for opset in proto.opset_import}.get("", 0) < OPSET:
        return None
    graph = proto.graph
    (output,) = graph.output
    for node in graph.node:
        node.input[:] = [CLEAN if name == output.name else name for name in node.input]
        node.output[:] = [CLEAN if name == output.name else name for name in node.output]
    return Appender(graph, output.type.tensor_type.shape.dim[1].dim_value)


def behind(graph: onnx.GraphProto, start: str) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes between `start` and the outputs, in order, and all names that these need."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):  # ONNX sorts nodes: producers come before consumers
        if needed & set(node.output) - {start}:
            needed.update(node.input)
            kept.append(node)
    return kept[::-1], needed
