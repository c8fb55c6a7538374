"""A bundle's gate, fitted to images of the owner's, and what it withholds of which images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.inference.engines import Probs
from app.inference.score_graph import with_head
from app.precision import Precision
from scumble.data.shifts import SHIFTS, shift
from scumble.defenses.codebook import Codebook, find
from scumble.defenses.evidence import Evidence
from scumble.defenses.gate import MEASURES, Gate, Measure
from scumble.defenses.scores import Whitener, energy
from scumble.training.gate import caught, fit_gate, fit_whitener
from scumble.training.measure import runner

Images = npt.NDArray[np.uint8]
REPORTED = (0.01, 0.02, 0.05)  # losses
LEAST = 1000  # own images for a whitener
MOST = 1000  # images of a set in the report
FITTED_SEED, REPORTED_SEED = 0, 1  # of the shifts


@dataclass(frozen=True)
class Ends:
    """What a network says of some images.

    Attributes:
        rows: (N, K) clean probabilities.
        logits: (N, K).
        features: (N, d); None where the network has none that are recognised.
    """

    rows: Probs
    logits: Probs
    features: Probs | None

    def every_other(self) -> Ends:
        """Those of the second image, the fourth, and so on."""
        features = None if self.features is None else self.features[1::2]
        return Ends(self.rows[1::2], self.logits[1::2], features)

    def evidence(self, whitener: Whitener | None) -> Evidence:
        """The scores of these images."""
        residual = None
        if whitener is not None and self.features is not None:
            residual = whitener.residual(self.features)
        return Evidence(self.rows.max(axis=1), energy(self.logits), residual)


Look = Callable[[Images], Ends]


def looker(model: bytes, precision: Precision, classes: int) -> Look:
    """What tells the ends of images.

    Raises:
        ConfigError: the network's rows are not a softmax.
    """
    run = runner(with_head(model), precision)

    def look(images: Images) -> Ends:
        columns = run(images)
        rows, logits, features = np.split(columns, [classes, 2 * classes], axis=1)
        return Ends(rows, logits, features if features.shape[1] else None)

    return look


def fitted_gate(look: Look, own: Images, seed: int = FITTED_SEED) -> Gate:
    """The gate of a network, from own images as they are and under each mild shift.

    A whitener is fitted to every other image, and the thresholds then to the rest: images that it
    was fitted to have small residuals. Fewer than `LEAST` images suffice for no whitener.
    """
    plain = look(own)
    whitener = None
    if plain.features is not None and len(own) >= LEAST:
        whitener = fit_whitener(plain.features[::2], plain.rows[::2].argmax(axis=1))
        plain, own = plain.every_other(), own[1::2]
    shifted = [look(shift(name, own, seed)).evidence(whitener) for name in SHIFTS]
    return fit_gate(plain.evidence(whitener), shifted, whitener, plain.logits)


def report(look: Look, gate: Gate, test: Images, foreign: Mapping[str, Images]) -> dict[str, Any]:
    """Shares withheld, by measure, loss and set: {"vim": {"0.01": {"own": 0.009, ...}}}."""
    sets: dict[str, Images] = {"own": test}
    sets |= {name: shift(name, test, REPORTED_SEED) for name in SHIFTS}
    seen = {
        name: look(images).evidence(gate.whitener) for name, images in {**sets, **foreign}.items()
    }
    kinds: list[tuple[Measure, ...]] = [(m,) for m in MEASURES if m in gate.thresholds]
    kinds.append((gate.best, "top"))
    return {
        "+".join(kind): {
            f"{loss:g}": {
                name: round(caught(gate, kind, loss, evidence), 5)
                for name, evidence in seen.items()
            }
            for loss in REPORTED
        }
        for kind in kinds
    }


def shares(forms: Mapping[str, Any], clean: Probs) -> dict[str, dict[str, Any]]:
    """How often own images fall into the cells of a codebook: {form: {cells: (rows, cells)}}."""
    found: dict[str, dict[str, Any]] = {}
    for form, sizes in forms.items():
        for cells in sizes:
            stored = find(forms, form, int(cells))  # type: ignore[arg-type]  # the keys are forms
            own, cell = Codebook(cells=int(cells), stored=stored).place(clean)
            counts = np.zeros((len(stored.rows), int(cells)))
            np.add.at(counts, (own, cell), 1)
            counts += 1 / counts.shape[1]  # a cell that no image fell into is drawn now and then
            share = counts / counts.sum(axis=1, keepdims=True)
            found.setdefault(form, {})[cells] = share.round(6).tolist()
    return found
