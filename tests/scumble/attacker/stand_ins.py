"""A victim that is a plain function, for tests of attacks."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from scumble.attacker.errors import BudgetExhausted
from scumble.attacker.pool import Pool

SHAPE = (1, 8, 8)
LABELS = 4


def linear_victim(seed=0, shape=SHAPE, labels=LABELS, scale=1.5):
    """A differentiable victim: images (N, C, H, W) -> logits (N, K)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), labels))
        with torch.no_grad():
            net[1].weight.mul_(scale * 4)
            net[1].bias.copy_(-net[1].weight.sum(1) / 2)  # grey is undecided
    return net.eval().requires_grad_(False)


class FunctionOracle:
    """Answers by a network, counts like the real oracle; `drop` throws answers away."""

    def __init__(self, net, budget, *, shape=SHAPE, labels=LABELS, step=0.0, drop=0.0):
        self.net, self.budget = net, budget
        self.shape, self.labels, self.step = shape, labels, step
        self.asked = 0
        self.calls = 0
        self._drop, self._rng = drop, np.random.default_rng(0)

    @property
    def remaining(self):
        return self.budget - self.asked

    def __call__(self, images):
        assert images.dtype == np.float32
        assert images.shape[1:] == self.shape
        assert images.min(initial=0) >= 0
        assert images.max(initial=1) <= 1
        if len(images) > self.remaining:
            raise BudgetExhausted(f"{len(images)} asked for, {self.remaining} left")
        self.asked += len(images)
        self.calls += 1
        with torch.no_grad():
            answers = self.net(torch.from_numpy(images)).softmax(1).numpy()
        answers[self._rng.random(len(answers)) < self._drop] = np.nan
        return answers


def noise_pool(n=400, shape=SHAPE, classes=4, seed=0):
    """Blobs of noise in `classes` kinds of brightness."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    images = rng.random((n, *shape)) * 0.5 + labels[:, None, None, None] / (2 * classes)
    return Pool("noise", images.astype(np.float32), labels.astype(np.int64), classes)
