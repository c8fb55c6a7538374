"""Warnings about policies that do nothing, or more than their owner may want."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from app.inference.bundle import GATE_FILE, Card, golden_inputs
from app.inference.engines import Probs
from app.inference.policy_presets import recommended_policy
from app.precision import Precision
from scumble import defenses
from scumble.defenses.chain import Chain
from scumble.defenses.codebook import Codebook
from scumble.defenses.dcp import DCP
from scumble.defenses.label import Label
from scumble.defenses.none import NoDefense
from scumble.defenses.withhold import Withhold

REASONS = {
    "withhold": "withhold keeps the label and a confidence, and gives no answer to most images "
    "unlike your own; drawn ones may pass",
    "codebook": "codebook keeps the label and a confidence, and nothing can be recovered from it",
    "label": "label keeps the label; after scumble calibrate, codebook keeps a confidence as well",
}
"""Why each policy is recommended, where it is."""

MANY = 100  # classes from which dcp moves labels
GATE = 0.03  # half the width of dcp's gate at its default nu
UNCHANGED = 1e-6
# What untrained networks answer at most: twice 1/K of many classes, 1/K and a tenth of the rest of
# few. A network that was trained with outliers is not much surer of the self-test.
UNTRAINED, UNTRAINED_REST = 2.0, 0.1


def policy_warnings(
    card: Card, precision: Precision, clean: Probs, defense: defenses.Defense
) -> Iterator[str]:
    """Sentences for the operator about a model and the policy that defends it.

    Args:
        card: of the model.
        precision: that is served.
        clean: the model's answers to the pictures of the self-test.
        defense: the policy.
    """
    count = len(card.labels)
    if clean.max() < min(UNTRAINED / count, 1 / count + UNTRAINED_REST * (1 - 1 / count)):
        yield (
            f"the model's answers hardly differ from 1/{count} on the self-test; "
            "are its weights trained?"
        )
    steps = defense.steps if isinstance(defense, Chain) else (defense,)
    for step in steps:
        if isinstance(step, DCP):
            yield from _dcp(step, count, _accuracy(card, precision))
    if not isinstance(defense, NoDefense) and not defense.needs:
        images = golden_inputs(card.input)
        if _changes_nothing(defense(clean, images), clean):
            yield f"{defense!r} changed none of the self-test's answers: it protects nothing"


def policy_hint(card: Card, precision: Precision, defense: defenses.Defense) -> str | None:
    """What is recommended beyond a policy; None where it is followed.

    Args:
        card: of the model.
        precision: that is served.
        defense: the policy.
    """
    recommended = recommended_policy(card, precision).defense
    steps = defense.steps if isinstance(defense, Chain) else (defense,)
    if any(isinstance(step, Withhold) for step in steps):
        return None
    reduced = any(isinstance(step, Codebook | Label) for step in steps)
    if recommended == "withhold" or not reduced:
        return REASONS[recommended]
    if not card.has_logits or precision not in GATE_FILE:
        return None
    if GATE_FILE[precision] not in card.files:
        return "scumble calibrate fits withhold, which gives no answer to images unlike your own"
    if not card.auxiliary.get("gate", {}).get("foreign"):
        return (
            "scumble calibrate --foreign SET tells how many foreign images get no answer from "
            "withhold"
        )
    return None


def _stored(precision: Precision) -> str:
    return "float32" if precision == "bf16" else precision


def _changes_nothing(answers: Probs, clean: Probs) -> bool:
    return answers.shape == clean.shape and float(np.abs(answers - clean).max()) < UNCHANGED


def _accuracy(card: Card, precision: Precision) -> float | None:
    figure = card.accuracy.get(_stored(precision))
    return None if figure is None else figure.value


def _dcp(defense: DCP, count: int, accuracy: float | None) -> Iterator[str]:
    if defense.beta < 1 and (accuracy is None or accuracy > defense.beta + GATE):
        right = "" if accuracy is None else f", and this model is right on {accuracy:.1%} of images"
        yield (
            f"dcp with beta {defense.beta:g} leaves answers more confident than "
            f"{defense.beta + GATE:g} clean{right}: most answers stay clean"
        )
    if count >= MANY:
        yield (
            f"dcp on {count} classes changes the label of many answers and makes every confidence "
            "tiny; label, codebook or keep_top1 keep the label"
        )
