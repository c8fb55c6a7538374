"""Withhold: no answer for images that are foreign or that the network is unsure of.

A withheld answer is a function of a secret, the model's version and the image, or the same for all
images: it carries nothing of the network. So an attacker who is told which answers are withheld,
and trains on the others, does at least as well as any other on the same queries.
`scumble/training/gate.py` has the sources of the scores; the keyed form follows Kariyappa and
Qureshi, "Defending Against Model Stealing Attacks with Adaptive Misinformation" (CVPR 2020), with a
keyed draw in the place of their network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from scumble.defenses.base import Defense, DefenseError, Inputs, Nodes, Probs
from scumble.defenses.codebook import Codebook
from scumble.defenses.evidence import ABSTAINED, ANSWERED, DRAWN, Answered, Evidence, Marks, Score
from scumble.defenses.gate import MEASURES, NEEDS, Gate, Measure
from scumble.defenses.label import Label
from scumble.defenses.pseudorandom_rows import PseudorandomRows


@dataclass(frozen=True, kw_only=True)
class Withhold(Defense):
    """y = rows of `defense`, but nothing of the network where a score is below its threshold.

    Attributes:
        on: "gate": foreign images. "boundary": images that the network is unsure of. "both".
        loss: share of the owner's own images, half of them mildly shifted, that is withheld.
        score: of the gate, a measure of `scumble.defenses.gate`; "auto" for the best there is.
        withheld: "abstained": the uniform row, and the protocol says so. "keyed": the row of a
            class and cell that a keyed hash of the image draws, and nothing says so.
        defense: what answers the other images; a user writes `answers: [name, {parameter: value}]`.
        gate: the thresholds; from the bundle.
        version: of the model, which draws are made for; from the bundle.
        secret: the server's key, any length. Without it, anyone who reads this file can draw.

    Raises:
        DefenseError: a parameter is not allowed, or keyed rows of a defense that has no prototypes.
    """

    keyed: ClassVar[bool] = True

    on: Literal["gate", "boundary", "both"] = "both"
    loss: float = 0.01
    score: Literal["auto", "energy", "residual", "vim"] = "auto"
    withheld: Literal["abstained", "keyed"] = "abstained"
    answers: Any = field(default=("codebook", {}), hash=False)
    defense: Defense | None = field(default=None, repr=False)
    gate: Gate | None = field(default=None, repr=False, compare=False)
    version: str = field(default="", repr=False)
    secret: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        self._check_choice("on", "gate", "boundary", "both")
        self._check_number("loss", 0, 0.5)
        self._check_choice("score", "auto", *(m for m in MEASURES if m != "top"))
        self._check_choice("withheld", "abstained", "keyed")
        if self.defense is None:
            return
        if self.withheld == "keyed" and not isinstance(self.defense, Codebook | Label):
            raise DefenseError(
                f"Withhold: withheld is 'keyed' with answers {self.answers!r}; allowed: codebook "
                "or label, whose rows can be drawn so that they look like any other"
            )
        if self.gate is None:
            raise DefenseError("Withhold: has no thresholds; make it with a bundle")
        try:
            self.gate.at(self.measures, self.loss)
        except DefenseError as error:
            raise DefenseError(f"Withhold: {error}") from error

    @classmethod
    def build(cls, bundle: Any, **params: Any) -> Self:
        """Make the defense with the thresholds of `bundle`.

        Args:
            bundle: an `app.inference.defense_artifacts.DefenseArtifacts`.
            params: of the defense.

        Raises:
            DefenseError: a parameter is not allowed, or the bundle has no such thresholds.
        """
        from scumble.defenses import configure  # here, as the table there imports this module

        defense = cls(**params)
        if not hasattr(bundle, "gate"):
            raise DefenseError(
                "Withhold: needs the thresholds of a bundle; give "
                f"bundle=app.inference.defense_artifacts.DefenseArtifacts(bundle), not {bundle!r}"
            )
        match defense.answers:
            case [str() as name, Mapping() as given]:
                pass
            case _:
                raise DefenseError(
                    f"Withhold: answers must be [name, {{parameter: value}}], got "
                    f"{defense.answers!r}"
                )
        try:
            inner = configure(name, given, bundle=bundle, secret=defense.secret)
            gate = bundle.gate()
        except DefenseError as error:
            raise DefenseError(f"Withhold: {error}") from error
        return replace(defense, defense=inner, gate=gate, version=bundle.version)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is compared with a threshold."""
        gate: Measure = self._gate().best if self.score == "auto" else self.score
        return {"gate": (gate,), "boundary": ("top",), "both": (gate, "top")}[self.on]

    @property
    def needs(self) -> frozenset[Score]:
        """The scores that its measures are made of, and what its defense needs."""
        own = frozenset().union(*(NEEDS[measure] for measure in self.measures))
        return own | self._defense().needs

    @property
    def withholds(self) -> bool:
        """It does."""
        return True

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The rows (N, K), of clean rows that are the only evidence.

        Raises:
            ValueError: the gate needs a score, which `answer` must be given.
        """
        return self.answer(probs, inputs, None).rows

    def answer(self, probs: Probs, inputs: Inputs | None, evidence: Evidence | None) -> Answered:
        """The rows (N, K), and which are withheld.

        Raises:
            ValueError: the evidence lacks a score, or a keyed draw the images.
        """
        evidence = Evidence.of(probs) if evidence is None else evidence
        rows, before = self._defense().answer(probs, inputs, evidence)
        below = self._below(evidence)[:, None]
        if self.withheld == "keyed":
            # For all rows, withheld or not, so that time does not tell.
            if inputs is None:
                raise ValueError("Withhold needs the images behind the rows, got None")
            draw = PseudorandomRows(
                self.secret, self.version, self._defense(), self._gate().shares or {}
            )
            instead, mark = draw(probs, inputs), DRAWN
        else:
            instead, mark = np.full_like(rows, 1 / max(rows.shape[1], 1)), ABSTAINED
        marks = np.where(below[:, 0], np.uint8(mark), np.uint8(ANSWERED))
        return Answered(np.where(below, instead, rows), _stronger(marks, before))

    def nodes(self, op: Nodes, probs: str) -> str | None:
        """The rows alone; `answer_nodes` says which are abstained."""
        found = self.answer_nodes(op, probs)
        return None if found is None else found[0]

    def answer_nodes(self, op: Nodes, probs: str) -> tuple[str, str | None] | None:
        """Comparisons and Where; None for keyed draws, and where the network lacks a score."""
        found = None if self.withheld == "keyed" else self._defense().answer_nodes(op, probs)
        if found is None:
            return None
        rows, abstained = found
        for measure, cut in zip(self.measures, self._cuts(), strict=True):
            value = self._gate().nodes(op, measure)
            if value is None:
                return None
            below = op("Less", value, float(cut))
            abstained = below if abstained is None else op("Or", abstained, below)
        return op("Where", str(abstained), 1 / op.classes, rows), abstained

    def _below(self, evidence: Evidence) -> np.ndarray[Any, np.dtype[np.bool_]]:
        # In float32, as in the graph: a threshold must not fall between two precisions of a value.
        found: list[np.ndarray[Any, np.dtype[np.bool_]]] = [
            self._gate().measure(measure, evidence).astype(np.float32) < cut
            for measure, cut in zip(self.measures, self._cuts(), strict=True)
        ]
        return found[0] if len(found) == 1 else found[0] | found[1]

    def _cuts(self) -> tuple[np.float32, ...]:
        return tuple(map(np.float32, self._gate().at(self.measures, self.loss)))

    def _gate(self) -> Gate:
        if self.gate is None:
            raise DefenseError("Withhold: has no thresholds; make it with a bundle")
        return self.gate

    def _defense(self) -> Defense:
        if self.defense is None:
            raise DefenseError("Withhold: answers nothing; make it with a bundle")
        return self.defense


def _stronger(marks: Marks, before: Marks | None) -> Marks:
    return marks if before is None else np.maximum(marks, before)
