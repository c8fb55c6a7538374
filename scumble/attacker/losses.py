"""What a copy is fitted by: losses for clean answers, and for answers of which some are wrong.

`soft` and `centred` use the probabilities. The others use the labels alone: `ce` trusts them all,
`gce`, `small_loss` and `elr` tolerate a share of wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

GCE_Q = 0.7
"""q of `gce`: 0 is cross-entropy, 1 the mean absolute error."""

ELR_WEIGHT, ELR_MEMORY = 3.0, 0.7
"""λ and β of `elr`, as published for CIFAR-10."""

RAMP = 0.3
"""Share of a fit during which `small_loss` goes from all answers to those that it keeps."""


class Loss(Protocol):
    """A loss; it may remember the answers that it has seen."""

    def __call__(self, logits: Tensor, answers: Tensor, rows: Tensor, progress: float) -> Tensor:
        """Mean over the batch, a scalar.

        Args:
            logits: of the copy (N, K).
            answers: (N, K), positive, rows that sum to 1.
            rows: which answers of the transfer set these are, int64 (N,), on the CPU.
            progress: share of the steps that are done.
        """
        ...


def soft(logits: Tensor, answers: Tensor, rows: Tensor, progress: float) -> Tensor:
    """Cross-entropy with the answers as targets, as KnockoffNets does."""
    del rows, progress
    return F.cross_entropy(logits, answers)


def centred(logits: Tensor, answers: Tensor, rows: Tensor, progress: float) -> Tensor:
    """Mean square between logits and log-probabilities, each less its mean over the classes.

    Log-probabilities less their mean are the victim's logits less theirs: an undefended answer
    says as much about the small classes as about the large one, which `soft` hardly sees.
    """
    del rows, progress
    target = answers.log()
    difference = logits - logits.mean(1, keepdim=True) - target + target.mean(1, keepdim=True)
    return difference.square().mean()


def gce(logits: Tensor, answers: Tensor, rows: Tensor, progress: float) -> Tensor:
    """(1 - p_y^q) / q, which gives little weight to labels that the copy finds unlikely.

    Source: Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks
    with Noisy Labels" (NeurIPS 2018, arXiv 1805.07836).
    """
    del rows, progress
    likely = (answers * logits.softmax(1)).sum(1)
    return ((1 - likely.clamp_min(1e-7) ** GCE_Q) / GCE_Q).mean()


class SmallLoss:
    """Cross-entropy of the answers of each batch that the copy finds most likely.

    Source: the selection of Han et al., "Co-teaching: Robust Training of Deep Neural Networks with
    Extremely Noisy Labels" (NeurIPS 2018, arXiv 1804.06872), here with one network.

    Args:
        noise: share of each batch that is left out in the end.
    """

    def __init__(self, noise: float) -> None:
        self._noise = noise

    def __call__(self, logits: Tensor, answers: Tensor, rows: Tensor, progress: float) -> Tensor:
        """See `Loss`."""
        del rows
        losses = F.cross_entropy(logits, answers, reduction="none")
        left_out = self._noise * min(1.0, progress / RAMP)
        kept = max(1, round((1 - left_out) * len(losses)))
        return losses.topk(kept, largest=False).values.mean()


class Elr:
    """Cross-entropy, and a term that holds the copy to what it said of an image before.

    Source: Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels"
    (NeurIPS 2020, arXiv 2007.00151): + λ ln(1 - <p, t>), t the moving average of p.

    Args:
        answers: how many there are in the transfer set.
        labels: K.
    """

    def __init__(self, answers: int, labels: int) -> None:
        self._said = torch.zeros(answers, labels)

    def forget(self, rows: Tensor) -> None:
        """Other answers have taken the places of these."""
        self._said[rows] = 0

    def __call__(self, logits: Tensor, answers: Tensor, rows: Tensor, progress: float) -> Tensor:
        """See `Loss`."""
        del progress
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        now = p.detach() / p.detach().sum(1, keepdim=True)
        self._said[rows] = ELR_MEMORY * self._said[rows] + (1 - ELR_MEMORY) * now.cpu()
        said = self._said[rows].to(p.device)
        held = (1 - (said * p).sum(1)).clamp_min(1e-4).log().mean()
        return F.cross_entropy(logits, answers) + ELR_WEIGHT * held


LABELS_ALONE = ("ce", "gce", "small_loss", "elr")
"""Losses that are given the label of each answer in place of its probabilities."""

LOSSES: dict[str, Callable[[int, int, float], Loss]] = {
    "soft": lambda answers, labels, noise: soft,
    "centred": lambda answers, labels, noise: centred,
    "ce": lambda answers, labels, noise: soft,
    "gce": lambda answers, labels, noise: gce,
    "small_loss": lambda answers, labels, noise: SmallLoss(noise),
    "elr": lambda answers, labels, noise: Elr(answers, labels),
}
"""Name -> (answers, labels, share that may be wrong) -> loss."""
