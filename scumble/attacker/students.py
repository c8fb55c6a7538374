"""Copies to be trained, and the one loop that fits them to stolen answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scumble.attacker import device, ranges
from scumble.attacker.errors import AttackError
from scumble.attacker.losses import LABELS_ALONE, LOSSES
from scumble.attacker.pretrained import efficientnet
from scumble.attacker.transports import Images, Probs
from scumble.progress import bar
from scumble.training.autocast import autocast
from scumble.training.nets import Normalize, resnet9, small_cnn
from scumble.training.train import AUGMENTS, batches, follow

TINY = 1e-12
"""Smallest probability that says anything (rounding, underflow); answers are clamped to it."""
WHY = 200  # characters of an error of torch's


@dataclass(frozen=True)
class Fitting:
    """How a student is fitted to a transfer set.

    Attributes:
        epochs: passes over the answered queries.
        lr: peak of the learning rate, which then falls to zero as a cosine.
        optimizer: key of `OPTIMIZERS`.
        loss: key of `LOSSES`.
        augment: key of `training.train.AUGMENTS`; the answers stay those of the images sent.
        batch: images per step.
        weight_decay: on all weights.
        warmup: share of the steps in which the learning rate rises.
        ema: decay per step of the averaged copy of the weights, which is kept; 0 keeps the last.
        smoothing: share of each target that is spread over all classes.
        mixup: images and targets are mixed in pairs, by shares from Beta(mixup, mixup); 0 mixes
            none. Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018).
        noise: share of wrong labels that `small_loss` expects.
        holdout: share of the answers that are not learned; of the averaged copies after each epoch
            the one that agrees best with them is kept. 0 keeps the last.
        patience: epochs without a better agreement after which the fit ends; 0 goes to the end.
        seed: of order and augmentation.
    """

    epochs: int = 15
    lr: float = 3e-3
    optimizer: str = "adamw"
    loss: str = "soft"
    augment: str = "none"
    batch: int = 128
    weight_decay: float = 5e-4
    warmup: float = 0.2
    ema: float = 0.995
    smoothing: float = 0.0
    mixup: float = 0.0
    noise: float = 0.1
    holdout: float = 0.0
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        tables: dict[str, Mapping[str, object]] = {
            "optimizer": OPTIMIZERS,
            "loss": LOSSES,
            "augment": AUGMENTS,
        }
        for name, table in tables.items():
            if (value := getattr(self, name)) not in table:
                raise AttackError(f"{name} is {value!r}; allowed: {', '.join(table)}")
        ranges.check(self)
        if self.patience and not self.holdout:
            raise AttackError(f"patience is {self.patience}; allowed with a holdout: more than 0")
        if self.smoothing and self.loss == "centred":
            raise AttackError(f"smoothing is {self.smoothing}; allowed with the loss centred: 0")


OPTIMIZERS: dict[str, Callable[[nn.Module, Fitting], torch.optim.Optimizer]] = {
    "adamw": lambda net, how: torch.optim.AdamW(
        net.parameters(), how.lr, weight_decay=how.weight_decay
    ),
    "sgd": lambda net, how: torch.optim.SGD(
        net.parameters(), how.lr, momentum=0.9, nesterov=True, weight_decay=how.weight_decay
    ),
}


def separable(cin: int, cout: int, *, pool: bool = False) -> nn.Sequential:
    """Depthwise 3x3, then pointwise convolution, batch norm and ReLU after each."""
    return nn.Sequential(
        nn.Conv2d(cin, cin, 3, padding=1, groups=cin, bias=False),
        nn.BatchNorm2d(cin),
        nn.ReLU(),
        nn.Conv2d(cin, cout, 1, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(),
        *([nn.MaxPool2d(2)] if pool else []),
    )


def mobile(channels: int, classes: int, width: int = 32) -> nn.Sequential:
    """Another family than the victims: depthwise separable convolutions, average pooling."""
    w = width
    return nn.Sequential(
        nn.Conv2d(channels, w, 3, padding=1, bias=False),
        nn.BatchNorm2d(w),
        nn.ReLU(),
        separable(w, 2 * w, pool=True),
        separable(2 * w, 4 * w),
        separable(4 * w, 4 * w, pool=True),
        separable(4 * w, 8 * w),
        separable(8 * w, 8 * w),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * w, classes),
    )


# name -> (channels, classes) -> network without its Normalize layer
STUDENTS: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": small_cnn,  # what serves `mnist`
    "resnet9": resnet9,  # what serves `cifar10` and `gtsrb`
    "resnet9_half": lambda channels, classes: resnet9(channels, classes, width=16),
    "mobile": mobile,
    "efficientnet": efficientnet,  # begins with ImageNet's weights
    "efficientnet_frozen": partial(efficientnet, frozen=True),
}


def make(
    name: str, shape: tuple[int, int, int], labels: int, *, seed: int, weights: Path | None = None
) -> nn.Module:
    """A student: float32 (N, C, H, W) in [0, 1] -> logits (N, K).

    Args:
        name: key of `STUDENTS`; `auto` is `small_cnn` for grey images, `resnet9` for others.
        shape: (C, H, W).
        labels: K.
        seed: of the weights.
        weights: state dict to start from, as `scumble attack` writes it.

    Raises:
        AttackError: no such student, or weights that do not fit it; or the student begins with the
            weights of a package that is not installed.
    """
    if name == "auto":
        name = "small_cnn" if shape[0] == 1 else "resnet9"
    if name not in STUDENTS:
        raise AttackError(f"student is {name!r}; allowed: auto, {', '.join(STUDENTS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = STUDENTS[name](shape[0], labels)
    net = nn.Sequential(Normalize([0.5] * shape[0], [0.25] * shape[0]), body)
    if weights is not None:
        try:
            net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as exc:  # torch raises a dozen kinds for a wrong file
            why = " ".join(f"{type(exc).__name__}: {exc}".split())[:WHY]
            raise AttackError(f"weights {str(weights)!r} do not fit {name}: {why}") from exc
    return net.to(device.best()).to(memory_format=torch.channels_last)


def save(net: nn.Module, path: Path) -> None:
    """Write the weights of a student, to be read also by machines without a GPU."""
    torch.save(weights_on_cpu(net), path)


def weights_on_cpu(net: nn.Module) -> dict[str, Tensor]:
    """The state of a network with every tensor copied to the CPU."""
    weights = net.state_dict()
    weights.update({name: weight.cpu() for name, weight in weights.items()})
    return weights


def usable(answers: Tensor) -> Tensor:
    """Answers (N, K) as targets: clamped to `TINY`, rows that sum to 1; NaN rows stay."""
    y = answers.clamp_min(TINY)
    return y / y.sum(1, keepdim=True)


def falling(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that rises over `warmup` of the steps, then falls to zero as a cosine."""
    rise = max(1.0, warmup * steps)

    def factor(step: int) -> float:
        if step < rise and warmup > 0:
            return (step + 1) / (rise + 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - rise) / max(1.0, steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit(
    net: nn.Module, images: Images, answers: Probs, fitting: Fitting, *, progress: bool = False
) -> None:
    """Fit `net` to answers; leaves it in eval mode.

    Args:
        net: changed in place.
        images: float32 (N, C, H, W) in [0, 1], as they were sent.
        answers: (N, K) of the service; rows of NaN are ignored.
        fitting: how.
        progress: show a bar.

    Raises:
        AttackError: fewer than two answers are left.
    """
    kept = np.isfinite(answers).all(1)
    if kept.sum() < 2:
        raise AttackError(f"{kept.sum()} of {len(answers)} answers can be used; at least 2 needed")
    rng = torch.Generator().manual_seed(fitting.seed)
    x, y = torch.from_numpy(images[kept]), targets(answers[kept], fitting)
    (x, held_x), (y, held_y) = held_out(x, fitting), held_out(y, fitting)
    # Batch norm needs two images; a last batch of one is left to the next epoch.
    per_epoch = len(x) // fitting.batch + (len(x) % fitting.batch > 1)
    if not per_epoch:
        raise AttackError(
            f"holdout is {fitting.holdout}, which leaves {len(x)} of {len(x) + len(held_x)} "
            "answers to learn; at least 2 needed"
        )
    steps = fitting.epochs * per_epoch
    optimizer = OPTIMIZERS[fitting.optimizer](net, fitting)
    schedule = falling(optimizer, steps, fitting.warmup)
    loss_of = LOSSES[fitting.loss](len(x), y.shape[1], fitting.noise)
    augment = AUGMENTS[fitting.augment]
    average = copy.deepcopy(net).requires_grad_(False)
    best = Best(held_x, held_y)
    shown = bar(steps, "fit", "step", shown=progress)
    net.train()
    whole = (rows for rows in batches(len(x), fitting.batch, fitting.epochs, rng) if len(rows) > 1)
    for step, rows in enumerate(whole):
        inputs, other, share = augment(x[rows], rng), rows, 1.0
        if fitting.mixup:
            share, order = mixture(fitting.mixup, len(rows), rng)
            other, inputs = rows[order], inputs * share + inputs[order] * (1 - share)
        logits = forward(net, inputs)
        loss = share * loss_of(logits, y[rows].to(logits.device), rows, step / steps)
        if fitting.mixup:
            loss += (1 - share) * loss_of(logits, y[other].to(logits.device), other, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        follow(average, net, min(fitting.ema, (1 + step) / (10 + step)))
        shown.update()
        shown.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if len(held_x) and (step + 1) % per_epoch == 0:
            best.see(average)
            if fitting.patience and best.waited >= fitting.patience:
                break
    shown.close()
    net.load_state_dict(best.weights or average.state_dict())
    net.eval()


def targets(answers: Probs, fitting: Fitting) -> Tensor:
    """What the copy is to say, (N, K)."""
    y = usable(torch.from_numpy(answers))
    if fitting.loss in LABELS_ALONE:
        y = torch.eye(y.shape[1])[y.argmax(1)]
    return y * (1 - fitting.smoothing) + fitting.smoothing / y.shape[1]


def held_out(rows: Tensor, fitting: Fitting) -> tuple[Tensor, Tensor]:
    """(those that are learned, those that are held out), chosen by the seed."""
    held = round(fitting.holdout * len(rows))
    if not held:
        return rows, rows[:0]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(fitting.seed))
    return rows[order[held:]], rows[order[:held]]


def mixture(alpha: float, n: int, rng: torch.Generator) -> tuple[float, Tensor]:
    """A share from Beta(alpha, alpha), 1/2 and more, and whom each of `n` images is mixed with."""
    # Two Gamma variables by a generator of numpy's, as torch's cannot be seeded for them.
    seed = int(torch.randint(2**31, (1,), generator=rng))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    return max(share, 1 - share), torch.randperm(n, generator=rng)


class Best:
    """The copy that agrees best with answers that it has not learned.

    Args:
        images: (N, C, H, W).
        answers: (N, K).
    """

    def __init__(self, images: Tensor, answers: Tensor) -> None:
        self._images = images.numpy()
        self._labels = answers.argmax(1).numpy()
        self._agreement = -1.0
        self.weights: dict[str, Tensor] | None = None
        self.waited = 0

    def see(self, net: nn.Module) -> None:
        """Keep the weights if they are the best so far; `waited` counts those that were not."""
        agreement = float((predict(net, self._images).argmax(1) == self._labels).mean())
        self.waited += 1
        # As good counts as better: later copies have seen more.
        if agreement >= self._agreement:
            self.waited = 0 if agreement > self._agreement else self.waited
            self._agreement = agreement
            self.weights = copy.deepcopy(net.state_dict())


def forward(net: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, K) in float32; the layers work in bfloat16 where that is fast."""
    x = x.to(device.of(net))
    with autocast(x.device.type):
        logits: Tensor = net(x.contiguous(memory_format=torch.channels_last))
    return logits.float()


@torch.inference_mode()
def predict(net: nn.Module, images: Images, batch: int = 500) -> Probs:
    """Probabilities (N, K) of the copy; leaves it in the mode it was in."""
    training = net.training
    net.eval()
    where = device.of(net)
    parts = [
        net(part.to(where)).softmax(1).cpu().numpy()
        for part in torch.from_numpy(images).split(batch)
    ]
    net.train(training)
    return np.concatenate(parts)
