"""Networks for `scumble export`: of torchvision, of timm, in a file, or of a function in a file."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from scumble.training.errors import ExportError
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


Fit = Literal["stretch", "crop", "resize_crop", "letterbox"]
FIT_OF: dict[str, Fit] = {"center": "resize_crop", "squash": "stretch", "border": "letterbox"}
FILTERS = ("bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Published:
    """What torchvision or timm says of weights that it publishes.

    Attributes:
        name: such as `IMAGENET1K_V1`.
        labels: of their classes; none if they are not known.
        size: of the input, in pixels.
        shorter: side that pictures are resized to before the crop.
        interpolation: filter of that.
        mean: of each channel.
        std: of each channel.
        fit: how pictures of another size are brought to size.
    """

    name: str
    labels: list[str]
    size: int
    shorter: int
    interpolation: str
    mean: list[float]
    std: list[float]
    fit: Fit = "resize_crop"

    @classmethod
    def of(cls, entry: Any) -> Published:
        """The metadata of an entry of torchvision's enumerations."""
        transforms = entry.transforms()
        return cls(
            entry.name,
            list(entry.meta["categories"]),
            transforms.crop_size[0],
            transforms.resize_size[0],
            transforms.interpolation.value,
            list(transforms.mean),
            list(transforms.std),
        )

    def preprocessing(
        self, size: tuple[int, int] | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the owner says, and what the weights say where that leaves something open.

        For another size than the weights' the share of the picture that is seen stays the same.

        Args:
            size: that the owner says.
            given: members of the card's `preprocessing` that the owner says.
        """
        found = {"interpolation": self.interpolation, **given}
        if size is None and self.fit != "crop" and not {"fit", "ratio"} & given.keys():
            return {"fit": self.fit, "shorter": self.shorter, **found}
        if given.get("fit", "crop") == "crop":
            return {"fit": "crop", "ratio": min(1.0, self.size / self.shorter), **found}
        return found


def torchvision_weights(name: str, weights: str | None) -> tuple[Published, Path | None]:
    """What torchvision says of weights, and their file if `weights` is one.

    Args:
        name: of the model.
        weights: a file, which is known by the name under which torchvision publishes it; or the
            name of weights, such as `IMAGENET1K_V2` or `DEFAULT`. Where it is neither known nor
            given, those of `DEFAULT` count.

    Raises:
        ExportError: no such model, weights or file.
    """
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ExportError(f"no torchvision classifier {name!r}; there: {', '.join(known)}")
    entries = torchvision.models.get_model_weights(name)
    path = None if weights is None else Path(weights)
    if weights in entries.__members__:
        return Published.of(entries[weights]), None
    if path is not None and not path.is_file():
        names = ", ".join(entries.__members__)
        raise ExportError(f"weights are {weights!r}; allowed: a file, or one of {names}")
    chosen = entries["DEFAULT"]
    if path is not None:
        published = (entry for entry in entries if entry.url.rpartition("/")[2] == path.name)
        chosen = next(published, chosen)
    return Published.of(chosen), path


def random_weights(torchvision_name: str | None) -> str:
    """A sentence about random weights, with those that there are instead.

    Args:
        torchvision_name: of a model of torchvision; None for one of timm.
    """
    names = ["pretrained"]
    if torchvision_name is not None:
        import torchvision

        names = list(torchvision.models.get_model_weights(torchvision_name).__members__)
    return f"the weights are random: give --weights, allowed: a file, or one of {', '.join(names)}"


def torchvision_model(name: str, classes: int, weights: str | None = None) -> nn.Module:
    """A classifier of `torchvision.models`.

    Args:
        name: of the model.
        classes: K.
        weights: name of published weights, which are downloaded if need be; random ones without it.

    Raises:
        ExportError: no such model, the message lists those there are; or no download.
    """
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ExportError(f"no torchvision classifier {name!r}; there: {', '.join(known)}")
    try:
        # Two models turn ImageNet's normalisation into their own, if they are told to.
        more = {"transform_input": True} if name in ("inception_v3", "googlenet") else {}
        net: nn.Module = torchvision.models.get_model(
            name, weights=weights, num_classes=classes, **more
        )
    except OSError as exc:
        raise ExportError(
            f"weights {weights} of {name} cannot be downloaded: {exc}; give their file with "
            "--weights FILE"
        ) from exc
    except ValueError as exc:
        raise ExportError(f"{name} with the weights {weights}: {exc}") from exc
    return net


def timm_model(
    name: str, classes: int | None, channels: int, weights: str | None
) -> tuple[nn.Module, Published]:
    """A classifier of the package timm, and what timm says of its weights.

    Args:
        name: of the model, with or without the tag of its weights, as `resnet18.a1_in1k`.
        classes: K; None for those of the weights.
        channels: of the input.
        weights: `pretrained` for timm's, which are downloaded if need be; else they are random, or
            come from a file later.

    Raises:
        ExportError: timm is not installed, has no such model, or cannot load its weights.
    """
    try:
        import timm
        import timm.data
    except ImportError as exc:
        raise ExportError("--timm needs the package timm: pip install timm") from exc
    more = {} if classes is None else {"num_classes": classes}
    try:
        net: nn.Module = timm.create_model(
            name, pretrained=weights == "pretrained", in_chans=channels, **more
        )
    except OSError as exc:
        raise ExportError(
            f"weights of {name} cannot be downloaded: {exc}; give their file with --weights FILE"
        ) from exc
    except (RuntimeError, ValueError, TypeError) as exc:
        raise ExportError(f"timm cannot make the model {name!r}: {exc}") from exc
    config = timm.data.resolve_model_data_config(net)
    size, cropped = config["input_size"][1], config.get("crop_pct") or 1.0
    subset = timm.data.infer_imagenet_subset(net)
    info = timm.data.ImageNetInfo(subset) if subset else None
    labels = [info.index_to_description(k) for k in range(info.num_classes())] if info else []
    said = Published(
        getattr(net, "pretrained_cfg", {}).get("tag") or name,
        labels,
        size,
        math.floor(size / cropped),
        config["interpolation"] if config["interpolation"] in FILTERS else "bilinear",
        list(config["mean"]),
        list(config["std"]),
        FIT_OF.get(config.get("crop_mode") or "center", "resize_crop"),
    )
    return net, said


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


def torchscript_module(path: Path) -> nn.Module:
    """The module of a file that `torch.jit.save` wrote.

    Raises:
        ExportError: torch cannot read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that torch.export is newer
            module = torch.jit.load(path, map_location="cpu")
    except UNREADABLE as exc:
        raise ExportError(
            f"{str(path)!r} is not a TorchScript file: {str(exc).split('. ')[0]}"
        ) from exc
    net: nn.Module = module.eval().float()
    return net


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


WRAPPED = ("state_dict", "model_state_dict", "model")  # under which files have their tensors


def load_weights(net: nn.Module, path: Path) -> None:
    """Fill `net` from a state dict or a safetensors file.

    The tensors may be under `state_dict`, `model_state_dict` or `model`, and have a prefix in
    common, as DataParallel (`module.`), Lightning and compiled networks write them. Tensors of half
    precision are widened.

    Raises:
        ExportError: not a file of plain tensors, or of another network.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = read_safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = next((state[key] for key in WRAPPED if key in state), state)
        net.load_state_dict(_without_prefix(state, set(net.state_dict())))
    except (
        RuntimeError,
        TypeError,
        AttributeError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
    ) as exc:
        raise ExportError(f"weights {str(path)!r} do not fit: {exc}") from exc


def _without_prefix(state: dict[str, torch.Tensor], wanted: set[str]) -> dict[str, torch.Tensor]:
    """The tensors under the prefix in front of one of the network's names; all, if there is none.

    What is not under it, such as the state of metrics, is left out.
    """
    if not wanted or wanted & state.keys():
        return state
    first = min(wanted)
    prefixes = [key.removesuffix(first) for key in state if key.endswith("." + first)]
    for prefix in sorted(prefixes, key=len):
        inside = [key for key in state if key.startswith(prefix)]
        found = {key.removeprefix(prefix): state[key] for key in inside}
        if wanted <= found.keys():
            return found
    return state


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
DTYPES |= {"BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
DTYPES |= {"I8": torch.int8, "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file: a length, a JSON header of that length, then the bytes.

    Raises:
        ValueError: not such a file.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    if len(content) < 8 or start > len(content):
        raise ValueError("not a safetensors file")
    header = json.loads(content[8:start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}; allowed: {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        data = bytearray(content[start + begin : start + end])
        flat = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]]) if data else torch.empty(0)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


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
