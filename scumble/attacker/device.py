"""Where networks run: on the GPU that torch finds, else on the CPU.

Random numbers are drawn on the CPU and moved afterwards, so a seed means the same on both. Between
the parts, images and answers are numpy arrays; a tensor goes where the network is that takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

CPU = torch.device("cpu")
_chosen: ContextVar[torch.device | None] = ContextVar("chosen", default=None)


def best(available: Callable[[], bool] = torch.cuda.is_available) -> torch.device:
    """Where new networks go."""
    return _chosen.get() or (torch.device("cuda") if available() else CPU)


@contextmanager
def chosen(device: torch.device) -> Iterator[None]:
    """New networks go to this device within the block, whatever torch finds."""
    token = _chosen.set(device)
    try:
        yield
    finally:
        _chosen.reset(token)


def of(net: nn.Module) -> torch.device:
    """Where a network is; the CPU for one without weights."""
    return next((weight.device for weight in net.parameters()), CPU)


def gpu() -> str | None:
    """The name of the GPU, None without one."""
    return torch.cuda.get_device_name() if best().type == "cuda" else None
