"""Outliers for `scumble train --outliers`: images that no attacker of a plan asks about.

    python -m scumble.evaluation.outliers mnist --data ../shared/data

Writes `OUT/NAME.parquet`; for victims whose attackers may ask about CIFAR-100, also
`OUT/NAME-foreign.parquet` with the classes of it that are not among the outliers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from scumble.attacker import transfer
from scumble.data.image_sets import Dataset, DatasetError, write_parquet
from scumble.evaluation.plans import PLANS
from scumble.training.command_options import plain_errors

# Of each kind that a program draws, images behind those that attackers get by the name alone.
DRAWN = "fractal[20000:23500],texture[20000:23500],noise[20000:23500]"
TERMS = {
    "mnist": f"cifar100[:7000],cifar100@outlines[7000:14000],{DRAWN}",
    "cifar10": DRAWN,
    "gtsrb": DRAWN,
}
# Every other superclass of CIFAR-100 (Krizhevsky 2009), so that no near kinds are on both sides.
SUPERCLASSES = {
    "fish": "aquarium_fish flatfish ray shark trout",
    "food containers": "bottle bowl can cup plate",
    "household electrical devices": "clock keyboard lamp telephone television",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
TAUGHT = frozenset(name for names in SUPERCLASSES.values() for name in names.split())
SPLIT = ("cifar10", "gtsrb")  # victims whose outliers are those classes beside the drawn images


def outliers(name: str, root: Path | None) -> tuple[Dataset, Dataset | None]:
    """(outliers for the victim `name`, images of the classes that are left out).

    Args:
        name: key of `TERMS`.
        root: folder with data sets by name.

    Raises:
        DatasetError: CIFAR-100 is not there, or an outlier is in the pool of a plan's attacker.
    """
    found, rest = transfer.data(TERMS[name], "train", root), None
    if name in SPLIT:
        taught, rest = halves(transfer.data("cifar100", "train", root))
        found = transfer.joined([taught, found], found.name)
    for pool in sorted(pools(name)):
        check_apart(found, transfer.data(pool, "train", root))
    return found, rest


def halves(photos: Dataset) -> tuple[Dataset, Dataset]:
    """(images of the classes in `TAUGHT`, the other images).

    Raises:
        DatasetError: `photos` lacks one of these classes.
    """
    if missing := TAUGHT - set(photos.classes):
        raise DatasetError(f"{photos.name} has no class {min(missing)!r}; needed: CIFAR-100")
    taught = np.array([one in TAUGHT for one in photos.classes])[photos.labels]
    return photos.subset(np.flatnonzero(taught)), photos.subset(np.flatnonzero(~taught))


def pools(name: str) -> set[str]:
    """What attackers of all plans ask the bundle `NAME-outliers` about."""
    cells = (cell for plan in PLANS.values() for cell in plan())
    return {cell.queries for cell in cells if cell.victim == f"{name}-outliers" and cell.queries}


def check_apart(found: Dataset, pool: Dataset) -> None:
    """Check that two sets have no image in common.

    Raises:
        DatasetError: they have.
    """
    images = transfer.fitted(pool.images, *found.images.shape[1:])
    if shared := {i.tobytes() for i in found.images} & {i.tobytes() for i in images}:
        raise DatasetError(
            f"{len(shared)} outliers of {found.name!r} are in {pool.name!r}, about which attackers "
            "ask; allowed: none"
        )


def write(path: Path, data: Dataset) -> None:
    """Write a set that `scumble train` and `scumble calibrate` read; its classes become numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, data.images, data.labels)
    click.echo(f"{path}: {len(data):,} images of {data.name}")


@click.command()
@click.argument("name", type=click.Choice(list(TERMS)))
@click.option(
    "--data",
    "root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the image sets; without it they are downloaded.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/outliers"),
    show_default=True,
    help="Folder of the files.",
)
def main(name: str, root: Path | None, out: Path) -> None:
    """Write the outliers for the victim NAME."""
    with plain_errors():
        found, rest = outliers(name, root)
        write(out / f"{name}.parquet", found)
        if rest is not None:
            write(out / f"{name}-foreign.parquet", replace(rest, name="the other classes"))


if __name__ == "__main__":
    main()
