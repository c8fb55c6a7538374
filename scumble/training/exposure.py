"""Outlier exposure: a network learns to be unsure of images that show none of its classes.

Source: Hendrycks, Mazeika, Dietterich, "Deep Anomaly Detection with Outlier Exposure" (ICLR 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Exposure:
    """Outliers for a training, as many in each step as own images.

    Attributes:
        images: uint8 (M, H, W, C), of the size and channels of the own images.
        weight: of their loss beside that of the own images.
        seed: of the draws.

    Raises:
        ValueError: no images, or a weight that is not above 0.
    """

    images: npt.NDArray[np.uint8]
    weight: float = 0.5
    seed: int = 0
    _planar: Tensor = field(init=False, repr=False)
    rng: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.images) or not self.weight > 0:
            raise ValueError(
                f"{len(self.images)} outliers of weight {self.weight}; allowed: at least one, of a "
                "weight above 0"
            )
        planar = torch.from_numpy(np.ascontiguousarray(self.images.transpose(0, 3, 1, 2)))
        object.__setattr__(self, "_planar", planar.float().div_(255))
        object.__setattr__(self, "rng", torch.Generator().manual_seed(self.seed))

    def draw(self, n: int) -> Tensor:
        """So many outliers, float32 (n, C, H, W) in [0, 1]."""
        return self._planar[torch.randint(len(self._planar), (n,), generator=self.rng)]

    def loss(self, logits: Tensor) -> Tensor:
        """The cross-entropy of the uniform distribution over classes, times the weight."""
        return self.weight * (logits.logsumexp(1) - logits.mean(1)).mean()
