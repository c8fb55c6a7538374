"""Hypothesis strategies for what the project passes around."""

import numpy as np
from hypothesis import strategies as st

DTYPES = (np.float32, np.float64)


def _soft(rng, k):
    return rng.dirichlet(np.ones(k))


def _peaky(rng, k):
    logits = 8 * rng.standard_normal(k)
    return np.exp(logits - logits.max())


def _one_hot(rng, k):
    return np.eye(k)[rng.integers(k)]


def _uniform(rng, k):
    return np.ones(k)


def _zeros(rng, k):
    row = _soft(rng, k) * (rng.random(k) < 0.5)
    row[rng.integers(k)] += 0.1
    return row


def _subnormal(rng, k):
    row = rng.choice([5e-324, 1e-310, 1e-45, 1e-40, 1e-20], size=k)
    row[rng.integers(k)] = 1
    return row


def _half(rng, k):
    row = _soft(rng, k)
    row[rng.integers(k)] = 0
    total = row.sum()
    row[row.argmin()] = total or 1
    return row


def _tie(rng, k):
    row = _soft(rng, k)
    row[rng.integers(k)] = row.max()
    return row


_KINDS = {
    "soft": _soft,
    "peaky": _peaky,
    "one_hot": _one_hot,
    "uniform": _uniform,
    "zeros": _zeros,
    "subnormal": _subnormal,
    "half": _half,
    "tie": _tie,
    "near_tie": _tie,
}


@st.composite
def probs(draw, min_k=1, max_k=200, max_n=40, dtypes=DTYPES):
    """Probability rows (N, K), float32 or float64.

    Among them exact zeros, ones and halves, ties, entries one bit below the top, subnormals.
    """
    dtype = draw(st.sampled_from(dtypes))
    k = draw(st.integers(min_k, min(max_k, max(min_k, 6))) | st.integers(min_k, max_k))
    kinds = draw(st.lists(st.sampled_from(sorted(_KINDS)), min_size=1, max_size=max_n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for kind in kinds:
        row = _KINDS[kind](rng, k)
        row = (row / row.sum()).astype(dtype)
        if kind == "near_tie":
            at = rng.integers(k)
            row[at] = np.nextafter(row[at], dtype(0))
        rows.append(row)
    return np.stack(rows)


@st.composite
def images(draw, n):
    """The batch behind N rows: uint8 (N, 4, 5, 3), float32 (N, 3, 4, 5), or None."""
    kind = draw(st.sampled_from(["uint8", "float", "none"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "none":
        return None
    if kind == "float":
        return rng.random((n, 3, 4, 5), dtype=np.float32)
    return rng.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)
