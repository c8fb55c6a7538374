"""Scores: in numpy, and the same from one call of every engine."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.errors import ConfigError
from app.inference import engines
from app.inference.bundle import Bundle, golden_inputs
from app.inference.graph import parse, single_output
from app.inference.score_graph import SCORED, ScoredEngine, head_of, with_scores
from scumble.defenses import DefenseError
from scumble.defenses.scores import Whitener, energy
from tests.tiny import SHAPE

ENGINES = ["openvino", "onnxruntime", pytest.param("torch", marks=pytest.mark.torch)]


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_energy_is_the_logarithm_of_the_sum_of_exponentials(scale):
    logits = scale * normal(50, 7)
    expected = np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(energy(logits), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("mean", "matrix"), [((3,), (2, 4)), ((3, 1), (2, 3)), ((0,), (1, 0)), ((3,), (3,))]
)
def test_a_whitener_whose_parts_do_not_fit_is_refused(mean, matrix):
    with pytest.raises(DefenseError, match=r"allowed: finite \(d,\) and \(r, d\)"):
        Whitener(np.zeros(mean, np.float32), np.zeros(matrix, np.float32))


def test_a_whitener_that_is_not_finite_is_refused():
    with pytest.raises(DefenseError, match="finite"):
        Whitener(np.full(3, np.nan, np.float32), np.zeros((1, 3), np.float32))


def some_whitener(d, r=2):
    return Whitener(normal(1, d)[0], normal(r, d, seed=1))


def outputs_of(model, names):
    """The tensors `names` of a network as ONNX Runtime computes them, for the golden inputs."""
    proto = parse(model)
    for name in names:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    found = []
    for name in names:
        content = single_output(proto.SerializeToString(), name)
        run = engines.load("onnxruntime", content, threads=1, precision="float32")
        found.append(run(golden_inputs(SHAPE)))
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_graph_gives_what_numpy_gives(models, precision, engine):
    model = Bundle(models / "tiny").onnx(precision)
    head = head_of(parse(model).graph, "probabilities")
    assert head.width == 6
    logits, features = outputs_of(model, [head.logits, head.features])
    whitener = some_whitener(6)

    def load(content):
        return engines.load(engine, content, threads=1, precision=precision)

    both = ScoredEngine(load, model, lambda: whitener)
    both.require(golden_inputs(SHAPE))
    rows, evidence = both(golden_inputs(SHAPE))
    np.testing.assert_allclose(rows, load(model)(golden_inputs(SHAPE)), rtol=0, atol=1e-6)
    # int8: another engine rounds a feature to the neighbouring level, so its own are compared.
    if (engine, precision) != ("openvino", "int8"):
        np.testing.assert_allclose(evidence.energy, energy(logits), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            evidence.residual, whitener.residual(features), rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(evidence.top, rows.max(axis=1))


def network(*end, rows="probabilities", more=()):
    """f (N, 5) -> end -> rows (N, 4)."""
    constants = {
        "w": np.ones((5, 4), np.float32),
        "v": np.ones((4, 5), np.float32),
        "b": np.zeros(4, np.float32),
        **dict(more),
    }
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["f"]), *end],
        "end",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 5])],
        [helper.make_tensor_value_info(rows, TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


SOFTMAX = helper.make_node("Softmax", ["z"], ["probabilities"], axis=1)
GEMM = helper.make_node("Gemm", ["f", "w", "b"], ["z"])
ENDS = {
    "Gemm": ([GEMM, SOFTMAX], "z", "f"),
    "Gemm with transposed weights": (
        [helper.make_node("Gemm", ["f", "v", "b"], ["z"], transB=1), SOFTMAX], "z", "f",
    ),
    "MatMul and Add": (
        [
            helper.make_node("MatMul", ["f", "w"], ["m"]),
            helper.make_node("Add", ["b", "m"], ["z"]),
            SOFTMAX,
        ], "z", "f",
    ),
    "no linear layer": ([helper.make_node("Mul", ["f", "b"], ["z"]), SOFTMAX], "z", None),
    "weights that are computed": (
        [helper.make_node("MatMul", ["f", "f"], ["z"]), SOFTMAX], "z", None,
    ),
    "no softmax": ([helper.make_node("Sigmoid", ["f"], ["probabilities"])], None, None),
}  # fmt: skip


@pytest.mark.parametrize(("end", "logits", "features"), ENDS.values(), ids=ENDS)
def test_the_last_layer_is_recognised_or_not(end, logits, features):
    head = head_of(parse(network(*end)).graph, "probabilities")
    assert (head.logits, head.features) == (logits, features)
    assert head.width == (5 if features else 0)


def test_a_network_without_a_linear_layer_has_the_energy_only():
    model = network(*ENDS["no linear layer"][0])
    (output,) = parse(with_scores(model, None)).graph.output
    assert (output.name, output.type.tensor_type.shape.dim[1].dim_value) == (SCORED, 5)
    with pytest.raises(ConfigError, match="none that is recognised; run `scumble calibrate`"):
        with_scores(model, some_whitener(5))


def test_a_whitener_of_another_network_is_refused():
    with pytest.raises(ConfigError, match="for 6 features, the network's last linear layer takes"):
        with_scores(network(GEMM, SOFTMAX), some_whitener(6))


def test_a_network_without_softmax_has_no_scores():
    with pytest.raises(ConfigError, match="must end in Softmax"):
        with_scores(network(*ENDS["no softmax"][0]), None)


def test_no_scored_graph_is_made_until_a_defense_needs_it(models):
    loaded = []

    def load(content):
        loaded.append(content)
        return engines.load("onnxruntime", content, threads=1, precision="float32")

    engine = ScoredEngine(load, Bundle(models / "tiny").onnx("float32"), lambda: None)
    assert not engine.made
    assert loaded == []
    first = engine.require(golden_inputs(SHAPE))
    assert engine.require(golden_inputs(SHAPE)) is first
    assert len(loaded) == 1
