"""Checks that a network makes sense: errors are refused, doubtful outputs are reported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from scumble.training.errors import ExportError

ALIKE = 1e-3  # L1 distance of answers to different pictures, below which they are nearly constant
SUM_TOLERANCE = 1e-3


def check_weights(model: onnx.ModelProto) -> None:
    """Refuse weights that are not finite.

    Raises:
        ExportError: a weight is NaN or infinite.
    """
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ExportError(f"the weights {tensor.name!r} have values that are NaN or infinite")


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse a normalisation that does not fit pixels in [0, 1].

    Raises:
        ExportError: a mean outside of [-1, 1], or a standard deviation that is not positive.
    """
    if not all(-1 <= value <= 1 for value in mean):
        raise ExportError(
            f"mean is {_list(mean)}; allowed: -1 to 1, as pixels are between 0 and 1 here "
            "(0..255 divided by 255)"
        )
    if not all(0 < value < np.inf for value in std):
        raise ExportError(f"std is {_list(std)}; allowed: numbers above 0")


def check_logits(logits: npt.NDArray[np.floating]) -> list[str]:
    """Refuse outputs that are not useful logits.

    Args:
        logits: (N, K), of different images.

    Returns:
        Warnings about what is possible but rarely intended.

    Raises:
        ExportError: one class, values that are not finite, or probabilities.
    """
    if logits.shape[1] == 1:
        raise ExportError(
            "the network returns one value for an image, and the softmax of one value is always "
            "1.0; give two classes, or an ONNX file with a sigmoid to `scumble import`"
        )
    if not np.isfinite(logits).all():
        raise ExportError("the network answers made-up pictures with NaN or infinite values")
    if is_distribution(logits):
        raise ExportError(
            "the network ends in a softmax: its answers are probabilities, and a softmax of these "
            "is nearly flat; return what comes before it"
        )
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    rows = shifted / shifted.sum(1, keepdims=True)
    apart = float(np.abs(rows - rows[:1]).sum(1).max())
    if apart < ALIKE:
        return [
            f"answers to {len(rows)} made-up pictures differ by {apart:.1e} at most: are the "
            "normalisation and the weights the right ones?"
        ]
    return []


def is_distribution(rows: npt.NDArray[np.floating]) -> bool:
    """Whether all rows are probabilities of more than one class."""
    near = np.abs(rows.sum(1) - 1).max() < SUM_TOLERANCE
    return bool(rows.shape[1] > 1 and rows.min() >= 0 and near)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
