"""The attacker's own images, in the shape that the victim takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from scumble.attacker.transports import Images
from scumble.data.image_sets import Dataset
from scumble.png import to_image


@dataclass(frozen=True, repr=False)
class Pool:
    """Images to ask about.

    Attributes:
        name: of the data set.
        images: float32 (M, C, H, W) in [0, 1].
        labels: int64 (M,): the attacker's own classes, which need not be the victim's.
        classes: how many of them there are.
    """

    name: str
    images: Images
    labels: npt.NDArray[np.int64]
    classes: int

    def __repr__(self) -> str:
        return f"Pool({self.name!r}, images={self.images.shape}, classes={self.classes})"

    def __len__(self) -> int:
        return len(self.images)


def pool(data: Dataset, shape: tuple[int, int, int]) -> Pool:
    """A data set with its images scaled to (C, H, W), grey or in colour as the victim wants."""
    channels, height, width = shape
    images = data.images
    if images.shape[1:3] != (height, width):
        images = np.stack([_scaled(picture, width, height) for picture in images])
    if images.shape[3] != channels:
        # Rec. 601, as Pillow turns colour into grey.
        grey = (
            np.rint(images @ np.array([0.299, 0.587, 0.114])) if channels == 1 else images[..., 0]
        )
        images = np.repeat(grey.astype(np.uint8)[..., None], channels, axis=3)
    planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    floats: Images = planar.astype(np.float32) / np.float32(255)
    return Pool(data.name, floats, data.labels, len(data.classes))


def _scaled(picture: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    return np.asarray(to_image(picture).resize((width, height), Image.Resampling.BILINEAR)).reshape(
        height, width, -1
    )
