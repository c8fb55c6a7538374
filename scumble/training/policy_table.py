"""What policies do to the owner's images, as a table below the commands that make bundles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from app.errors import ConfigError
from app.inference.assembly import configure_defense, load_pipeline
from app.inference.bundle import Bundle, open_bundle
from app.inference.decode import Pixels
from app.inference.pipeline import Pipeline
from app.inference.policy_effect import images_of, policy_effects
from app.inference.policy_presets import DEFAULTS, recommended_policy
from app.settings import Settings, load_settings
from scumble.defenses import Defense, DefenseError

images_option = click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with images of yours; shows the labels of the first ones, and which share of all "
    "labels policies change.",
)
NAMED = 5  # images whose label is printed
COMPARED = "dcp"  # which changes more labels, the more classes there are


def settings_of(models: Path, name: str, **more: Any) -> Settings:
    """The settings of the environment, for a bundle.

    Raises:
        ConfigError: a setting is not allowed.
    """
    return load_settings(model_dir=models, model=name, **more)


def policies_of(settings: Settings, bundle: Bundle) -> dict[str, Defense]:
    """The policy of the settings, the recommended one and `dcp`, each by what it is.

    Raises:
        ConfigError: the bundle lacks what the settings' defense needs, or a parameter of it is not
            allowed.
    """
    recommended = recommended_policy(bundle.card, settings.precision)
    wanted: dict[str, Mapping[str, Any]] = {settings.defense: settings.defense_params}
    wanted.setdefault(recommended.defense, recommended.params)
    wanted.setdefault(COMPARED, bundle.card.recommended.get(COMPARED, DEFAULTS[COMPARED]))
    wanted.pop("none", None)
    found: dict[str, Defense] = {}
    for name, params in wanted.items():
        try:
            defense = configure_defense(settings, bundle, name, params)
        except DefenseError as exc:
            raise ConfigError(f"defense {name!r}: {exc}") from exc
        found[repr(defense)] = defense
    return found


def policy_table(
    settings: Settings, bundle: Bundle, pipeline: Pipeline, images: Iterable[Pixels], of: str
) -> Table:
    """Shares of labels changed and answers withheld, and the mean distance to the clean answers.

    Args:
        settings: whose policy is one of those compared.
        bundle: the network.
        pipeline: of `settings` and `bundle`.
        images: (H, W, C), as the network takes them.
        of: what the images are, for the title.

    Raises:
        ConfigError: the policy of the settings cannot be served with this bundle.
    """
    policies = policies_of(settings, bundle)
    effects = policy_effects(pipeline, list(policies.values()), images)
    table = Table(title=f"{effects[0].images:,} images {of}, {settings.precision}")
    table.add_column("policy", overflow="fold")
    for column in ("labels changed", "withheld", "L1"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, effect in zip(policies, effects, strict=True):
        row = f"{effect.changed:.2%}", f"{effect.withheld:.2%}", f"{effect.l1:.3f}"
        table.add_row(name, *row)
    return table


def show_policies(settings: Settings, images: Iterable[Pixels], of: str) -> None:
    """Print the table; the bundle is made by now, so what cannot be compared is a note."""
    try:
        bundle = open_bundle(settings.model_dir, settings.model)
        show(policy_table(settings, bundle, load_pipeline(settings, bundle), images, of))
    except ConfigError as exc:
        click.echo(f"note: no policies are compared: {exc}")


def show_folder(settings: Settings, folder: Path) -> None:
    """Print labels and the table of the images in a folder, and what the service refuses of it."""
    bundle = open_bundle(settings.model_dir, settings.model)
    refused: list[str] = []
    try:
        pipeline = load_pipeline(settings, bundle)
        found = images_of(folder, bundle.card, settings.limits, refused)
        first = list(islice(found, NAMED))
        names = [str(file.relative_to(folder)) for file, _ in first]
        batch = np.stack([pixels for _, pixels in first])
        for name, answer in zip(names, pipeline.engine(batch), strict=True):
            label = bundle.card.labels[int(answer.argmax())]
            click.echo(f"{name}: {label}, {answer.max():.1%}")
        images = (pixels for _, pixels in chain(first, found))
        show(policy_table(settings, bundle, pipeline, images, f"in {folder}"))
    except ConfigError as exc:
        click.echo(f"note: no policies are compared: {exc}")
    if refused:
        click.echo(f"note: {len(refused)} images are refused, the first is {refused[0]}")


def show(table: Table) -> None:
    """Print a table to the standard output."""
    Console().print(table)
