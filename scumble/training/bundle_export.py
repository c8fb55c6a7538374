"""From a torch module to a bundle: ONNX file, golden outputs, card.

The network is exported alone and gets its ends as ONNX nodes, so that they are the same whatever
the network is:

    pixels  uint8 (N, H, W, C)  -Transpose, Cast, Div->  tensor  float32 (N, C, H, W) in [0, 1]
    tensor  -network->  logits (N, K)  -Softmax->  probabilities (N, K)
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import orjson
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from app.inference.bundle import (
    ONNX_FILE,
    Card,
    Golden,
    InputShape,
    checked_card,
    golden_inputs,
    write_card,
)
from app.inference.engines import EngineName, load, resolve
from app.inference.graph import TENSOR
from app.precision import Precision
from scumble.training.errors import ExportError
from scumble.training.onnx_import import samples
from scumble.training.sanity_checks import check_logits, check_weights
from scumble.training.staging import remove_derived

LOGITS = "logits"
OPSET = 18
IR_VERSION = 10  # what ONNX Runtime 1.22, the oldest allowed, reads
# Golden outputs differ between engines and processors. Bundles allow this many times the largest
# difference that was seen while the bundle was made, and at least the floor of the precision.
MARGIN = 4.0
FLOOR: dict[Precision, float] = {"float32": 1e-3, "int8": 0.05, "bf16": 0.05}


def classes_of(module: nn.Module, shape: InputShape) -> int:
    """The number of classes of `module`.

    Raises:
        ExportError: it does not take any number of such images, or does not return logits (N, K).
    """
    classes = 0
    for batch in (2, 3):  # an exported program may be fixed to one batch
        example = torch.rand(batch, shape.channels, shape.height, shape.width)
        try:
            with torch.inference_mode():
                logits = module.eval()(example)
        except (RuntimeError, ValueError, TypeError, AssertionError) as exc:
            raise ExportError(
                f"the network does not take {tuple(example.shape)}: {cause_of(exc)}"
            ) from exc
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != batch:
            found = getattr(logits, "shape", type(logits).__name__)
            raise ExportError(
                f"the network returns {found} for {batch} images, not logits ({batch}, K)"
            )
        classes = logits.shape[1]
    return classes


def notes_of(module: nn.Module, shape: InputShape) -> list[str]:
    """What is seldom meant about the answers to made-up pictures.

    Raises:
        ExportError: the answers are implausible.
    """
    with torch.inference_mode():
        rows = [module(_tensor(pixels)).double().numpy() for pixels in samples(shape)]
    return check_logits(np.concatenate(rows))


def _tensor(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255


def to_onnx(module: nn.Module, shape: InputShape, more: Sequence[str] = ()) -> onnx.ModelProto:
    """The served graph of `module`.

    Args:
        module: float32 (N, C, H, W) in [0, 1] -> logits (N, K), normalisation included; a tuple
            that starts with them if it has more outputs.
        shape: of the pixels.
        more: names of the other outputs, each (N, K).

    Raises:
        ExportError: torch cannot express the module in ONNX with a batch of any size.
    """
    example = torch.rand(2, shape.channels, shape.height, shape.width)
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        return _with_ends(_scripted(module, example, more), shape)
    # Traced with channels last, torch writes a pooling as a gather of every single element.
    module = module.eval().to(memory_format=torch.contiguous_format)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                input_names=[TENSOR],
                output_names=[LOGITS, *more],
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as exc:
        cause = exc.__cause__ or exc
        raise ExportError(
            f"torch cannot export the network with a batch of any size: {cause}"
        ) from exc
    assert program is not None  # noqa: S101 - it is, unless the export goes to a file
    return _with_ends(program.model_proto, shape)


def _scripted(module: nn.Module, example: torch.Tensor, more: Sequence[str]) -> onnx.ModelProto:
    """The graph of TorchScript, which only torch's older exporter takes."""
    try:
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore", UserWarning)  # that a traced module has no signature
            torch.onnx.export(
                torch.jit.trace(module, example, check_trace=False),
                (example,),
                file := Path(folder, "network.onnx"),
                input_names=[TENSOR],
                output_names=[LOGITS, *more],
                opset_version=OPSET,
                dynamic_axes={name: {0: "N"} for name in (TENSOR, LOGITS, *more)},
                dynamo=False,
            )
            return onnx.load(file)
    except (torch.onnx.OnnxExporterError, RuntimeError) as exc:
        raise ExportError(f"torch cannot export the TorchScript: {cause_of(exc)}") from exc


def cause_of(exc: Exception) -> str:
    """The message of an error of torch, of TorchScript's without the code that it quotes."""
    text = str(exc).strip()
    return text.splitlines()[-1] if "TorchScript interpreter" in text else text


def check_same(module: nn.Module, model: bytes, shape: InputShape) -> None:
    """Compare the answers of a graph with those of its network.

    Raises:
        ExportError: they differ, as those of a trace that holds a fixed batch do.
    """
    pixels = samples(shape)
    with torch.inference_mode():
        expected = torch.cat([module(_tensor(each)) for each in pixels]).double().softmax(1)
    found = load("onnxruntime", model, threads=1, precision="float32")(pixels)
    apart = float(np.abs(found - expected.numpy()).max())
    if not apart <= FLOOR["float32"]:
        raise ExportError(
            f"the exported graph answers differently from the network, by {apart:.2g}"
        )


def _with_ends(network: onnx.ModelProto, shape: InputShape) -> onnx.ModelProto:
    graph = network.graph
    classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    before = [
        helper.make_node("Transpose", ["pixels"], ["planar"], "to_planar", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planar"], ["levels"], "to_float", to=TensorProto.FLOAT),
        helper.make_node("Div", ["levels", "white"], [TENSOR], "to_unit"),
    ]
    after = helper.make_node("Softmax", [LOGITS], ["probabilities"], "softmax", axis=1)
    white = numpy_helper.from_array(np.array(255, np.float32), "white")
    sizes: list[str | int | None] = ["N", shape.height, shape.width, shape.channels]
    served = helper.make_graph(
        [*before, *graph.node, after],
        "classifier",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, sizes)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", classes])
            for name in ("probabilities", *(output.name for output in graph.output[1:]))
        ],
        [white, *graph.initializer],
    )
    # Traces of the exporter (file names, line numbers) have no place in a published file.
    for node in served.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for tensor in served.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    model = helper.make_model(
        served,
        opset_imports=list(network.opset_import),
        ir_version=IR_VERSION,
        producer_name="scumble",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def export_bundle(
    module: nn.Module, folder: Path, shape: InputShape, card: dict[str, Any], *, threads: int = 1
) -> Card:
    """Write `folder` as a bundle with the one precision float32.

    Args:
        module: as for `to_onnx`.
        folder: made if missing; what was made of an earlier network in it (int8 file, auxiliary
            models) is removed.
        shape: of the pixels.
        card: name, version, labels and whatever else is known; input and files are filled in.
        threads: of the engines that make the golden outputs.

    Raises:
        ExportError: the network cannot be exported, or has not one class per label.
        BundleError: no card may be like this.
    """
    count, labels = classes_of(module, shape), card["labels"]
    notes_of(module, shape)
    if count != len(labels):
        raise ExportError(f"the network has {count} classes, but there are {len(labels)} labels")
    card = {**card, "input": shape.model_dump()}
    checked_card(card)  # before a folder is made of a name that no card may have
    folder.mkdir(parents=True, exist_ok=True)
    remove_derived(folder)
    model = to_onnx(module, shape)
    check_weights(model)
    content = model.SerializeToString()
    check_same(module, content, shape)
    (folder / "float32.onnx").write_bytes(content)
    return finish(folder, card, threads=threads)


def finish(folder: Path, card: dict[str, Any], *, threads: int = 1) -> Card:
    """Make `golden.json` for the ONNX files that are in `folder`, then the card."""
    golden = make_golden(folder, InputShape.model_validate(card["input"]), threads=threads)
    (folder / "golden.json").write_bytes(orjson.dumps(golden.model_dump(mode="json")) + b"\n")
    return write_card(folder, card)


def make_golden(folder: Path, shape: InputShape, *, threads: int = 1) -> Golden:
    """The engines' answers to `golden_inputs`, and how much they differ."""
    inputs = golden_inputs(shape)
    probabilities: dict[str, list[list[float]]] = {}
    tolerance: dict[str, float] = {}
    precisions: tuple[Precision, ...] = ("float32", "int8")
    for precision in precisions:
        if not (folder / ONNX_FILE[precision]).exists():
            continue
        model = (folder / ONNX_FILE[precision]).read_bytes()
        answers = {
            engine: load(engine, model, threads=threads, precision=precision)(inputs)
            for engine in engines(precision)
        }
        expected = answers["onnxruntime"]
        difference = max(float(np.abs(a - expected).max()) for a in answers.values())
        probabilities[precision] = expected.astype(float).round(7).tolist()
        tolerance[precision] = _tolerance(precision, difference)
        if precision == "float32" and "openvino" in answers:
            rough = load("openvino", model, threads=threads, precision="bf16")(inputs)
            probabilities["bf16"] = probabilities["float32"]
            tolerance["bf16"] = _tolerance("bf16", float(np.abs(rough - expected).max()))
    return Golden(probabilities=probabilities, tolerance=tolerance)


def engines(precision: Precision) -> list[EngineName]:
    """The engines that bundles are measured on: those installed that are exact here."""
    both = resolve("auto", precision) == "openvino"
    return ["onnxruntime", "openvino"] if both else ["onnxruntime"]


def _tolerance(precision: Precision, difference: float) -> float:
    return float(f"{max(FLOOR[precision], MARGIN * difference):.2g}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns of its own plans; errors still come through."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    log.setLevel(level)
