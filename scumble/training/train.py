"""Train a victim: SGD with Nesterov momentum on a one-cycle schedule, random crops and the like.

One recipe per victim in `RECIPES`; everything random comes from the recipe's seed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scumble.data.image_sets import Dataset
from scumble.progress import bar
from scumble.training.autocast import autocast
from scumble.training.checkpoint import Checkpoint
from scumble.training.exposure import Exposure
from scumble.training.nets import NETS, Normalize

CPU = torch.device("cpu")
Augment = Callable[[Tensor, torch.Generator], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one victim is trained.

    Attributes:
        net: key of `NETS`.
        epochs: passes over the training images.
        lr: peak learning rate; it rises over the first fifth of the steps, then falls to zero.
        augment: key of `AUGMENTS`.
        batch: images per step.
        weight_decay: on all weights.
        ema: decay per step of the averaged copy of the weights, which is what is kept.
        holdout: share of the training images kept back to choose between quantized candidates.
        seed: of weights, order and augmentation.
        data: the data set; None for the one of the recipe's name.
    """

    net: str
    epochs: int
    lr: float
    augment: str
    batch: int = 256
    weight_decay: float = 5e-4
    ema: float = 0.995
    holdout: float = 0.05
    seed: int = 0
    data: str | None = None


def train(
    recipe: Recipe,
    data: Dataset,
    *,
    targets: Tensor | None = None,
    loss: Loss = F.cross_entropy,
    exposure: Exposure | None = None,
    checkpoint: Checkpoint | None = None,
    device: torch.device = CPU,
    progress: bool = True,
) -> nn.Module:
    """Fit a network to `data`.

    Args:
        recipe: how.
        data: images and labels.
        targets: what to learn instead of the labels, such as probabilities (N, K).
        loss: of (logits (N, K), targets), a scalar.
        exposure: outliers that the network should be unsure of.
        checkpoint: where the state is kept from which an interrupted training goes on; its result
            is that of one that was not interrupted.
        device: where the network learns; images are augmented on the CPU.
        progress: whether a bar is shown.

    Returns:
        The averaged network in eval mode: (N, C, H, W) float32 in [0, 1] -> logits (N, K).
    """
    torch.manual_seed(recipe.seed)
    rng = torch.Generator().manual_seed(recipe.seed)
    images, labels = as_tensors(data)
    targets = labels if targets is None else targets
    mean = images.mean((0, 2, 3)).tolist()
    std = images.std((0, 2, 3)).tolist()
    net = nn.Sequential(Normalize(mean, std), NETS[recipe.net](images.shape[1], len(data.classes)))
    net = net.to(device).to(memory_format=torch.channels_last)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.SGD(
        net.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * math.ceil(len(data) / recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    augment = AUGMENTS[recipe.augment]
    shown = bar(steps, f"train {data.name}", "step", shown=progress)
    order = Order(len(data), recipe.batch, recipe.epochs, rng)
    parts = {"net": net, "average": average, "optimizer": optimizer, "schedule": schedule}
    parts |= {"order": order}
    generators = {"rng": rng} | ({} if exposure is None else {"outliers": exposure.rng})
    if checkpoint is not None and (found := checkpoint.read()) is not None:
        _restore(parts, generators, found)
        shown.update(order.step)
    net.train()
    for rows in order:
        x = augment(images[rows], rng)
        if exposure is not None:
            x = torch.cat([x, augment(exposure.draw(len(rows)), rng)])
        with autocast(device.type):
            x = x.to(device).contiguous(memory_format=torch.channels_last)
            logits = net(x).float()
        value = loss(logits[: len(rows)], targets[rows].to(device))
        if exposure is not None:
            value = value + exposure.loss(logits[len(rows) :])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        # The average of the first steps would be of random weights: let its memory grow with time.
        step = order.step - 1
        follow(average, net, min(recipe.ema, (1 + step) / (10 + step)))
        if checkpoint is not None:
            checkpoint.write(partial(_state, parts, generators))
        shown.update()
        shown.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    shown.close()
    return average.to(CPU).eval()


class Order:
    """Row numbers of each step, reshuffled in each epoch.

    Args:
        n: rows.
        size: of a batch.
        epochs: passes over the rows.
        rng: shuffles.

    Attributes:
        step: that comes next.
    """

    def __init__(self, n: int, size: int, epochs: int, rng: torch.Generator) -> None:
        self.step = 0
        self._n, self._size, self._rng = n, size, rng
        self._per_epoch = math.ceil(n / size)
        self._steps = epochs * self._per_epoch
        self._rows = torch.arange(0)

    def __iter__(self) -> Iterator[Tensor]:
        while self.step < self._steps:
            at = self.step % self._per_epoch
            if not at:
                self._rows = torch.randperm(self._n, generator=self._rng)
            self.step += 1
            yield self._rows[at * self._size : (at + 1) * self._size]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"step": self.step, "rows": self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was."""
        self.step, self._rows = state["step"], state["rows"]


def _state(parts: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    return {
        **{name: part.state_dict() for name, part in parts.items()},
        **{name: generator.get_state() for name, generator in generators.items()},
    }


def _restore(
    parts: Mapping[str, Any],
    generators: Mapping[str, torch.Generator],
    state: Mapping[str, Any],
) -> None:
    for name, part in parts.items():
        part.load_state_dict(state[name])
    for name, generator in generators.items():
        generator.set_state(state[name])


@torch.inference_mode()
def accuracy(net: Callable[[Tensor], Tensor], data: Dataset, batch: int = 500) -> float:
    """Share of `data` whose arg-max is the label, in [0, 1]."""
    images, labels = as_tensors(data)
    hits = 0
    for i in range(0, len(data), batch):
        hits += int((net(images[i : i + batch]).argmax(1) == labels[i : i + batch]).sum())
    return hits / len(data)


def as_tensors(data: Dataset) -> tuple[Tensor, Tensor]:
    """(images float32 (N, C, H, W) in [0, 1], labels int64 (N,))."""
    planar: npt.NDArray[np.uint8] = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2))
    return torch.from_numpy(planar).float().div_(255), torch.from_numpy(data.labels)


def batches(n: int, size: int, epochs: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Row numbers, reshuffled in each epoch."""
    for _ in range(epochs):
        yield from torch.randperm(n, generator=rng).split(size)


def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Let the moving average of a network's weights take a step towards `net`."""
    with torch.no_grad():
        for weight, fast in zip(average.parameters(), net.parameters(), strict=True):
            weight.lerp_(fast, 1 - decay)
        for buffer, now in zip(average.buffers(), net.buffers(), strict=True):
            buffer.copy_(now)


def crop(pad: int) -> Augment:
    """Shift by up to `pad` pixels each way; the border is mirrored."""

    def apply(x: Tensor, rng: torch.Generator) -> Tensor:
        n, _, h, w = x.shape
        wide = F.pad(x, (pad,) * 4, mode="reflect")
        dy, dx = torch.randint(0, 2 * pad + 1, (2, n), generator=rng)
        rows = dy.view(n, 1) + torch.arange(h)
        cols = dx.view(n, 1) + torch.arange(w)
        return wide.permute(0, 2, 3, 1)[
            torch.arange(n).view(n, 1, 1), rows.view(n, h, 1), cols.view(n, 1, w)
        ].permute(0, 3, 1, 2)

    return apply


def flip(x: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror half of the images left to right."""
    chosen = torch.rand(len(x), generator=rng) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), x.flip(3), x)


def cutout(size: int) -> Augment:
    """Grey out a square of `size` pixels (DeVries and Taylor, arXiv 1708.04552)."""

    def apply(x: Tensor, rng: torch.Generator) -> Tensor:
        n, _, h, w = x.shape
        cy = torch.randint(0, h, (n, 1, 1), generator=rng)
        cx = torch.randint(0, w, (n, 1, 1), generator=rng)
        far_y = (torch.arange(h).view(1, h, 1) - cy).abs() > size // 2
        far_x = (torch.arange(w).view(1, 1, w) - cx).abs() > size // 2
        return torch.where((far_y | far_x).unsqueeze(1), x, torch.tensor(0.5))

    return apply


def affine(degrees: float, shift: float, scale: float, shear: float = 0.0) -> Augment:
    """Rotate by up to `degrees`, shift by up to `shift` of the side, scale by 1 +- `scale`."""

    def apply(x: Tensor, rng: torch.Generator) -> Tensor:
        n = len(x)
        u = torch.rand(5, n, generator=rng) * 2 - 1
        angle = u[0] * math.radians(degrees)
        zoom = 1 + u[1] * scale
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        row1 = torch.stack([cos, -sin + shear * u[4], u[2] * 2 * shift], 1)
        row2 = torch.stack([sin, cos, u[3] * 2 * shift], 1)
        grid = F.affine_grid(torch.stack([row1, row2], 1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    return apply


def light(amount: float) -> Augment:
    """Brightness and contrast of each image times 1 +- `amount`."""

    def apply(x: Tensor, rng: torch.Generator) -> Tensor:
        u = 1 + (torch.rand(2, len(x), 1, 1, 1, generator=rng) * 2 - 1) * amount
        mean = x.mean((1, 2, 3), keepdim=True)
        return (((x - mean) * u[0] + mean) * u[1]).clamp(0, 1)

    return apply


def chain(*steps: Augment) -> Augment:
    """One after the other."""

    def apply(x: Tensor, rng: torch.Generator) -> Tensor:
        for step in steps:
            x = step(x, rng)
        return x

    return apply


AUGMENTS: dict[str, Augment] = {
    "none": lambda x, _: x,
    "flips": chain(crop(4), flip),
    "crops": crop(4),
    "digits": affine(degrees=12, shift=0.08, scale=0.12),
    "objects": chain(crop(4), flip, cutout(8)),
    # crop, scale, flip and cutout; the second for images that mean something else when mirrored
    "scaled": chain(affine(degrees=0, shift=0.1, scale=0.2), flip, cutout(8)),
    "scaled_upright": chain(affine(degrees=8, shift=0.1, scale=0.2), cutout(6)),
    "signs": chain(affine(degrees=10, shift=0.08, scale=0.15, shear=0.1), light(0.5), cutout(6)),
}

RECIPES: dict[str, Recipe] = {
    "mnist": Recipe("small_cnn", epochs=18, lr=0.2, augment="digits", ema=0.99),
    "cifar10": Recipe("resnet9", epochs=30, lr=0.3, augment="objects"),
    "gtsrb": Recipe("resnet9", epochs=60, lr=0.2, augment="signs", batch=128),
    # A test part is split off, as the shared files have none.
    "cifar100": Recipe("resnet9_half", epochs=30, lr=0.2, augment="flips", data="cifar100-split"),
    "cifar10-resnet18": Recipe("resnet18", epochs=30, lr=0.2, augment="objects", data="cifar10"),
    # Small and offline, for the tutorial.
    "digits": Recipe(
        "small_cnn", epochs=6, lr=0.05, augment="digits", batch=32, ema=0.98, holdout=0.1
    ),
}
