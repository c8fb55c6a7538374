"""Pseudorandom rows in place of withheld answers: a keyed hash of the image picks class and cell.

The class is any of the K, the right one included: otherwise the answer would rule a class out.
The hash covers the image on a grid of 256 levels, so a repeated image gets the same row from every
replica with the same secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scumble.defenses.base import Defense, Inputs, Probs, canonical
from scumble.defenses.codebook import Codebook, Indices

Shares = Mapping[str, Mapping[str, npt.NDArray[np.float64]]]

_PURPOSE = b"scumble.withhold"  # separates these hashes from other uses of the secret


@dataclass(frozen=True)
class PseudorandomRows:
    """Draws rows from the few that a defense can serve.

    Attributes:
        secret: the server's key, any length.
        version: of the model; another version gives other rows.
        defense: a codebook, whose rows are drawn, or `Label`, whose rows are one-hot.
        shares: {form: {cells: (rows, cells)}}, how often in-distribution images fall into each
            cell, so that drawn confidences have the same distribution.
    """

    secret: bytes
    version: str
    defense: Defense
    shares: Shares

    def __call__(self, like: Probs, inputs: Inputs) -> Probs:
        """A row for each image (N, K), with the shape and type of `like`.

        Raises:
            ValueError: `inputs` and `like` differ in length.
        """
        images = canonical(inputs)
        n, classes = like.shape
        if len(images) != n:
            raise ValueError(f"{n} rows, but {len(images)} inputs")
        key = hashlib.blake2b(self.secret, person=_PURPOSE).digest()
        version = self.version.encode() + b"\0"
        digests = bytearray()
        for image in images:
            drawn = hashlib.blake2b(version, key=key, digest_size=16)
            drawn.update(image)
            digests += drawn.digest()
        numbers = np.frombuffer(bytes(digests), "<u8").reshape(n, 2)
        # 64 bits modulo K: the bias is below K / 2^64.
        top: Indices = (numbers[:, 0] % np.uint64(classes)).astype(np.intp)
        if isinstance(self.defense, Codebook):
            cells = self._cells(self.defense, top, numbers[:, 1] * 2.0**-64)
            return self.defense.rows(top, cells, like)
        return np.eye(classes, dtype=like.dtype)[top]

    def _cells(self, codebook: Codebook, top: Indices, at: npt.NDArray[Any]) -> Indices:
        even = np.full((1, codebook.cells), 1 / codebook.cells)
        shares = self.shares.get(codebook.form, {}).get(str(codebook.cells), even)
        of_class = shares[top] if len(shares) > 1 else np.repeat(shares, len(top), axis=0)
        cells: Indices = (at[:, None] >= of_class.cumsum(axis=1)[:, :-1]).sum(axis=1)
        return cells
