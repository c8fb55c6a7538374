"""The clean rows that a known defense maps to an answer, and the one of them nearest to a prior.

The answer is y_i = g(p_i) / S. Let t be the top class and m = p_t. Then m alone fixes the gate's
strength c and S = g(m) / y_t, hence every g(p_i) = y_i S. What is left is to invert g, which has
two branches for each class below 1/2, and to find an m for which the row sums to 1. On a grid over
m the sum is computed for all branches; where it passes 1, Newton's method finishes (m, p) at once.
Whatever was approximate on the way, a row counts as solution only if the defense maps it to y.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from scumble.attacker.adapt.perturbation_formulas import FLOOR, Array, KnownDefense, lift

Indices = npt.NDArray[np.intp]

BOTH = 6  # classes nearest the fold, which are tried on both branches
TRIES = 16  # zeros per row, nearest to the prior first, that Newton gets
NEAR = 0.02  # L1 distance from the answer within which a zero of the grid is one of the row's
FIT = 1e-4  # the same after Newton; what rounding to a few decimals leaves
STEPS = 12  # of Newton
KNOTS = 500  # of g on each branch, for the grid
CHUNK = 128  # rows at a time
TINY = 1e-9  # what keeps a divisor from 0


class ExactInverse:
    """The inverse of one defense for one number of classes.

    Args:
        known: the defense.
        classes: K.
    """

    def __init__(self, known: KnownDefense, classes: int) -> None:
        self._known = known
        self._floor = FLOOR[known.odds]
        self._m = _grid(known, classes)
        self._c = known.strength(self._m)
        self._fold = known.fold(self._c)
        self._low, self._high = self._knots()
        # Every choice of branches for the classes that are tried both ways, (2^BOTH, BOTH).
        self._choices = np.array(list(product([0.0, 1.0], repeat=min(BOTH, classes - 1))))

    def __call__(self, y: Array, prior: Array) -> Array:
        """Solutions (N, K) nearest to the prior in L1; the prior where there is none."""
        best = prior.copy()
        distance = np.full(len(y), np.inf)
        # The top class is that of the answer or, where the defense changed it, of the prior.
        of_answer, of_prior = y.argmax(axis=1), prior.argmax(axis=1)
        changed = np.flatnonzero(of_answer != of_prior)
        for rows, top in ((np.arange(len(y)), of_answer), (changed, of_prior[changed])):
            for i in range(0, len(rows), CHUNK):
                part = rows[i : i + CHUNK]
                at, p = self._solutions(y[part], prior[part], top[i : i + CHUNK])
                at = part[at]
                off = np.abs(p - prior[at]).sum(axis=1)
                order = np.argsort(-off, kind="stable")  # the nearest of a row is written last
                order = order[off[order] < distance[at[order]]]
                best[at[order]] = p[order]
                distance[at[order]] = off[order]
        return best

    def _solutions(self, y: Array, prior: Array, top: Indices) -> tuple[Indices, Array]:
        """Rows (R, K) that the defense maps to an answer, and which answer that is (R,)."""
        at, p = self._zeros(y, prior, top)
        p, at = self._within(p, y, at, NEAR)
        off = np.abs(p - prior[at]).sum(axis=1)
        order = np.lexsort((off, at))
        rank = np.arange(len(at)) - np.searchsorted(at[order], at[order])
        first = order[rank < TRIES]
        p, at = p[first], at[first]
        p, at = self._within(self._newton(p, y[at], top[at]), y, at, FIT)
        return at, p

    def _within(self, p: Array, y: Array, at: Indices, limit: float) -> tuple[Array, Indices]:
        """Those of the rows p (R, K) that the defense maps to near y[at], and their `at`."""
        near = np.abs(self._known(p) - y[at]).sum(axis=1) < limit
        return p[near], at[near]

    def _zeros(self, y: Array, prior: Array, top: Indices) -> tuple[Indices, Array]:
        """Rows (R, K) that nearly sum to 1, and which answer each is of (R,)."""
        grid, each = len(self._m), np.arange(len(y))
        ratio = y / np.maximum(y[each, top], TINY)[:, None]
        g_top = np.maximum(self._known.raised(self._m, self._c), 0)
        low, high = np.empty((2, grid, *y.shape))
        for i in range(grid):
            v = ratio * g_top[i]
            low[i] = np.interp(v, *self._low[i])
            # No other class than the top is above 1/2; there it only has to spoil the sum.
            high[i] = np.where(v > 0.5, v, np.interp(v, *self._high[i]))
        np.exp(low, out=low)
        low[:, each, top] = high[:, each, top] = self._m[:, None]

        # The branch is the prior's, except for the classes nearest the fold.
        m = np.minimum(prior[each, top], self._known.closed_below)  # as the row was moved
        fold = self._fold[np.searchsorted(self._m, m).clip(0, grid - 1)]
        side = np.log(np.maximum(prior, self._floor) / fold[:, None])
        side[each, top] = np.inf
        both = np.argsort(np.abs(side), axis=1)[:, : self._choices.shape[1]]
        upper = side > 0
        sure = np.where(upper, high, low)
        np.put_along_axis(sure, np.broadcast_to(both, (grid, *both.shape)), 0, axis=2)
        both_low = np.take_along_axis(low, both[None], axis=2)
        both_high = np.take_along_axis(high, both[None], axis=2)
        excess = (sure.sum(axis=2) + both_low.sum(axis=2) - 1)[:, :, None]
        excess = excess + (both_high - both_low) @ self._choices.T  # (grid, N, choices)
        j, at, choice = np.nonzero((excess[:-1] > 0) != (excess[1:] > 0))

        before, after = excess[j, at, choice], excess[j + 1, at, choice]
        share = (before / (before - after))[:, None]
        upper = upper[at]
        np.put_along_axis(upper, both[at], self._choices[choice] > 0, axis=1)
        left = np.where(upper, high[j, at], low[j, at])
        right = np.where(upper, high[j + 1, at], low[j + 1, at])
        return at, left + (right - left) * share

    def _newton(self, p: Array, y: Array, top: Indices) -> Array:
        """Rows (R, K) moved to where g(p_i) = y_i S and the sum is 1.

        With r_i = y_i / y_t the equations are F_i = g(p_i) - r_i g(m) = 0 for i != t, and the sum;
        each p_i meets only m besides itself, so a step is one division per class.
        """
        known, each = self._known, np.arange(len(p))
        ratio = y / np.maximum(y[each, top], TINY)[:, None]
        for _ in range(STEPS):
            m = p[each, top][:, None]
            c, c_slope = known.strength(m), known.strength_slope(m)
            h = lift(p, known.gamma, known.odds)
            h_top = h[each, top][:, None]
            slope = known.raised_slope(p, c)
            slope = np.where(np.abs(slope) < 1e-6, 1e-6, slope)  # it is 0 at the fold
            miss = (p + c * h - ratio * (m + c * h_top)) / slope
            by_m = c_slope * h - ratio * (known.raised_slope(m, c) + c_slope * h_top)
            turn = -by_m / slope
            miss[each, top], turn[each, top] = 0, 1
            total = turn.sum(axis=1)
            total = np.where(np.abs(total) < TINY, TINY, total)
            step = (1 - p.sum(axis=1) + miss.sum(axis=1)) / total
            # By factors, as the low branch reaches over twelve orders of magnitude.
            p = p * np.exp(np.clip((turn * step[:, None] - miss) / p, -2, 2))
            m = p[each, top].clip(self._floor, 1)
            p = p.clip(self._floor, 0.5)
            p[each, top] = m
        rows: Array = p / p.sum(axis=1, keepdims=True)
        return rows

    def _knots(self) -> tuple[list[tuple[Array, Array]], list[tuple[Array, Array]]]:
        """Per point of the grid (g, ln p) down from the fold and (g, p) up from it, g rising."""
        low, high = [], []
        way = np.linspace(0, 1, KNOTS) ** 2  # denser at the fold, where the inverse is steep
        for c, fold in zip(self._c, self._fold, strict=True):
            strength = np.full(KNOTS, c)
            log = np.log(fold) + (np.log(self._floor) - np.log(fold)) * way
            up = fold + (0.5 - fold) * way
            # Rounding at the fold must not disturb the order that interpolation needs.
            low.append((np.maximum.accumulate(self._known.raised(np.exp(log), strength)), log))
            high.append((np.maximum.accumulate(self._known.raised(up, strength)), up))
        return low, high


def _grid(known: KnownDefense, classes: int) -> Array:
    """Points of m from 1/K to 1, denser near 1 and in the gate."""
    parts = [np.linspace(1 / classes, 1, 80), 1 - np.geomspace(1e-9, 0.05, 20)]
    if known.defense == "dcp":
        parts.append(known.beta + np.linspace(-20, 20, 41) / known.nu)
    points = np.unique(np.concatenate(parts))
    return points[(points >= 1 / classes) & (points <= 1)]
