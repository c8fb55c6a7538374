"""Writes what the records say into the cards of `models/`: recommended parameters, best copies.

python -m docs.generators.recommended
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from app.inference.bundle import open_bundle, write_card
from docs.generators.policies import CELLS
from scumble.evaluation.claims import advice, default_strengths
from scumble.evaluation.summary import Line, best, load, summarise
from scumble.evaluation.tables import ordered

MODELS = Path(__file__).parents[2] / "models"
LOSS = 0.01  # of own answers, what the policies are compared at


def recommended() -> dict[str, dict[str, dict[str, Any]]]:
    """Parameters by bundle and defense."""
    lines = ordered(summarise(load(CELLS)))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for bundle, beta in default_strengths(advice(lines)).items():
        found[bundle] = {"dcp": {"beta": beta}}
    for bundle, params in withhold_params(lines).items():
        found.setdefault(bundle, {})["withhold"] = params
    return found


def withhold_params(lines: Iterable[Line]) -> dict[str, dict[str, Any]]:
    """By bundle: of the measured losses of at most `LOSS`, the one with the least accurate copy."""
    found: dict[str, Line] = {}
    for line in best(line for line in lines if line.tuned):
        if line.defense.name == "withhold" and line.defense.params["loss"] <= LOSS:
            known = found.setdefault(line.victim, line)
            found[line.victim] = min(known, line, key=lambda each: each.stolen.mean)
    return {bundle: line.defense.params for bundle, line in found.items()}


def copies() -> dict[str, list[dict[str, Any]]]:
    """The most accurate copy under each measured policy, by bundle, in the order of the plots."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in best(ordered(summarise(load(CELLS)))):
        found.setdefault(line.victim, []).append(
            {
                "precision": line.precision,
                "defense": line.defense.name,
                "params": line.defense.params,
                "attacker": line.attacker,
                "queries": line.budget,
                "copied": round(line.stolen.mean, 4),
                "served": round(line.served.mean, 4),
                "seeds": len(line.seeds),
            }
        )
    return found


@click.command()
def main() -> None:
    """Write the cards."""
    write_cards()


def write_cards() -> None:
    """Write what the records say now into the cards of the bundles."""
    strengths = recommended()
    for name, stolen in copies().items():
        defenses = strengths.get(name, {})
        bundle = open_bundle(MODELS, name)
        card = bundle.card.model_dump(mode="json", exclude={"format", "files"})
        card |= {"recommended": defenses, "copies": stolen}
        write_card(bundle.folder, card)
        click.echo(f"{bundle.folder / 'card.json'}: {defenses}")


if __name__ == "__main__":
    main()
