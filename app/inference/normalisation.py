"""What networks take in place of pixels: (pixels / 255 - mean) / std, and the usual presets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Normalisation:
    """What a network takes: (pixels / 255 - mean) / std, in the order of its channels.

    Attributes:
        mean: of pixels in 0..1, per channel as the network has them, or one for all.
        std: the same way.
        bgr: blue comes first.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    bgr: bool = False


PRESETS = {
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tf": Normalisation((0.5,), (0.5,)),
    "0..1": Normalisation(),
    "0..255": Normalisation((0.0,), (1 / 255,)),
    "caffe": Normalisation((103.939 / 255, 116.779 / 255, 123.68 / 255), (1 / 255,), bgr=True),
}
