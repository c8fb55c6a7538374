"""int8 files of a bundle: after training (PTQ) or by training on (QAT), for server or mobile.

Four candidates, all in QDQ form with uint8 activations and int8 weights, differ in two things:

    server   one weight scale per output channel: accurate; any x86 with VNNI or AMX, recent ARM
    mobile   one weight scale per tensor: smallest tables, the form that simple accelerators take
    ptq      scales from a sample of training images
    qat      the ptq file trained on, see `scumble.training.qat`

Preprocessing and softmax stay float. The best candidate on held-out images becomes `int8.onnx`.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from app.inference.bundle import CODEBOOK_FILE, GATE_FILE, Bundle, Card
from app.inference.engines import EngineName, Probs
from app.inference.graph import parse
from scumble.data.image_sets import Dataset
from scumble.progress import bar
from scumble.training.bundle_export import engines, finish
from scumble.training.measure import (
    answers,
    batch_size,
    card_accuracy,
    describe,
    gap,
    share_right,
)
from scumble.training.qat import Tuning, tune
from scumble.training.staging import staged

Method = Literal["ptq", "qat"]
Preset = Literal["server", "mobile"]
PER_CHANNEL: dict[Preset, bool] = {"server": True, "mobile": False}
PRESETS: tuple[Preset, ...] = get_args(Preset)
METHODS: tuple[Method, ...] = get_args(Method)
CALIBRATION_IMAGES = 512
CALIBRATION_VALUES = 64 * 32 * 32 * 3  # levels of the images in a batch: 64 small ones or a photo
# Kinds of nodes that stay float. Of timm's vision transformers ONNX Runtime 1.32 could not load the
# file in which the weights of layer norms were quantized.
FLOAT = ("Softmax", "LayerNormalization")
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class Candidate:
    """A quantized file and its figures; shares in [0, 1], `l1` to the float answers in [0, 2]."""

    method: Method
    preset: Preset
    file: bytes
    validation: float
    validation_l1: float
    test: float
    test_l1: float

    @property
    def name(self) -> str:
        """`ptq-server` and the like."""
        return f"{self.method}-{self.preset}"

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better; the test set has no part in it."""
        return self.validation, -self.validation_l1

    def figures(self) -> dict[str, Any]:
        """What the card says of it."""
        return {
            "validation": round(self.validation, 6),
            "validation_l1": round(self.validation_l1, 6),
            "test": round(self.test, 6),
            "test_l1": round(self.test_l1, 6),
            "bytes": len(self.file),
        }


class Judge:
    """Compares quantized files with the float file, on held-out and on test images.

    Where nobody has labelled the images, the float network's own classes count as right.

    Attributes:
        labelled: somebody has labelled the test images.
    """

    def __init__(self, original: bytes, held_out: Dataset, test: Dataset) -> None:
        self.validation = answers(original, held_out.images, "float32")
        self.reported = answers(original, test.images, "float32")
        self.held_out = _as_answered(held_out, self.validation)
        self.test = _as_answered(test, self.reported)
        self.labelled = test.labelled

    def rank(self, file: bytes) -> tuple[float, float]:
        """(share right, minus L1 distance) on the held-out images."""
        probs = answers(file, self.held_out.images, "int8")
        return share_right(probs, self.held_out), -gap(probs, self.validation)

    def candidate(self, method: Method, preset: Preset, file: bytes) -> Candidate:
        """The file with all its figures."""
        right, distance = self.rank(file)
        probs = answers(file, self.test.images, "int8")
        shares = right, -distance, share_right(probs, self.test), gap(probs, self.reported)
        return Candidate(method, preset, file, *shares)


@dataclass(frozen=True)
class Skipped:
    """A file that could not be made, and why."""

    name: str
    reason: str


def candidates(
    original: bytes,
    train: Dataset,
    judge: Judge,
    tuning: Tuning,
    methods: Sequence[Method] = METHODS,
    presets: Sequence[Preset] = PRESETS,
) -> Iterator[Candidate | Skipped]:
    """Make and measure each combination; `train` calibrates all and trains those of qat.

    What cannot be trained on is skipped, and the file that it starts from is there instead.
    """
    images = calibration_sample(train, tuning.seed)
    if not train.labelled and "qat" in methods:
        train = _as_answered(train, answers(original, train.images, "float32"))
    for preset in presets:
        start = ptq(original, images, preset)
        untrained = judge.candidate("ptq", preset, start)
        if "ptq" in methods:
            yield untrained
        if "qat" in methods:
            try:
                tuned = tune(start, original, train, tuning, judge.rank)
            except Exception as exc:  # noqa: BLE001  # of torch, for operators that it lacks
                yield Skipped(f"qat-{preset}", " ".join(str(exc).split()) or repr(exc))
                if "ptq" not in methods:
                    yield untrained
            else:
                yield judge.candidate("qat", preset, tuned)


def ship(
    bundle: Bundle,
    made: Sequence[Candidate | Skipped],
    judge: Judge,
    tuning: Tuning,
    command: str,
) -> Card:
    """Write the best of `made` as `int8.onnx`, with golden outputs and a card that knows it."""
    found = [each for each in made if isinstance(each, Candidate)]
    best = max(found, key=lambda c: c.rank)
    size = len(bundle.read("float32.onnx"))
    probs = {e: answers(best.file, judge.test.images, "int8", e) for e in engines("int8")}
    agreement = {
        "images": len(judge.test),
        "engines": list(probs),
        "same_label": min(float((p.argmax(1) == q.argmax(1)).mean()) for p, q in _pairs(probs)),
        "l1": max(gap(p, q) for p, q in _pairs(probs)),
    }
    quantization = {
        "method": best.method,
        "preset": best.preset,
        "ratio": round(len(best.file) / size, 4),
        "candidates": {c.name: c.figures() for c in found},
        "skipped": {each.name: each.reason for each in made if isinstance(each, Skipped)},
        "right_is": "the label" if judge.labelled else "the class that the float network gives",
        "float32": {
            "validation": round(share_right(judge.validation, judge.held_out), 6),
            "test": round(share_right(judge.reported, judge.test), 6),
            "bytes": size,
        },
        "chosen_by": "validation, then validation_l1",
        "validation_data": {"images": len(judge.held_out), "data": describe(judge.held_out)},
        "calibration": {"images": CALIBRATION_IMAGES, "seed": tuning.seed, "range": "min-max"},
        "qat": asdict(tuning),
        "agreement": agreement,
        "command": command,
    }
    card = bundle.card.model_dump(exclude={"files", "format"})
    card["accuracy"].pop("int8", None)  # of the file before
    if judge.labelled:
        shown = {"float32": judge.reported, "int8": answers(best.file, judge.test.images, "int8")}
        for precision, rows in shown.items():
            card["accuracy"][precision] = card_accuracy(rows, judge.test).model_dump()
    with staged(bundle.folder) as folder:
        (folder / "int8.onnx").write_bytes(best.file)
        for calibrated in (CODEBOOK_FILE["int8"], GATE_FILE["int8"]):  # to another int8 file
            (folder / calibrated).unlink(missing_ok=True)
        return finish(folder, {**card, "quantization": quantization})


def ptq(original: bytes, images: npt.NDArray[np.uint8], preset: Preset) -> bytes:
    """Quantize a bundle's float file with activation ranges from `images` (N, H, W, C).

    Source: ONNX Runtime's static quantization; minimum and maximum of the sample give the ranges.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, out = (Path(folder, f"{n}.onnx") for n in ("float32", "prepared", "int8"))
        source.write_bytes(original)
        # Plain shape inference does; the symbolic one stumbles over graphs without shape notes.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        prepared.write_bytes(_with_flat_biases(parse(prepared.read_bytes())).SerializeToString())
        quantize_static(
            prepared,
            out,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=PER_CHANNEL[preset],
            nodes_to_exclude=_float_nodes(parse(prepared.read_bytes()).graph),
        )
        return _with_float_logits(parse(out.read_bytes())).SerializeToString()


def _with_flat_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """The biases (1, K) of Gemm nodes as (K,), the only shape that the quantizer takes.

    scikit-learn writes such biases, and its MatMul and Add have become a Gemm by now.
    """
    graph = model.graph
    biases = {node.input[2] for node in graph.node if node.op_type == "Gemm" and node.input[2:]}
    others = {
        name
        for node in graph.node
        for i, name in enumerate(node.input)
        if node.op_type != "Gemm" or i != 2
    }
    for tensor in graph.initializer:
        if tensor.name in biases - others and list(tensor.dims[:-1]) == [1]:
            del tensor.dims[0]
    return model


def _as_answered(data: Dataset, probs: Probs) -> Dataset:
    """`data`, if need be with the labels that a network gave it."""
    if data.labelled:
        return data
    classes = tuple(str(k) for k in range(probs.shape[1]))
    return replace(data, labels=probs.argmax(1).astype(np.int64), classes=classes)


def calibration_sample(train: Dataset, seed: int) -> npt.NDArray[np.uint8]:
    """Up to `CALIBRATION_IMAGES` training images."""
    rows = np.random.default_rng(seed).permutation(len(train))[:CALIBRATION_IMAGES]
    return train.images[rows]


class _Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no types
    """Hands the images over in batches; all activations of a batch are in memory at once."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        size = batch_size(images.shape[1:], CALIBRATION_VALUES)
        self._batches = iter([images[i : i + size] for i in range(0, len(images), size)])
        self._bar = bar(len(images), "activation ranges", "img", shown=len(images) > size)
        self._given = 0

    def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
        """The next feed, or None."""
        self._bar.update(self._given - self._bar.n)  # what was given before has been run
        batch = next(self._batches, None)
        if batch is None:
            self._bar.close()
            return None
        self._given += len(batch)
        return {"pixels": batch}


def _float_nodes(graph: onnx.GraphProto) -> list[str]:
    """What stays float: all nodes before the first with weights, and those of `FLOAT`."""
    weighted: set[str] = set()  # names of tensors that depend on a weighted node
    names = []
    for node in graph.node:
        if node.op_type in WEIGHTED or weighted & set(node.input):
            weighted.update(node.output)
            if node.op_type not in FLOAT:
                continue
        names.append(node.name)
    return names


def _with_float_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the rounding of the logits: 256 steps would show in every answer."""
    graph = model.graph
    makers = {output: n for n in graph.node for output in n.output}
    softmax = makers[graph.output[0].name]
    widen = makers.get(softmax.input[0])
    narrow = makers.get(widen.input[0]) if widen is not None else None
    if widen is None or narrow is None or narrow.op_type != "QuantizeLinear":
        return model
    softmax.input[0] = narrow.input[0]
    graph.node.remove(widen)
    graph.node.remove(narrow)
    used = {name for n in graph.node for name in n.input}
    for tensor in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(tensor)
    return model


def _pairs(probs: dict[EngineName, Probs]) -> list[tuple[Probs, Probs]]:
    return list(itertools.combinations_with_replacement(probs.values(), 2))
