"""How many images a batch may have, so that answers come within a target.

Larger batches use the engine better and keep everybody in them waiting. The size follows the times
that are measured, as Clipper's does (Crankshaw et al., NSDI 2017, section 4.3), but from a fitted
line in place of its additive increase.
"""

from __future__ import annotations

FORGET = 0.98  # what an earlier batch still counts when another has run


class AdaptiveBatchLimit:
    """The largest batch of which two fit into the target.

    An image that arrives just after a batch began waits for that one and for its own. A batch of n
    images is taken to need a + b n seconds, fitted by least squares in which older batches count
    less.

    Args:
        target_s: for nearly all answers; 0 for none, then batches are as large as allowed.
        largest: images in any batch.
    """

    def __init__(self, target_s: float, largest: int) -> None:
        self._target_s = target_s
        self._largest = largest
        self._weight = self._n = self._nn = self._t = self._nt = 0.0

    def __call__(self) -> int:
        """Images that the next batch may have, at least 1."""
        if not self._target_s or not self._weight:
            return self._largest
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - mean_n * mean_n
        # All batches of one size tell nothing of a: then time is taken to be proportional.
        each = mean_t / mean_n
        if spread > 1e-6 * mean_n * mean_n:
            each = (self._nt / self._weight - mean_n * mean_t) / spread
        fixed = max(0.0, mean_t - each * mean_n)
        if each <= 0:
            return self._largest
        return max(1, min(self._largest, int((self._target_s / 2 - fixed) / each + 1e-6)))

    def note(self, images: int, seconds: float) -> None:
        """A batch has run."""
        self._weight = FORGET * self._weight + 1
        self._n = FORGET * self._n + images
        self._nn = FORGET * self._nn + images * images
        self._t = FORGET * self._t + seconds
        self._nt = FORGET * self._nt + images * seconds
