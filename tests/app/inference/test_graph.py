"""Cutting a graph open at `tensor`, and down to one of its outputs."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.errors import ConfigError
from app.inference.graph import parse, single_output, tensor_input


def graph_of(*nodes, output="out", sizes=("N", 4, 5, 3)) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, list(sizes))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.array(255, np.float32), "white"),
            numpy_helper.from_array(np.array(2, np.float32), "two"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return model.SerializeToString()


TRANSPOSE = helper.make_node("Transpose", ["pixels"], ["planar"], perm=[0, 3, 1, 2])
CAST = helper.make_node("Cast", ["planar"], ["levels"], to=TensorProto.FLOAT)
DIV = helper.make_node("Div", ["levels", "white"], ["tensor"])
MUL = helper.make_node("Mul", ["tensor", "two"], ["out"])


def test_cut():
    cut = parse(tensor_input(graph_of(TRANSPOSE, CAST, DIV, MUL))).graph
    assert [n.op_type for n in cut.node] == ["Mul"]
    assert [i.name for i in cut.initializer] == ["two"]
    (tensor,) = cut.input
    assert tensor.name == "tensor"
    assert tensor.type.tensor_type.elem_type == TensorProto.FLOAT
    dims = [d.dim_value or d.dim_param for d in tensor.type.tensor_type.shape.dim]
    assert dims == ["N", 3, 4, 5]


def test_cut_twice_is_cut_once():
    once = tensor_input(graph_of(TRANSPOSE, CAST, DIV, MUL))
    assert tensor_input(once) == once


def test_no_tensor():
    div = helper.make_node("Div", ["levels", "white"], ["unit"])
    mul = helper.make_node("Mul", ["unit", "two"], ["out"])
    with pytest.raises(ConfigError, match="'tensor'"):
        tensor_input(graph_of(TRANSPOSE, CAST, div, mul))


def test_pixels_used_behind_tensor():
    side = helper.make_node("Cast", ["pixels"], ["side"], to=TensorProto.FLOAT)
    add = helper.make_node("Add", ["tensor", "side"], ["out"])
    with pytest.raises(ConfigError, match="'pixels'"):
        tensor_input(graph_of(TRANSPOSE, CAST, DIV, side, add))


@pytest.mark.parametrize("junk", [b"", b"no model", b"\x08"])
def test_not_a_model(junk):
    with pytest.raises(ConfigError, match="not an ONNX model"):
        tensor_input(junk)


def two_outputs() -> bytes:
    proto = parse(graph_of(TRANSPOSE, CAST, DIV, MUL))
    proto.graph.node.append(helper.make_node("Add", ["tensor", "three"], ["sum"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(3, np.float32), "three"))
    proto.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, None))
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("name", "operator", "constant"), [("out", "Mul", "two"), ("sum", "Add", "three")]
)
def test_one_output_keeps_what_it_needs(name, operator, constant):
    graph = parse(single_output(two_outputs(), name)).graph
    assert [o.name for o in graph.output] == [name]
    assert [n.op_type for n in graph.node] == ["Transpose", "Cast", "Div", operator]
    assert {i.name for i in graph.initializer} == {"white", constant}
    assert [i.name for i in graph.input] == ["pixels"]


def test_a_single_output_is_left_alone():
    model = graph_of(TRANSPOSE, CAST, DIV, MUL)
    assert single_output(model, "out") is model


def test_no_such_output():
    with pytest.raises(ConfigError, match="no output 'scores'; available: out, sum"):
        single_output(two_outputs(), "scores")
