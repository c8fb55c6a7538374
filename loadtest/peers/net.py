"""The `cifar10` victim as a plain torch module, for peers that do not know this project.

A ResNet-9 whose batch norms are folded into its convolutions, as they are in the ONNX file; the
names of its parameters follow from its layers and match those in the file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels."""
        return (x - self.mean) / self.std


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        out: Tensor = x + self.layers(x)
        return out


def conv(cin: int, cout: int, *, pool: bool = False) -> nn.Sequential:
    """3x3 convolution, ReLU, and a 2x2 max-pool where asked."""
    layers = [nn.Conv2d(cin, cout, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def victim() -> nn.Sequential:
    """The network without its weights: (N, 3, 32, 32) float32 in [0, 1] -> logits (N, 10)."""
    layers = nn.Sequential(
        conv(3, 32),
        conv(32, 64, pool=True),
        Residual(conv(64, 64), conv(64, 64)),
        conv(64, 128, pool=True),
        conv(128, 256, pool=True),
        Residual(conv(256, 256), conv(256, 256)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    return nn.Sequential(Normalize(), layers)


def loaded(weights: Path) -> nn.Sequential:
    """The network with the weights in a file that `loadtest.peers.weights` wrote."""
    net = victim()
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()
