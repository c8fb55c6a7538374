"""Quantized files: form, parity of the engines, and what training on adds."""

import itertools

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from app.inference.bundle import CODEBOOK_FILE, GATE_FILE, Bundle, InputShape
from app.inference.engines import ENGINES, load
from app.inference.graph import parse, tensor_input
from scumble.data.image_sets import Dataset
from scumble.progress import reporting
from scumble.training.bundle_export import export_bundle, to_onnx
from scumble.training.nets import NETS, Normalize
from scumble.training.qat import Student, Tuning, tune
from scumble.training.quantize import (
    METHODS,
    PRESETS,
    Judge,
    calibration_sample,
    candidates,
    ptq,
    ship,
)
from scumble.training.train import Recipe, train

SHAPE = InputShape(height=10, width=10, channels=3)
LABELS = ("stripes", "bars", "flat")
TUNING = Tuning(epochs=2, lr=1e-4, batch=32, seed=1)


def made_up(n: int, seed: int) -> Dataset:
    """Three kinds of texture under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    wave = np.where(np.arange(10) % 4 < 2, 60.0, -60.0)
    kinds = np.stack([np.tile(wave, (10, 1)), np.tile(wave[:, None], (1, 10)), np.zeros((10, 10))])
    images = 128 + kinds[labels][..., None] + rng.normal(0, 60, (n, 10, 10, 3))
    groups = tuple(map(str, range(n)))
    return Dataset("made_up", images.clip(0, 255).astype(np.uint8), labels, LABELS, groups)


@pytest.fixture(scope="module")
def sets() -> tuple[Dataset, Dataset, Dataset]:
    return made_up(320, 1), made_up(100, 2), made_up(100, 3)


@pytest.fixture(scope="module")
def bundle(sets, tmp_path_factory) -> Bundle:
    net = train(Recipe("small_cnn", 2, 0.05, "none", batch=32, ema=0.8), sets[0], progress=False)
    folder = tmp_path_factory.mktemp("bundle") / "made_up"
    export_bundle(net, folder, SHAPE, {"name": "made_up", "version": "1", "labels": list(LABELS)})
    return Bundle(folder)


def test_calibration_says_how_far_it_is(bundle, sets):
    said = []
    with reporting(lambda *how: said.append(how)):
        ptq(bundle.read("float32.onnx"), calibration_sample(sets[0], 0), "server")
    assert said[0] == ("activation ranges", 0, len(sets[0]))
    assert said[-1] == ("activation ranges", len(sets[0]), len(sets[0]))


@pytest.fixture(scope="module")
def found(bundle, sets):
    train_set, held_out, test = sets
    original = bundle.read("float32.onnx")
    judge = Judge(original, held_out, test)
    return judge, {c.name: c for c in candidates(original, train_set, judge, TUNING)}


NAMES = [f"{method}-{preset}" for preset in PRESETS for method in METHODS]


def test_all_four(found):
    assert list(found[1]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_form(found, name):
    graph = parse(found[1][name].file).graph
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    makers = {o: n for n in graph.node for o in n.output}
    weighted = [n for n in graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(weighted) == 5
    for node in weighted:
        x, w, b = (makers[name] for name in node.input)
        assert {n.op_type for n in (x, w, b)} == {"DequantizeLinear"}
        assert makers[x.input[0]].op_type == "QuantizeLinear"
        assert stored[x.input[2]].dtype == np.uint8
        assert stored[w.input[0]].dtype == np.int8
        assert stored[b.input[0]].dtype == np.int32
        outputs = stored[w.input[0]].shape[0]
        assert stored[w.input[1]].size == (outputs if name.endswith("server") else 1)
        assert np.array_equal(
            stored[b.input[1]].reshape(-1), (stored[x.input[1]] * stored[w.input[1]]).reshape(-1)
        )
        assert np.abs(stored[w.input[0]].astype(int)).max() == 127
    # Preprocessing and softmax are float.
    assert makers["tensor"].op_type == "Div"
    assert makers["tensor"].input[0] == "levels"
    softmax = makers[graph.output[0].name]
    assert softmax.op_type == "Softmax"
    assert makers[softmax.input[0]] is weighted[-1]
    assert not any(
        i.data_type == TensorProto.FLOAT and np.prod(i.dims) > 100 for i in graph.initializer
    )


@pytest.mark.parametrize("name", NAMES)
def test_runs_alike_in_all_engines(found, sets, name):
    file = found[1][name].file
    x = sets[2].images
    tensors = np.ascontiguousarray(x.transpose(0, 3, 1, 2) / np.float32(255))
    expected = load("onnxruntime", file, threads=1, precision="int8")(x)
    for engine in ENGINES:
        for model, batch in ((file, x), (tensor_input(file), tensors)):
            probs = load(engine, model, threads=1, precision="int8")(batch)
            # One step of the int8 grid in a logit, here and there, is what engines may differ by.
            assert probs == pytest.approx(expected, abs=0.02)
            assert np.abs(probs - expected).mean() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_near_float(found, name):
    judge, by_name = found
    candidate = by_name[name]
    right = (judge.reported.argmax(1) == judge.test.labels).mean()
    assert right > 0.9
    assert candidate.test >= right - 0.05
    assert candidate.test_l1 < 0.1
    assert candidate.rank == (candidate.validation, -candidate.validation_l1)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_untrained_student_is_the_ptq_file(bundle, sets, preset):
    original = bundle.read("float32.onnx")
    start = ptq(original, calibration_sample(sets[0], 0), preset)
    student = Student(start, original)
    before, after = (
        {i.name: numpy_helper.to_array(i) for i in parse(f).graph.initializer}
        for f in (start, student.to_bytes())
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert value.shape == after[name].shape
        # A bias has so many levels that the order of multiplication may move it by one.
        slack = 1 if value.dtype == np.int32 else 0
        assert after[name] == pytest.approx(value, rel=1e-5, abs=slack)
    # The fake-quantized forward pass is what the file computes.
    x = sets[2].images
    tensors = np.ascontiguousarray(x.transpose(0, 3, 1, 2) / np.float32(255))
    with torch.no_grad():
        probs = student(torch.from_numpy(tensors)).softmax(1).numpy()
    assert probs == pytest.approx(load("torch", start, threads=2, precision="int8")(x), abs=0.02)


def test_training_on_moves_weights_and_activation_scales(bundle, sets):
    original = bundle.read("float32.onnx")
    start = ptq(original, calibration_sample(sets[0], 0), "server")
    later = itertools.count()
    tuned = tune(start, original, sets[0], TUNING, lambda _: (next(later), 0.0), progress=False)
    before, after = (
        {i.name: numpy_helper.to_array(i) for i in parse(file).graph.initializer}
        for file in (start, tuned)
    )
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    kinds = {before[name].dtype.name for name in moved}
    assert kinds == {"int8", "int32", "float32"}
    activations = {n for n in moved if n.endswith("_scale") and before[n].size == 1}
    assert len(activations) >= 5
    assert not any(name.endswith("zero_point") for name in moved)


def test_where_no_epoch_is_better_the_start_is_kept(bundle, sets):
    original = bundle.read("float32.onnx")
    start = ptq(original, calibration_sample(sets[0], 0), "server")
    worse = itertools.count(0, -1)
    assert tune(start, original, sets[0], TUNING, lambda _: (next(worse), 0.0)) == start


def test_ship(bundle, found):
    judge, by_name = found
    for stale in (CODEBOOK_FILE["int8"], GATE_FILE["int8"]):  # of an earlier int8 file
        (bundle.folder / stale).write_text("{}")
    card = ship(bundle, list(by_name.values()), judge, TUNING, "scumble quantize made_up")
    best = max(by_name.values(), key=lambda c: c.rank)
    assert Bundle(bundle.folder).read("int8.onnx") == best.file
    assert (card.quantization["method"], card.quantization["preset"]) == (best.method, best.preset)
    assert list(card.quantization["candidates"]) == NAMES
    assert card.accuracy["int8"].value == pytest.approx(best.test)
    assert card.accuracy["int8"].images == 100
    assert card.quantization["agreement"]["same_label"] > 0.97
    assert set(Bundle(bundle.folder).golden().probabilities) == {"float32", "bf16", "int8"}
    assert not {CODEBOOK_FILE["int8"], GATE_FILE["int8"]} & set(card.files)


def test_ratio():
    """A net large enough that weights, not node names, fill its file."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(Normalize([0.5] * 3, [0.2] * 3), NETS["resnet9"](3, 3)).eval()
    original = to_onnx(net, SHAPE).SerializeToString()
    for preset in PRESETS:
        file = ptq(original, made_up(64, 0).images, preset)
        assert len(file) / len(original) < 0.27


def of_rows(weights: dict, nodes: list[tuple]) -> bytes:
    """A served graph: pixels (4, 4, 1), `flat` (16) of them, and these nodes to `logits`."""
    weights = {**weights, "white": np.array(255)}
    nodes = [
        ("Transpose", ["pixels"], "planar", {"perm": [0, 3, 1, 2]}),
        ("Cast", ["planar"], "levels", {"to": TensorProto.FLOAT}),
        ("Div", ["levels", "white"], "tensor", {}),
        ("Flatten", ["tensor"], "flat", {}),
        *nodes,
        ("Softmax", ["logits"], "probabilities", {"axis": 1}),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [out], out, **more) for kind, inputs, out, more in nodes],
        "rows",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 4, 4, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(value.astype(np.float32), key) for key, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("kind", ["biases of one row", "layer norms"])
def test_networks_of_rows_are_quantized(kind):
    """Biases (1, K) as scikit-learn has them; layer norms, whose weights stay float."""
    rng = np.random.default_rng(0)
    norms = kind == "layer norms"
    weights = {
        "w1": rng.normal(0, 0.5, (16, 8)), "b1": rng.normal(0, 1, (1, 8)),
        "w2": rng.normal(0, 0.5, (8, 3)), "b2": rng.normal(0, 1, (1, 3)),
        "scale": rng.uniform(0.5, 1, 8), "shift": rng.normal(0, 0.1, 8),
    }  # fmt: skip
    middle = ("LayerNormalization", ["a1", "scale", "shift"], "r1", {}) if norms else (
        "Relu", ["a1"], "r1", {}
    )  # fmt: skip
    original = of_rows(
        {key: value for key, value in weights.items() if norms or key[0] != "s"},
        [
            ("MatMul", ["flat", "w1"], "m1", {}),
            ("Add", ["m1", "b1"], "a1", {}),
            middle,
            ("MatMul", ["r1", "w2"], "m2", {}),
            ("Add", ["m2", "b2"], "logits", {}),
        ],
    )
    images = rng.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    small = ptq(original, images, "server")
    rows = [
        load("onnxruntime", model, threads=1, precision="float32")(images)
        for model in (original, small)
    ]
    assert 0 < np.abs(rows[1] - rows[0]).max() < 0.05
    graph = parse(small).graph
    kept = {
        name
        for node in graph.node
        if node.op_type == "LayerNormalization"
        for name in node.input[1:]
    }
    assert kept == ({"scale", "shift"} if norms else set())
