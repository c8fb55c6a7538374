"""The victims' networks: (N, C, H, W) float32 in [0, 1] -> logits (N, K).

All but `resnet18` are sized for bundles under 10 MB and for two cores. `Normalize` is the first
layer of each, so that a network carries its own preprocessing into the exported graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel; both are buffers and end up as constants of the graph."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv(cin: int, cout: int, *, stride: int = 1, pool: bool = False) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU, and a 2x2 max-pool where asked."""
    layers: list[nn.Module] = [
        nn.Conv2d(cin, cout, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class Basic(nn.Module):
    """The block of ResNet-18: ReLU(shortcut(x) + f(x))."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(cin, cout, stride=stride),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or cin != cout:
            self.shortcut = nn.Sequential(
                nn.Conv2d(cin, cout, 1, stride=stride, bias=False), nn.BatchNorm2d(cout)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.layers(x))


def small_cnn(channels: int, classes: int) -> nn.Sequential:
    """Four convolutions, 71 k parameters: the `mnist` victim, and all auxiliary models."""
    return nn.Sequential(
        conv(channels, 16),
        conv(16, 32, pool=True),
        conv(32, 64, pool=True),
        conv(64, 80),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(80, classes),
    )


def resnet9(channels: int, classes: int, width: int = 32) -> nn.Sequential:
    """Eight convolutions, two residual blocks, a linear head; `width` to 8 `width` channels."""
    w = width
    return nn.Sequential(
        conv(channels, w),
        conv(w, 2 * w, pool=True),
        Residual(conv(2 * w, 2 * w), conv(2 * w, 2 * w)),
        conv(2 * w, 4 * w, pool=True),
        conv(4 * w, 8 * w, pool=True),
        Residual(conv(8 * w, 8 * w), conv(8 * w, 8 * w)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * w, classes),
    )


def resnet18(channels: int, classes: int, width: int = 64) -> nn.Sequential:
    """ResNet-18 (He et al., arXiv 1512.03385) for small images: its stem is one convolution.

    With 64 channels in the first stage it has 11.2 million parameters.
    """
    layers: list[nn.Module] = [conv(channels, width)]
    cin = width
    for cout, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Basic(cin, cout, stride), Basic(cout, cout, 1)]
        cin = cout
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes)
    )


# name -> (channels, classes) -> network without its Normalize layer
NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": small_cnn,
    "resnet9": resnet9,
    "resnet9_half": partial(resnet9, width=16),
    "resnet18": resnet18,
}
