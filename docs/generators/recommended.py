"""Writes the recommended parameters of defenses into the cards of `models/`, from the records.

python -m docs.generators.recommended
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from app.inference.bundle import open_bundle, write_card
from docs.generators.results import CELLS
from scumble.evaluation.claims import advice, default_strengths
from scumble.evaluation.summary import load, summarise
from scumble.evaluation.tables import ordered

MODELS = Path(__file__).parents[2] / "models"


def recommended() -> dict[str, dict[str, dict[str, Any]]]:
    """Parameters by bundle and defense."""
    strengths = default_strengths(advice(ordered(summarise(load(CELLS)))))
    return {bundle: {"dcp": {"beta": beta}} for bundle, beta in strengths.items()}


@click.command()
def main() -> None:
    """Write the cards."""
    for name, defenses in recommended().items():
        bundle = open_bundle(MODELS, name)
        card = bundle.card.model_dump(mode="json", exclude={"format", "files"})
        write_card(bundle.folder, {**card, "recommended": defenses})
        click.echo(f"{bundle.folder / 'card.json'}: {defenses}")


if __name__ == "__main__":
    main()
