"""MAD: the answer whose gradient points farthest from the clean answer's.

Source: Orekondy, Schiele, Fritz, "Prediction Poisoning: Towards Defenses Against DNN Model Stealing
Attacks" (ICLR 2020); final layer and one-hot oracle as in the baseline of Khaled et al. (ICMLA
2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from scumble.defenses.auxiliary_network import AuxiliaryNetworkDefense
from scumble.defenses.base import Inputs, Probs

Keep = Literal["none", "argmax"]
Rows = npt.NDArray[np.float64]

EXACT = 10  # most classes for which all 2^(K-1) sets are tried, as in the source


@dataclass(frozen=True, kw_only=True)
class MAD(AuxiliaryNetworkDefense):
    """y = (1 - t) p + t y*, y* the target whose gradient makes the largest angle with that of p.

    G_k is the gradient of log softmax_k with respect to the surrogate's last linear layer, and
    y* maximises 1 - cos(G^T y*, G^T p); t = min(1, epsilon / |p - y*|_1).

    This needs no gradient. With h the input of the last layer, s = softmax(W h + b) the
    surrogate's answer and e_k one-hot, d log softmax_k / d(logits) = e_k - s, so

        G_k = (e_k - s) [h, 1]^T,    G^T y = (y - s) [h, 1]^T    for any y that sums to 1,
        <G^T y, G^T p> = <y - s, p - s> (|h|^2 + 1),    |G^T y| = |y - s| sqrt(|h|^2 + 1):

    the cosine is that of y - s and p - s, two vectors of K numbers, and h drops out. Where either
    is 0 the cosine counts as 0.

    Attributes:
        epsilon: bound on the L1 distance, 0 (none) to 2.
        keep: "none": y* is one-hot (ties go to the last class); the predicted class can change.
            "argmax": y* is an extreme point of the rows with the same predicted class c as p, that
            is, uniform over a set of classes that contains c. Up to 10 classes all sets are tried;
            above, the class that gains most is added while one gains. c stays a maximum.

    Raises:
        DefenseError: a parameter is of the wrong type or out of range.
    """

    file: ClassVar[str] = "surrogate.onnx"
    output: ClassVar[str] = "probabilities"

    epsilon: float
    keep: Keep = "none"

    def __post_init__(self) -> None:
        self._check_number("epsilon", 0, 2)
        self._check_choice("keep", "none", "argmax")

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The poisoned rows (N, K).

        Raises:
            ValueError: there are no images, or the network has another number of classes.
        """
        s = self._ask(probs, inputs).astype(np.float64)
        move = probs - s  # float64: confident rows differ in their last digits
        cosines = one_hot_cosines(s, move)
        if self.keep == "none":
            last = cosines.shape[1] - 1 - cosines[:, ::-1].argmin(axis=1)
            target = np.zeros_like(s)
            target[np.arange(len(s)), last] = 1
        elif probs.shape[1] <= EXACT:
            target = best_set(s, move, probs.argmax(axis=1), cosines)
        else:
            target = grown_set(s, move, probs.argmax(axis=1), cosines)
        away = target - probs
        distance = np.add.reduce(np.abs(away), axis=1, keepdims=True)
        t = np.ones_like(distance)
        np.divide(self.epsilon, distance, out=t, where=distance > self.epsilon)
        t = t.astype(probs.dtype)
        y = (1 - t) * probs
        y += t * target.astype(probs.dtype)
        return y


def one_hot_cosines(s: Rows, move: Rows) -> Rows:
    """cos(e_k - s, move) |move| (N, K) for every class k.

    The sum over all classes but k is the total minus the term of k, except for a class above 1/2:
    where s is nearly one-hot, this would cancel, so the other classes are summed directly.
    """
    sure = np.flatnonzero(np.maximum.reduce(s, axis=1) > 0.5)
    top = sure, s[sure].argmax(axis=1)
    rest = s.copy()
    rest[top] = 0

    def others(values: Rows, without_top: Rows) -> Rows:
        out: Rows = np.add.reduce(values, axis=1, keepdims=True) - values
        out[top] = np.add.reduce(without_top[sure], axis=1)
        return out

    missing = others(s, rest)  # 1 - s_k
    square = others(s * s, rest * rest)
    return _ratio(missing * move - others(s * move, rest * move), missing * missing + square)


def best_set(s: Rows, move: Rows, top: npt.NDArray[np.intp], cosines: Rows) -> Rows:
    """The uniform row over the set of classes with `top` that has the least cosine, of all sets."""
    n, classes = s.shape
    rows = np.arange(n)
    # Class c first, then the others: set number b contains those whose bit is set in b.
    order = np.argsort(np.arange(classes) != top[:, None], axis=1, kind="stable")
    s_sums, move_sums = (
        _subset_sums(np.take_along_axis(values, order, axis=1)) for values in (s, move)
    )
    sizes = _set_sizes(classes)
    found = _set_cosines(s, move, s_sums, move_sums, sizes)
    found[:, 0] = cosines[rows, top]  # the set of c alone, by the more exact sum
    best = found.argmin(axis=1)
    member = np.ones((n, classes))
    member[:, 1:] = best[:, None] >> np.arange(classes - 1) & 1
    target = np.zeros_like(s)
    np.put_along_axis(target, order, member / sizes[best][:, None], axis=1)
    return target


def grown_set(s: Rows, move: Rows, top: npt.NDArray[np.intp], cosines: Rows) -> Rows:
    """The same, with a set that grows from `top` by the class that lowers the cosine most."""
    n, classes = s.shape
    rows = np.arange(n)
    member = np.zeros(s.shape, bool)
    member[rows, top] = True
    least = cosines[rows, top]
    s_sum, move_sum = s[rows, top], move[rows, top]
    growing = np.ones(n, bool)
    for size in range(2, classes + 1):
        found = _set_cosines(s, move, s_sum[:, None] + s, move_sum[:, None] + move, float(size))
        found[member] = np.inf
        best = found.argmin(axis=1)
        growing &= found[rows, best] < least  # a row that has stopped stays
        if not growing.any():
            break
        grown = rows[growing], best[growing]
        member[grown] = True
        least[growing] = found[grown]
        s_sum[growing] += s[grown]
        move_sum[growing] += move[grown]
    return member / np.add.reduce(member, axis=1, keepdims=True, dtype=np.float64)


def _set_cosines(s: Rows, move: Rows, s_sums: Rows, move_sums: Rows, sizes: Any) -> Rows:
    """cos(u - s, move) |move|, u uniform over a set, from sums over the set."""
    product = move_sums / sizes - np.add.reduce(s * move, axis=1, keepdims=True)
    norm2 = (1 - 2 * s_sums) / sizes + np.add.reduce(s * s, axis=1, keepdims=True)
    return _ratio(product, norm2)


def _subset_sums(values: Rows) -> Rows:
    """(N, 2^(K-1)): the first column plus each subset of the others, by doubling."""
    sums = values[:, :1]
    for k in range(1, values.shape[1]):
        sums = np.concatenate([sums, sums + values[:, k : k + 1]], axis=1)
    return sums


@cache
def _set_sizes(classes: int) -> Rows:
    """(2^(K-1),): the number of classes in each of those sets."""
    sizes: Rows = _subset_sums(np.ones((1, classes)))[0]
    return sizes


def _ratio(product: Rows, norm2: Rows) -> Rows:
    """The quotient product / sqrt(norm2); 0 where the norm is 0."""
    out = np.zeros_like(product)
    np.divide(product, np.sqrt(np.maximum(norm2, 0)), out=out, where=norm2 > 0)
    return out
