"""Generators of the data-free attacks: noise (N, nz) -> pre-images x̂ (N, C, H, W).

The image that is sent is (tanh(x̂) + 1) / 2; the attacks take their differences before the tanh.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scumble.training.autocast import autocast


class Generator(nn.Module):
    """Linear, then two times upsampling and convolution.

    The shape is that of DFME's generator (Truong et al., "Data-Free Model Extraction", CVPR 2021,
    appendix): 2 `width` channels at a quarter of the side, `width` channels at the whole side,
    batch norm after each layer; `affine` in the last one is MAZE's difference.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, nz: int = 256, width: int = 64, affine: bool = False
    ) -> None:
        super().__init__()
        channels, height, width_px = shape
        self.size = (height, width_px)
        self.start = (2 * width, -(-height // 4), -(-width_px // 4))
        self.linear = nn.Linear(nz, self.start[0] * self.start[1] * self.start[2])
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels, affine=affine),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """x̂ (N, C, H, W) of noise (N, nz)."""
        noise = noise.to(self.linear.weight.device)
        with autocast(noise.device.type):
            maps = self.linear(noise).view(-1, *self.start)
            out: Tensor = self.layers(maps.contiguous(memory_format=torch.channels_last))
        # Sides that are not multiples of four lose the border.
        return out[..., : self.size[0], : self.size[1]].float()


def images(x: Tensor) -> Tensor:
    """(tanh(x̂) + 1) / 2: what is sent."""
    return (torch.tanh(x) + 1) / 2


def noise(n: int, nz: int, rng: torch.Generator) -> Tensor:
    """Standard normal (n, nz)."""
    return torch.randn(n, nz, generator=rng)
