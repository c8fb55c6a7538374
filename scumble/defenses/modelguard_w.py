"""ModelGuard-W: the likeliest answer to mislead a copy, within a distance of the clean row.

Source: Tang et al., "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks"
(USENIX Security 2024), its linear program, solved exactly here. Shapes: `N` images, `K` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scumble.defenses.base import Defense, Inputs, Probs

Array = npt.NDArray[np.float64]
LEAD = 1e-4  # of the predicted class over each other
FLOOR = 1e-6  # added inside the logarithm
SLACK = 1e-12
APART = 1e-10


@dataclass(frozen=True, kw_only=True)
class ModelGuardW(Defense):
    """y minimises sum_j log(p_j + 1e-6) y_j over the rows within L1 distance epsilon of p.

    The predicted class stays ahead of each other class by 1e-4. A row that no answer satisfies
    (two classes lead, and epsilon is small) is sent as it is.

    For a fixed top value t the rest is an exchange: take from the likeliest of the other classes,
    give to the least likely, none above t - 1e-4. The value of that exchange is convex and
    piecewise linear in t, so the optimum is at one of its O(K^2) kinks. The top may have to rise.

    Attributes:
        epsilon: L1 distance allowed, 0 (none) to 2.

    Raises:
        DefenseError: a parameter has the wrong type or is out of range.
    """

    epsilon: float

    def __post_init__(self) -> None:
        self._check_number("epsilon", 0, 2)

    def __call__(self, probs: Probs, inputs: Inputs | None) -> Probs:
        """The solutions (N, K)."""
        del inputs
        if not self.epsilon or probs.shape[1] < 2:
            return probs
        rows = probs.astype(np.float64)
        rows /= rows.sum(axis=1, keepdims=True)
        answers = [solve(row, self.epsilon) for row in rows]
        return np.array(answers, np.float64).reshape(probs.shape).astype(probs.dtype)


def solve(row: Array, epsilon: float) -> Array:
    """The answer to one row (K,); the row itself where there is none."""
    order = np.argsort(-row, kind="stable")
    exchange = Exchange(row[order[0]], row[order[1:]], epsilon / 2)
    best = exchange.best()
    if best is None:
        return row
    answer = np.empty_like(row)
    answer[order] = [best, *exchange.rest(best)]
    return answer


class Exchange:
    """What the other classes get for a top value t.

    Args:
        top: clean probability of the predicted class.
        others: of the others, descending.
        budget: mass that may move, half of the L1 distance.
    """

    def __init__(self, top: float, others: Array, budget: float) -> None:
        self.top = float(top)
        self.others = others
        self.budget = budget
        self._cost = np.log(np.append(top, others) + FLOOR)
        self._sums = np.append(0, others.cumsum())

    def best(self) -> float | None:
        """The top value of the optimum, by bisection over the kinks; None where there is none."""
        kinks = self._kinks()
        kinks = kinks[self._moved(kinks) <= self.budget + SLACK]
        if not len(kinks):
            return None
        low, high = 0, len(kinks) - 1
        while low < high:
            middle = (low + high) // 2
            if self.value(kinks[middle + 1]) < self.value(kinks[middle]):
                low = middle + 1
            else:
                high = middle
        return float(kinks[low])

    def value(self, t: float) -> float:
        """The objective."""
        return float(self._cost[0] * t + self._cost[1:] @ self.rest(t))

    def rest(self, t: float) -> Array:
        """The other classes' values, in their order."""
        cap, mass = t - LEAD, 1 - t
        # All of it on the least likely classes, where that is near enough.
        room = cap * np.arange(len(self.others))[::-1]
        packed: Array = np.clip(mass - room, 0, cap)
        if (np.abs(packed - self.others).sum() + abs(t - self.top)) / 2 <= self.budget + SLACK:
            return packed
        capped = np.minimum(self.others, cap)
        forced = float((self.others - capped).sum())
        take = self.budget - max(self.top - t, 0) - forced
        give = self.budget - max(t - self.top, 0)
        taken = np.clip(take - (capped.cumsum() - capped), 0, capped)
        free = cap - capped
        given = np.clip(give - (free[::-1].cumsum()[::-1] - free), 0, free)
        answer: Array = capped - taken + given
        return answer

    def _moved(self, t: Array) -> Array:
        """The least mass that moves for top values (n,)."""
        above = np.searchsorted(-self.others, -(t - LEAD), side="left")
        forced = self._sums[above] - above * (t - LEAD)
        least: Array = np.maximum(forced + np.maximum(self.top - t, 0), t - self.top)
        return least

    def _kinks(self) -> Array:
        """Top values at which the exchange may change its direction, ascending."""
        n, budget, top = len(self.others), self.budget, self.top
        sums, count = self._sums, np.arange(n + 1)
        last = sums[-1] - sums[::-1]  # of the b least likely classes
        found: list[Any] = [top, top + budget, self.others + LEAD]
        found.append((1 + count * LEAD) / (1 + count))  # b classes at the cap take all
        found.append(1 - last[:-1] - self.others[::-1] - budget)  # that is just near enough
        capped, emptied = count[:, None], count[None, :]
        both = np.minimum(capped, emptied)
        for falls in (0, 1):
            # b receivers are full.
            found.append(
                (budget + falls * top + last + count * LEAD) / np.maximum(count + falls, 1)
            )
            # f classes are at the cap, and the a likeliest are emptied.
            slope = falls + capped - both
            level = sums[capped] + sums[emptied] - sums[both] - budget + falls * top
            found.append((level + (capped - both) * LEAD) / np.maximum(slope, 1))
        kinks = np.concatenate([np.ravel(part) for part in found])
        least = (1 + n * LEAD) / (1 + n)
        inside = kinks[(kinks > least) & (kinks < 1)]
        ascending = np.unique(np.append(inside, [least, 1]))
        # Equal but for rounding, two kinks would tell the bisection nothing.
        apart: Array = ascending[np.append(True, np.diff(ascending) > APART)]
        return apart
