"""Real handwritten digits in MNIST's form, from a data set that ships inside scikit-learn's wheel.

MNIST itself must be downloaded; these 1,797 digits of the UCI set "Optical Recognition of
Handwritten Digits" are there offline. They are other hands and another scanner than MNIST's, so a
net trained on MNIST reads most, not all of them.

`python -m scumble.data.digits OUT` writes the pictures of `docs/digits/`.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from scumble.data.image_sets import Dataset

SIDE = 28  # MNIST: 28 x 28 pixels ...
BOX = 20  # ... with the digit in a box of 20 x 20, its centre of mass in the middle

# digit -> its row in the data set: each near the same digit of MNIST, for a person and in pixels
SHOWN = {0: 36, 2: 116, 3: 316, 5: 281, 7: 447, 9: 361}


def digits() -> Dataset:
    """The 1,797 digits as uint8 (N, 28, 28, 1), white on black.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.stack([_as_mnist(picture) for picture in raw.images])[..., None]
    groups = tuple(f"digits/{i}" for i in range(len(images)))
    names = tuple(map(str, raw.target_names))
    return Dataset("digits", images, raw.target.astype(np.int64), names, groups)


def write(folder: Path) -> list[Path]:
    """Write the `SHOWN` digits as `<digit>.png`; returns the files.

    Raises:
        OSError: `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = digits().images
    files = [folder / f"{digit}.png" for digit in SHOWN]
    for file, row in zip(files, SHOWN.values(), strict=True):
        Image.fromarray(images[row, :, :, 0]).save(file, optimize=True)
    return files


def _as_mnist(picture: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """(8, 8) of 0..16 to (28, 28) of 0..255."""
    small = Image.fromarray(np.rint(picture * (255 / 16)).astype(np.uint8))
    ink = np.asarray(small.resize((BOX, BOX), Image.Resampling.LANCZOS), np.float64)
    ink = (ink - ink.min()) * (255 / (ink.max() - ink.min()))
    top, left = _corner(ink.sum(axis=1)), _corner(ink.sum(axis=0))
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + BOX, left : left + BOX] = np.rint(ink)
    return image


def _corner(profile: npt.NDArray[np.float64]) -> int:
    """Where the box starts along one axis, for the centre of mass to be in the middle."""
    mass = float(profile @ np.arange(BOX) / profile.sum())
    return min(max(round((SIDE - 1) / 2 - mass), 0), SIDE - BOX)


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(out: Path) -> None:
    """Write six digits as PNG files into the folder OUT."""
    for file in write(out):
        click.echo(file)


if __name__ == "__main__":
    main()
