"""All engines give the same answers, row by row, whatever the batch; torch is the oracle."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from app.errors import ConfigError
from app.inference.bundle import Bundle, InputShape, golden_inputs, open_bundle
from app.inference.engines import ENGINES, FAST, load, resolve
from app.inference.graph import tensor_input
from app.inference.pipeline import self_test
from app.inference.processor import adds_int8_exactly
from scumble.training.bundle_export import to_onnx
from scumble.training.nets import NETS, Normalize

MODELS = Path(__file__).parents[4] / "models"
SHAPE = InputShape(height=12, width=10, channels=3)
BATCH_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def tiny():
    """(ONNX bytes, torch module) of a net with random weights and awake batch norms."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(Normalize([0.4, 0.5, 0.6], [0.2] * 3), NETS["resnet9"](3, 7))
    with torch.no_grad():
        net(torch.rand(64, 3, 12, 10))  # moves the running statistics off their start
    return to_onnx(net.eval(), SHAPE).SerializeToString(), net


def pictures(n: int, shape: InputShape = SHAPE, seed: int = 0) -> np.ndarray:
    size = (n, shape.height, shape.width, shape.channels)
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def tensors(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) / np.float32(255))


@pytest.mark.parametrize("name", ENGINES)
def test_equals_torch_on_the_original_module(name, tiny):
    model, net = tiny
    x = pictures(5)
    with torch.inference_mode():
        expected = net(torch.from_numpy(tensors(x))).softmax(1).numpy()
    found = load(name, model, threads=1, precision="float32")(x)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_tensor_input_gives_the_same(name, tiny):
    model, _ = tiny
    x = pictures(5)
    by_pixels = load(name, model, threads=1, precision="float32")(x)
    by_tensor = load(name, tensor_input(model), threads=1, precision="float32")(tensors(x))
    assert by_tensor == pytest.approx(by_pixels, abs=1e-5)


@pytest.mark.parametrize("name", [n for n in ENGINES if n != "torch"])
@pytest.mark.parametrize("source", ["tiny", "float32", "bf16", "int8"])
def test_a_row_does_not_depend_on_its_batch(name, source, tiny):
    if source == "tiny":
        model, shape, precision = tiny[0], SHAPE, "float32"
    else:
        bundle = open_bundle(MODELS, "mnist")
        model, shape, precision = bundle.onnx(source), bundle.card.input, source
    if (name, precision) == ("onnxruntime", "bf16"):
        pytest.skip("bf16 is OpenVINO's only")
    run = load(name, model, threads=1, precision=precision)
    x = pictures(32, shape)
    rows = np.concatenate([run(x[i : i + 1]) for i in range(32)])
    # Bit-identical on some processors; on others kernels for one image and for many round apart.
    assert run(x) == pytest.approx(rows, abs=BATCH_TOLERANCE)
    for n in (*FAST, 7, 19):  # sizes with a compiled form of their own, and others
        assert run(x[:n]) == pytest.approx(rows[:n], abs=BATCH_TOLERANCE)
        assert run(x[-n:]) == pytest.approx(rows[-n:], abs=BATCH_TOLERANCE)
    assert run(x[::-1]) == pytest.approx(rows[::-1], abs=BATCH_TOLERANCE)  # not contiguous


@pytest.mark.parametrize("name", ENGINES)
def test_it_answers_while_another_thread_prepares_it(name, tiny):
    run = load(name, tiny[0], threads=1, precision="float32")
    x = pictures(19)
    rows = np.concatenate([run(x[i : i + 1]) for i in range(19)])
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(run.prepare, FAST)
        sizes = itertools.cycle(range(1, 20))
        while not prepared.done():
            n = next(sizes)
            assert run(x[:n]) == pytest.approx(rows[:n], abs=1e-5)
    prepared.result()
    for n in range(1, 20):
        assert run(x[:n]) == pytest.approx(rows[:n], abs=1e-5)


def test_openvino_does_not_wait_for_a_form_that_another_thread_compiles(tiny):
    engine = load("openvino", tiny[0], threads=1, precision="float32")
    compile_now, go_on, begun = engine._compiled_for, threading.Event(), threading.Event()

    def compile_later(size):
        begun.set()
        assert go_on.wait(30)
        return compile_now(size)

    engine._compiled_for = compile_later
    x = pictures(4)
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(engine.prepare, [4])
        assert begun.wait(30)
        in_parts = engine(x)
        assert not prepared.done()
        go_on.set()
    assert engine(x) == pytest.approx(in_parts, abs=1e-5)
    assert set(engine._forms) == {1, 4}


def test_openvino_does_without_a_size_that_it_cannot_compile(tiny, caplog):
    engine = load("openvino", tiny[0], threads=1, precision="float32")
    compile_now = engine._compiled_for

    def refuse_4(size):
        if size == 4:
            raise RuntimeError("no room")
        return compile_now(size)

    engine._compiled_for = refuse_4
    engine.prepare(FAST)
    x = pictures(7)
    rows = np.concatenate([engine(x[i : i + 1]) for i in range(7)])
    for n in (4, 7):
        assert engine(x[:n]) == pytest.approx(rows[:n], abs=1e-5)
    assert [entry.getMessage() for entry in caplog.records] == [
        "openvino cannot run 4 images at a time: no room"
    ]


@pytest.mark.parametrize("name", ENGINES)
def test_answers_may_be_kept(name, tiny):
    run = load(name, tiny[0], threads=1, precision="float32")
    for n in (1, 3, 4):
        x = pictures(n)
        first = run(x)
        kept = first.copy()
        run(255 - x)
        assert np.array_equal(first, kept)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("name", ENGINES)
def test_committed_bundle(name, precision):
    bundle = open_bundle(MODELS, "mnist")
    golden = bundle.golden()
    run = load(name, bundle.onnx(precision), threads=1, precision=precision)
    found = run(golden_inputs(bundle.card.input))
    expected = np.array(golden.probabilities[precision])
    # Half, as the room given to golden outputs is for other processors and not for other engines.
    assert found == pytest.approx(expected, abs=golden.tolerance[precision] / 2)


def test_bf16_is_near_float32():
    bundle = open_bundle(MODELS, "mnist")
    x = golden_inputs(bundle.card.input)
    rough = load("openvino", bundle.onnx("bf16"), threads=1, precision="bf16")(x)
    expected = np.array(bundle.golden().probabilities["bf16"])
    assert rough == pytest.approx(expected, abs=bundle.golden().tolerance["bf16"])


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_bf16_is_refused(name, tiny):
    with pytest.raises(ConfigError, match="bf16"):
        load(name, tiny[0], threads=1, precision="bf16")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_corrupt_model(name, damage, tiny):
    model = {"empty": b"", "text": b"not a model", "cut": tiny[0][:-1000]}[damage]
    with pytest.raises(ConfigError):
        load(name, model, threads=1, precision="float32")


def test_torch_names_the_operators_it_lacks():
    node = helper.make_node("Erf", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(model)
    with pytest.raises(ConfigError, match="Erf"):
        load("torch", model.SerializeToString(), threads=1, precision="float32")


VNNI, AVX2 = "flags\t: fpu avx2 avx512_vnni\n", "flags\t: fpu avx2 avx512f\n"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "exact"),
    [
        (VNNI, "x86_64", True),
        (AVX2, "x86_64", False),
        (VNNI.replace("avx512_vnni", "avx_vnni"), "AMD64", True),
        (None, "x86_64", False),
        (None, "aarch64", True),
    ],
)
def test_int8_is_exact_where_the_processor_adds_without_saturation(
    cpuinfo, machine, exact, tmp_path
):
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    assert adds_int8_exactly(file, machine) is exact


@pytest.mark.parametrize(
    ("precision", "exact", "engine"),
    [
        ("float32", False, "openvino"),
        ("bf16", False, "openvino"),
        ("int8", True, "openvino"),
        ("int8", False, "onnxruntime"),
    ],
)
def test_auto_takes_the_fastest_engine_that_is_exact(precision, exact, engine):
    assert resolve("auto", precision, lambda: exact) == engine
    assert resolve("openvino", precision, lambda: exact) == "openvino"


@pytest.mark.parametrize("name", ["mnist", "cifar10", "gtsrb"])
def test_int8_of_onnxruntime_is_exact_on_any_processor(name):
    bundle = Bundle(MODELS / name)
    engine = load("onnxruntime", bundle.onnx("int8"), threads=1, precision="int8")
    self_test(bundle, engine, "int8")


def test_auto_prefers_openvino():
    assert resolve("auto") == "openvino"
    with pytest.raises(ConfigError, match="tensorrt"):
        resolve("tensorrt")


def test_openvino_writes_no_files(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    load("openvino", tiny[0], threads=1, precision="float32")(pictures(2))
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("least_bytes", [0, 1 << 20], ids=["lent", "copied"])
def test_openvino_gets_large_batches_lent_and_small_ones_copied(models, monkeypatch, least_bytes):
    monkeypatch.setattr("app.inference.engines.openvino.LENT_FROM", least_bytes)
    model = (models / "tiny" / "float32.onnx").read_bytes()
    engine = load("openvino", model, threads=1, precision="float32")
    engine.prepare(FAST)
    pixels = np.random.default_rng(0).integers(0, 256, (41, 8, 8, 3), np.uint8)
    singly = np.concatenate([engine(pixels[i : i + 1]) for i in range(len(pixels))])
    for _ in range(2):
        np.testing.assert_allclose(engine(pixels), singly, atol=1e-5)
