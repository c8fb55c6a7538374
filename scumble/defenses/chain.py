"""Chain: several defenses, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from scumble.defenses.base import Defense, DefenseError, Inputs, Nodes, Probs
from scumble.defenses.evidence import ABSTAINED, ANSWERED, Answered, Evidence, Score


@dataclass(frozen=True, kw_only=True)
class Chain(Defense):
    """Each step gets the rows of the previous step, and the same images.

    Attributes:
        steps: one or more defenses; a user writes `[[name, {parameter: value}], ...]`.

    Raises:
        DefenseError: there are no steps, or a step is not a defense.
    """

    keyed: ClassVar[bool] = True

    steps: tuple[Defense, ...]

    def __post_init__(self) -> None:
        steps = self.steps
        if (
            not isinstance(steps, list | tuple)
            or not steps
            or not all(isinstance(step, Defense) for step in steps)
        ):
            raise self._refusal("steps", "must be one or more defenses")
        object.__setattr__(self, "steps", tuple(steps))

    @property
    def needs(self) -> frozenset[Score]:
        """Those of all steps."""
        return frozenset().union(*(step.needs for step in self.steps))

    @property
    def withholds(self) -> bool:
        """Whether a step withholds rows."""
        return any(step.withholds for step in self.steps)

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The rows (N, K) after the last step."""
        if self.withholds:
            return self.answer(probs, inputs, None).rows
        for step in self.steps:
            probs = step(probs, inputs)
        return probs

    def answer(self, probs: Probs, inputs: Inputs | None, evidence: Evidence | None) -> Answered:
        """The rows after the last step; no step changes a row that an earlier one abstained."""
        if not self.withholds:
            return Answered(self(probs, inputs))
        evidence = evidence or Evidence.of(probs)
        rows, marks = probs, np.full(len(probs), ANSWERED, np.uint8)
        for step in self.steps:
            changed, more = step.answer(rows, inputs, evidence)
            rows = np.where((marks == ABSTAINED)[:, None], rows, changed)
            if more is not None:
                np.maximum(marks, more, out=marks)
        return Answered(rows, marks)

    def nodes(self, op: Nodes, probs: str) -> str | None:
        """The rows after the last step; None if a step cannot be written as nodes."""
        found = self.answer_nodes(op, probs)
        return None if found is None else found[0]

    def answer_nodes(self, op: Nodes, probs: str) -> tuple[str, str | None] | None:
        """The rows after the last step, and which are abstained."""
        rows, abstained = probs, None
        for step in self.steps:
            found = step.answer_nodes(op, rows)
            if found is None:
                return None
            changed, more = found
            if abstained is None:
                rows, abstained = changed, more
            else:
                rows = op("Where", abstained, rows, changed)
                abstained = abstained if more is None else op("Or", abstained, more)
        return rows, abstained

    @classmethod
    def build(cls, bundle: Any, **params: Any) -> Self:
        """Make each of `steps` by its name, with the same bundle and secret.

        Raises:
            DefenseError: a step is wrong; the message has its number, counted from 1.
        """
        from scumble.defenses import configure  # here, because that package imports this module

        secret: bytes = params.get("secret", b"")
        steps = params["steps"]
        if not isinstance(steps, list | tuple) or not steps:
            raise DefenseError(
                f"Chain: steps must be a list [[name, {{parameter: value}}], ...], got {steps!r}"
            )
        built = []
        for number, step in enumerate(steps, 1):
            match step:
                case [str() as name, Mapping() as given]:
                    pass
                case _:
                    raise DefenseError(
                        f"Chain: step {number} must be [name, {{parameter: value}}], got {step!r}"
                    )
            try:
                built.append(configure(name, given, bundle=bundle, secret=secret))
            except DefenseError as error:
                raise DefenseError(f"Chain: step {number}: {error}") from error
        return cls(steps=tuple(built))
