"""How many images a batch may have, so that answers come within a target.

Larger batches use the engine better, but each request in them waits longer. The limit follows the
measured times, as in Clipper (Crankshaw et al., NSDI 2017, section 4.3), but from a fitted line
instead of an additive increase.
"""

from __future__ import annotations

DECAY = 0.98  # weight of a batch after the next one


class AdaptiveBatchLimit:
    """The largest batch such that two batches fit into the target.

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
        """Record the time of a batch."""
        self._weight = DECAY * self._weight + 1
        self._n = DECAY * self._n + images
        self._nn = DECAY * self._nn + images * images
        self._t = DECAY * self._t + seconds
        self._nt = DECAY * self._nt + images * seconds
