"""Coverage: ask about the images of a pool that are furthest from all that was asked about.

Source: Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach"
(ICLR 2018), its greedy k-centre choice; Pal et al., "ActiveThief: Model Extraction Using Active
Learning and Unannotated Public Data" (AAAI 2020), which steals with it. A first part of the budget
goes to images drawn at random. A copy is fitted to the answers, and the images of the pool whose
features in that copy are furthest from those of all images asked about are asked next, in steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from scumble.attacker import device
from scumble.attacker.attacks import knockoff
from scumble.attacker.attacks.knockoff import Rows
from scumble.attacker.attacks.mask_seeking import MaskSeeking, Seeker, answered
from scumble.attacker.errors import AttackError
from scumble.attacker.oracle import Oracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import fit, forward
from scumble.attacker.transports import Images, Probs
from scumble.progress import bar

Floats = npt.NDArray[np.float32]
BATCH = 500


@dataclass(frozen=True)
class Coverage(MaskSeeking):
    """`MaskSeeking` with another choice of queries.

    Attributes:
        epochs: of the copy that is fitted before each step.
        candidates: images of the pool that a step chooses from at most, drawn at random.
    """

    epochs: int = 4
    candidates: int = 20_000

    def _plan(self, oracle: Oracle, pool: Pool, student: nn.Module) -> Coverer:
        return Coverer(self, oracle, pool, student)


class Coverer(Seeker):
    """The plan: a random part, then greedy k-centre in the features of a copy.

    Args:
        attack: its settings.
        oracle: what will be asked.
        pool: the images.
        student: the copy before it has learned.
    """

    def __init__(self, attack: Coverage, oracle: Oracle, pool: Pool, student: nn.Module) -> None:
        super().__init__(attack, oracle, pool)
        self._how = replace(attack.fitting, epochs=attack.epochs)
        self._candidates = attack.candidates
        self._student = copy.deepcopy(student)
        self._start = copy.deepcopy(student.state_dict())
        self._answers: list[Probs] = []

    def learn(self, rows: Rows, answers: Probs) -> None:
        """Note the answers."""
        super().learn(rows, answers)
        self._answers.append(answers)

    def _sort(self, count: int) -> None:
        """Put the next `count` images of what is left first."""
        asked, answers = np.concatenate(self._asked), np.concatenate(self._answers)
        known = answered(answers)
        if known.sum() < 2:  # nothing to fit a copy to
            return
        self._student.load_state_dict(self._start)
        fit(self._student, self._pool.images[asked[known]], answers[known], self._how)
        among = self._left[: max(count, self._candidates)]
        points, centres = (features(self._student, self._pool.images[r]) for r in (among, asked))
        first = furthest(points, centres, min(count, len(among)))
        chosen = among[first]
        self._left = np.concatenate([chosen, self._left[~np.isin(self._left, chosen)]])


@torch.inference_mode()
def features(net: nn.Module, images: Images) -> Floats:
    """What enters the last linear layer for each image (N, d), each of length 1.

    Raises:
        AttackError: the network has no linear layer.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise AttackError(
            f"coverage needs a copy with a linear layer; {type(net).__name__} has none"
        )
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del layer
        seen.append(inputs[0].flatten(1).float().cpu())

    hook = layers[-1].register_forward_pre_hook(keep)
    net.eval()
    for part in torch.from_numpy(images).split(BATCH):
        forward(net, part.to(device.of(net)))
    hook.remove()
    rows = torch.cat(seen)
    found: Floats = (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)).numpy()
    return found


def furthest(points: Floats, centres: Floats, count: int) -> npt.NDArray[np.int64]:
    """Greedy k-centre: `count` points, each the furthest from all centres and points before it.

    Args:
        points: (N, d), of length 1.
        centres: (M, d), of length 1.
        count: at most N.

    Returns:
        Row numbers of the points, in the order of the choice.
    """
    # For vectors of length 1 the nearest has the largest product.
    nearest = np.concatenate([(part @ centres.T).max(axis=1) for part in _split(points)])
    chosen = np.empty(count, np.int64)
    shown = bar(count, "choice", "image", shown=False)
    for i in range(count):
        chosen[i] = best = int(nearest.argmin())
        np.maximum(nearest, points @ points[best], out=nearest)
        nearest[best] = np.inf
        shown.update()
    shown.close()
    return chosen


def _split(rows: Floats) -> list[Floats]:
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def paper(seed: int) -> Coverage:
    """The published fit of `knockoff`, ten steps of the budget."""
    return Coverage(fitting=knockoff.paper(seed).fitting, first=0.1, steps=9, epochs=10, seed=seed)


def cpu(seed: int) -> Coverage:
    """For two cores."""
    return Coverage(fitting=knockoff.cpu(seed).fitting, seed=seed)


PROFILES: dict[str, Callable[[int], Coverage]] = {"paper": paper, "cpu": cpu}
