"""Quantization-aware training of a QDQ graph itself: any bundle, no second network definition.

The post-training graph is run by the torch engine's interpreter with three changes: weights and
biases are the float ones, QuantizeLinear hands its input on, and DequantizeLinear rounds to the
int8 grid and back with straight-through gradients. Scales of activations are trained (Esser et
al., Learned Step Size Quantization, arXiv 1902.08153); those of weights follow the largest weight.
Afterwards the integers and scales are written into the same graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from tqdm import tqdm

from app.engines.torch import OPS, Interpreter
from app.graph import parse, tensor_input
from scumble.data import Dataset
from training.train import AUGMENTS, as_tensors, batches

LOGITS = "logits"
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
        seed: of order and augmentation.
    """

    epochs: int = 3
    lr: float = 2e-5
    scale_lr: float = 1e-3
    augment: str = "none"
    temperature: float = 2.0
    labels: float = 0.3
    batch: int = 128
    seed: int = 0


class Student(nn.Module):
    """A QDQ graph with float weights behind fake quantization: `tensor` -> logits.

    Args:
        quantized: ONNX file in QDQ form.
        original: the float file it was made from; gives the weights before rounding.
    """

    def __init__(self, quantized: bytes, original: bytes) -> None:
        super().__init__()
        ops = {**OPS, "QuantizeLinear": lambda x, *_, **__: x, "DequantizeLinear": _fake}
        self.model = parse(quantized)
        self.net = Interpreter(parse(tensor_input(quantized)), ops)
        floats = {i.name: numpy_helper.to_array(i) for i in parse(original).graph.initializer}
        self.pairs = [n for n in self.model.graph.node if n.op_type == "DequantizeLinear"]
        self.values = nn.ParameterDict()  # float weights and biases, by the name of their integers
        self.scales = nn.ParameterDict()  # logarithms of activation scales, by the scale's name
        for node in self.pairs:
            integers, scale = node.input[:2]
            if integers in self.net.constants:
                start = torch.from_numpy(floats[integers.removesuffix(SUFFIX)].copy())
                self.values[_key(integers)] = nn.Parameter(start)
            elif _key(scale) not in self.scales:
                self.scales[_key(scale)] = nn.Parameter(self.net.constants[scale].log())

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
        scales: dict[str, Tensor] = {
            node.input[1]: self.scales[_key(node.input[1])].exp()
            for node in self.pairs
            if _key(node.input[1]) in self.scales
        }
        for node in self.pairs:  # weights first: scales of biases follow from theirs
            kind = _kind(stored, node)
            if kind is torch.int8:
                weight = self.values[_key(node.input[0])]
                scale = _weight_scale(weight, _axis(node), stored[node.input[1]].dims)
                levels = (weight / _along(scale, weight, _axis(node))).round().clamp(-127, 127)
                scales[node.input[1]] = scale
                _store(stored[node.input[0]], levels.to(torch.int8))
        made_by = {output: n for n in model.graph.node for output in n.output}
        for node in model.graph.node:
            if len(node.input) < 3 or node.op_type not in ("Conv", "Gemm"):
                continue
            x, w, b = (made_by.get(name) for name in node.input)
            if x is None or w is None or b is None or b.op_type != "DequantizeLinear":
                continue
            scale = (scales[x.input[1]] * scales[w.input[1]]).reshape(-1)
            bias = (self.values[_key(b.input[0])] / scale).round()
            scales[b.input[1]] = scale.reshape(list(stored[b.input[1]].dims))
            _store(stored[b.input[0]], bias.to(torch.int32))
        for name, scale in scales.items():
            _store(stored[name], scale)
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

    Args:
        quantized: the post-training QDQ file.
        original: the float file that it was made from.
        data: training images.
        tuning: how.
        score: of a QDQ file on other images, larger is better; the best epoch is kept.
        progress: show a bar.
    """
    rng = torch.Generator().manual_seed(tuning.seed)
    images, labels = as_tensors(data)
    student = Student(quantized, original)
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
    bar = tqdm(total=steps, desc=f"tune {data.name}", unit="step", disable=not progress)
    kept: list[tuple[tuple[float, float], bytes]] = []
    for step, rows in enumerate(batches(len(data), tuning.batch, tuning.epochs, rng)):
        x = augment(images[rows], rng).contiguous(memory_format=torch.channels_last)
        # Rounding to bf16 is far below the noise of the int8 grid that is being trained for.
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                soft = (teacher(x, LOGITS).float() / t).softmax(1)
            logits = student(x).float()
        hard = F.cross_entropy(logits, labels[rows])
        distance = F.kl_div((logits / t).log_softmax(1), soft, reduction="batchmean") * t * t
        loss = tuning.labels * hard + (1 - tuning.labels) * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % per_epoch == 0:
            file = student.to_bytes()
            kept.append((score(file), file))
    bar.close()
    return max(kept, key=lambda k: k[0])[1]


def _fake(x: Tensor, scale: Tensor, zero: Tensor, *, axis: int = 1) -> Tensor:
    """What DequantizeLinear(QuantizeLinear(x)) gives, with gradients."""
    if zero.dtype is torch.int32:
        return x  # a bias: its grid is too fine to matter
    if zero.dtype is torch.int8:
        scale = _weight_scale(x.detach(), axis, scale.shape)
        if scale.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(
                x, float(scale), int(zero.reshape(-1)[0]), -127, 127
            )
        return torch.fake_quantize_per_channel_affine(x, scale, zero.int(), axis, -127, 127)
    factor = 1 / math.sqrt(x.numel() * 255)
    return torch._fake_quantize_learnable_per_tensor_affine(
        x.float(), scale.reshape(1), zero.float().reshape(1), 0, 255, factor
    )


def _weight_scale(weight: Tensor, axis: int, shape: object) -> Tensor:
    """Symmetric scale: the largest weight, of each slice of `axis` or of all, becomes 127."""
    per_channel = len(list(shape)) == 1 and list(shape)[0] > 1  # type: ignore[call-overload]
    dims = [d for d in range(weight.ndim) if not (per_channel and d == axis % weight.ndim)]
    return (weight.abs().amax(dims) / 127).clamp_min(1e-12)


def _along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    shape = [1] * x.ndim
    if scale.numel() > 1:
        shape[axis % x.ndim] = -1
    return scale.view(shape)


def _axis(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), 1)


def _key(name: str) -> str:
    """A name as torch's dictionaries of parameters accept it."""
    return name.replace(".", "/")
