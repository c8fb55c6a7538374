"""Noise, fractals and textures: transfer sets of images that show nothing.

Each function makes `n` of them, (n, SIDE, SIDE, 3) uint8. Sources: Kataoka et al., "Pre-training
without Natural Images" (IJCV 2022), for fractals; Baradad et al., "Learning to See by Looking at
Noise" (NeurIPS 2021), for noise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Pixels = npt.NDArray[np.uint8]
SIDE = 32  # of an image


def fractal(n: int, rng: np.random.Generator) -> Pixels:
    """Attractors of random iterated function systems, in random colours (n, SIDE, SIDE, 3)."""
    maps, points, steps = 4, 48, 60
    # Contractions only: each matrix is scaled to a norm below 1.
    matrices = rng.uniform(-1, 1, (n, maps, 2, 2))
    norms = np.linalg.norm(matrices, 2, axis=(2, 3))
    matrices *= (rng.uniform(0.4, 0.9, (n, maps)) / norms)[..., None, None]
    shifts = rng.uniform(-1, 1, (n, maps, 2))
    at = np.zeros((n, points, 2))
    each = np.arange(n)[:, None]
    counts = np.zeros((n, SIDE * SIDE))
    low, high = np.full((n, 1, 2), -3.0), np.full((n, 1, 2), 3.0)
    for step in range(steps):
        chosen = rng.integers(0, maps, (n, points))
        at = np.einsum("npij,npj->npi", matrices[each, chosen], at) + shifts[each, chosen]
        if step == steps // 3:  # settled: the frame is what the points fill
            low, high = at.min(1, keepdims=True) - 0.05, at.max(1, keepdims=True) + 0.05
        if step > steps // 3:
            cell = ((at - low) / (high - low) * SIDE).clip(0, SIDE - 1).astype(np.int64)
            np.add.at(counts, (each, cell[..., 0] * SIDE + cell[..., 1]), 1)
    light = np.minimum(counts / 3, 1).reshape(n, SIDE, SIDE, 1)
    back, front = rng.uniform(0, 0.4, (n, 1, 1, 3)), rng.uniform(0.6, 1, (n, 1, 1, 3))
    drawn: Pixels = np.rint(255 * (back + light * (front - back))).astype(np.uint8)
    return drawn


def noise(n: int, rng: np.random.Generator) -> Pixels:
    """Noise of several scales, half of it in black and white (n, SIDE, SIDE, 3)."""
    total = torch.zeros(n, 3, SIDE, SIDE)
    for side in (2, 4, 8, 16, 32):
        grid = torch.from_numpy(rng.standard_normal((n, 3, side, side)).astype(np.float32))
        weight = torch.from_numpy(rng.uniform(0, 1, (n, 1, 1, 1)).astype(np.float32))
        total += weight * F.interpolate(grid, (SIDE, SIDE), mode="bilinear", align_corners=False)
    total = (total / total.flatten(1).std(1).view(-1, 1, 1, 1) / 4 + 0.5).clamp(0, 1)
    hard = torch.from_numpy(rng.random(n) < 0.5).view(-1, 1, 1, 1)
    return pixels(torch.where(hard, (total[:, :1] > 0.6).float().expand_as(total), total))


def texture(n: int, rng: np.random.Generator) -> Pixels:
    """Two crossing waves, bent by a smooth field, in two colours (n, SIDE, SIDE, 3).

    Half of them have hard edges: stripes, dots and checks.
    """
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    bends = torch.from_numpy(rng.standard_normal((n, 2, 4, 4)).astype(np.float32))
    smooth = F.interpolate(bends, (SIDE, SIDE), mode="bicubic", align_corners=True).numpy()
    total = np.ones((n, SIDE, SIDE))
    for k in range(2):
        angle, phase = rng.uniform(0, 2 * np.pi, (2, n, 1, 1))
        cycles, bend = rng.uniform(1, 8, (n, 1, 1)), rng.uniform(0, 2, (n, 1, 1))
        along = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * cycles * along + phase + bend * smooth[:, k])
        total *= np.where(rng.random((n, 1, 1)) < 0.5 * k, 1, wave)
    hard = rng.random((n, 1, 1)) < 0.5
    light = np.where(hard, total > rng.uniform(-0.3, 0.3, (n, 1, 1)), (total + 1) / 2)[..., None]
    back, front = rng.uniform(0, 1, (2, n, 1, 1, 3))
    drawn: Pixels = np.rint(255 * (back + light * (front - back))).astype(np.uint8)
    return drawn


def pixels(planes: Tensor) -> Pixels:
    """Images (N, H, W, C) of planes (N, C, H, W) in [0, 1]."""
    found: Pixels = np.rint(planes.clamp(0, 1).numpy() * 255).astype(np.uint8)
    return np.ascontiguousarray(found.transpose(0, 2, 3, 1))
