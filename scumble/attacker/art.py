"""Runs the attacks of the Adversarial Robustness Toolbox (ART) against a service.

ART is not a dependency: `pip install adversarial-robustness-toolbox`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs


def black_box(oracle: Oracle) -> Any:
    """The service as ART's `BlackBoxClassifier`, which its extraction attacks take.

    Args:
        oracle: what is asked; its budget counts every image.

    Raises:
        ImportError: ART is not installed.
    """
    art = import_module("art.estimators.classification")

    def answer(images: Images) -> Probs:
        found = oracle(np.asarray(images, np.float32))
        # ART learns every row; a discarded one would be class 0.
        if lost := int(np.isnan(found).any(axis=1).sum()):
            raise AttackError(
                f"{lost} of {len(found)} answers were discarded; ART's attacks need all of them"
            )
        return found

    return art.BlackBoxClassifier(
        answer,
        input_shape=oracle.shape,
        nb_classes=oracle.labels,
        clip_values=(0.0, 1.0),
    )


def copy(student: nn.Module, oracle: Oracle, lr: float = 1e-3) -> Any:
    """A student as ART's `PyTorchClassifier`, which its attacks train.

    Args:
        student: images (N, C, H, W) in [0, 1] -> logits (N, K); trained in place.
        oracle: what it is a copy of.
        lr: of Adam.

    Raises:
        ImportError: ART is not installed.
    """
    art = import_module("art.estimators.classification")
    return art.PyTorchClassifier(
        student,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(student.parameters(), lr),
        input_shape=oracle.shape,
        nb_classes=oracle.labels,
        clip_values=(0.0, 1.0),
    )
