"""Codebook: one of a few fixed rows, chosen by the predicted class and its probability's cell.

Sources: the quantizer of Tang et al., "ModelGuard: Information-Theoretic Defense Against Model
Extraction Attacks" (USENIX Security 2024), here with frozen rows; Lloyd, "Least Squares
Quantization in PCM" (1982), for the cells. `scumble/training/codebook.py` fits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from scumble.defenses.base import Defense, DefenseError, Inputs, Nodes, Probs

Float32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]
Form = Literal["auto", "classwise", "pooled", "calibrated"]
FORMS: tuple[Form, ...] = ("auto", "classwise", "pooled", "calibrated")
MOST_CELLS = 16
NORMALISED = 1e-5  # how far the sum of a stored row may be from 1


@dataclass(frozen=True, eq=False)
class Cells:
    """The rows of one form and number of cells m.

    Attributes:
        borders: ascending, (K, m - 1) for cells of each class, (1, m - 1) for cells of all classes.
            The cell is the number of borders below the probability of the predicted class.
        rows: (K, m, K), the rows to send out; or (1, m, 1), the probability of the predicted
            class, of which the other classes share the rest evenly.

    Raises:
        DefenseError: the shapes do not match, borders are not ascending, or rows are not
            probabilities that are largest for their own class.
    """

    borders: Float32
    rows: Float32

    def __post_init__(self) -> None:
        classes, cells, width = self.rows.shape if self.rows.ndim == 3 else (0, 0, 0)
        if not cells or width != classes or self.borders.shape != (classes, cells - 1):
            raise DefenseError(
                f"the codebook has borders {self.borders.shape} for rows {self.rows.shape}; "
                "allowed: (K, m - 1) for (K, m, K), or (1, m - 1) for (1, m, 1)"
            )
        sound = bool(np.isfinite(self.rows).all() and ((self.rows >= 0) & (self.rows <= 1)).all())
        if sound and classes > 1:
            own = self.rows[np.arange(classes), :, np.arange(classes)]
            others = self.rows.copy()
            others[np.arange(classes), :, np.arange(classes)] = -1
            off = float(np.abs(self.rows.sum(axis=2, dtype=np.float64) - 1).max())
            sound = sound and off <= NORMALISED and bool((own > others.max(axis=2)).all())
        if not (sound and (np.diff(self.borders, axis=1) >= 0).all()):
            raise DefenseError(
                "the codebook is malformed; allowed: ascending borders, and rows of probabilities "
                "that are largest for their own class"
            )

    @property
    def classwise(self) -> bool:
        """Whether each class has its own cells and rows."""
        return len(self.rows) > 1


@dataclass(frozen=True, kw_only=True)
class Codebook(Defense):
    """y = row(c, j), c the arg-max of p (the first maximum), j the number of borders below p_c.

    The answer reveals c and j, and nothing else about p: at most log2(K m) bits.

    Attributes:
        cells: m, 1 to 16; a bundle has rows for some of these numbers.
        form: "classwise": the mean rows of each class's cells. "pooled": cells of all classes
            together, with the mean probability of the predicted class and the rest spread evenly.
            "calibrated": the same, with the share of correct answers in the cell as that
            probability. "auto": classwise if the bundle has it, else pooled.
        stored: the rows, from the bundle.
    """

    cells: int = 4
    form: Form = "auto"
    stored: Cells | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_integer("cells", 1, MOST_CELLS)
        self._check_choice("form", *FORMS)

    @classmethod
    def build(cls, bundle: Any, **params: Any) -> Self:
        """Make the defense with the codebook of `bundle`.

        Args:
            bundle: an `app.inference.defense_artifacts.DefenseArtifacts`.
            params: of the defense.

        Raises:
            DefenseError: a parameter is not allowed, or the bundle lacks the rows.
        """
        defense = cls(**params)
        if not hasattr(bundle, "codebook"):
            raise DefenseError(
                "Codebook needs the codebook of a bundle; pass "
                f"bundle=app.inference.defense_artifacts.DefenseArtifacts(bundle), got {bundle!r}"
            )
        try:
            codebook = bundle.codebook()
            form = defense.form
            if form == "auto":
                own = str(defense.cells) in codebook.get("classwise", {})
                form = "classwise" if own else "pooled"
            stored = find(codebook, form, defense.cells)
        except DefenseError as error:
            raise DefenseError(f"Codebook: {error}") from error
        return replace(defense, form=form, stored=stored)

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """Stored rows (N, K).

        Raises:
            ValueError: the rows have another number of classes than the codebook.
        """
        del inputs
        _, cell = self.place(probs)
        return self.rows(probs.argmax(axis=1), cell, probs)

    def place(self, probs: Probs) -> tuple[Indices, Indices]:
        """Which borders hold for each row (its class's own, or 0 for those of all), and its cell.

        Raises:
            ValueError: as for `__call__`.
        """
        stored = self._stored()
        n, classes = probs.shape
        if stored.classwise and classes != len(stored.rows):
            raise ValueError(f"Codebook has {len(stored.rows)} classes; the rows have {classes}")
        # In float32, as in the graph, so that both compare the same value with the borders.
        sure = probs.max(axis=1).astype(np.float32) if classes else np.empty(n, np.float32)
        own = probs.argmax(axis=1) if stored.classwise else np.zeros(n, np.intp)
        return own, (sure[:, None] > stored.borders[own]).sum(axis=1)

    def rows(self, top: Indices, cell: Indices, like: Probs) -> Probs:
        """The stored rows of predicted classes and cells (N,), of the shape and type of others."""
        stored = self._stored()
        n, classes = like.shape
        if stored.classwise:
            found: Probs = stored.rows[top, cell].astype(like.dtype)
            return found
        tall = stored.rows[0, cell].astype(like.dtype)
        y = np.repeat((1 - tall) / max(classes - 1, 1), classes, axis=1)
        y[np.arange(n), top] = tall[:, 0] if classes > 1 else 1
        return y

    def nodes(self, op: Nodes, probs: str) -> str:
        """The same by ArgMax, comparisons and Gather."""
        stored = self._stored()
        cells = stored.rows.shape[1]
        top = op("ArgMax", probs, axis=1, keepdims=1)
        sure = op("ReduceMax", probs, np.array([1]), keepdims=1)
        if stored.classwise:
            borders = op("Gather", stored.borders, op("Squeeze", top, np.array([1])), axis=0)
        else:
            borders = op("Identity", stored.borders)
        if cells > 1:
            above = op("Cast", op("Greater", sure, borders), to=7)
            cell = op("ReduceSum", above, np.array([1]), keepdims=1)
        else:
            cell = op("Sub", top, top)
        if stored.classwise:
            at = op("Add", op("Mul", top, np.array(cells)), cell)
            rows = stored.rows.reshape(-1, op.classes)
            return op("Gather", rows, op("Squeeze", at, np.array([1])), axis=0)
        tall = op("Gather", stored.rows.reshape(-1), cell, axis=0)
        if op.classes == 1:
            return op("Div", tall, tall)
        rest = op("Div", op("Sub", 1.0, tall), float(op.classes - 1))
        return op("Where", op("Equal", top, np.arange(op.classes)), tall, rest)

    def _stored(self) -> Cells:
        if self.stored is None:
            raise DefenseError("Codebook has no rows; make it with a bundle")
        return self.stored


def find(codebook: Mapping[str, Mapping[str, Any]], form: Form, cells: int) -> Cells:
    """The rows of one form and number of cells in a codebook document.

    Args:
        codebook: {form: {m: {"borders": ..., "rows": ...}}}.
        form: "classwise", "pooled" or "calibrated".
        cells: m.

    Raises:
        DefenseError: it lacks them; the message lists those that it has.
    """
    found = codebook.get(form, {}).get(str(cells))
    if found is None:
        there = "; ".join(f"{name}: {', '.join(sizes)}" for name, sizes in codebook.items())
        raise DefenseError(
            f"the bundle has no {form} codebook with {cells} cells; available: {there or 'none'}"
        )
    try:
        borders, rows = (np.asarray(found[name], np.float32) for name in ("borders", "rows"))
    except (KeyError, TypeError, ValueError) as error:
        raise DefenseError(f"the {form} codebook with {cells} cells is malformed") from error
    return Cells(borders.reshape(len(rows), -1), rows)
