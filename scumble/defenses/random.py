"""Random: moves some mass to a wrong class, the same one whenever the same image is sent.

Source: the Random baseline of Khaled et al. (ICMLA 2023). There the class is drawn for each answer,
so averaging repeated answers undoes it; here it is derived from a keyed hash of the image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from scumble.defenses.base import Defense, DefenseError, Inputs, Probs, canonical

_PURPOSE = b"scumble.random"  # keeps these hashes distinct from other uses of the secret


@dataclass(frozen=True, kw_only=True)
class Random(Defense):
    """y = (1 - epsilon/2) p + (epsilon/2) e_k, k uniform over the classes other than arg-max p.

    k depends only on the secret and the 256-level grid of the row's image (or the clean row, if
    there is no image): every replica with the same secret gives the same answer, and so does every
    form in which the image can be sent. |y - p|_1 <= epsilon.
    With a single class y = p.

    Attributes:
        epsilon: bound on the L1 distance, 0 (none) to 2.
        secret: the server's key, of any length. Without one, anyone can compute k.

    Raises:
        DefenseError: a parameter is of the wrong type or out of range.
    """

    keyed: ClassVar[bool] = True

    epsilon: float
    secret: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        self._check_number("epsilon", 0, 2)
        if not isinstance(self.secret, bytes):
            raise DefenseError(f"Random: secret must be bytes, got {type(self.secret).__name__}")

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The rows (N, K) with mass epsilon/2 on a drawn class.

        Raises:
            ValueError: `inputs` has another length than `probs`.
        """
        n, classes = probs.shape
        if classes == 1:
            return probs
        # Adding 0.0 turns -0.0 into 0.0, so that equal probabilities have equal bytes.
        source = probs.astype(np.float64, "C") + 0.0 if inputs is None else canonical(inputs)
        if len(source) != n:
            raise ValueError(f"{n} rows, but {len(source)} inputs")
        key = hashlib.blake2b(self.secret, person=_PURPOSE).digest()
        # 64 bits modulo K - 1: the bias is below K / 2^64.
        draws = [
            int.from_bytes(hashlib.blake2b(row, key=key, digest_size=8).digest(), "little")
            % (classes - 1)
            for row in source
        ]
        k = np.array(draws, dtype=np.intp)
        k += k >= probs.argmax(axis=1)
        y = probs * (1 - self.epsilon / 2)
        y[np.arange(n), k] += self.epsilon / 2
        return y
