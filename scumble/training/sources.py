"""Networks for `scumble export`: torchvision's, a `.pt2` file, or a function in a file."""

from __future__ import annotations

import importlib.util
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from scumble.training.bundle_export import ExportError
from scumble.training.nets import Normalize

# As they are typed after --mean and --std.
IMAGENET_MEAN = "0.485,0.456,0.406"
IMAGENET_STD = "0.229,0.224,0.225"
# What torch.export.load raises for files of another format.
UNREADABLE = (
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def torchvision_model(name: str, classes: int) -> nn.Module:
    """A classifier of `torchvision.models` with random weights.

    Raises:
        ExportError: no such model; the message lists those there are.
    """
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ExportError(f"no torchvision classifier {name!r}; available: {', '.join(known)}")
    net: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    return net


def own_module(source: str) -> nn.Module:
    """What FUNCTION of `FILE.py:FUNCTION` returns; the file is run.

    Raises:
        ExportError: no such file or function, it failed, or it returned something else.
    """
    file, _, function = source.rpartition(":")
    if not file or not Path(file).is_file():
        raise ExportError(f"module is {source!r}; give FILE.py:FUNCTION with a file that exists")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ExportError(f"{file!r} is not a Python file")
    code = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(code)
        net = getattr(code, function)()
    except Exception as exc:
        raise ExportError(f"{source!r} failed: {type(exc).__name__}: {exc}") from exc
    if not isinstance(net, nn.Module):
        raise ExportError(f"{source!r} returned {type(net).__name__}, not a torch.nn.Module")
    return net


def pt2_module(path: Path) -> nn.Module:
    """The module of a `torch.export.save` file.

    Raises:
        ExportError: torch cannot read it.
    """
    try:
        program = torch.export.load(path)
    except UNREADABLE as exc:
        raise ExportError(f"{str(path)!r} is not a torch.export file: {exc}") from exc
    return Exported(program.module())


class Exported(nn.Module):
    """An exported program. Its mode is fixed, and torch raises when asked to set it."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.training = False

    def train(self, mode: bool = True) -> Exported:
        del mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.program(x)
        return out


def load_weights(net: nn.Module, path: Path) -> None:
    """Fill `net` from a state dict file, bare or under `state_dict` or `model`.

    Raises:
        ExportError: not a file of plain tensors, or of another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = next((state[k] for k in ("state_dict", "model") if k in state), state)
        net.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except (RuntimeError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as exc:
        raise ExportError(f"weights {str(path)!r} do not fit: {exc}") from exc


def normalized(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """`net` behind (x - mean) / std."""
    return nn.Sequential(Normalize(mean, std), net)


def numbers(text: str) -> list[float]:
    """The numbers of a list such as `0.5,0.5,0.5`.

    Raises:
        ExportError: `text` is not such a list.
    """
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as exc:
        raise ExportError(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5") from exc
