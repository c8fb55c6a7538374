"""Answers cleaned by a network that learned from made-up pairs, whatever the defense.

Sources: Chen et al., "D-DAE: Defense-Penetrating Model Extraction Attacks" (IEEE S&P 2023), and its
use in Tang et al., "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks"
(USENIX Security 2024). There the clean rows are answers of shadow models, and a first network tells
which defense runs; here the rows are drawn and one network learns all defenses at once, so that it
needs no data and no query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from scumble.attacker import device
from scumble.attacker.adapt.base import Mapped, ModifierParameters
from scumble.attacker.adapt.perturbation_formulas import Array, gate, perturb
from scumble.attacker.adapt.posteriors import draw
from scumble.attacker.oracle import Oracle
from scumble.attacker.transports import Images, Probs
from scumble.progress import bar

BATCH = 256
SMALLEST = 1e-6  # probabilities below look alike to the network


@dataclass(frozen=True)
class Recover(ModifierParameters):
    """Every row through a network from (y, p) pairs of unknown defenses of unknown strength.

    Rows are sorted by y before and put back after, so classes are treated alike. Wrapping trains
    the network, the same one for the same seed.

    Attributes:
        pairs: drawn rows, 1 to 10 million.
        epochs: over them, 1 to 10,000.
        hidden: widths of the layers.
        learning_rate: of Adam at first; falls to 0 along a cosine.
        scales: of the logits of the drawn rows.
        seed: of rows and network.

    Raises:
        AttackError: a parameter is out of range.
    """

    pairs: int = 50_000
    epochs: int = 30
    hidden: Sequence[int] = (256, 128)
    learning_rate: float = 1e-3
    scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_integer("pairs", 1, 10_000_000)
        self._check_integer("epochs", 1, 10_000)
        self._check_positives("hidden", int)
        self._check_number("learning_rate", 1e-6, 1)
        self._check_positives("scales", float)
        self._check_integer("seed", 0, 2**63 - 1)

    def __call__(self, oracle: Oracle, student: nn.Module) -> Oracle:
        """The oracle with cleaned answers."""
        del student
        network = self._train(oracle.labels)

        def answer(rows: Probs, images: Images) -> Probs:
            del images
            y = torch.from_numpy(rows).to(device.of(network))
            y, order = y.sort(dim=1, descending=True, stable=True)
            with torch.no_grad():
                p = network(y).softmax(dim=1)
            cleaned: Probs = torch.empty_like(p).scatter_(1, order, p).cpu().numpy()
            return cleaned

        return Mapped(oracle, answer)

    def _train(self, classes: int) -> _Denoiser:
        rng = np.random.default_rng(self.seed)
        clean = draw(self.pairs, classes, self.scales, rng)
        defended = _defend(clean, rng)
        order = np.argsort(-defended, axis=1, kind="stable")
        y = torch.from_numpy(np.take_along_axis(defended, order, axis=1).astype(np.float32))
        p = torch.from_numpy(np.take_along_axis(clean, order, axis=1).astype(np.float32))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = _Denoiser(classes, self.hidden)
        where = device.best()
        y, p, network = y.to(where), p.to(where), network.to(where)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        steps = self.epochs * -(-self.pairs // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        shown = bar(steps, "recover", "step", shown=False)
        for _ in range(self.epochs):
            for batch in torch.randperm(self.pairs, generator=generator).split(BATCH):
                loss = (network(y[batch]).softmax(dim=1) - p[batch]).abs().sum(dim=1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                shown.update()
        shown.close()
        return network


def _defend(p: Array, rng: np.random.Generator) -> Array:
    """Rows (n, K), each moved by a defense of random kind and strength."""
    n, classes = p.shape
    gamma = rng.uniform(0.05, 0.3, (n, 1))
    beta = rng.uniform(0.3, 1.5, (n, 1))
    weak = np.exp(rng.uniform(np.log(0.02), np.log(1.5), (n, 1)))
    wrong = (p.argmax(axis=1) + rng.integers(1, classes, n)) % classes
    share = rng.uniform(0, 0.5, (n, 1))
    scale = 10.0 ** rng.integers(1, 5, (n, 1))
    rounded = np.rint(p * scale)
    rounded = np.where(rounded.any(axis=1, keepdims=True), rounded, p)
    answers = [
        p,
        perturb(p, beta * gate(p.max(axis=1, keepdims=True), beta, 1000.0), gamma, "clamped"),
        perturb(p, weak, gamma, "clamped"),
        perturb(p, weak, gamma, "lee2018"),
        (1 - share) * p + share * np.eye(classes)[wrong],
        rounded / rounded.sum(axis=1, keepdims=True),
    ]
    moved: Array = np.stack(answers)[rng.integers(0, len(answers), n), np.arange(n)]
    return moved


class _Denoiser(nn.Module):
    """Sorted rows (N, K) -> logits (N, K), as a change of their logarithms."""

    def __init__(self, classes: int, hidden: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 2 * classes
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, classes))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        log = y.clamp_min(SMALLEST).log()
        out: torch.Tensor = log + self.layers(torch.cat([y, log / 4], dim=1))
        return out
