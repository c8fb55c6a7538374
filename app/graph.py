"""Parts of an ONNX file: what lies behind `tensor`, what one of several outputs needs.

A bundle's graph starts with uint8 pixels; the float32 (N, C, H, W) in [0, 1] that it makes of them
is named `tensor` (see `training/export.py`). With that as the input, for clients that send float
tensors instead of pixels, the nodes before it go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.errors import ConfigError

if TYPE_CHECKING:
    import onnx

TENSOR = "tensor"


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
        raise ConfigError(f"{len(model)} bytes are not an ONNX model: no graph in them")
    return proto


def tensor_input(model: bytes) -> bytes:
    """The same network with the input `tensor`, float32 (N, C, H, W) in [0, 1].

    Raises:
        ConfigError: not an ONNX model, no such tensor, or pixels are used behind it too.
    """
    import onnx

    proto = parse(model)
    graph = proto.graph
    if [i.name for i in graph.input] == [TENSOR]:
        return model
    if not any(TENSOR in node.output for node in graph.node):
        raise ConfigError(
            f"the graph makes no tensor named {TENSOR!r}; make the bundle with `scumble export`"
        )
    kept, needed = behind(graph, TENSOR)
    pixels = graph.input[0]
    if pixels.name in needed:
        raise ConfigError(f"the graph uses {pixels.name!r} behind {TENSOR!r} too")
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
    """The same network with the one output `name`, without what only the others need.

    Raises:
        ConfigError: not an ONNX model, or it has no such output.
    """
    import onnx

    proto = parse(model)
    graph = proto.graph
    outputs = {output.name: output for output in graph.output}
    if list(outputs) == [name]:
        return model
    if name not in outputs:
        raise ConfigError(f"the graph has no output {name!r}; there: {', '.join(outputs)}")
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


def behind(graph: onnx.GraphProto, start: str) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that the outputs need once `start` is given, in order, and all names they need."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):  # ONNX keeps nodes sorted: makers before users
        if needed & set(node.output) - {start}:
            needed.update(node.input)
            kept.append(node)
    return kept[::-1], needed
