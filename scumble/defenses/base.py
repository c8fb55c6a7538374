"""What every defense is: a frozen value that turns clean probabilities into the ones sent out.

Shapes: `N` images, `K` classes. A row of `probs` (N, K) is >= 0 and sums to 1 within rounding.

Every defense keeps shape and dtype, returns finite rows >= 0 that sum to 1 within rounding, is the
identity (within rounding) at zero strength, and gives a row the same bits whatever its batch,
position or repetition.
It changes neither argument; the result may be `probs` itself, so treat all three as read-only.

A new defense is a file with a subclass here beside, and its line in the table of `__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from scumble.defenses.evidence import Answered, Evidence, Score
from scumble.defenses.parameters import CheckedParameters

Probs = npt.NDArray[np.floating[Any]]
"""float32 or float64 (N, K), C order."""

Inputs = npt.NDArray[Any]
"""uint8 (N, H, W, C) or float (N, C, H, W): the images behind the rows."""

Pixels = npt.NDArray[np.uint8]
"""uint8 (N, H, W, C), C order."""


class Nodes(Protocol):
    """Appends nodes to an ONNX graph; values are names, opset 18 says what the operators do.

    Attributes:
        classes: K.
        clean: the network's own rows (N, K), whatever a defense before this one made of them.
    """

    classes: int
    clean: str

    @property
    def logits(self) -> str | None:
        """(N, K), what the rows are the softmax of; None where they are no softmax."""
        ...

    @property
    def features(self) -> str | None:
        """(N, d), the input of the last linear layer; None where none is recognised."""
        ...

    def __call__(
        self, op: str, *inputs: str | float | npt.NDArray[Any], **attributes: int | str
    ) -> str:
        """The result of one operator; numbers among the inputs become float32 constants."""
        ...


def canonical(inputs: Inputs) -> Pixels:
    """The 256-level grid of images, the same for all forms in which they can arrive.

    Whatever a keyed defense draws must be drawn over this. A float tensor has many spellings of one
    image, such as -0.0 in place of 0.0: each would draw anew, and their mean is the clean answer.

    Args:
        inputs: uint8 (N, H, W, C), or float (N, C, H, W), whose values are clipped to [0, 1] and
            rounded to the nearest level.

    Returns:
        uint8 (N, H, W, C) in C order; `inputs` itself where it is that.
    """
    if inputs.dtype == np.uint8:
        return np.ascontiguousarray(inputs)
    levels = np.rint(np.clip(inputs, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, 1, -1))


class DefenseError(ValueError):
    """A defense or one of its parameters is not allowed; says which, what it was, what is."""


@dataclass(frozen=True, kw_only=True)
class Defense(CheckedParameters, ABC):
    """Base of all defenses.

    Subclasses are frozen keyword-only dataclasses whose fields carry the paper's symbols. A field
    with `repr=False` is supplied by the server (secret, auxiliary model), never by a user.
    """

    parameter_error: ClassVar[type[Exception]] = DefenseError

    keyed: ClassVar[bool] = False
    """Whether `build` is to be given the server's secret, as `secret`; see `canonical`."""

    @abstractmethod
    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The rows to send out.

        Args:
            probs: clean rows, float32 or float64 (N, K).
            inputs: the images, uint8 (N, H, W, C) or float (N, C, H, W); None if not at hand.

        Returns:
            Rows of the same shape and dtype.
        """

    @property
    def needs(self) -> frozenset[Score]:
        """Scores that `answer` must be given as evidence."""
        return frozenset()

    @property
    def withholds(self) -> bool:
        """Whether `answer` may withhold rows: it then says which, and needs evidence."""
        return False

    def answer(self, probs: Probs, inputs: Inputs | None, evidence: Evidence | None) -> Answered:
        """The rows to send out, and what was withheld.

        Args:
            probs: as for `__call__`.
            inputs: as for `__call__`.
            evidence: of the clean rows; None for a defense that does not withhold.
        """
        del evidence
        return Answered(self(probs, inputs))

    def nodes(self, op: Nodes, probs: str) -> str | None:
        """The same inside a network's graph: equal to `__call__` within 1e-6 (3e-6: lee2018).

        Args:
            op: appends a node.
            probs: clean rows, float32 (N, K).

        Returns:
            The rows to send out, or None (as here) for a defense that cannot be written so.
        """
        del op, probs
        return None

    def answer_nodes(self, op: Nodes, probs: str) -> tuple[str, str | None] | None:
        """`answer` inside a network's graph.

        Returns:
            The rows to send out, and which are abstained: bool (N, 1), or None for a defense that
            withholds nothing. None as a whole where it cannot be written so.
        """
        rows = self.nodes(op, probs)
        return None if rows is None else (rows, None)

    @classmethod
    def build(cls, bundle: Any, **params: Any) -> Self:
        """The defense for one model; override to take auxiliary models from its bundle.

        Raises:
            DefenseError: a parameter is not allowed, or the bundle lacks what is needed.
        """
        del bundle
        return cls(**params)

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """Names of the parameters a user may give."""
        return tuple(field.name for field in fields(cls) if field.init and field.repr)
