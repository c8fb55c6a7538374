"""DisGUIDE: data-free, from labels; the generator looks for images on which two copies disagree.

Source: Rosenthal, Enouen, Pham, Tan, "DisGUIDE: Disagreement-Guided Data-Free Model Extraction"
(AAAI 2023). As in IDEAL no gradient of the service is estimated, and each image that is made costs
one query. The generator maximises the standard deviation of the copies' probabilities, mean over
the classes, and the entropy of their mean label over the batch. Both copies learn from all labels
in the memory; the first of them is what the attack leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scumble.attacker.attacks.ideal import Ideal, entropy
from scumble.attacker.errors import AttackError
from scumble.attacker.pretrained import Pretrained
from scumble.attacker.students import forward


@dataclass(frozen=True)
class Disguide(Ideal):
    """`Ideal` with another loss of the generator, and a second copy for it.

    Attributes:
        spread: weight of the mean label's entropy.
    """

    spread: float = 0.2
    difference: float = 0.0

    def check(self, budget: int, *, images: bool) -> None:
        """See `Attack`."""
        super().check(budget, images=images)
        if self.difference:
            raise AttackError(f"difference is {self.difference}; allowed in disguide: 0")

    def _copies(self, student: nn.Module) -> list[nn.Module]:
        """The copy, and one of the same kind with other weights; pretrained ones are kept."""
        other = copy.deepcopy(student)
        learning: list[nn.Module] = [
            part.head for part in other.modules() if isinstance(part, Pretrained)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            for layer in (layer for part in learning or [other] for layer in part.modules()):
                if callable(reset := getattr(layer, "reset_parameters", None)):
                    reset()
        return [student, other]

    def _wanted(self, copies: list[nn.Module], x: Tensor) -> Tensor:
        """Less where the copies disagree, and where all labels are as frequent."""
        rows = torch.stack([forward(each, x).softmax(1) for each in copies])
        disagreement = rows.std(0, unbiased=False).mean()
        return -disagreement - self.spread * entropy(rows.mean(0).mean(0))


def paper(seed: int) -> Disguide:
    """A wider generator and more steps of the copies, for a GPU."""
    return Disguide(batch=256, g_steps=1, s_steps=50, width=64, memory=250_000, seed=seed)


def cpu(seed: int) -> Disguide:
    """For two cores."""
    return Disguide(g_steps=3, s_steps=6, seed=seed)


PROFILES: dict[str, Callable[[int], Disguide]] = {"paper": paper, "cpu": cpu}
