"""Defenses inside a graph: the same answers as in numpy, in both engines that run graphs fast."""

import numpy as np
import pytest
from hypothesis import given, settings
from onnx import TensorProto, checker, helper

from app.inference import engines
from app.inference.graph import defended, parse, with_l1_output
from scumble.defenses import TABLE, make
from tests.scumble.defenses.test_contract import Pictured
from tests.strategies import probs

# name, parameters; the others must say that they cannot be written as nodes
ROWS = [
    ("none", {}),
    ("dcp", {"beta": 0.0}),
    ("dcp", {"beta": 0.7}),
    ("dcp", {"beta": 1.0}),
    ("dcp", {"beta": 1.0199}),
    ("dcp", {"beta": 1.02}),  # from here on, the gate is open for every row
    ("dcp", {"beta": 1.2}),
    ("dcp", {"beta": 1.5, "gamma": 0.1, "nu": 50}),
    ("dcp", {"beta": 0.9, "mode": "lee2018"}),
    ("reverse_sigmoid", {"beta": 0.64}),
    ("reverse_sigmoid", {"beta": 1.28, "odds": "lee2018"}),
    ("label", {}),
    ("codebook", {"form": "pooled"}),
    ("chain", {"steps": [["dcp", {"beta": 1.0}], ["label", {}]]}),
    ("chain", {"steps": [["reverse_sigmoid", {"beta": 0.3}], ["dcp", {"beta": 1.2}]]}),
]
BEHIND = {  # why not in the graph
    "adaptive_misinformation": {"tau": 0.5},  # another network
    "random": {"epsilon": 0.5},  # a key
    "mad": {"epsilon": 0.5},  # another network
    "grad2": {"epsilon": 0.5},  # same
    "modelguard_w": {"epsilon": 1},  # a search
    "round": {"decimals": 2},  # float64, and a sort of two keys
    "top_k": {"k": 2},  # the order of equal rows is an engine's own
    "withhold": {  # a key; without one: tests/scumble/defenses/test_withhold.py
        "on": "boundary",
        "loss": 0.5,
        "answers": ["label", {}],
        "withheld": "keyed",
    },
    "chain": {"steps": [["dcp", {"beta": 1.0}], ["round", {"decimals": 2}]]},
}
LEE = "lee2018"  # its 1 - p is float64 in numpy
ENGINES = ["openvino", "onnxruntime"]


def rows_through(classes, *, opset=18) -> bytes:
    """A network whose answers are its inputs."""
    shape = ["N", classes]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["p"], ["probabilities"])],
        "rows",
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, shape)],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def hard_rows(classes, beta):
    """Sure, even, gated and at the gate, with entries that float32 can hardly tell from 0."""
    rng = np.random.default_rng(classes)
    sharp = rng.standard_normal((400, classes)) * rng.choice([0.1, 1, 4, 30], (400, 1))
    rows = np.exp(sharp - sharp.max(1, keepdims=True))
    rows /= rows.sum(1, keepdims=True)
    eye, even = np.eye(classes), np.full((1, classes), 1 / classes)
    near = [
        [m, *[(1 - m) / (classes - 1)] * (classes - 1)]
        for m in beta + np.array([-0.03, -0.003, -1e-4, 0, 1e-4, 0.003, 0.03])
        if 1 / classes <= m <= 1 and classes > 1
    ]
    parts = [rows, eye, even, *([np.array(near)] if near else [])]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("classes", [1, 2, 10, 43, 200])
@pytest.mark.parametrize(("name", "params"), ROWS)
def test_the_graph_gives_what_numpy_gives(name, params, classes, engine):
    defense = make(name, bundle=Pictured(), **params)
    rows = hard_rows(classes, params.get("beta", 0.5))
    expected = defense(rows, None)
    network = rows_through(classes)
    load = engines.load
    inside = defended(network, defense)
    answer = load(engine, inside, threads=1, precision="float32")(rows)
    if name == "chain" and "label" in str(params):  # a tie may fall either way
        same = (answer == expected).all(1)
        assert same.mean() > 0.98
    else:
        np.testing.assert_allclose(answer, expected, atol=3e-6 if LEE in str(params) else 1e-6)
    both = load(engine, with_l1_output(network, defense), threads=1, precision="float32")(rows)
    np.testing.assert_allclose(both[:, :-1], answer, atol=1e-6)
    np.testing.assert_allclose(both[:, -1], np.abs(answer - rows).sum(1), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=probs())
def test_any_rows(rows):
    defense = make("dcp", beta=1.2)
    rows = rows.astype(np.float32)
    model = defended(rows_through(rows.shape[1]), defense)
    engine = engines.load("onnxruntime", model, threads=1, precision="float32")
    np.testing.assert_allclose(engine(rows), defense(rows, None), atol=1e-6)


@pytest.mark.parametrize(("name", "params"), ROWS)
def test_the_graphs_are_whole_and_keep_their_names(name, params):
    model = defended(rows_through(10), make(name, bundle=Pictured(), **params))
    checker.check_model(parse(model), full_check=True)
    graph = parse(model).graph
    assert [i.name for i in graph.input] == ["p"]
    assert [o.name for o in graph.output] == ["probabilities"]
    report = with_l1_output(rows_through(10), make(name, bundle=Pictured(), **params))
    checker.check_model(parse(report), full_check=True)
    (output,) = parse(report).graph.output
    assert [d.dim_value or d.dim_param for d in output.type.tensor_type.shape.dim] == ["N", 11]


@pytest.mark.parametrize(("beta", "more"), [(1.0199, 8), (1.02, 0), (1.2, 0)])
def test_a_gate_that_is_open_for_every_row_has_no_nodes(beta, more):
    gated = parse(defended(rows_through(10), make("dcp", beta=beta, gamma=0.2)))
    plain = parse(defended(rows_through(10), make("reverse_sigmoid", beta=beta, gamma=0.2)))
    assert len(gated.graph.node) == len(plain.graph.node) + more


@pytest.mark.parametrize(("name", "params"), BEHIND.items())
def test_the_others_say_that_they_cannot(name, params):
    defense = make(name, bundle=Pictured(), secret=b"test", **params)
    assert defended(rows_through(10), defense) is None
    assert with_l1_output(rows_through(10), defense) is None


def test_every_defense_is_in_one_of_the_tables():
    assert {name for name, _ in ROWS} | set(BEHIND) == set(TABLE)


def test_the_guard_stays_behind():
    assert defended(rows_through(10), make("dcp", beta=1.2, keep_top1=True)) is None


def test_a_network_of_older_operators_is_left_alone():
    assert defended(rows_through(10, opset=13), make("dcp", beta=1.2)) is None
