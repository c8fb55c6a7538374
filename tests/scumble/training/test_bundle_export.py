"""Torch modules become bundles that every engine runs."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from app.inference.bundle import Bundle, InputShape, golden_inputs
from app.inference.engines import ENGINES, load
from app.inference.graph import parse, tensor_input
from scumble.training.bundle_export import ExportError, classes_of, export_bundle, to_onnx
from scumble.training.quantize import ptq
from scumble.training.sources import load_weights, own_module, pt2_module, torchvision_model

SMALL = InputShape(height=9, width=8, channels=3)
CARD = {"name": "own", "version": "1", "labels": list("abcd")}
OWN = """
import torch
def net():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 4))
def number():
    return 3
def bad():
    raise KeyError("weights")
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return own_module(f"{tmp_path / 'own.py'}:net")


def torch_answer(net: nn.Module, pixels: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255
    with torch.inference_mode():
        return net.eval()(x).softmax(1).numpy()


def test_graph_form(own):
    graph = to_onnx(own, SMALL).graph
    (pixels,), (out,) = graph.input, graph.output
    assert (pixels.name, pixels.type.tensor_type.elem_type) == ("pixels", onnx.TensorProto.UINT8)
    assert [d.dim_value or d.dim_param for d in pixels.type.tensor_type.shape.dim] == ["N", 9, 8, 3]
    assert out.name == "probabilities"
    assert [d.dim_value or d.dim_param for d in out.type.tensor_type.shape.dim] == ["N", 4]
    operators = [n.op_type for n in graph.node]
    assert operators[:4] == ["Transpose", "Cast", "Div", "Conv"]
    assert operators[-1] == "Softmax"
    assert "BatchNormalization" not in operators
    assert graph.node[2].output == ["tensor"]
    assert not any(i.external_data for i in graph.initializer)
    assert not any(n.metadata_props or n.doc_string for n in graph.node)


def test_bundle_of_an_own_module(own, tmp_path):
    card = export_bundle(own, tmp_path / "own", SMALL, CARD)
    bundle = Bundle(tmp_path / "own")
    assert bundle.card == card
    assert set(card.files) == {"float32.onnx", "golden.json"}
    golden, x = bundle.golden(), golden_inputs(SMALL)
    expected = torch_answer(own, x)
    assert np.array(golden.probabilities["float32"]) == pytest.approx(expected, abs=1e-5)
    assert set(golden.tolerance) == {"float32", "bf16"}
    for name in ENGINES:
        model = bundle.onnx("float32")
        assert load(name, model, threads=1, precision="float32")(x) == pytest.approx(
            expected, abs=1e-5
        )


def test_a_new_network_removes_the_old_int8_file(own, tmp_path):
    export_bundle(own, tmp_path / "own", SMALL, CARD)
    (tmp_path / "own" / "int8.onnx").write_bytes(b"of another network")
    assert "int8.onnx" not in export_bundle(own, tmp_path / "own", SMALL, CARD).files


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_torchvision(name):
    torch.manual_seed(0)
    net = torchvision_model(name, 1000)
    shape = InputShape(height=96, width=96, channels=3)
    for module in net.modules():  # batch norms of fresh networks do nothing: wake them
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    model = to_onnx(net, shape).SerializeToString()
    x = golden_inputs(shape)[:2]
    expected = torch_answer(net, x)
    for engine in ENGINES:
        found = load(engine, model, threads=2, precision="float32")(x)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert parse(tensor_input(model)).graph.input[0].name == "tensor"
    # Its int8 form too: the operators are the ones that the torch engine has.
    int8 = ptq(model, x, "server")
    rounded = load("onnxruntime", int8, threads=2, precision="int8")(x)
    for engine in ENGINES:
        found = load(engine, int8, threads=2, precision="int8")(x)
        assert found == pytest.approx(rounded, rel=0.2, abs=2e-3)


def test_pt2(own, tmp_path):
    batch = torch.export.Dim("N")
    example = (torch.rand(2, 3, 9, 8),)
    free = torch.export.export(own.eval(), example, dynamic_shapes=({0: batch},))
    torch.export.save(free, tmp_path / "free.pt2")
    net = pt2_module(tmp_path / "free.pt2")
    x = golden_inputs(SMALL)
    model = to_onnx(net, SMALL).SerializeToString()
    found = load("onnxruntime", model, threads=1, precision="float32")(x)
    assert found == pytest.approx(torch_answer(own, x), abs=1e-5)


def test_pt2_of_a_fixed_batch_is_refused(own, tmp_path):
    fixed = torch.export.export(own.eval(), (torch.rand(2, 3, 9, 8),))
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    with pytest.raises(ExportError, match="does not take"):
        export_bundle(pt2_module(tmp_path / "fixed.pt2"), tmp_path / "own", SMALL, CARD)


def test_one_label_per_class(own, tmp_path):
    with pytest.raises(ExportError, match=r"4 classes, but there are 2 labels"):
        export_bundle(own, tmp_path / "own", SMALL, {**CARD, "labels": ["a", "b"]})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("own.py:number", "returned int"),
        ("own.py:bad", "KeyError"),
        ("own.py:none", "AttributeError"),
        ("other.py:net", "exists"),
        ("own.py", "FILE.py:FUNCTION"),
    ],
)
def test_own_module_refused(own, tmp_path, source, message):
    with pytest.raises(ExportError, match=message):
        own_module(f"{tmp_path}/{source}")


def test_networks_refused():
    with pytest.raises(ExportError, match="mobilenet_v2"):
        torchvision_model("mobilenet_v22", 10)
    with pytest.raises(ExportError, match="not logits"):
        classes_of(nn.Conv2d(3, 4, 3), SMALL)
    with pytest.raises(ExportError, match="does not take"):
        classes_of(nn.Conv2d(1, 4, 3), SMALL)


def test_weights(own, tmp_path):
    other = own_module(f"{tmp_path / 'own.py'}:net")
    with torch.no_grad():
        other[0].weight.add_(1)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}}, tmp_path / "w.pt"
    )
    load_weights(own, tmp_path / "w.pt")
    assert torch.equal(own[0].weight, other[0].weight)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ExportError, match="do not fit"):
        load_weights(own, tmp_path / "w.pt")
    torch.save(own, tmp_path / "w.pt")  # a pickled object may run code: refused unread
    with pytest.raises(ExportError, match="do not fit"):
        load_weights(own, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_text("no weights")
    with pytest.raises(ExportError, match="do not fit"):
        load_weights(own, tmp_path / "w.pt")
