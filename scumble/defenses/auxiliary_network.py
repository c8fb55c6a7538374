"""What the defenses have in common that ask an auxiliary network about the same image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from scumble.defenses.base import Defense, DefenseError, Inputs, Probs

Network = Callable[[Inputs], Probs]
"""Images, uint8 (N, H, W, C) or float (N, C, H, W), to one float row each (N, K)."""


def absent(inputs: Inputs) -> Probs:
    """The network of a defense that was given none.

    Raises:
        DefenseError: always.
    """
    del inputs
    raise DefenseError("this defense has no auxiliary network; make it with a bundle")


@dataclass(frozen=True, kw_only=True)
class AuxiliaryNetworkDefense(Defense):
    """Base of the defenses with an auxiliary network.

    Every row is asked about, whether its answer is used or not, so time tells nothing.

    Attributes:
        network: images to rows (N, K), a row independent of its batch.
    """

    file: ClassVar[str]
    """Of the bundle."""

    output: ClassVar[str]
    """Of the network."""

    network: Network = field(default=absent, repr=False)

    @classmethod
    def build(cls, bundle: Any, **params: Any) -> Self:
        """The defense with its network from `bundle`, as `app.inference.auxiliary` has it.

        Raises:
            DefenseError: a parameter is not allowed, or there is no such network.
        """
        defense = cls(**params)
        if not hasattr(bundle, "auxiliary"):
            raise DefenseError(
                f"{cls.__name__}: needs {cls.file} of a bundle; give "
                f"bundle=app.inference.auxiliary.Auxiliaries(bundle), not {bundle!r}"
            )
        try:
            return replace(defense, network=bundle.auxiliary(cls.file, cls.output))
        except DefenseError as error:
            raise DefenseError(f"{cls.__name__}: {error}") from error

    def _ask(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The network's row for each of `probs`.

        Raises:
            ValueError: no images, or rows of another shape come back.
        """
        name = type(self).__name__
        if inputs is None:
            raise ValueError(f"{name} needs the images behind the rows, got None")
        rows = self.network(inputs)
        if rows.shape != probs.shape:
            raise ValueError(f"{name}: {self.file} gave {rows.shape} for rows {probs.shape}")
        return rows
