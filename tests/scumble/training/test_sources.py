"""Weights as other tools save them, and what torchvision says of its own."""

import io
import json
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from app.inference.bundle import Bundle, InputShape, Preprocessing, golden_inputs
from app.inference.decode import decode
from app.inference.engines import load
from scumble.training.bundle_export import check_same, classes_of, notes_of, to_onnx
from scumble.training.errors import ExportError
from scumble.training.export_command import export
from scumble.training.sources import (
    load_weights,
    normalized,
    read_safetensors,
    timm_model,
    torchscript_module,
    torchvision_weights,
)
from tests.pictures import encoded

SMALL = InputShape(height=9, width=8, channels=3)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in net(1).state_dict().items()}


SAVED = {
    "bare": lambda: prefixed(""),
    "under state_dict": lambda: {"state_dict": prefixed(""), "epoch": 3},
    "under model_state_dict": lambda: {"model_state_dict": prefixed("")},
    "under model": lambda: {"model": prefixed("")},
    "DataParallel": lambda: prefixed("module."),
    "Lightning": lambda: {
        "state_dict": {**prefixed("model."), "metric.total": torch.zeros(1)},
        "pytorch-lightning_version": "2.0",
    },
    "compiled": lambda: prefixed("_orig_mod."),
    "compiled and parallel": lambda: {"state_dict": prefixed("module._orig_mod.")},
    "half precision": lambda: {
        key: value.half() if value.is_floating_point() else value
        for key, value in prefixed("").items()
    },
    "bfloat16": lambda: {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in prefixed("net.").items()
    },
}


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_state_dict_is_found_however_it_was_saved(name, kind, tmp_path):
    state = SAVED[name]()
    path = tmp_path / f"w.{kind}"
    if kind == "pt":
        torch.save(state, path)
    else:
        flat = next((v for v in state.values() if isinstance(v, dict)), state)
        path.write_bytes(safetensors(flat))
    found = net()
    load_weights(found, path)
    for key, value in net(1).state_dict().items():
        assert found.state_dict()[key].dtype == value.dtype
        torch.testing.assert_close(found.state_dict()[key], value, atol=5e-3, rtol=1e-2)


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def safetensors(state: dict[str, torch.Tensor]) -> bytes:
    """By the format's description."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for key, value in state.items():
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no file",
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 2) + b"{}",
        safetensors({"0.weight": torch.zeros(2)})[:-4],
        safetensors({"other": torch.zeros(2)}),
    ],
)
def test_a_broken_safetensors_file_is_refused(content, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="do not fit"):
        load_weights(net(), path)


def test_safetensors_of_unknown_numbers(tmp_path):
    path = tmp_path / "w.safetensors"
    content = safetensors({"x": torch.zeros(1)}).replace(b"F32", b"F99")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x is F99; allowed: F64, F32"):
        read_safetensors(path)


# -- torchvision --


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("resnet50", "resnet50-0676ba61.pth", ("IMAGENET1K_V1", 224, 256, "bilinear")),
        ("resnet50", "resnet50-11ad3fa6.pth", ("IMAGENET1K_V2", 224, 232, "bilinear")),
        ("resnet50", "own.pth", ("IMAGENET1K_V2", 224, 232, "bilinear")),
        ("efficientnet_b0", "x.pth", ("IMAGENET1K_V1", 224, 256, "bicubic")),
        ("inception_v3", "x.pth", ("IMAGENET1K_V1", 299, 342, "bilinear")),
        (
            "vit_b_16",
            "vit_b_16_swag-9ac1b537.pth",
            ("IMAGENET1K_SWAG_E2E_V1", 384, 384, "bicubic"),
        ),
    ],
)
def test_published_files_are_known_by_their_names(name, file, expected, tmp_path):
    (tmp_path / file).touch()
    found, path = torchvision_weights(name, str(tmp_path / file))
    assert path == tmp_path / file
    assert (found.name, found.size, found.shorter, found.interpolation) == expected
    assert found.labels[:2] == ["tench", "goldfish"]
    assert len(set(found.labels)) == 1000


def test_weights_are_a_file_or_a_name():
    found, path = torchvision_weights("resnet50", "IMAGENET1K_V1")
    assert (found.name, found.shorter, path) == ("IMAGENET1K_V1", 256, None)
    with pytest.raises(ExportError, match="allowed: a file, or one of IMAGENET1K_V1, IMAGENET1K_V"):
        torchvision_weights("resnet50", "IMAGENET")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of weights under the name by which torchvision publishes it."""
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir()
    torch.save(model.state_dict(), path)
    return model.eval(), path


@pytest.mark.parametrize("by", ["file", "name"])
def test_photos_are_answered_as_torchvision_answers_them(published, tmp_path, by, monkeypatch):
    model, path = published
    monkeypatch.setattr(torch.hub, "_hub_dir", str(path.parent.parent))
    weights = str(path) if by == "file" else "IMAGENET1K_V1"
    words = ["sq", "--torchvision", "squeezenet1_1", "--weights", weights]
    done = CliRunner().invoke(export, [*words, "--models", str(tmp_path)], prog_name="export")
    assert done.exit_code == 0, done.output
    bundle = Bundle(tmp_path / "sq")
    card, entry = bundle.card, torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    assert card.labels == entry.meta["categories"]
    assert card.preprocessing == Preprocessing(fit="resize_crop", shorter=256)
    assert card.training["weights"] == "IMAGENET1K_V1"
    run = load("onnxruntime", bundle.onnx("float32"), threads=1, precision="float32")
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    large = photos[0].resize((1600, 1068))
    in_full = card.preprocessing.model_copy(update={"reduce_jpeg": False})
    as_made = card.preprocessing
    for photo, rule in ((photos[0], as_made), (photos[1], as_made), (large, in_full)):
        data = encoded(photo, "JPEG", quality=95)
        with torch.inference_mode():
            seen = entry.transforms()(Image.open(io.BytesIO(data)).convert("RGB"))
            expected = model(seen[None]).softmax(1).numpy()
        found = run(decode(data, card.input, rule, 4_000_000)[None])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert found.argmax() == expected.argmax()
    reduced, whole = (decode(data, card.input, rule, 4_000_000) for rule in (as_made, in_full))
    assert (reduced != whole).any()  # so that its answers may differ


@pytest.mark.parametrize(
    ("source", "weights", "allowed"),
    [
        (["--torchvision", "squeezenet1_1"], "IMAGENET1K_V1", "IMAGENET1K_V1, DEFAULT"),
        (["--timm", "small.four"], "pretrained", "pretrained"),
    ],
    ids=["torchvision", "timm"],
)
def test_random_weights_are_named_before_the_export(
    published, timm, tmp_path, monkeypatch, source, weights, allowed
):
    timm()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(published[1].parent.parent))
    # The wrong mean ends the command after the network is made, and before it is exported.
    words = ["net", *source, "--models", str(tmp_path), "--mean", "a"]
    note = "note: the weights are random: give --weights, allowed: a file, or one of "
    assert CliRunner().invoke(export, words).stdout == f"{note}{allowed}\n"
    assert CliRunner().invoke(export, [*words, "--weights", weights]).stdout == ""


# -- TorchScript --


def saved(module: torch.jit.ScriptModule, folder: Path) -> Path:
    torch.jit.save(module, folder / "net.pt")
    return folder / "net.pt"


SCRIPTS = {
    "scripted": lambda: torch.jit.script(net(1).eval()),
    "traced": lambda: torch.jit.trace(net(1).eval(), torch.rand(2, 3, 9, 8)),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(net(1).eval())),
    "in training mode": lambda: torch.jit.script(net(1)),
    "half precision": lambda: torch.jit.script(net(1).eval().half()),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_torchscript_answers_as_its_network(name, prepared, tmp_path):
    found = torchscript_module(saved(SCRIPTS[name](), tmp_path))
    if prepared:
        found = normalized(found, [0.4], [0.2])
    assert classes_of(found, SMALL) == 4
    model = to_onnx(found, SMALL).SerializeToString()
    check_same(found, model, SMALL)
    pixels = golden_inputs(SMALL)
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / np.float32(255))
    with torch.inference_mode():
        expected = net(1).eval()((x - 0.4) / 0.2 if prepared else x).softmax(1).numpy()
    run = load("onnxruntime", model, threads=1, precision="float32")
    np.testing.assert_allclose(run(pixels), expected, atol=2e-3 if "half" in name else 1e-5)


class OfTheBatch(nn.Module):
    """Answers that depend on the other images of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x) * (1 + 100 * x.mean())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_what_torchscript_cannot_be_is_one_sentence(tmp_path):
    script = torchscript_module(saved(torch.jit.script(net().eval()), tmp_path))
    with pytest.raises(
        ExportError, match=r"take \(2, 1, 9, 8\): RuntimeError: Given groups"
    ) as info:
        classes_of(script, InputShape(height=9, width=8, channels=1))
    assert "\n" not in str(info.value)
    fixed = torch.jit.trace(nn.Sequential(net().eval(), Fixed()), torch.rand(2, 3, 9, 8))
    with pytest.raises(ExportError, match=r"does not take \(3, 3, 9, 8\): "):
        classes_of(torchscript_module(saved(fixed, tmp_path)), SMALL)
    mixed = OfTheBatch().eval()
    with pytest.raises(ExportError, match="answers differently from the network, by 0"):
        check_same(mixed, to_onnx(torch.jit.script(mixed), SMALL).SerializeToString(), SMALL)
    for file, content in {"w.pt": b"no archive", "e.pt": b""}.items():
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ExportError, match=f"{file}' is not a TorchScript file: "):
            torchscript_module(tmp_path / file)


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, 4)


# -- timm, which is not installed here: what is asked of it, and what its answers become --


class Timm(ModuleType):
    """A package timm with one model, in its three modes of cropping."""

    def __init__(self, **config) -> None:
        super().__init__("timm")
        self.made: list[dict] = []
        self.data = ModuleType("timm.data")
        config = {
            "input_size": (3, 9, 9), "interpolation": "bicubic", "crop_pct": 0.9,
            "crop_mode": "center", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), **config,
        }  # fmt: skip
        self.data.resolve_model_data_config = lambda model: config
        self.data.infer_imagenet_subset = lambda model: (
            "four" if model[-1].out_features == 4 else None
        )
        self.data.ImageNetInfo = lambda subset: Info()

    def create_model(self, name, **options):
        if name != "small.four":
            raise RuntimeError(f"Unknown model ({name})")
        if options["pretrained"] and options.get("num_classes", 4) != 4:
            raise OSError("no network")
        self.made.append(options)
        made = net(1)
        made[-1] = nn.Linear(6, options.get("num_classes", 4))
        return made


class Info:
    def num_classes(self):
        return 4

    def index_to_description(self, k):
        return ["cat", "crane", "dog", "crane"][k]


@pytest.fixture
def timm(monkeypatch):
    """`timm(**config)` puts the package in place and gives it."""

    def install(**config):
        module = Timm(**config)
        monkeypatch.setitem(sys.modules, "timm", module)
        monkeypatch.setitem(sys.modules, "timm.data", module.data)
        return module

    return install


def test_a_model_of_timm_brings_its_labels_and_preprocessing(timm):
    package = timm()
    model, said = timm_model("small.four", None, 3, "pretrained")
    assert package.made == [{"pretrained": True, "in_chans": 3}]
    assert said.labels == ["cat", "crane", "dog", "crane"]
    assert (said.size, said.shorter, said.interpolation) == (9, 10, "bicubic")
    rule = {"fit": "resize_crop", "shorter": 10, "interpolation": "bicubic"}
    assert said.preprocessing(None, {}) == rule
    assert said.preprocessing(None, {"shorter": 12, "fill": 3}) == {
        **rule,
        "shorter": 12,
        "fill": 3,
    }
    other = {"fit": "crop", "ratio": 0.9, "interpolation": "bicubic"}
    assert said.preprocessing((18, 9), {}) == other
    assert said.preprocessing(None, {"ratio": 0.5}) == {**other, "ratio": 0.5}
    assert said.preprocessing(None, {"fit": "stretch", "interpolation": "lanczos"}) == {
        "fit": "stretch",
        "interpolation": "lanczos",
    }
    assert said.mean == [0.5, 0.4, 0.3]
    assert classes_of(model, SMALL) == 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"crop_mode": "squash"}, {"fit": "stretch", "shorter": 10}),
        ({"crop_mode": "border"}, {"fit": "letterbox", "shorter": 10}),
        ({"crop_mode": None, "crop_pct": None}, {"fit": "resize_crop", "shorter": 9}),
    ],
)
def test_how_timm_crops(timm, config, expected):
    timm(**config, interpolation="random")
    _, said = timm_model("small.four", None, 3, None)
    assert said.preprocessing(None, {}) == {**expected, "interpolation": "bilinear"}


def test_what_timm_lacks_is_one_sentence(timm, monkeypatch):
    timm()
    with pytest.raises(ExportError, match=r"make the model 'nope': Unknown model \(nope\)"):
        timm_model("nope", None, 3, None)
    with pytest.raises(ExportError, match="no network; give their file with --weights FILE"):
        timm_model("small.four", 9, 3, "pretrained")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ExportError, match="--timm needs the package timm: pip install timm"):
        timm_model("small.four", None, 3, None)


# -- networks that cannot be meant --


class Ends(nn.Module):
    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.net, self.end = net().eval(), end

    def forward(self, x):
        return self.end(self.net(x))


class First(nn.Module):
    def forward(self, x):
        return x[:, :1]


class NoNumbers(nn.Module):
    def forward(self, x):
        return x * float("nan")


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        (nn.Softmax(1), "the network ends in a softmax"),
        (First(), "the softmax of one value is always 1.0"),
        (NoNumbers(), "NaN or infinite values"),
    ],
)
def test_implausible_modules_are_refused(end, sentence):
    assert classes_of(Ends(end), SMALL) in (1, 4)
    with pytest.raises(ExportError, match=sentence):
        notes_of(Ends(end).eval(), SMALL)


def test_a_constant_module_is_reported():
    model = net().eval()
    with torch.no_grad():
        model[5].weight.zero_()
    assert "differ by 0.0e+00 at most" in notes_of(model, SMALL)[0]
    assert notes_of(nn.Sequential(nn.Flatten(), nn.Linear(216, 4)), SMALL) == []
