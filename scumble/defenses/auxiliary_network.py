"""The base of defenses that run an auxiliary network on the same image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from scumble.defenses.base import Defense, DefenseError, Inputs, Probs

Network = Callable[[Inputs], Probs]
"""Images, uint8 (N, H, W, C) or float (N, C, H, W), to one float row each (N, K)."""


def absent(inputs: Inputs) -> Probs:
    """Stand in for the network of a defense that was made without a bundle.

    Raises:
        DefenseError: always.
    """
    del inputs
    raise DefenseError("this defense has no auxiliary network; make it with a bundle")


@dataclass(frozen=True, kw_only=True)
class AuxiliaryNetworkDefense(Defense):
    """Base of the defenses with an auxiliary network.

    The network runs on every image, whether its row is used or not, so timing reveals nothing.

    Attributes:
        network: maps images to rows (N, K); a row does not depend on its batch.
    """

    file: ClassVar[str]
    """The network's file in the bundle."""

    output: ClassVar[str]
    """The output of the network that is used."""

    network: Network = field(default=absent, repr=False)

    @classmethod
    def build(cls, bundle: Any, **params: Any) -> Self:
        """Make the defense with a network of `bundle`.

        Args:
            bundle: an `app.inference.defense_artifacts.DefenseArtifacts`.
            params: of the defense.

        Raises:
            DefenseError: a parameter is not allowed, or the bundle lacks the network.
        """
        defense = cls(**params)
        if not hasattr(bundle, "auxiliary"):
            raise DefenseError(
                f"{cls.__name__} needs {cls.file} of a bundle; pass "
                f"bundle=app.inference.defense_artifacts.DefenseArtifacts(bundle), got {bundle!r}"
            )
        try:
            return replace(defense, network=bundle.auxiliary(cls.file, cls.output))
        except DefenseError as error:
            raise DefenseError(f"{cls.__name__}: {error}") from error

    def _ask(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The network's row for each of `probs`.

        Raises:
            ValueError: there are no images, or the network returns rows of another shape.
        """
        name = type(self).__name__
        if inputs is None:
            raise ValueError(f"{name} needs the images behind the rows, got None")
        rows = self.network(inputs)
        if rows.shape != probs.shape:
            raise ValueError(f"{name}: {self.file} returned {rows.shape} for rows {probs.shape}")
        return rows
