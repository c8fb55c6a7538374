"""A GPU for machines that have none: CPU memory that is said to be the GPU's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda")
# What a real GPU allows between both memories.
COPIES = {"copy_", "data", "_has_compatible_shallow_copy_type"}


class PretendGpu(TorchFunctionMode):
    """Keeps account of whose memory is whose, and refuses what a real GPU would refuse.

    That is operations on tensors of both sides, but for scalars and indices of the CPU, and numpy
    on tensors of the GPU. What happens inside an operation, as its backward pass, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        # Kept alive, so that no address is reused by another tensor.
        self._memory: dict[int, torch.UntypedStorage] = {}

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            name = getattr(func.__self__, "__name__", "")
        given = list(tensors([args, kwargs]))
        if name in ("__getitem__", "__setitem__") and self.holds(args[0]):
            given = list(tensors([args[0], args[2:]]))
        here = any(not self.holds(tensor) and tensor.dim() for tensor in given)
        there = any(self.holds(tensor) for tensor in given)
        if name in COPIES or name == "_parse_to":
            return func(*args, **kwargs)
        if name in ("to", "cpu"):
            return self._move(func, name, args, kwargs)
        if there and name in ("numpy", "__array__"):
            raise TypeError("can't convert a tensor of the GPU to numpy")
        if there and name == "device":
            return GPU
        if there and here:
            raise RuntimeError(f"{name}: tensors of both sides")
        made = kwargs.get("device") == GPU
        if made:
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if there or made:
            self._keep(result)
        return result

    def _move(self, func, name, args, kwargs):
        """`to` a device or to another tensor's side, or to the `cpu`."""
        tensor, *rest = args
        goal = self.holds(tensor) and name == "to"
        for part in [*rest, *kwargs.values()]:
            if isinstance(part, torch.device):
                goal = part == GPU
            elif isinstance(part, torch.Tensor):
                goal = self.holds(part)
        rest = ["cpu" if isinstance(part, torch.device) else part for part in rest]
        result = func(tensor, *rest, **kwargs)
        if self.holds(result) != goal:  # `to` may give the tensor itself
            result = result.clone()
        if goal:
            self._keep(result)
        return result

    def _keep(self, result) -> None:
        for tensor in tensors(result):
            if tensor.numel():
                storage = tensor.untyped_storage()
                self._memory[storage.data_ptr()] = storage


def tensors(value) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
