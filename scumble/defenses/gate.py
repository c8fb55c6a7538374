"""Thresholds below which an image is foreign, or the network unsure of it, by the loss allowed.

`scumble calibrate` fits them to images of the owner's; a bundle has them in
`gate.<precision>.json`. All scores here are larger for own images.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scumble.defenses.base import DefenseError, Nodes
from scumble.defenses.evidence import Column, Evidence, Score
from scumble.defenses.scores import AXIS, Whitener, energy_nodes

Measure = Literal["top", "energy", "residual", "vim"]
MEASURES: tuple[Measure, ...] = ("top", "energy", "residual", "vim")
NEEDS: dict[Measure, frozenset[Score]] = {
    "top": frozenset(),
    "energy": frozenset({"energy"}),
    "residual": frozenset({"residual"}),
    "vim": frozenset({"energy", "residual"}),
}


@dataclass(frozen=True, eq=False)
class Gate:
    """What `scumble calibrate` found for one precision of a bundle.

    Attributes:
        losses: ascending shares of own images.
        thresholds: for a measure, or two joined by "+", one row of thresholds each: at `losses[i]`
            that share of own images is below `thresholds[...][j][i]` for some j.
        weight: a of the measure vim = energy - a residual.
        whitener: of the residual; None where the network has no features.
        shares: {form: {cells: (rows, cells)}}, how often own images fall into a codebook's cells.
    """

    losses: npt.NDArray[np.float64]
    thresholds: Mapping[str, npt.NDArray[np.float64]]
    weight: float = 0.0
    whitener: Whitener | None = None
    shares: Mapping[str, Mapping[str, npt.NDArray[np.float64]]] | None = None

    @property
    def best(self) -> Measure:
        """The measure that uses all that the network has."""
        return "vim" if self.whitener is not None else "energy"

    def at(self, measures: tuple[Measure, ...], loss: float) -> tuple[float, ...]:
        """The threshold of each of the measures that together lose a share `loss` of own images.

        Raises:
            DefenseError: there are none for these measures or for this loss.
        """
        found = self.thresholds.get("+".join(measures))
        if found is None:
            raise DefenseError(
                f"the bundle has no thresholds for {' and '.join(measures)}; there: "
                f"{', '.join(self.thresholds) or 'none'}"
            )
        if loss == 0:
            return (-np.inf,) * len(measures)
        if not self.losses[0] <= loss <= self.losses[-1]:
            raise DefenseError(
                f"loss is {loss:g}; allowed by the bundle: 0, or {self.losses[0]:g} to "
                f"{self.losses[-1]:g}"
            )
        return tuple(float(np.interp(loss, self.losses, row)) for row in found)

    def measure(self, name: Measure, evidence: Evidence) -> Column:
        """A measure of images (N,).

        Raises:
            ValueError: the evidence lacks a score.
        """
        missing = [score for score in sorted(NEEDS[name]) if getattr(evidence, score) is None]
        if missing:
            raise ValueError(f"{name} needs the score {missing[0]}, which the evidence lacks")
        match name:
            case "top":
                return evidence.top
            case "energy":
                return np.asarray(evidence.energy)
            case "residual":
                return -np.asarray(evidence.residual)
        return np.asarray(evidence.energy) - np.asarray(evidence.residual) * np.float32(self.weight)

    def nodes(self, op: Nodes, name: Measure) -> str | None:
        """The same as nodes (N, 1); None where the network lacks a score."""
        if name == "top":
            return op("ReduceMax", op.clean, AXIS, keepdims=1)
        if op.logits is None or (name != "energy" and op.features is None):
            return None
        if name == "energy":
            return energy_nodes(op, op.logits)
        assert self.whitener is not None  # noqa: S101  # it has thresholds for this measure
        residual = self.whitener.nodes(op, str(op.features))
        if name == "residual":
            return op("Neg", residual)
        return op("Sub", energy_nodes(op, op.logits), op("Mul", residual, self.weight))


def read_gate(document: Mapping[str, Any]) -> Gate:
    """The gate of a parsed `gate.<precision>.json`.

    Raises:
        DefenseError: it is malformed.
    """
    try:
        losses = np.asarray(document["losses"], np.float64)
        thresholds = {
            name: np.asarray(rows, np.float64).reshape(-1, len(losses))
            for name, rows in document["thresholds"].items()
        }
        found = document["whitener"]
        whitener = None
        if found is not None:
            mean, matrix = (np.frombuffer(b64decode(found[k]), "<f4") for k in ("mean", "matrix"))
            whitener = Whitener(mean.astype(np.float32), matrix.reshape(-1, len(mean)).copy())
        shares = {
            form: {cells: np.asarray(rows, np.float64) for cells, rows in sizes.items()}
            for form, sizes in document["shares"].items()
        }
        gate = Gate(losses, thresholds, float(document["weight"]), whitener, shares)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DefenseError(f"the thresholds are malformed: {error!r}") from error
    if not len(losses) or (np.diff(losses) <= 0).any():
        raise DefenseError("the thresholds are malformed: losses must ascend")
    return gate
