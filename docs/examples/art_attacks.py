"""KnockoffNets and CopycatCNN of the Adversarial Robustness Toolbox, as attacks of `scumble`.

    pip install adversarial-robustness-toolbox
    scumble evaluate --attack docs/examples/art_attacks.py:ArtKnockoffNets --defense label

The referee runs them as it runs its own attacks: the same victim, images, student and query count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from art.attacks.extraction import CopycatCNN, KnockoffNets
from torch import nn

from scumble.attacker import art
from scumble.attacker.errors import AttackError
from scumble.attacker.observer import Watch
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool


@dataclass(frozen=True)
class ArtKnockoffNets:
    """ART's KnockoffNets: images drawn at random, each asked about once.

    Attributes:
        epochs: passes over the answers.
        batch: images per step.
        lr: of Adam.
        seed: of ART's choice of images, and of the order in which they are learned.
    """

    epochs: int = 10
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0

    def check(self, budget: int, *, images: bool) -> None:
        """See `scumble.attacker.attacks.Attack`."""
        del budget
        if not images:
            raise AttackError("the attack needs images to query: give a data set with --queries")

    def __call__(self, oracle: Oracle, student: nn.Module, pool: Pool | None, watch: Watch) -> None:
        """See `scumble.attacker.attacks.Attack`."""
        self.check(oracle.remaining, images=pool is not None)
        assert pool is not None  # noqa: S101  # checked above
        np.random.seed(self.seed)  # noqa: NPY002  # ART draws from numpy's global generator
        torch.manual_seed(self.seed)
        budget = min(oracle.remaining, len(pool))
        self.extract(oracle, student, pool, budget)
        student.eval()
        watch(budget, student)

    def extract(self, oracle: Oracle, student: nn.Module, pool: Pool, budget: int) -> None:
        """Let ART train the student."""
        attack = KnockoffNets(
            art.black_box(oracle),
            batch_size_fit=self.batch,
            batch_size_query=1024,
            nb_epochs=self.epochs,
            nb_stolen=budget,
            use_probability=True,  # as the paper has it; ART's default is labels
            verbose=False,
        )
        attack.extract(pool.images, thieved_classifier=art.copy(student, oracle, self.lr))


@dataclass(frozen=True)
class ArtCopycatCNN(ArtKnockoffNets):
    """ART's CopycatCNN: it learns the label of each answer."""

    def extract(self, oracle: Oracle, student: nn.Module, pool: Pool, budget: int) -> None:
        """Let ART train the student."""
        attack = CopycatCNN(
            art.black_box(oracle),
            batch_size_fit=self.batch,
            batch_size_query=1024,
            nb_epochs=self.epochs,
            nb_stolen=budget,
        )
        attack.extract(pool.images, thieved_classifier=art.copy(student, oracle, self.lr))
