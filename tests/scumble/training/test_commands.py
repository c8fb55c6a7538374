"""The training commands: what they write, and one line for every mistake."""

import shlex

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.datasets import load_digits

from app.inference.bundle import Bundle, Preprocessing, golden_inputs
from app.inference.engines import load
from scumble.data.image_sets import write_parquet
from scumble.training.calibrate import calibrate
from scumble.training.command_options import plain_errors
from scumble.training.commands import quantize, train
from scumble.training.export_command import export
from scumble.training.train import AUGMENTS
from tests.pictures import encoded, picture

OWN = """
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 3))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Real digits of 8 x 8 pixels under the name of a set that has a recipe."""
    folder = tmp_path_factory.mktemp("data")
    found = load_digits()
    images = (found.images * 15.9375).astype(np.uint8)
    write_parquet(folder / "mnist_train.parquet", images[:600], found.target[:600])
    write_parquet(folder / "mnist_test.parquet", images[600:900], found.target[600:900])
    return folder


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    """A model folder after `scumble train mnist` with outliers and another name."""
    folder = tmp_path_factory.mktemp("models")
    noise = np.random.default_rng(0).integers(0, 256, (30, 6, 6, 3), np.uint8)
    write_parquet(data / "noise.parquet", noise, [0] * 30)
    words = ["mnist", "--data", str(data), "--models", str(folder), "--epochs", "30"]
    words += ["--bundle", "reader", "--outliers", str(data / "noise.parquet")]
    done = CliRunner().invoke(train, words, prog_name="train")
    assert done.exit_code == 0, done.output
    assert "on 300 test images" in done.output
    return folder


def test_train(models, data):
    card = Bundle(models / "reader").card
    assert (card.name, card.training["set"]) == ("reader", "mnist")
    assert shlex.split(card.training["command"]) == shlex.split(
        f"scumble train mnist --data {data} --models {models} --epochs 30 --bundle reader "
        f"--outliers {data}/noise.parquet"
    )
    assert card.training["outliers"].startswith("noise (sha256 of pixels and labels ")
    assert card.training["outlier_weight"] == 0.5
    assert card.training["recipe"]["epochs"] == 30
    assert card.training["images"] + card.training["held_out"] == 600
    assert card.labels == [str(k) for k in range(10)]
    assert card.accuracy["float32"].images == 300
    assert card.accuracy["float32"].data.startswith("mnist_test (sha256")
    assert card.accuracy["float32"].value > 0.6
    assert "CC BY-SA" in card.data_licence


def test_quantize(models, data):
    words = ["reader", "--data", str(data), "--models", str(models), "--epochs", "1"]
    done = CliRunner().invoke(quantize, words, prog_name="quantize")
    assert done.exit_code == 0, done.output
    for name in ("ptq-server", "qat-server", "ptq-mobile", "qat-mobile"):
        assert f"{name} " in done.output
    card = Bundle(models / "reader").card
    assert len(card.quantization["candidates"]) == 4
    assert card.quantization["qat"]["augment"] == "digits"
    assert card.training["recipe"]["epochs"] == 30  # kept
    assert abs(card.accuracy["int8"].value - card.accuracy["float32"].value) < 0.05

    words += ["--method", "ptq", "--preset", "mobile"]
    done = CliRunner().invoke(quantize, words, prog_name="quantize")
    assert done.exit_code == 0, done.output
    assert list(Bundle(models / "reader").card.quantization["candidates"]) == ["ptq-mobile"]


def test_export_own_module_with_labels_and_weights(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "labels.txt").write_text("cat\ndog\nbird\n")
    namespace: dict = {}
    exec(OWN, namespace)  # noqa: S102 - the text above
    net = namespace["net"]().eval()
    with torch.no_grad():
        net[4].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    command = (
        f"own --module {tmp_path}/own.py:net --weights {tmp_path}/weights.pt --size 12 "
        f"--channels 1 --labels {tmp_path}/labels.txt --mean 0.5 --std 0.25 --fit crop --ratio 0.9 "
        f"--models {tmp_path}/models --images docs/digits"
    )
    done = CliRunner().invoke(export, command.split(), prog_name="export")
    assert done.exit_code == 0, done.output
    assert "6 images in docs/digits, float32" in done.output
    assert [word in done.output for word in ("labels changed", "Label()", "DCP(")] == [True] * 3
    bundle = Bundle(tmp_path / "models" / "own")
    assert bundle.card.labels == ["cat", "dog", "bird"]
    assert bundle.card.preprocessing == Preprocessing(fit="crop", ratio=0.9)
    x = golden_inputs(bundle.card.input)
    planar = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).float() / 255
    with torch.inference_mode():
        expected = net((planar - 0.5) / 0.25).softmax(1).numpy()
    found = load("onnxruntime", bundle.onnx("float32"), threads=1, precision="float32")(x)
    assert found == pytest.approx(expected, abs=1e-5)


def test_export_takes_inputs_that_are_not_square(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    words = f"own --module {tmp_path}/own.py:net --size 12x20 --channels 1 --alpha black"
    done = CliRunner().invoke(export, [*words.split(), "--models", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "3 classes, 12x20 pixels, 1 channels" in done.output
    bundle = Bundle(tmp_path / "own")
    assert (bundle.card.input.height, bundle.card.input.width) == (12, 20)
    assert bundle.card.preprocessing == Preprocessing(alpha="black")
    x = golden_inputs(bundle.card.input)
    run = load("onnxruntime", bundle.onnx("float32"), threads=1, precision="float32")
    assert run(x).shape == (len(x), 3)


def test_export_torchvision_has_imagenet_defaults(tmp_path):
    words = ["sq", "--torchvision", "squeezenet1_1", "--classes", "5", "--size", "64"]
    done = CliRunner().invoke(export, [*words, "--models", str(tmp_path)], prog_name="export")
    assert done.exit_code == 0, done.output
    bundle = Bundle(tmp_path / "sq")
    assert bundle.card.preprocessing == Preprocessing(fit="crop", ratio=0.875)
    assert bundle.card.labels == ["0", "1", "2", "3", "4"]
    assert len(bundle.golden().probabilities["float32"][0]) == 5


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (train, "imagenet", "'imagenet' is not one of"),
        (train, "mnist --data {folder}/none", "does not exist"),
        (quantize, "none --data {data} --models {folder}", "no model 'none'"),
        (export, "x", "give one of --torchvision, --pretrained, --timm, --module, --pt2, "),
        (export, "x --torchvision resnet1", "no torchvision classifier 'resnet1'"),
        (export, "x --module none.py:net", "FILE.py:FUNCTION"),
        (export, "x --module {folder}/own.py:net --size 12", "does not take (2, 3, 12, 12)"),
        (
            export,
            "x --module {folder}/own.py:net --size 12 --channels 1 --classes 9",
            "the network has 3 classes, but there are 9 labels",
        ),
        (export, "x --module {folder}/own.py:net --mean 1,b", "'1,b' is not a list of numbers"),
        (export, "x --pt2 {folder}/own.py", "is not a torch.export file"),
        (export, "../x --module {folder}/own.py:net --channels 1", "no card can be made"),
    ],
)
def test_one_line_for_a_mistake(command, words, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "models").mkdir()
    typed = words.format(data=data, folder=tmp_path).split()
    done = CliRunner().invoke(command, typed, prog_name=command.name)
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)
    assert message in done.output
    assert len(done.output.strip().splitlines()[-1]) < 1200
    assert not list(tmp_path.rglob("*.onnx"))
    assert not (tmp_path.parent / "x").exists()


def test_other_classes_than_the_bundle_has(models, data, tmp_path):
    grey = np.full((8, 6, 6), 200, np.uint8)
    write_parquet(tmp_path / "many.parquet", grey, np.arange(8) + 4)
    for file, message in (("many", "12 classes, the network 10"), ("none", "no file")):
        words = ["reader", "--models", str(models), "--data", str(data)]
        words += ["--test", str(tmp_path / f"{file}.parquet")]
        done = CliRunner().invoke(quantize, words, prog_name="quantize")
        assert done.exit_code == 1
        assert message in done.output


# -- images of one's own, for a network whose operators torch's interpreter lacks --

HARD = """
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Hardswish(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 3))
"""


@pytest.fixture
def hard(tmp_path):
    """A model folder with such a bundle, of 12 x 10 pixels."""
    (tmp_path / "hard.py").write_text(HARD)
    (tmp_path / "labels.txt").write_text("ant\nbee\ncow\n")
    words = f"hard --module {tmp_path}/hard.py:net --size 12 --labels {tmp_path}/labels.txt"
    done = CliRunner().invoke(export, [*words.split(), "--models", str(tmp_path / "models")])
    assert done.exit_code == 0, done.output
    return tmp_path / "models"


def photos(folder, counts):
    """Photos of different sizes in class folders, or without any (`.`)."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            content = encoded(picture(17 + i, 30 - i, seed=i), "JPEG")
            (folder / name / f"{i}.jpg").write_bytes(content)
    return folder


def run_quantize(models, *words):
    return CliRunner().invoke(quantize, ["hard", "--models", str(models), *words])


def test_what_cannot_be_trained_on_is_skipped_and_the_file_without_is_kept(hard, tmp_path):
    folder = photos(tmp_path / "photos", {"ant": 4, "bee": 4, "cow": 4})
    done = run_quantize(hard, "--train", str(folder), "--test", str(folder))
    assert done.exit_code == 0, done.output
    assert "qat-server  skipped: " in done.output
    card = Bundle(hard / "hard").card
    assert card.quantization["method"] == "ptq"
    assert set(card.quantization["skipped"]) == {"qat-server", "qat-mobile"}
    assert set(card.quantization["candidates"]) == {"ptq-server", "ptq-mobile"}
    assert card.accuracy["int8"].images == 12


@pytest.mark.parametrize("method", ["ptq", "qat", "both"])
def test_images_without_labels_are_enough(hard, tmp_path, method):
    folder = photos(tmp_path / "photos", {".": 10})
    words = ["--train", str(folder), "--preset", "server", "--method", method]
    done = run_quantize(hard, *words)
    assert done.exit_code == 0, done.output
    assert "the images have no labels: right is what the float network says" in done.output
    card = Bundle(hard / "hard").card
    assert card.accuracy == {}
    assert card.quantization["right_is"] == "the class that the float network gives"
    assert card.quantization["float32"]["test"] == 1.0
    assert card.quantization["candidates"]["ptq-server"]["test"] >= 0.5
    assert set(Bundle(hard / "hard").golden().probabilities) == {"float32", "bf16", "int8"}


@pytest.mark.parametrize(
    ("command", "option"), [(quantize, "--train"), (calibrate, "--own and --test")]
)
def test_a_bundle_of_unknown_images_asks_for_some(hard, command, option):
    done = CliRunner().invoke(command, ["hard", "--models", str(hard)])
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert "no image set is known that 'hard' was trained on" in said
    assert said.endswith(f"give images of yours with {option}")


def test_some_of_the_classes_are_enough(hard, tmp_path):
    folder = photos(tmp_path / "photos", {"cow": 4, "Bee ": 5})
    words = ["--train", str(folder), "--test", str(folder), "--method", "ptq"]
    done = run_quantize(hard, *words, "--preset", "server")
    assert done.exit_code == 0, done.output
    assert Bundle(hard / "hard").card.accuracy["int8"].images == 9


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (quantize, "hard --train {photos} --test {photos}/none"),
        (export, "hard --module {folder}/hard.py:net --size 1"),
        (export, "hard --module {folder}/hard.py:net --size 12 --classes 9"),
        (export, "hard --module {folder}/hard.py:fails"),
    ],
)
def test_a_command_that_fails_leaves_the_bundle_as_it_was(hard, tmp_path, command, words):
    folder = photos(tmp_path / "photos", {"ant": 4})
    before = {p.name: p.read_bytes() for p in (hard / "hard").iterdir()}
    typed = words.format(photos=folder, folder=tmp_path).split()
    done = CliRunner().invoke(command, [*typed, "--models", str(hard)])
    assert done.exit_code == 1
    assert {p.name: p.read_bytes() for p in (hard / "hard").iterdir()} == before
    assert [p.name for p in hard.iterdir()] == ["hard"]


def test_an_interrupted_command_says_how_to_go_on():
    for message in ("", "continue with the same command"):
        with pytest.raises(KeyboardInterrupt) as said, plain_errors():
            raise KeyboardInterrupt(*[message] if message else [])
        assert str(said.value) == (message or "interrupted: the same command starts again")


def test_an_interrupted_training_says_how_to_continue_and_leaves_no_checkpoint(
    tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (70, 16, 16, 3), np.uint8), np.arange(70) % 7
    write_parquet(tmp_path / "cifar100_train.parquet", images, labels)
    words = ["cifar100", "--data", str(tmp_path), "--models", str(tmp_path), "--epochs", "2"]
    kept = tmp_path / ".training-cifar100.pt"
    calls = iter(range(2))

    def interrupted(images, _):
        if next(calls):
            raise KeyboardInterrupt  # as Ctrl-C does
        return images

    with monkeypatch.context() as patched:
        patched.setitem(AUGMENTS, "flips", interrupted)
        with pytest.raises(KeyboardInterrupt, match="the same command continues") as said:
            train.invoke(train.make_context("train", list(words)))
    assert str(kept) in str(said.value)
    assert kept.is_file()
    done = CliRunner().invoke(train, words, prog_name="train")
    assert done.exit_code == 0, done.output
    assert f"continues the interrupted training in {kept}" in done.output
    assert not kept.exists()
    card = Bundle(tmp_path / "cifar100").card
    assert (card.training["set"], card.training["recipe"]["net"]) == (
        "cifar100-split",
        "resnet9_half",
    )
    assert card.accuracy["float32"].images == 10
