"""Quantization-aware training of a QDQ graph itself: any bundle, no second network definition.

The post-training graph is run by the torch engine's interpreter with three changes: weights and
biases are the float ones, QuantizeLinear hands its input on, and DequantizeLinear rounds to the
int8 grid and back with straight-through gradients. Scales of activations are trained (Esser et
al., Learned Step Size Quantization, arXiv 1902.08153); those of weights follow the largest weight.
Afterwards the integers and scales are written into the same graph.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from app.inference.engines.torch import OPS, Interpreter, along
from app.inference.graph import parse, tensor_input
from scumble.data.image_sets import Dataset
from scumble.progress import bar
from scumble.training.autocast import autocast
from scumble.training.bundle_export import LOGITS
from scumble.training.train import AUGMENTS, as_tensors, batches, follow

SUFFIX = "_quantized"  # how ONNX Runtime names the integers of an initializer


@dataclass(frozen=True)
class Tuning:
    """How a quantized graph is trained on.

    Attributes:
        epochs: passes over the training images.
        lr: Adam's peak learning rate of weights and biases; falls to zero on a cosine.
        scale_lr: the same of the logarithms of the activation scales.
        augment: key of `AUGMENTS`.
        temperature: of the distillation from the float network.
        labels: weight of the cross-entropy with the labels; the distillation has the rest.
        batch: images per step.
        ema: decay per step of the averaged copy of weights and scales, which is what is kept.
        seed: of order and augmentation.
    """

    epochs: int = 3
    lr: float = 1e-4
    scale_lr: float = 1e-3
    augment: str = "none"
    temperature: float = 2.0
    labels: float = 0.3
    batch: int = 128
    ema: float = 0.99
    seed: int = 0


class Student(nn.Module):
    """A QDQ graph with float weights behind fake quantization: `tensor` -> logits.

    Args:
        quantized: ONNX file in QDQ form.
        original: the float file it was made from; gives the weights before rounding.

    Attributes:
        values: float weights and biases, by the name of their integers.
        scales: logarithms of the activation scales, by the scale's name.
    """

    def __init__(self, quantized: bytes, original: bytes) -> None:
        super().__init__()
        ops = {**OPS, "QuantizeLinear": lambda x, *_, **__: x, "DequantizeLinear": _fake}
        self.model = parse(quantized)
        self.net = Interpreter(parse(tensor_input(quantized)), ops)
        self.pairs = [n for n in self.model.graph.node if n.op_type == "DequantizeLinear"]
        floats = {i.name: numpy_helper.to_array(i) for i in parse(original).graph.initializer}
        self.values = nn.ParameterDict()
        self.scales = nn.ParameterDict()
        for node in self.pairs:
            source, scale = node.input[:2]
            if source in self.net.constants:
                exact = floats.get(source.removesuffix(SUFFIX))
                self.values[_key(source)] = nn.Parameter(
                    self._restored(node) if exact is None else torch.from_numpy(exact.copy())
                )
            elif _key(scale) not in self.scales:
                self.scales[_key(scale)] = nn.Parameter(self.net.constants[scale].log())

    def _restored(self, node: onnx.NodeProto) -> Tensor:
        """Integers times their scale, for what ONNX Runtime has renamed while it optimized."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        constants = (self.net.constants[name] for name in node.input)
        return OPS["DequantizeLinear"](*constants, axis=axis)

    def forward(self, tensor: Tensor) -> Tensor:
        for name in self.net.constants:
            if _key(name) in self.values:
                self.net.constants[name] = self.values[_key(name)]
            elif _key(name) in self.scales:
                self.net.constants[name] = self.scales[_key(name)].exp()
        return self.net(tensor, LOGITS)

    @torch.no_grad()
    def to_bytes(self) -> bytes:
        """The QDQ file with the present weights and scales."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        stored = {i.name: i for i in model.graph.initializer}
        scales = {
            n.input[1]: self.scales[k].exp()
            for n in self.pairs
            if (k := _key(n.input[1])) in self.scales
        }
        for node in self.pairs:
            source, scale = node.input[:2]
            if source in stored and stored[source].data_type == onnx.TensorProto.INT8:
                weight = self.values[_key(source)]
                axis = _axis(node, stored[scale])
                scales[scale] = _weight_scale(weight, axis)
                levels = weight / along(scales[scale], weight, axis or 0)
                _store(stored[source], levels.round().clamp(-127, 127).to(torch.int8))
        # A bias has the grid of the products that it is added to.
        makers = {n.output[0]: n for n in self.pairs}
        for node in model.graph.node:
            if len(node.input) == 3 and all(name in makers for name in node.input):
                x, w, b = (makers[name].input for name in node.input)
                scales[b[1]] = (scales[x[1]] * scales[w[1]]).reshape(-1)
                levels = (self.values[_key(b[0])] / scales[b[1]]).round()
                _store(stored[b[0]], levels.to(torch.int32))
        for name, value in scales.items():
            _store(stored[name], value.reshape(list(stored[name].dims)))
        return model.SerializeToString()


def tune(
    quantized: bytes,
    original: bytes,
    data: Dataset,
    tuning: Tuning,
    score: Callable[[bytes], tuple[float, float]],
    *,
    progress: bool = True,
) -> bytes:
    """Train a QDQ file on `data`, the float file being its teacher.

    The teacher sees each image under two augmentations and answers with the mean of both, which is
    right more often than a single answer: that is what there is to gain over the float network.

    Args:
        quantized: the post-training QDQ file.
        original: the float file that it was made from.
        data: training images.
        tuning: how.
        score: of a QDQ file on other images, larger is better; the best epoch is kept, and the
            untrained start where no epoch is better.
        progress: show a bar.
    """
    rng = torch.Generator().manual_seed(tuning.seed)
    images, labels = as_tensors(data)
    student = Student(quantized, original)
    average = copy.deepcopy(student).requires_grad_(False)
    teacher = Interpreter(parse(tensor_input(original)))
    optimizer = torch.optim.Adam(
        [
            {"params": list(student.values.parameters()), "lr": tuning.lr},
            {"params": list(student.scales.parameters()), "lr": tuning.scale_lr},
        ]
    )
    per_epoch = math.ceil(len(data) / tuning.batch)
    steps = tuning.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    augment, t = AUGMENTS[tuning.augment], tuning.temperature
    shown = bar(steps, f"tune {data.name}", "step", shown=progress)
    # The start is a candidate like every epoch: where nothing is to be gained, nothing is lost.
    kept = [(score(quantized), quantized)]
    for step, rows in enumerate(batches(len(data), tuning.batch, tuning.epochs, rng)):
        x, other = (
            augment(images[rows], rng).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        # Rounding to bf16 is far below the noise of the int8 grid that is being trained for.
        with autocast("cpu"):
            with torch.no_grad():
                both = teacher(x, LOGITS).float() + teacher(other, LOGITS).float()
                soft = (both / (2 * t)).softmax(1)
            logits = student(x).float()
        hard = F.cross_entropy(logits, labels[rows])
        distance = F.kl_div((logits / t).log_softmax(1), soft, reduction="batchmean") * t * t
        loss = tuning.labels * hard + (1 - tuning.labels) * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        follow(average, student, min(tuning.ema, (1 + step) / (10 + step)))
        shown.update()
        shown.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % per_epoch == 0:
            file = average.to_bytes()
            kept.append((score(file), file))
    shown.close()
    return max(kept, key=lambda k: k[0])[1]


def _fake(x: Tensor, scale: Tensor, zero: Tensor, *, axis: int = 1) -> Tensor:
    """What DequantizeLinear(QuantizeLinear(x)) gives, with gradients."""
    if zero.dtype is torch.int32:
        return x  # a bias: its grid is too fine to matter
    if zero.dtype is torch.int8:
        if scale.numel() == 1:
            one = _weight_scale(x.detach(), None)
            return torch.fake_quantize_per_tensor_affine(x, one, zero.int().view(()), -127, 127)
        each = _weight_scale(x.detach(), axis)
        return torch.fake_quantize_per_channel_affine(x, each, zero.int(), axis, -127, 127)
    rounded: Tensor = _Learned.apply(x.float(), scale, int(zero))
    return rounded


class _Learned(torch.autograd.Function):
    """Rounding to uint8 and back with a trained scale, from one of torch's own operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: int) -> Tensor:
        y, inside = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(
            x, float(scale), zero, 0, 255
        )
        ctx.save_for_backward(x, y, inside, scale)
        rounded: Tensor = y
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y, inside, scale = ctx.saved_tensors
        passed = gradient * inside
        # dy/ds is round(x/s) - x/s inside the range and the range's end, less zero, outside.
        total = ((gradient * y).sum() - (passed * x).sum()) / scale
        # LSQ's factor: brings a sum over all elements near the gradient of one weight.
        return passed, (total / math.sqrt(x.numel() * 255)).view_as(scale), None


def _weight_scale(weight: Tensor, axis: int | None) -> Tensor:
    """Symmetric scale by which the largest weight, of each slice of `axis` or of all, is 127."""
    others = [d for d in range(weight.ndim) if d != axis]
    return (weight.abs().amax(others) / 127).clamp_min(1e-12)


def _axis(node: onnx.NodeProto, scale: onnx.TensorProto) -> int | None:
    """The axis that has a scale per slice; None where one scale serves all."""
    if math.prod(scale.dims) == 1:
        return None
    return next((a.i for a in node.attribute if a.name == "axis"), 1)


def _store(tensor: onnx.TensorProto, value: Tensor) -> None:
    tensor.CopyFrom(numpy_helper.from_array(value.contiguous().numpy(), tensor.name))


def _key(name: str) -> str:
    """A name as torch's dictionaries of parameters accept it."""
    return name.replace(".", "/")
