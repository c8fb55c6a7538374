"""Gradients of a black box by forward differences, and the step that its transport needs.

Source: Kariyappa, Prakash, Qureshi, "MAZE: Data-Free Model Stealing Attack Using Zeroth-Order
Gradient Estimation" (CVPR 2021, arXiv 2005.03161), section 4.3; the same in DFME, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scumble.attacker.generators import images
from scumble.attacker.oracle import Oracle

PAPER_STEP = 1e-3
"""ε of both papers: on the unit sphere it changes a value of 3,072 by 1.8e-5."""

LEVELS = 2.0
"""How many of the transport's levels a value changes by, in the mean, with the default step."""


def default_step(oracle: Oracle) -> float:
    """ε for this oracle: the papers' where floats arrive, else large enough to be seen.

    A direction of length ε changes each of d values before the tanh by about ε/√d, and at most half
    of that in the image.
    """
    if oracle.step == 0:
        return PAPER_STEP
    return LEVELS * 2 * oracle.step * math.sqrt(math.prod(oracle.shape))


def sphere(n: int, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """(n, *shape): directions, uniform on the unit sphere of all values."""
    u = torch.randn(n, *shape, generator=rng)
    unit: Tensor = u / u.flatten(1).norm(dim=1).view(n, *[1] * len(shape))
    return unit


def ask(oracle: Oracle, x: Tensor) -> Tensor:
    """Answers (N, K) about images (N, C, H, W) in [0, 1]."""
    answers = oracle(np.ascontiguousarray(x.detach().cpu().numpy(), np.float32))
    return torch.from_numpy(answers).to(x.device)


def estimate(
    loss: Callable[[Tensor, Tensor], Tensor],
    oracle: Oracle,
    x: Tensor,
    *,
    directions: int,
    step: float,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a loss that can only be looked at: ĝ = d/m Σ_j (L(x̂ + ε u_j) − L(x̂))/ε u_j.

    Args:
        loss: (images, answers) -> loss of each, (N,).
        oracle: asked N (m + 1) images.
        x: x̂ (N, C, H, W), before the tanh.
        directions: m.
        step: ε.
        rng: of the directions.

    Returns:
        ĝ (N, C, H, W) per image; the images (N, C, H, W) of x̂ itself; their answers (N, K).

    Raises:
        BudgetExhausted: fewer are left; nothing was asked.
    """
    n, d = len(x), x[0].numel()
    with torch.no_grad():
        u = sphere(n * directions, x.shape[1:], rng).to(x.device)
        moved = images(x.repeat_interleave(directions, 0) + step * u)
        base = images(x)
        answers = ask(oracle, torch.cat([base, moved]))
        at, there = loss(base, answers[:n]), loss(moved, answers[n:])
        slope = (there - at.repeat_interleave(directions, 0)) / step
        # An answer that was thrown away says nothing about the slope.
        slope = torch.nan_to_num(slope, nan=0.0)
        g = d * (slope.view(-1, 1, 1, 1) * u).view(n, directions, *x.shape[1:]).mean(1)
    return g, base, answers[:n]
