"""An ONNX classifier of any tool -> the graph that bundles have.

    pixels  uint8 (N, H, W, C)  ->  tensor  float32 (N, C, H, W) in [0, 1]
    tensor  -normalisation, layout->  the network  -what is before its softmax->  logits (N, K)
    logits  -Softmax->  probabilities (N, K)

The network's own names get a prefix. Weights of half precision become float32, the batch becomes
free, and operators are brought to the set that defenses need where the converter can do that. The
result is compared with the file as it came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnx.version_converter
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from app.inference.bundle import InputShape, golden_inputs
from app.inference.graph import OPSET, TENSOR
from app.inference.normalisation import Normalisation
from scumble.training.errors import ExportError
from scumble.training.sanity_checks import (
    check_logits,
    check_normalisation,
    check_weights,
    is_distribution,
)

PREFIX = "network/"
LOGITS = "logits"
IR_VERSION = 10  # what ONNX Runtime 1.22, the oldest allowed, reads
TOLERANCE = {False: 1e-3, True: 2e-2}  # of probabilities; True: the file has half precision
FLOATS: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
CHANNELS = (1, 2, 3, 4)  # by which the dimension of the channels is known
SMALLEST = 1e-30  # probability whose logarithm is still taken
PASSING = ("Identity", "Reshape", "Flatten", "Squeeze", "Cast")

Layout = Literal["nchw", "nhwc"]
Answers = Literal["logits", "probabilities", "sigmoid", "logit"]
Values = npt.NDArray[Any]


class Unsaid(ExportError):
    """The file leaves open what an option can say.

    Attributes:
        option: its name.
        choices: its values; none if it is free.
    """

    def __init__(self, message: str, option: str, choices: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.option, self.choices = option, choices


@dataclass(frozen=True)
class Decision:
    """How a file is read.

    Attributes:
        input: name of the input.
        layout: of the input.
        shape: of the pixels.
        kind: ONNX's type of the input's elements.
        batch: images that the file takes at once; None for any number.
        output: name of the output.
        answers: what the output is.
        classes: K.
    """

    input: str
    layout: Layout
    shape: InputShape
    kind: int
    batch: int | None
    output: str
    answers: Answers
    classes: int

    def sentence(self, normalisation: Normalisation) -> str:
        """What was decided, for people to check."""
        shape, batch = self.shape, "any number" if self.batch is None else self.batch
        order = "BGR" if normalisation.bgr else ("RGB" if shape.channels == 3 else "grey")
        return (
            f"input {self.input!r}: {self.layout.upper()}, {shape.height} x {shape.width} pixels, "
            f"{order}, {batch} at once, (x - {_numbers(normalisation.mean)}) / "
            f"{_numbers(normalisation.std)} of pixels in 0..1; output {self.output!r}: "
            f"{self.answers} of {self.classes} classes"
        )


@dataclass(frozen=True)
class Imported:
    """A graph for a bundle, and what to tell about it."""

    model: onnx.ModelProto
    decision: Decision
    notes: list[str]


def read_network(path: Path) -> onnx.ModelProto:
    """The ONNX file with all its weights, also those in files beside it.

    Raises:
        ExportError: no such file, or no such weights.
    """
    try:
        model = onnx.load(path)
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as exc:
        raise ExportError(f"{str(path)!r} is not a whole ONNX model: {exc}") from exc
    if not model.graph.node:
        raise ExportError(f"{str(path)!r} is not an ONNX model: it has no nodes")
    return model


def decide(
    model: onnx.ModelProto,
    normalisation: Normalisation,
    *,
    layout: Layout | None = None,
    size: tuple[int, int] | None = None,
    output: str | None = None,
    answers: Answers | None = None,
) -> Decision:
    """Read from a network what it says of itself; the arguments are what the owner says.

    Raises:
        Unsaid: an option has to say something.
        ExportError: it is not an image classifier.
    """
    found = _input(model.graph)
    # Old files of PaddlePaddle have -1 for a free size.
    sides = [max(0, dim.dim_value) for dim in found.type.tensor_type.shape.dim]
    layout = layout or _layout(sides)
    channels, height, width = sides[1:] if layout == "nchw" else (sides[3], *sides[1:3])
    height, width = _size((height, width), size)
    if channels not in (0, 1, 3):
        raise ExportError(
            f"the network takes {channels} channels; allowed: 1 and 3, as a picture has no more "
            "that the service could fill (transparency is laid on white)"
        )
    shape = InputShape(height=height, width=width, channels=1 if channels == 1 else 3)
    kind, batch = found.type.tensor_type.elem_type, sides[0] or None
    outputs = [each.name for each in model.graph.output]
    if output is None and len(outputs) != 1:
        message = f"the network has the outputs {', '.join(outputs)}; choose with --output"
        raise Unsaid(message, "output", outputs)
    if output is not None and output not in outputs:
        raise ExportError(f"the network has no output {output!r}; there: {', '.join(outputs)}")
    output = output or outputs[0]
    raw = Decision(found.name, layout, shape, kind, batch, output, "logits", 0)
    rows = _run_as_it_is(model, raw, normalisation)
    answers = _answers(model, output, rows, answers)
    return replace(raw, answers=answers, classes=2 if rows.shape[1] == 1 else rows.shape[1])


def convert(model: onnx.ModelProto, decision: Decision, normalisation: Normalisation) -> Imported:
    """The graph of a bundle.

    Raises:
        ExportError: the weights or answers are implausible, the batch cannot be made free, or the
            result computes something else.
    """
    check_weights(model)
    check_normalisation(normalisation.mean, normalisation.std)
    expected = _probabilities(_run_as_it_is(model, decision, normalisation), decision.answers)
    half = _has_half(model)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    if len(changed.functions):
        changed = onnx.inliner.inline_local_functions(changed)
    _drop_listed_weights(changed)
    if half:
        _to_float32(changed)
    notes = []
    apart = np.inf
    for attempt in _attempts(changed, decision):
        served = _with_ends(attempt, decision, normalisation)
        found = _run(served, {"pixels": samples(decision.shape)}, [LOGITS, "probabilities"])
        if found is None:
            continue
        logits, probabilities = found
        apart = float(np.abs(probabilities - expected).max())
        if apart <= TOLERANCE[half]:
            notes += check_logits(logits)
            if half:
                notes.append("weights of half precision are stored as float32")
            return Imported(served, decision, notes)
    if apart == np.inf:
        raise ExportError(
            "the network cannot be run with a batch of any size: it was exported for "
            f"{decision.batch or 1} at once; export it with a dynamic batch"
        )
    raise ExportError(f"the graph with a free batch answers differently, by {apart:.2g}")


def samples(shape: InputShape) -> npt.NDArray[np.uint8]:
    """Made-up pictures: waves, black, white, noise."""
    flat = np.zeros((2, shape.height, shape.width, shape.channels), np.uint8)
    flat[1] = 255
    noise = np.random.default_rng(0).integers(0, 256, flat.shape, np.uint8)
    return np.concatenate([golden_inputs(shape), flat, noise])


def _input(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    """The one input that is not a weight."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [each for each in graph.input if each.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(each.name for each in inputs) or "none"
        raise ExportError(f"the network has the inputs {names}; needed: one, of images")
    kind = inputs[0].type.tensor_type
    if len(kind.shape.dim) != 4 or kind.elem_type not in (*FLOATS, TensorProto.UINT8):
        shape = [dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim]
        name = TensorProto.DataType.Name(kind.elem_type)
        raise ExportError(
            f"the input {inputs[0].name!r} is {name} {shape}; needed: FLOAT, FLOAT16 or UINT8 of "
            "four dimensions"
        )
    return inputs[0]


def _layout(sides: Sequence[int]) -> Layout:
    first, last = sides[1] in CHANNELS, sides[3] in CHANNELS
    if first == last:
        raise Unsaid(
            f"the input has the shape {list(sides)}, where 0 is free; say which dimension the "
            "channels are with --layout nchw or nhwc",
            "layout",
            get_args(Layout),
        )
    return "nchw" if first else "nhwc"


def _size(found: tuple[int, int], given: tuple[int, int] | None) -> tuple[int, int]:
    if given is None and not all(found):
        message = "the network takes images of any size; say which with --size HEIGHTxWIDTH"
        raise Unsaid(message, "size")
    if given is None:
        return found
    if any(side and side != wanted for side, wanted in zip(found, given, strict=True)):
        raise ExportError(
            f"the network takes {found[0]} x {found[1]} pixels, not {given[0]} x {given[1]}"
        )
    return given


def _answers(model: onnx.ModelProto, output: str, rows: Values, given: Answers | None) -> Answers:
    """What an output is, by the operator that makes it and by its values."""
    operator = _maker(model.graph, output)
    last = "" if operator is None else operator.op_type
    one, between = rows.shape[1] == 1, bool(rows.min() >= 0 and rows.max() <= 1)
    if one:
        found: Answers | None = "sigmoid" if last == "Sigmoid" else None
        if given not in (None, "sigmoid", "logit"):
            raise ExportError(f"answers are {given} by --answers, but the network gives one value")
        if found is None and given is None:
            raise Unsaid(
                "the network gives one value for an image; say with --answers whether it is a "
                "sigmoid or a logit, of the second of two classes",
                "answers",
                ("sigmoid", "logit"),
            )
        return given or found or "sigmoid"
    if last == "Sigmoid" and given in (None, "sigmoid"):
        raise ExportError(
            f"the network gives {rows.shape[1]} sigmoids, of classes that do not exclude each "
            "other; needed: one class for an image"
        )
    if given is None:
        return "probabilities" if last == "Softmax" or is_distribution(rows) else "logits"
    if given == "logits" and (last == "Softmax" or is_distribution(rows)):
        raise ExportError("answers are logits by --answers, but the network ends in a softmax")
    if given == "probabilities" and not (between and is_distribution(rows)):
        raise ExportError("answers are probabilities by --answers, but they do not add up to 1")
    if given in ("sigmoid", "logit"):
        raise ExportError(f"{given} is of networks that give one value, not {rows.shape[1]}")
    return given


def _maker(graph: onnx.GraphProto, name: str) -> onnx.NodeProto | None:
    """The node behind an output, without those that only pass its values on."""
    makers = {output: node for node in graph.node for output in node.output}
    node = makers.get(name)
    while node is not None and node.op_type in PASSING:
        node = makers.get(node.input[0])
    return node


def _prepared(pixels: Values, decision: Decision, normalisation: Normalisation) -> Values:
    """Pixels (N, H, W, C) as the file takes them."""
    unit = pixels.astype(np.float64) / 255
    if normalisation.bgr:
        unit = unit[..., ::-1]
    values = (unit - np.array(normalisation.mean)) / np.array(normalisation.std)
    if decision.layout == "nchw":
        values = values.transpose(0, 3, 1, 2)
    if decision.kind == TensorProto.UINT8:
        return np.ascontiguousarray(np.rint(values).clip(0, 255).astype(np.uint8))
    return np.ascontiguousarray(values.astype(FLOATS[decision.kind]))


def _run_as_it_is(
    model: onnx.ModelProto, decision: Decision, normalisation: Normalisation
) -> Values:
    """The chosen output (N, K) for the samples, one by one.

    Raises:
        ExportError: ONNX Runtime refuses the file, or the output is not of K values an image.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _prepared(samples(decision.shape), decision, normalisation)
    session = _session(model)
    rows = []
    for value in values:
        batch = np.repeat(value[None], decision.batch or 1, 0)
        try:
            (answer,) = session.run([decision.output], {decision.input: batch})
        except Exception as exc:  # ONNX Runtime's errors have no common class
            raise ExportError(f"ONNX Runtime cannot run the network: {_first(exc)}") from exc
        if len(answer) != len(batch) or sum(side > 1 for side in answer.shape[1:]) > 1:
            raise ExportError(
                f"the output {decision.output!r} has the shape {answer.shape} for {len(batch)} "
                "images; needed: (N, K)"
            )
        rows.append(np.asarray(answer[0], np.float64).reshape(-1))
    return np.stack(rows)


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as exc:  # ONNX Runtime's errors have no common class
        raise ExportError(f"ONNX Runtime cannot load the network: {_first(exc)}") from exc


def _run(model: onnx.ModelProto, feed: dict[str, Values], names: list[str]) -> list[Values] | None:
    """Outputs for a batch of several; None where the graph cannot take one."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    for name in set(names) - {output.name for output in shown.graph.output}:
        shown.graph.output.append(onnx.ValueInfoProto(name=name))
    try:
        return list(_session(shown).run(names, feed))
    except Exception:  # noqa: BLE001  # the next attempt may be able to
        return None


def _probabilities(rows: Values, answers: Answers) -> Values:
    """What the bundle should answer where the file answers with `rows`."""
    if answers == "probabilities":
        return rows
    if answers == "sigmoid":
        return np.concatenate([1 - rows, rows], 1)
    if answers == "logit":
        rows = np.concatenate([np.zeros_like(rows), rows], 1)
    shifted = np.exp(rows - rows.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def _attempts(model: onnx.ModelProto, decision: Decision) -> Iterator[onnx.ModelProto]:
    """The network with a free batch, the form that keeps most of it first."""
    version = {opset.domain: opset.version for opset in model.opset_import}.get("", 1)
    for fixed in (None, -1, 0):
        free = _free_batch(model, decision.input, fixed)
        if version < OPSET:
            with contextlib.suppress(Exception):  # the converter lacks operators: as it is, then
                yield onnx.version_converter.convert_version(free, OPSET)
        yield free


def _free_batch(model: onnx.ModelProto, name: str, reshaped: int | None) -> onnx.ModelProto:
    """The network for any number of images.

    Args:
        model: the network.
        name: of its input.
        reshaped: what becomes of the first size of shapes that are constants; None to keep it.
    """
    free = onnx.ModelProto()
    free.CopyFrom(model)
    graph = free.graph
    for value in [*graph.input, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.name == name or (dims and value in graph.output):
            dims[0].Clear()
            dims[0].dim_param = "N"
    del graph.value_info[:]
    if reshaped is None:
        return free
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in shapes:
            for attribute in node.attribute:
                if attribute.name == "value":
                    stored[node.output[0]] = attribute.t
    for tensor in (stored[name] for name in shapes if name in stored):
        sizes = numpy_helper.to_array(tensor).copy()
        if sizes.size and sizes[0] > 0 and (reshaped == 0 or -1 not in sizes):
            sizes[0] = reshaped
            tensor.CopyFrom(numpy_helper.from_array(sizes, tensor.name))
    return free


def _with_ends(
    network: onnx.ModelProto, decision: Decision, normalisation: Normalisation
) -> onnx.ModelProto:
    """The network between pixels and probabilities."""
    named = onnx.compose.add_prefix(network, PREFIX)
    graph = named.graph
    nodes, stored = _before(decision, normalisation)
    stored["white"] = np.array(255, np.float32)
    behind, more, cut = _behind(graph, PREFIX + decision.output, decision.answers)
    stored.update(more)
    sizes: list[str | int | None] = [
        "N", decision.shape.height, decision.shape.width, decision.shape.channels
    ]  # fmt: skip
    served = helper.make_graph(
        [*nodes, *(node for node in graph.node if node not in cut), *behind],
        "classifier",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, sizes)],
        [
            helper.make_tensor_value_info(
                "probabilities", TensorProto.FLOAT, ["N", decision.classes]
            )
        ],
        [numpy_helper.from_array(value, name) for name, value in stored.items()]
        + list(graph.initializer),
    )
    for node in served.node:
        del node.metadata_props[:]
        node.doc_string = ""
    opsets = _opsets(named)
    oldest = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    model = helper.make_model(
        served,
        opset_imports=opsets,
        ir_version=max(oldest, IR_VERSION),
        producer_name="scumble",
    )
    needed, kept = {"probabilities"}, []
    for node in reversed(model.graph.node):  # what only other outputs need goes
        if needed & set(node.output):
            needed.update(node.input, _inside(node))
            kept.append(node)
    kept.reverse()
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    slim = helper.make_graph(kept, "classifier", model.graph.input, model.graph.output, weights)
    model.graph.CopyFrom(slim)
    return model


def _opsets(model: onnx.ModelProto) -> list[onnx.OperatorSetIdProto]:
    """Each operator set once: files name the standard one in two ways, or several times."""
    versions: dict[str, int] = {}
    for opset in model.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        versions[domain] = max(opset.version, versions.get(domain, 0))
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _inside(node: onnx.NodeProto) -> set[str]:
    """Names that the graphs in a node's attributes use."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                names.update(inner.input, _inside(inner))
            names.update(output.name for output in graph.output)
    return names


def _before(
    decision: Decision, normalisation: Normalisation
) -> tuple[list[onnx.NodeProto], dict[str, Values]]:
    """Nodes from `pixels` to the network's input, and their constants."""
    stored: dict[str, Values] = {}
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["planar"], "to_planar", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planar"], ["levels"], "to_float", to=TensorProto.FLOAT),
        helper.make_node("Div", ["levels", "white"], [TENSOR], "to_unit"),
    ]
    at = TENSOR

    def then(operator: str, *constants: str, **attributes: Any) -> None:
        nonlocal at
        name = f"prepared/{len(nodes)}"
        nodes.append(helper.make_node(operator, [at, *constants], [name], name, **attributes))
        at = name

    if normalisation.bgr:
        stored["bgr"] = np.array([2, 1, 0], np.int64)
        then("Gather", "bgr", axis=1)
    for operator, name, values, nothing in (
        ("Sub", "mean", normalisation.mean, 0.0),
        ("Div", "std", normalisation.std, 1.0),
    ):
        if any(value != nothing for value in values):
            stored[name] = np.array(values, np.float32).reshape(1, -1, 1, 1)
            then(operator, name)
    if decision.layout == "nhwc":
        then("Transpose", perm=[0, 2, 3, 1])
    if decision.kind == TensorProto.UINT8:
        stored["half"] = np.array(0.5, np.float32)
        then("Add", "half")
        then("Floor")
        then("Cast", to=TensorProto.UINT8)
    nodes.append(helper.make_node("Identity", [at], [PREFIX + decision.input], "to_network"))
    return nodes, stored


def _behind(
    graph: onnx.GraphProto, output: str, answers: Answers
) -> tuple[list[onnx.NodeProto], dict[str, Values], list[onnx.NodeProto]]:
    """Nodes from the network's output to the probabilities, their constants, and what is cut."""
    operator = _maker(graph, output)
    stored: dict[str, Values] = {}
    cut = []
    wanted = {"probabilities": "Softmax", "sigmoid": "Sigmoid"}.get(answers)
    exact = operator is not None and operator.op_type == wanted
    if operator is not None and exact:  # what comes before it are the logits
        for node in graph.node:
            if node is operator:
                continue
            node.input[:] = [
                operator.input[0] if name == operator.output[0] else name for name in node.input
            ]
        if output == operator.output[0]:
            output = operator.input[0]
        cut.append(operator)
    nodes = [
        helper.make_node("Cast", [output], ["rows/float"], "rows/float", to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["rows/float"], ["rows"], "rows", axis=1),
    ]
    at = "rows"
    if wanted and not exact:
        stored["least"] = np.array(SMALLEST, np.float32)
        nodes.append(helper.make_node("Max", [at, "least"], ["rows/some"], "rows/some"))
        nodes.append(helper.make_node("Log", ["rows/some"], ["rows/log"], "rows/log"))
        at = "rows/log"
        if answers == "sigmoid":
            stored["one"] = np.array(1, np.float32)
            nodes.append(helper.make_node("Sub", ["one", "rows"], ["rows/other"], "rows/other"))
            nodes.append(helper.make_node("Max", ["rows/other", "least"], ["rows/rest"], "rest"))
            nodes.append(helper.make_node("Log", ["rows/rest"], ["rows/first"], "rows/first"))
            nodes.append(helper.make_node("Concat", ["rows/first", at], [LOGITS], LOGITS, axis=1))
    if answers in ("sigmoid", "logit") and not (wanted and not exact):
        stored["nothing"] = np.array(0, np.float32)
        nodes.append(helper.make_node("Mul", [at, "nothing"], ["rows/zero"], "rows/zero"))
        nodes.append(helper.make_node("Concat", ["rows/zero", at], [LOGITS], LOGITS, axis=1))
    elif not any(LOGITS in node.output for node in nodes):
        nodes.append(helper.make_node("Identity", [at], [LOGITS], LOGITS))
    nodes.append(helper.make_node("Softmax", [LOGITS], ["probabilities"], "softmax", axis=1))
    return nodes, stored, cut


def _drop_listed_weights(model: onnx.ModelProto) -> None:
    """Old files list weights as inputs too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [each for each in model.graph.input if each.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _has_half(model: onnx.ModelProto) -> bool:
    return any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer) or any(
        each.type.tensor_type.elem_type == TensorProto.FLOAT16 for each in model.graph.input
    )


def _to_float32(model: onnx.ModelProto) -> None:
    """Weights, constants and casts of half precision as float32."""
    graph = model.graph
    for each in [*graph.input, *graph.output]:
        if each.type.tensor_type.elem_type == TensorProto.FLOAT16:
            each.type.tensor_type.elem_type = TensorProto.FLOAT
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensors.append(attribute.t)
            elif node.op_type == "Cast" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    for tensor in tensors:
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    del graph.value_info[:]


def _first(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0][:300] if lines else type(exc).__name__


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
