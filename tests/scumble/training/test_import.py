"""ONNX files of many kinds become bundles that answer as the files do."""

import json
import shlex

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from app.commands.connect import connect
from app.inference.bundle import Bundle, InputShape, Preprocessing
from app.inference.decode import decode
from app.inference.engines import load
from app.inference.normalisation import PRESETS
from scumble.cli import main
from scumble.training.command_options import typed
from scumble.training.errors import ExportError
from scumble.training.export_command import export
from scumble.training.import_command import import_onnx, prompted, settled
from scumble.training.onnx_import import Unsaid, convert, decide, read_network, samples
from tests.pictures import encoded, picture

HEIGHT, WIDTH, CLASSES = 10, 12, 4


def network(
    *,
    layout="nchw",
    ends="logits",
    batch="N",
    opset=18,
    half=False,
    pixels=False,
    reshaped=False,
    scale=1.0,
    listed=False,
) -> onnx.ModelProto:
    """A classifier as another tool might write it.

    Args:
        layout: of its input.
        ends: logits, softmax, sigmoid, one logit, or a softmax behind a reshape.
        batch: of its input.
        opset: of its operators.
        half: weights, input and output of half precision.
        pixels: the input is uint8.
        reshaped: the batch is a constant inside, too.
        scale: of what the first layer expects.
        listed: weights are inputs, too, as in old files.
    """
    rng = np.random.default_rng(3)
    floats, kind = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    one = ends in ("sigmoid", "logit")
    weights = {
        "w1": (rng.normal(0, 0.5, (6, 3, 3, 3)) * scale).astype(kind),
        "b1": rng.normal(0, 0.1, 6).astype(kind),
        "w2": rng.normal(0, 2, (6, 1 if one else CLASSES)).astype(kind),
    }
    nodes, at = [], "pixels"
    if pixels:
        nodes.append(helper.make_node("Cast", [at], ["wide"], to=floats))
        at = "wide"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [at], ["planar"], perm=[0, 3, 1, 2]))
        at = "planar"
    nodes += [
        helper.make_node("Conv", [at, "w1", "b1"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
    ]
    if reshaped:
        weights["to"] = np.array([batch, 6], np.int64)
        nodes.append(helper.make_node("Reshape", ["p", "to"], ["f"], "flat"))
    else:
        nodes.append(helper.make_node("Flatten", ["p"], ["f"], "flat"))
    nodes.append(helper.make_node("MatMul", ["f", "w2"], ["logits"], "linear"))
    last = {"softmax": "Softmax", "reshaped softmax": "Softmax", "sigmoid": "Sigmoid"}
    if ends == "reshaped softmax":
        weights["same"] = np.array([-1, CLASSES], np.int64)
        nodes.append(helper.make_node("Softmax", ["logits"], ["soft"], axis=1))
        nodes.append(helper.make_node("Reshape", ["soft", "same"], ["tensor"]))
    elif ends == "hidden softmax":
        nodes.append(helper.make_node("Exp", ["logits"], ["e"]))
        weights["axis"] = np.array([1], np.int64)
        nodes.append(helper.make_node("ReduceSum", ["e", "axis"], ["sum"]))
        nodes.append(helper.make_node("Div", ["e", "sum"], ["tensor"]))
    else:
        more = {"axis": 1} if ends == "softmax" else {}
        nodes.append(helper.make_node(last.get(ends, "Identity"), ["logits"], ["tensor"], **more))
    sides = [batch, 3, HEIGHT, WIDTH] if layout == "nchw" else [batch, HEIGHT, WIDTH, 3]
    inputs = [
        helper.make_tensor_value_info("pixels", TensorProto.UINT8 if pixels else floats, sides)
    ]
    if listed:
        inputs += [
            helper.make_tensor_value_info(name, floats, value.shape)
            for name, value in weights.items()
        ]
    outputs = [("tensor", weights["w2"].shape[1]), ("f", 6)]
    graph = helper.make_graph(
        nodes,
        "theirs",
        inputs,
        [helper.make_tensor_value_info(name, floats, [batch, n]) for name, n in outputs[:1]],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=6 if opset < 13 else helper.find_min_ir_version_for(
            [helper.make_opsetid("", opset)]
        ),
    )  # fmt: skip


def theirs(model: onnx.ModelProto, values: np.ndarray, kind: str) -> np.ndarray:
    """What the file answers, image by image, as probabilities."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    count = batch if isinstance(batch, int) else 1
    rows = np.stack(
        [session.run(None, {"pixels": np.stack([v] * count)})[0][0] for v in values]
    ).astype(float)
    if "softmax" in kind:
        return rows
    if kind == "sigmoid":
        return np.concatenate([1 - rows, rows], 1)
    if kind == "logit":
        rows = np.concatenate([0 * rows, rows], 1)
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def values_of(pixels: np.ndarray, preset: str, layout: str, kind: type) -> np.ndarray:
    """The presets as their tools write them down."""
    levels = pixels.astype(np.float64)
    scaled = {
        "imagenet": lambda: (levels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
        "tf": lambda: levels / 127.5 - 1,
        "0..1": lambda: levels / 255,
        "0..255": lambda: levels,
        "caffe": lambda: levels[..., ::-1] - [103.939, 116.779, 123.68],
    }[preset]()
    if layout == "nchw":
        scaled = scaled.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(scaled.astype(kind))


KINDS = {
    "nchw": {},
    "nhwc": {"layout": "nhwc"},
    "softmax": {"ends": "softmax"},
    "softmax behind a reshape": {"ends": "reshaped softmax"},
    "softmax made of other operators": {"ends": "hidden softmax"},
    "one sigmoid": {"ends": "sigmoid"},
    "one logit": {"ends": "logit"},
    "batch of 1": {"batch": 1},
    "batch of 1, reshaped": {"batch": 1, "reshaped": True},
    "batch of 4, reshaped": {"batch": 4, "reshaped": True},
    "opset 9": {"opset": 9, "ends": "softmax", "listed": True},
    "opset 13": {"opset": 13},
    "the newest opset": {"opset": onnx.defs.onnx_opset_version()},
    "half precision": {"half": True},
    "half precision, softmax": {"half": True, "ends": "softmax"},
    "pixels": {"pixels": True, "layout": "nhwc", "preset": "0..255", "scale": 0.01},
    "tf": {"preset": "tf"},
    "0..1": {"preset": "0..1"},
    "0..255": {"preset": "0..255", "scale": 0.01},
    "caffe": {"preset": "caffe", "scale": 0.01},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_bundle_answers_as_the_file_does(name, tmp_path):
    options = dict(KINDS[name])
    preset = options.pop("preset", "imagenet")
    model = network(**options)
    onnx.save(model, tmp_path / "net.onnx")
    words = [str(tmp_path / "net.onnx"), "--normalize", preset, "--models", str(tmp_path / "m")]
    words += ["--answers", "logit"] if options.get("ends") == "logit" else []
    done = CliRunner().invoke(import_onnx, words)
    assert done.exit_code == 0, done.output
    assert "input 'pixels': " in done.output
    bundle = Bundle(tmp_path / "m" / "net")
    pixels = samples(bundle.card.input)
    kind = np.uint8 if options.get("pixels") else np.float16 if options.get("half") else np.float32
    fed = values_of(pixels, preset, options.get("layout", "nchw"), kind)
    expected = theirs(model, fed, options.get("ends", "logits"))
    slack = 2e-2 if options.get("half") else 1e-4
    for engine in ("onnxruntime", "openvino"):
        found = load(engine, bundle.onnx("float32"), threads=1, precision="float32")(pixels)
        np.testing.assert_allclose(found, expected, atol=slack)
    assert np.abs(expected - expected[:1]).max() > 2e-3
    graph = onnx.load_model_from_string(bundle.onnx("float32"))
    assert {opset.version for opset in graph.opset_import} == {max(18, options.get("opset", 18))}


def test_weights_in_a_file_beside_it_come_along(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(network(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").is_file()
    words = [str(path), "--normalize", "0..1", "--models", str(tmp_path / "m")]
    done = CliRunner().invoke(import_onnx, words)
    assert done.exit_code == 0, done.output
    assert set(Bundle(tmp_path / "m" / "net").card.files) == {"float32.onnx", "golden.json"}
    (tmp_path / "w.bin").unlink()
    done = CliRunner().invoke(import_onnx, words)
    assert done.exit_code == 1
    assert "is not a whole ONNX model" in done.output


def test_one_of_several_outputs_is_chosen_by_its_name(tmp_path):
    model = network(ends="softmax")
    model.graph.output.append(helper.make_tensor_value_info("f", TensorProto.FLOAT, ["N", 6]))
    with pytest.raises(ExportError, match="has the outputs tensor, f; choose with --output"):
        decide(model, PRESETS["0..1"])
    found = decide(model, PRESETS["0..1"], output="f")
    assert (found.answers, found.classes) == ("logits", 6)
    made = convert(model, found, PRESETS["0..1"]).model
    assert [each.name for each in made.graph.output] == ["probabilities"]
    assert "MatMul" not in {node.op_type for node in made.graph.node}
    with pytest.raises(ExportError, match="no output 'x'; there: tensor, f"):
        decide(model, PRESETS["0..1"], output="x")


def test_a_negative_size_is_a_free_one():
    model = network()
    for dim, value in zip(
        model.graph.input[0].type.tensor_type.shape.dim, (-1, 3, -1, -1), strict=True
    ):
        dim.Clear()
        dim.dim_value = value
    with pytest.raises(ExportError, match="takes images of any size; say which with --size"):
        decide(model, PRESETS["0..1"])
    found = decide(model, PRESETS["0..1"], size=(8, 12))
    assert (found.batch, found.shape.height, found.shape.width) == (None, 8, 12)
    made = convert(model, found, PRESETS["0..1"]).model
    sizes = made.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value or dim.dim_param for dim in sizes] == ["N", 8, 12, 3]


def test_an_operator_set_that_is_listed_twice_is_one(tmp_path):
    model = network()
    model.opset_import.extend([helper.make_opsetid("ai.onnx", 18), helper.make_opsetid("", 17)])
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    found = convert(model, decide(model, PRESETS["0..1"]), PRESETS["0..1"]).model
    listed = {opset.domain: opset.version for opset in found.opset_import}
    assert (len(found.opset_import), listed) == (2, {"": 18, "ai.onnx.ml": 3})


def free_size() -> onnx.ModelProto:
    model = network()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.Clear()
        dim.dim_param = "side"
    return model


def test_a_free_size_is_asked_for():
    with pytest.raises(ExportError, match="--size HEIGHTxWIDTH"):
        decide(free_size(), PRESETS["0..1"])
    found = decide(free_size(), PRESETS["0..1"], size=(20, 16))
    assert found.shape == InputShape(height=20, width=16, channels=3)
    with pytest.raises(ExportError, match="takes 10 x 12 pixels, not 20 x 16"):
        decide(network(), PRESETS["0..1"], size=(20, 16))


def with_weight(name: str, value: np.ndarray) -> onnx.ModelProto:
    model = network()
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    return model


def two_inputs() -> onnx.ModelProto:
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
    return model


def sigmoids() -> onnx.ModelProto:
    model = network(ends="softmax")
    model.graph.node[-1].CopyFrom(helper.make_node("Sigmoid", ["logits"], ["tensor"]))
    return model


def four_channels(layout: str) -> onnx.ModelProto:
    model = network(layout=layout)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[1 if layout == "nchw" else 3].dim_value = 4
    return model


IMPLAUSIBLE = {
    "RGBA": (four_channels("nchw"), ["--normalize=tf"], "takes 4 channels; allowed: 1 and 3"),
    "RGBA last": (four_channels("nhwc"), ["--normalize=tf"], "takes 4 channels; allowed: 1 and 3"),
    "NaN": (with_weight("b1", np.full(6, np.nan)), [], "the weights 'b1' have values that are NaN"),
    "std 0": (network(), ["--std", "0"], "std is 0; allowed: numbers above 0"),
    "mean 127.5": (network(), ["--mean", "127.5"], "mean is 127.5; allowed: -1 to 1"),
    "no numbers": (network(), ["--mean", "a,b"], "'a,b' is not a list of numbers"),
    "one value": (network(ends="logit"), ["--normalize=tf"], "whether it is a sigmoid or a logit"),
    "several sigmoids": (sigmoids(), ["--normalize=tf"], "gives 4 sigmoids"),
    "two inputs": (two_inputs(), ["--normalize=tf"], "has the inputs pixels, other; needed: one"),
    "softmax before softmax": (
        network(ends="softmax"),
        ["--normalize=tf", "--answers=logits"],
        "answers are logits by --answers, but the network ends in a softmax",
    ),
    "no softmax": (
        network(),
        ["--normalize=tf", "--answers=probabilities"],
        "they do not add up to 1",
    ),
    "nothing said": (network(), [], "give --normalize imagenet|tf|0..1|0..255|caffe"),
    "no size": (network(), ["--size", "big"], "'big' is not a size; allowed: 224 or HEIGHTxWIDTH"),
    "a name": (network(), ["--normalize=tf", ".x"], "no card can be made of this"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPLAUSIBLE)
def test_what_cannot_be_meant_is_refused_with_a_sentence(name, tmp_path):
    model, words, sentence = IMPLAUSIBLE[name]
    onnx.save(model, tmp_path / "net.onnx")
    if name == "NaN":
        words = ["--normalize=tf"]
    done = CliRunner().invoke(
        import_onnx, [str(tmp_path / "net.onnx"), *words, "--models", str(tmp_path / "m")]
    )
    assert done.exit_code in (1, 2)
    assert sentence in " ".join(done.output.split())
    assert not list(tmp_path.glob("m/*"))


def test_nearly_constant_answers_are_reported(tmp_path):
    onnx.save(with_weight("w1", np.zeros((6, 3, 3, 3))), tmp_path / "net.onnx")
    words = [str(tmp_path / "net.onnx"), "--normalize", "tf", "--models", str(tmp_path / "m")]
    done = CliRunner().invoke(import_onnx, words)
    assert done.exit_code == 0, done.output
    assert "note: answers to 10 made-up pictures differ by 0.0e+00 at most" in done.output


def test_a_file_that_is_no_network(tmp_path):
    for content in (b"", b"no model", b"\x08\x07"):
        (tmp_path / "net.onnx").write_bytes(content)
        with pytest.raises(ExportError, match="is not a"):
            read_network(tmp_path / "net.onnx")


LABEL_FILES = {
    "l.txt": ("\ufeffant\nbee\ncow\ndog\n\n", ["ant", "bee", "cow", "dog"]),
    "l.json": (json.dumps(["ant", "bee", "cow", "dog"]), ["ant", "bee", "cow", "dog"]),
    "k.json": (
        json.dumps({str(k): [f"n{k}", name] for k, name in enumerate("abcd")}),
        ["a", "b", "c", "d"],
    ),
    "d.txt": ("crane\nbee\ncrane\ndog", ["crane (0)", "bee", "crane (2)", "dog"]),
}


@pytest.mark.parametrize("name", LABEL_FILES)
def test_labels_and_how_pictures_are_fitted(name, tmp_path):
    text, labels = LABEL_FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    model = network()
    onnx.save(model, tmp_path / "net.onnx")
    words = f"{tmp_path}/net.onnx own --normalize imagenet --labels {tmp_path}/{name}".split()
    words += ["--fit", "resize_crop", "--shorter", "14", "--interpolation", "bicubic"]
    done = CliRunner().invoke(import_onnx, [*words, "--models", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert ("get their number: crane" in done.output) == (name == "d.txt")
    card = Bundle(tmp_path / "own").card
    assert card.labels == labels
    assert card.preprocessing == Preprocessing(
        fit="resize_crop", shorter=14, interpolation="bicubic"
    )
    assert card.training["decision"].startswith("input 'pixels': NCHW, 10 x 12 pixels, RGB, any")
    source = picture(40, 30)
    scale = source.resize((18, 14), Image.Resampling.BICUBIC).crop((3, 2, 15, 12))
    seen = decode(encoded(source), card.input, card.preprocessing, 10**6)
    np.testing.assert_array_equal(seen, np.asarray(scale))


def test_every_rule_for_pictures_is_an_option_and_the_card_has_the_command(tmp_path):
    onnx.save(network(), tmp_path / "net.onnx")
    words = (
        f"import {tmp_path}/net.onnx own --normalize imagenet --bgr --size 10x12 --fit letterbox "
        "--fill 9 --no-orientation --alpha drop --profile srgb"
    ).split()
    words += ["--no-reduce-jpeg", "--licence", "my own", "--models", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    card = Bundle(tmp_path / "own").card
    assert card.preprocessing == Preprocessing(
        fit="letterbox", fill=9, orientation=False, alpha="drop", profile="srgb", reduce_jpeg=False
    )
    program, *again = shlex.split(card.training["command"])
    assert program == "scumble"
    assert sorted(again) == sorted(words)
    assert CliRunner().invoke(main, again).exit_code == 0
    assert Bundle(tmp_path / "own").card == card


def open_in_all(layout="nhwc"):
    """A network whose file says neither layout, nor size, nor output, nor what one value is."""
    model = network(layout=layout, ends="logit")
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        dim.Clear()
    model.graph.output.append(onnx.ValueInfoProto(name=model.graph.node[0].output[0]))
    return model


def test_people_at_a_terminal_are_asked_for_what_the_file_leaves_open():
    said = {"layout": "nhwc", "size": (10, 12), "answers": "logit"}
    model = open_in_all()
    said["output"] = model.graph.output[0].name
    asked = []

    def ask(missing):
        asked.append((missing.option, tuple(missing.choices)))
        return said[missing.option]

    found = settled(model, PRESETS["imagenet"], {}, ask)
    assert asked == [
        ("layout", ("nchw", "nhwc")),
        ("size", ()),
        ("output", tuple(each.name for each in model.graph.output)),
        ("answers", ("sigmoid", "logit")),
    ]
    assert (found.layout, found.shape.height, found.answers) == ("nhwc", 10, "logit")
    with pytest.raises(ExportError, match="--layout nchw or nhwc"):
        settled(model, PRESETS["imagenet"], {}, None)


def test_what_was_answered_at_a_prompt_is_in_the_command_of_the_card(tmp_path, monkeypatch):
    answers = iter(["tf", "nhwc", (10, 12)])
    monkeypatch.setattr("click.prompt", lambda text, **_: next(answers))
    (tmp_path / "net.onnx").touch()
    with import_onnx.make_context("import", [f"{tmp_path}/net.onnx", "--bgr"]) as ctx:
        prompted(ctx, Unsaid("", "preset", ("tf",)))
        prompted(ctx, Unsaid("", "layout", ("nchw", "nhwc")))
        prompted(ctx, Unsaid("", "size"))
        words = "--normalize tf --bgr --layout nhwc --size 10x12"
        assert typed(ctx) == f"scumble import {tmp_path}/net.onnx {words}"


@pytest.mark.parametrize("command", [import_onnx, export, connect], ids=lambda one: one.name)
def test_commands_that_make_bundles_have_all_rules_for_pictures(command):
    assert Preprocessing.model_fields.keys() <= {option.name for option in command.params}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ant\n\ncow\ndog", "have an empty one"),
        ("ant\nbee", "the network has 4 classes, but there are 2 labels"),
    ],
)
def test_labels_that_do_not_fit(text, sentence, tmp_path):
    (tmp_path / "l.txt").write_text(text)
    onnx.save(network(), tmp_path / "net.onnx")
    words = f"{tmp_path}/net.onnx --normalize tf --labels {tmp_path}/l.txt --models {tmp_path}/m"
    done = CliRunner().invoke(import_onnx, words.split())
    assert done.exit_code == 1
    assert sentence in " ".join(done.output.split())
