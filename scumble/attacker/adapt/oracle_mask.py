"""The worst case of a defense that withholds: an attacker who is told which answers are true.

Whatever such a defense hides, it cannot do worse than here: the copy learns from clean labels, and
only the choice of queries is left to the attacker. It is a bound, not an attack that outsiders
can run: it takes the address of the undefended service, which `scumble evaluate` gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from scumble.attacker import consent
from scumble.attacker.adapt.abstention_filter import withheld
from scumble.attacker.adapt.base import Mapped, ModifierParameters
from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import HttpOracle, Oracle
from scumble.attacker.transports import Images, Probs


@dataclass(frozen=True)
class OracleMask(ModifierParameters):
    """Rows that are withheld, or have another label than the clean answer, become NaN.

    Attributes:
        clean: URL of the same service without a defense; asked outside of the budget.

    Raises:
        AttackError: `clean` is no URL, or another machine's.
    """

    clean: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.clean, str):
            raise self._refusal("clean", "must be a URL")
        # Whoever's consent there is, it was given for another address.
        if self.clean and not consent.loopback(self.clean):
            raise self._refusal("clean", "must be a service on this machine")

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with only true answers.

        Raises:
            AttackError: no URL.
        """
        del student
        if not self.clean:
            raise AttackError(
                "oracle_mask needs the undefended service: --set oracle_mask.clean=URL"
            )

        def answer(rows: Probs, images: Images) -> Probs:
            with HttpOracle(self.clean, budget=len(images), transport="pixels") as truth:
                labels = truth(images).argmax(axis=1)
            false = withheld(rows) | (rows.argmax(axis=1) != labels)
            return np.where(false[:, None], np.float32(np.nan), rows)

        return Mapped(oracle, answer)
