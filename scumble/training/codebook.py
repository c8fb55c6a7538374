"""Fit a codebook: cells of the predicted class's probability, and the row that each is served as.

Sources: Lloyd, "Least Squares Quantization in PCM" (IEEE Trans. Inf. Theory, 1982); Ayer et al.,
"An Empirical Distribution Function for Sampling with Incomplete Information" (1955), for the
pooling of adjacent violators. Shapes: `N` images, `K` classes, `m` cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from scumble.defenses.codebook import Cells

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
SIZES = (1, 2, 4, 8)
ROWS_A_CELL = 4  # a class with fewer rows per cell gets no cells
MOST_CLASSES = 200  # beyond that, K m K numbers are a large file, and no class has rows enough
LEAD = 1e-4  # of the predicted class over the others in a row
TRUST = 10  # rows that the network's own confidence counts as much as
ROUNDS = 100
DIGITS = 8  # of what is stored


def fit(probs: Array, labels: Labels, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """All forms and sizes with enough rows, as `scumble.defenses.codebook.find` reads them.

    Args:
        probs: clean rows (N, K) of images that the network was not trained on.
        labels: (N,) what they show.
        sizes: numbers of cells m.
    """
    probs = np.asarray(probs, np.float64)
    forms: dict[str, dict[str, Cells]] = {
        "classwise": {str(m): cells for m in sizes if (cells := classwise(probs, m)) is not None},
        "pooled": {str(m): pooled(probs, m) for m in sizes},
        "calibrated": {str(m): calibrated(probs, labels, m) for m in sizes},
    }
    return {
        form: {m: _document(cells) for m, cells in found.items()}
        for form, found in forms.items()
        if found
    }


def classwise(probs: Array, cells: int) -> Cells | None:
    """Cells of each class, each served as the mean of its rows; None where rows are too few."""
    classes = probs.shape[1]
    top, sure = probs.argmax(axis=1), probs.max(axis=1)
    counts = np.bincount(top, minlength=classes)
    if classes > MOST_CLASSES or counts.min() < ROWS_A_CELL * cells:
        return None
    borders = np.empty((classes, cells - 1), np.float32)
    rows = np.empty((classes, cells, classes), np.float32)
    for c in range(classes):
        mine = top == c
        borders[c] = borders_of(sure[mine], cells)
        cell = _cell(sure[mine], borders[c])
        whole = probs[mine].mean(axis=0)
        for j in range(cells):
            inside = probs[mine][cell == j]
            rows[c, j] = ahead(inside.mean(axis=0) if len(inside) else whole, c)
    return Cells(borders, rows)


def pooled(probs: Array, cells: int) -> Cells:
    """Cells of all classes together, served as their mean probability of the predicted class."""
    sure = probs.max(axis=1)
    borders = borders_of(sure, cells)
    cell = _cell(sure, borders)
    means = [sure[cell == j].mean() if (cell == j).any() else sure.mean() for j in range(cells)]
    return _even(borders, np.array(means), probs.shape[1])


def calibrated(probs: Array, labels: Labels, cells: int) -> Cells:
    """The same cells, served as the share of right answers in them, which never falls with j."""
    sure = probs.max(axis=1)
    borders = borders_of(sure, cells)
    cell = _cell(sure, borders)
    right = probs.argmax(axis=1) == labels
    n = np.bincount(cell, minlength=cells).astype(np.float64)
    # Few rows say little: the network's own confidence counts as much as TRUST of them.
    said = np.bincount(cell, sure, minlength=cells) / np.maximum(n, 1)
    share = (np.bincount(cell, right, minlength=cells) + TRUST * said) / (n + TRUST)
    return _even(borders, rising(share, n), probs.shape[1])


def borders_of(values: Array, cells: int) -> npt.NDArray[np.float32]:
    """The m - 1 borders (ascending) between the centres that 1-D Lloyd finds.

    They are the midpoints of the centres' logits: most values lie close to 1, where the midpoints
    of probabilities would cut none of them off.
    """
    values = np.sort(np.clip(values, 1e-9, 1 - 1e-9))
    centres = np.quantile(values, (np.arange(cells) + 0.5) / cells)
    for _ in range(ROUNDS):
        cell = _cell(values, (centres[1:] + centres[:-1]) / 2)
        n = np.bincount(cell, minlength=cells)
        means = np.where(n > 0, np.bincount(cell, values, cells) / np.maximum(n, 1), centres)
        if np.allclose(means, centres, rtol=0, atol=1e-12):
            break
        centres = np.sort(means)
    logits = np.log(centres / (1 - centres))
    found: npt.NDArray[np.float32] = (1 / (1 + np.exp(-(logits[1:] + logits[:-1]) / 2))).astype(
        np.float32
    )
    return found


def ahead(row: Array, c: int) -> Array:
    """The row with class c ahead of the others by `LEAD` at least, summing to 1."""
    row = row.copy()
    others = np.delete(row, c)
    if len(others):
        row[c] = max(row[c], others.max() + LEAD)
    scaled: Array = row / row.sum()
    return scaled


def rising(share: Array, weights: Array) -> Array:
    """The nearest sequence that never falls, by pooling adjacent violators."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(share, np.maximum(weights, 1e-9), strict=True):
        blocks.append([float(value), float(weight), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight_, length = blocks.pop()
            before = blocks[-1]
            total = before[1] + weight_
            blocks[-1] = [
                (before[0] * before[1] + mean * weight_) / total, total, before[2] + length
            ]  # fmt: skip
    return np.repeat([block[0] for block in blocks], [int(block[2]) for block in blocks])


def _even(borders: npt.NDArray[np.float32], tops: Array, classes: int) -> Cells:
    least = min(1.0, 1 / classes + LEAD)
    rows = np.clip(tops, least, 1).astype(np.float32)
    return Cells(borders[None], rows[None, :, None])


def _cell(values: Array, borders: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = (values.astype(borders.dtype)[:, None] > borders[None]).sum(
        axis=1
    )
    return found


def _document(cells: Cells) -> dict[str, Any]:
    """As it is stored: numbers that are read back as the same float32."""
    return {
        "borders": [[float(f"{b:.9g}") for b in row] for row in cells.borders],
        "rows": np.char.mod(f"%.{DIGITS}g", cells.rows).astype(np.float64).tolist(),
    }
