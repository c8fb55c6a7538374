"""Policies that a model's owner chooses from, and which of them is recommended.

`scumble check`, the table of `scumble calibrate`, the console and the demo all take them from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.inference.bundle import CODEBOOK_FILE, GATE_FILE, Card
from app.precision import Precision

LOSS = "0.02"  # of own images: the column of the card's report that decides on `withhold`
CAUGHT = 0.5  # of each foreign set; a gate that lets more pass hinders attackers little
WORTH = 0.02  # of accuracy by which a copy must fall; less is a tie
# Parameters where the card recommends none.
DEFAULTS: dict[str, dict[str, Any]] = {"dcp": {"beta": 1.2}, "withhold": {"loss": 0.01}}


@dataclass(frozen=True)
class Preset:
    """A policy with the parameters that suit the model.

    Attributes:
        defense: name of the defense.
        params: of the defense.
        recommended: whether it is the one of `recommended_policy`.
    """

    defense: str
    params: Mapping[str, Any]
    recommended: bool


def policy_presets(card: Card, precision: Precision) -> list[Preset]:
    """The policies that the bundle can serve.

    Args:
        card: of the model.
        precision: that is served.
    """
    names = ["none", "dcp", "label"]
    if CODEBOOK_FILE[precision] in card.files:
        names.append("codebook")
    recommended = names[-1]
    if GATE_FILE.get(precision) in card.files:
        names.append("withhold")
        if gate_catches(card, precision) and hinders(card):
            recommended = "withhold"
    return [
        Preset(name, card.recommended.get(name, DEFAULTS.get(name, {})), name == recommended)
        for name in names
    ]


def gate_catches(card: Card, precision: Precision) -> bool:
    """Whether `withhold` withholds at least `CAUGHT` of each foreign set at `LOSS`.

    The card's report of `scumble calibrate` says so; without foreign sets it cannot.
    """
    report = card.auxiliary.get("gate", {})
    measures: dict[str, dict[str, dict[str, float]]] = report.get(precision, {})
    both = next((each for name, each in measures.items() if name.endswith("+top")), {})
    shares = [both.get(LOSS, {}).get(name, 0.0) for name in report.get("foreign", {})]
    return bool(shares) and min(shares) >= CAUGHT


def hinders(card: Card) -> bool:
    """Whether the best copy measured under `withhold` is worse by `WORTH` than that from labels.

    True where the card has not both. Copies of either precision count: an attacker may get past the
    gate with images that are unlike the foreign sets.
    """
    best: dict[str, float] = {}
    recommended = card.recommended.get("withhold")
    for copy in card.copies:
        if copy.defense == "label" or (copy.defense, copy.params) == ("withhold", recommended):
            best[copy.defense] = max(copy.copied, best.get(copy.defense, 0.0))
    return len(best) < 2 or best["label"] - best["withhold"] > WORTH


def recommended_policy(card: Card, precision: Precision) -> Preset:
    """The one of `policy_presets` that is recommended."""
    return next(preset for preset in policy_presets(card, precision) if preset.recommended)
