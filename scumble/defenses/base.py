"""The base class of defenses: frozen values that map clean probabilities to the ones sent out.

Shapes: `N` images, `K` classes. A row of `probs` (N, K) is >= 0 and sums to 1 within rounding.

Every defense keeps shape and dtype, returns finite rows >= 0 that sum to 1 within rounding, is the
identity (within rounding) at zero strength, and gives a row the same bits whatever its batch,
position or repetition.
It changes neither argument; the result may be `probs` itself, so treat all three as read-only.

To add a defense, put a subclass in a file of this folder and a line in the table of `__init__.py`.
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
    """Appends nodes to an ONNX graph. Values are names; operators are those of opset 18.

    Attributes:
        classes: K.
        clean: the network's own rows (N, K), before any defense.
    """

    classes: int
    clean: str

    @property
    def logits(self) -> str | None:
        """(N, K), what the rows are the softmax of; None if they are not a softmax."""
        ...

    @property
    def features(self) -> str | None:
        """(N, d), the input of the last linear layer; None if none is recognised."""
        ...

    def __call__(
        self, op: str, *inputs: str | float | npt.NDArray[Any], **attributes: int | str
    ) -> str:
        """The result of one operator; numbers among the inputs become float32 constants."""
        ...


def canonical(inputs: Inputs) -> Pixels:
    """The 256-level grid of images, the same for all forms in which they can arrive.

    A keyed defense must derive all randomness from this. A float tensor can represent one image in
    many ways, such as -0.0 in place of 0.0: each would get another draw, and the mean of the draws
    is the clean answer.

    Args:
        inputs: uint8 (N, H, W, C), or float (N, C, H, W), whose values are clipped to [0, 1] and
            rounded to the nearest level.

    Returns:
        uint8 (N, H, W, C) in C order; `inputs` itself if it has that form.
    """
    if inputs.dtype == np.uint8:
        return np.ascontiguousarray(inputs)
    levels = np.rint(np.clip(inputs, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, 1, -1))


class DefenseError(ValueError):
    """A defense or a parameter is not allowed; the message has its value and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Defense(CheckedParameters, ABC):
    """Base of all defenses.

    Subclasses are frozen keyword-only dataclasses whose fields are named by the paper's symbols. A
    field with `repr=False` is supplied by the server (secret, auxiliary model), never by a user.
    """

    parameter_error: ClassVar[type[Exception]] = DefenseError

    keyed: ClassVar[bool] = False
    """Whether `build` gets the server's secret, as `secret`; see `canonical`."""

    @abstractmethod
    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The rows to send out.

        Args:
            probs: clean rows, float32 or float64 (N, K).
            inputs: the images, uint8 (N, H, W, C) or float (N, C, H, W); None if not available.

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
        """`__call__` as nodes of a network's graph, equal within 1e-6 (3e-6 for `lee2018`).

        Args:
            op: appends a node.
            probs: clean rows, float32 (N, K).

        Returns:
            The rows to send out, or None (as here) for a defense that cannot be written as nodes.
        """
        del op, probs
        return None

    def answer_nodes(self, op: Nodes, probs: str) -> tuple[str, str | None] | None:
        """`answer` inside a network's graph.

        Returns:
            The rows to send out, and which are abstained: bool (N, 1), or None for a defense that
            withholds nothing. None instead of both if it cannot be written as nodes.
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
