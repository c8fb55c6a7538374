"""Where networks run: on the GPU that torch finds, else on the CPU.

Random numbers are drawn on the CPU and moved afterwards, so a seed means the same on both. Between
the parts, images and answers are numpy arrays; a tensor goes where the network is that takes it.
"""

from __future__ import annotations

import torch
from torch import nn

CPU = torch.device("cpu")


def best() -> torch.device:
    """Where new networks go."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


def of(net: nn.Module) -> torch.device:
    """Where a network is; the CPU for one without weights."""
    return next((weight.device for weight in net.parameters()), CPU)


def gpu() -> str | None:
    """The name of the GPU, None without one."""
    return torch.cuda.get_device_name() if best().type == "cuda" else None
