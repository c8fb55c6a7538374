"""What is served: model card, policy, settings, and the defenses that the page offers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.access.keys import read_keys
from app.errors import ConfigError, Unprocessable
from app.inference.bundle import GOLDEN_COUNT, Card, open_bundle
from app.inference.engine_selection import resolve
from app.inference.image_formats import FORMATS
from app.inference.policy_presets import policy_presets
from app.settings import Settings, shown, variables

ACTIVE = "active"


@dataclass(frozen=True)
class Knob:
    """A defense that the page offers, with a slider for one parameter.

    Attributes:
        says: one sentence for the operator.
        parameter: set by the slider; None for a defense without parameters.
        low: lower end of the slider.
        high: upper end; None for the number of classes.
        step: of the slider.
        start: initial value, unless this is the active policy.
    """

    says: str
    parameter: str | None = None
    low: float = 0
    high: float | None = 0
    step: float = 0.01
    start: float = 0


CALIBRATED = {"codebook", "withhold"}  # need what `scumble calibrate` fits

# Custom defenses (`FILE.py:Class`) are not offered: the console must not load files by name.
KNOBS = {
    "dcp": Knob("Moves rows less confident than beta; from 1 on, all rows.", "beta", 0, 3, start=1),
    "reverse_sigmoid": Knob("Moves every row, whatever its confidence.", "beta", 0, 3, start=0.6),
    "random": Knob("Moves epsilon/2 of the mass to a wrong class.", "epsilon", 0, 2, start=0.5),
    "round": Knob("Rounds to this number of decimals.", "decimals", 1, 8, step=1, start=2),
    "top_k": Knob("Keeps the k largest probabilities.", "k", 1, None, step=1, start=3),
    "label": Knob("Returns the label only, with probability 1."),
    "codebook": Knob("Keeps the label and one of a few levels of confidence."),
    "withhold": Knob(
        "Gives no answer to images unlike your own, or that the network is unsure of; loss is the "
        "share of your own images among these.",
        "loss",
        0.001,
        0.1,
        step=0.001,
        start=0.01,
    ),
    "none": Knob("Returns the clean probabilities."),
}
# What `withhold` may answer with: none of these has a defense among its parameters.
ANSWERS = tuple(name for name in KNOBS if name != "withhold")


def about(settings: Settings, model_dir: Path) -> dict[str, Any]:
    """Everything on the page that stays the same until the next reload.

    Args:
        settings: of the service.
        model_dir: folder of the served bundle.

    Raises:
        ConfigError: the bundle or the engine cannot be found.
    """
    card = open_bundle(model_dir, settings.model).card
    return {
        "model": {
            **card.model_dump(include={"name", "version", "labels", "input", "accuracy"}),
            "precision": settings.precision,
            "engine": resolve(settings.engine, settings.precision),
            "served_file": card.served_file(settings.precision),
            "files": card.files,
            "data_licence": card.data_licence,
        },
        "policy": {
            "defense": settings.defense,
            "params": card.defense_params(settings.defense, settings.defense_params),
        },
        "defenses": offered(settings, card),
        "presets": [asdict(each) for each in policy_presets(card, settings.precision)],
        "copies": measured_copies(settings, card),
        "golden": GOLDEN_COUNT,
        "formats": sorted(FORMATS),
        "max_body_bytes": settings.limits.max_body_bytes,
        "settings": [
            {"name": name, "value": shown(settings, name), "says": says}
            for name, says in variables().items()
        ],
    }


def offered(settings: Settings, card: Card) -> list[dict[str, Any]]:
    """The defenses of the page's list; the slider of the active one starts at its value.

    Those that need what the bundle lacks are left out.
    """
    fitted = {preset.defense for preset in policy_presets(card, settings.precision)}
    rows = []
    for name, knob in KNOBS.items():
        if name in CALIBRATED and name not in fitted:
            continue
        high = len(card.labels) if knob.high is None else knob.high
        given = settings.defense_params if name == settings.defense else {}
        params = card.defense_params(name, given)
        start = params.get(knob.parameter or "", min(knob.start, high))
        step = knob.step
        while abs(start / step - round(start / step)) > 1e-6:  # the slider can stand at its start
            step /= 10
        span = {"low": min(knob.low, start), "high": max(high, start), "start": start, "step": step}
        rows.append({**asdict(knob), **span, "name": name, "params": params})
    if settings.defense not in KNOBS:
        fixed = Knob("The served defense; its parameters cannot be changed here.")
        rows.insert(0, {**asdict(fixed), "name": ACTIVE, "params": {}})
    return rows


def measured_copies(settings: Settings, card: Card) -> list[dict[str, Any]]:
    """What attackers made of the model that is served, as far as it was measured."""
    precision = "float32" if settings.precision == "bf16" else settings.precision
    return [copy.model_dump() for copy in card.copies if copy.precision == precision]


def client_policies(keys_file: Path | None) -> dict[str, list[str]]:
    """The policies of each client's valid keys, in words; empty if there is no readable file."""
    if keys_file is None:
        return {}
    try:
        keys = read_keys(keys_file).keys
    except ConfigError:
        return {}
    found: dict[str, list[str]] = {}
    for key in keys:
        if key.revoked is None:
            given = ", ".join(f"{name} {value}" for name, value in key.defense_params.items())
            defense = key.defense or "as served"
            form = "" if key.output.form == "full" else f", {key.output.form}"
            words = f"{defense} ({given}){form}" if given else f"{defense}{form}"
            if words not in found.setdefault(key.client, []):
                found[key.client].append(words)
    return found


def policy(settings: Settings, name: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The defense and parameters for a name of the page's list.

    Raises:
        Unprocessable: the page does not offer this name, or what `withhold` answers with.
    """
    if name == ACTIVE:
        return settings.defense, settings.defense_params
    if name not in KNOBS:
        raise Unprocessable(f"defense is {name[:64]!r}; allowed: {', '.join([*KNOBS, ACTIVE])}")
    match params.get("answers"):
        case [inner, *_] if inner not in ANSWERS:
            raise Unprocessable(
                f"answers are those of {str(inner)[:64]!r}; allowed: {', '.join(ANSWERS)}"
            )
    return name, params
