"""Runs the attacks of the Adversarial Robustness Toolbox (ART) against a service.

ART is not a dependency: `pip install adversarial-robustness-toolbox`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from scumble.attacker.oracle import Oracle


def black_box(oracle: Oracle) -> Any:
    """The service as ART's `BlackBoxClassifier`, which its extraction attacks take.

    Args:
        oracle: what is asked; its budget counts every image.

    Raises:
        ImportError: ART is not installed.
    """
    art = import_module("art.estimators.classification")
    return art.BlackBoxClassifier(
        lambda images: oracle(np.asarray(images, np.float32)),
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
