"""Labelled image sets: a Parquet file, a folder of class folders, or a torchvision set by name.

All three give the same frozen `Dataset`, so training and attacks need not care where it came from.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from scumble.png import encode_png

SPLITS = ("train", "test")
CACHE = Path.home() / ".cache" / "scumble"  # of downloads
DIGITS = "digits"  # comes with scikit-learn: no download
_PARTS = re.compile(r"\d+|\D+")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif", ".ppm", ".bmp")
# Sets without a test part: name -> the set whose training part is split, share of the test part,
# seed of the draw.
SPLIT_OFF = {"cifar100-split": ("cifar100", 1 / 7, 0)}
ROWS = 64  # of a Parquet file that are in memory as files at a time

Pixels = npt.NDArray[np.uint8]
Decoder = Callable[[bytes], Pixels]
"""Makes (H, W, C) of one image file, all of one shape."""


class DatasetError(ValueError):
    """A data set could not be found or read; the message says which and what is accepted."""


@dataclass(frozen=True, repr=False)
class Dataset:
    """Images with labels.

    Attributes:
        name: what it was opened as.
        images: uint8 (N, H, W, C), C being 1 or 3.
        labels: int64 (N,).
        classes: K class names; none if nobody labelled the images, whose labels are then 0.
        groups: one string per image; images of one group are near-duplicates (frames of one
            traffic sign) and must stay on one side of a validation split.
    """

    name: str
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    groups: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, images={self.images.shape}, classes={len(self.classes)})"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelled(self) -> bool:
        """Whether the labels say anything."""
        return bool(self.classes)

    def subset(self, rows: npt.NDArray[np.int64]) -> Dataset:
        """The images at `rows`, in that order."""
        return Dataset(
            self.name,
            self.images[rows],
            self.labels[rows],
            self.classes,
            tuple(self.groups[i] for i in rows),
        )

    def split(self, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """(rest, held out): about `fraction` of the images, whole groups, drawn with `seed`.

        Raises:
            DatasetError: `fraction` is not between 0 and 1, or all images are one group.
        """
        keys, member = np.unique(np.array(self.groups), return_inverse=True)
        if not 0 < fraction < 1:
            raise DatasetError(f"fraction is {fraction}; allowed: between 0 and 1")
        if len(keys) < 2:
            raise DatasetError(
                f"{self.name!r} is a single group of images; nothing can be held out"
            )
        order = np.random.default_rng(seed).permutation(len(keys))
        count = min(max(1, round(fraction * len(keys))), len(keys) - 1)
        held = np.isin(member, order[:count])
        return self.subset(np.flatnonzero(~held)), self.subset(np.flatnonzero(held))


def load(
    source: str,
    split: str = "train",
    *,
    root: Path | None = None,
    decoder: Decoder | None = None,
    unlabelled: bool = False,
) -> Dataset:
    """Open a data set.

    Args:
        source: a `.parquet` file, a folder with one sub-folder per class, or the name of a set.
        split: `train` or `test`; used when `source` is a name.
        root: for a name: a folder that may hold `<name>_<split>.parquet`. Where it does not, the
            set is taken from `torchvision.datasets`, downloaded into `root` on first use; `digits`
            is always there. Those of `SPLIT_OFF` are parts of the training part of another set.
        decoder: reads the image files one by one; without it they are stretched to the size of the
            first, and grey if all of them are.
        unlabelled: a folder of images without class folders is accepted.

    Raises:
        DatasetError: nothing of that name, or the file is not an image set.
    """
    if split not in SPLITS:
        raise DatasetError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    if source in SPLIT_OFF:
        whole, share, seed = SPLIT_OFF[source]
        rest, held_out = load(whole, root=root, decoder=decoder).split(share, seed)
        return replace(rest if split == "train" else held_out, name=f"{source}_{split}")
    path = Path(source)
    if path.suffix == ".parquet":
        return _parquet(path, decoder)
    if path.is_dir():
        return _folder(path, decoder, unlabelled)
    if root is not None and (packed := root / f"{source}_{split}.parquet").is_file():
        return _parquet(packed, decoder)
    if source == DIGITS:
        return _digits(split)
    if source in TORCHVISION:
        return _torchvision(source, split, root or CACHE, decoder)
    raise _unknown(source)


def whole(name: str) -> str:
    """The set that a set was split off from; its own name for others."""
    return SPLIT_OFF[name][0] if name in SPLIT_OFF else name


def named(name: str, split: str, root: Path | None = None) -> bool:
    """Whether `name` is that of a set: of one that can be downloaded, or that `root` has."""
    if name == DIGITS or name in SPLIT_OFF or name in TORCHVISION:
        return True
    return root is not None and (root / f"{name}_{split}.parquet").is_file()


def require(source: str, split: str = "train", *, root: Path | None = None) -> None:
    """Check that `load` finds a data set. Nothing is decoded; a set of torchvision is downloaded.

    Args:
        source: see `load`.
        split: see `load`.
        root: see `load`.

    Raises:
        DatasetError: nothing of that name, no such file, or the download failed.
    """
    if source in SPLIT_OFF:
        source, split = SPLIT_OFF[source][0], "train"
    path = Path(source)
    packed = root is not None and (root / f"{source}_{split}.parquet").is_file()
    if path.suffix == ".parquet":
        if not path.is_file():
            raise DatasetError(f"no file {source!r}")
    elif path.is_dir() or packed or source == DIGITS:
        pass
    elif source in TORCHVISION:
        _download(source, split, root or CACHE)
    else:
        raise _unknown(source)


def write_parquet(
    path: Path, images: npt.NDArray[np.uint8], labels: Iterable[int], paths: Iterable[str] = ()
) -> None:
    """Write images as PNG files into a Parquet file that `load` reads.

    Args:
        path: of the file.
        images: uint8 (N, H, W, C), C being 1 or 3, or (N, H, W).
        labels: N of them.
        paths: N file names, which the groups are made of; none if empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names: list[str | None] = [*paths] or [None] * len(images)
    rows = [
        {"bytes": encode_png(image), "path": name}
        for image, name in zip(images, names, strict=True)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table({"image": pa.array(rows, kind), "label": np.asarray(labels, np.int64)}), path
    )


def numbered_as(data: Dataset, labels: Sequence[str]) -> Dataset:
    """A set with the classes of a network, and their numbers.

    Raises:
        DatasetError: its classes are others; see `class_numbers`.
    """
    numbers = np.array(class_numbers(data.name, data.classes, labels), np.int64)
    return replace(data, labels=numbers[data.labels], classes=tuple(labels))


def class_numbers(name: str, classes: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The number of each class of a data set among the labels of a network.

    Classes may be named after labels, in any order and not all of them, or numbered from 0. As many
    classes as there are labels, under other names, are taken in their order.

    Raises:
        DatasetError: none of these.
    """
    known: dict[str, int] = {}
    for k, label in enumerate(labels):
        known[_plain(label)] = -1 if _plain(label) in known else k
    named = [known.get(_plain(each), -1) for each in classes]
    if min(named) >= 0:
        return named
    if all(each.isdecimal() and int(each) < len(labels) for each in classes):
        return [int(each) for each in classes]
    if len(classes) == len(labels):
        return list(range(len(labels)))
    strange = next(each for each, k in zip(classes, named, strict=True) if k < 0)
    raise DatasetError(
        f"{name} has {len(classes)} classes, the network {len(labels)}, none or two of them named "
        f"{strange!r}; needed: classes with the names of labels, or with their numbers from 0"
    )


def _plain(label: str) -> str:
    return label.strip().casefold()


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by their value: `2` before `10`."""
    parts = [(int(p), "") if p.isdecimal() else (-1, p) for p in _PARTS.findall(name)]
    return [*parts, (-1, name)]


def _parquet(path: Path, decoder: Decoder | None) -> Dataset:
    """Hugging Face image layout: `image` = struct{bytes, path}, `label` = int64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = str(path)
    if not path.is_file():
        raise DatasetError(f"no file {name!r}")
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if not {"image", "label"} <= set(schema.names):
            raise DatasetError(f"{name!r} has the columns {schema.names}; allowed: image and label")
        image, label = schema.field("image").type, schema.field("label").type
        if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise DatasetError(f"{name!r}: image is {image}; allowed: a struct with bytes and path")
        column = file.read(["label"])["label"]
    except pa.ArrowInvalid as exc:
        raise DatasetError(f"{name!r} is not a Parquet file: {exc}") from exc
    if not pa.types.is_integer(label) or column.null_count or not len(column):
        raise DatasetError(f"{name!r}: label is {label}; allowed: an integer for each image")
    labels = column.to_numpy().astype(np.int64)
    meta = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = meta.get("info", {}).get("features", {}).get("label", {})
    classes = feature.get("names") or [str(k) for k in range(int(labels.max()) + 1)]
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DatasetError(
            f"{name!r} has labels from {labels.min()} to {labels.max()} for {len(classes)} classes"
        )
    groups: list[str] = []

    def files() -> Iterator[tuple[str, bytes]]:
        for batch in file.iter_batches(ROWS, columns=["image"]):
            for row in batch.column("image").to_pylist():
                i, row = len(groups), row or {}
                # The path may be missing, and then nothing is known to be a near-duplicate.
                groups.append(_group(row.get("path") or f"{path.stem}/{i}"))
                yield f"{name!r}, row {i}", row.get("bytes") or b""

    images = _decoded(path.name, files(), len(labels), decoder)
    return Dataset(path.stem, images, labels, tuple(classes), tuple(groups))


def _folder(path: Path, decoder: Decoder | None, unlabelled: bool) -> Dataset:
    classes = sorted((p.name for p in path.iterdir() if p.is_dir()), key=natural)
    files = [f for name in classes for f in _images(path / name)]
    if not files and unlabelled:
        classes, files = [], _images(path)
    if not files:
        inside = "images and no " if unlabelled else ""
        raise DatasetError(
            f"{str(path)!r} has no {inside}class folders with {', '.join(SUFFIXES)} files"
        )
    contents = ((repr(str(f)), f.read_bytes()) for f in files)
    images = _decoded(path.name, contents, len(files), decoder)
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number.get(f.parent.name, 0) for f in files], np.int64)
    groups = tuple(_group(f.as_posix()) for f in files)
    return Dataset(path.name, images, labels, tuple(classes), groups)


def _images(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)


def _unknown(source: str) -> DatasetError:
    return DatasetError(
        f"no data set {source!r}: give a .parquet file, a folder of class folders, "
        f"or one of {', '.join(sorted([DIGITS, *SPLIT_OFF, *TORCHVISION]))}"
    )


def _download(name: str, split: str, root: Path) -> Any:
    import torchvision.datasets as tv

    try:
        return TORCHVISION[name](tv, root, split)
    except (OSError, RuntimeError) as exc:
        raise DatasetError(
            f"{name!r} cannot be downloaded into {str(root)!r}: {exc}; give a folder that has "
            f"{name}_{split}.parquet, or use {DIGITS}, which needs no download"
        ) from exc


def _torchvision(name: str, split: str, root: Path, decoder: Decoder | None) -> Dataset:
    data = _download(name, split, root)
    pairs = list(data)
    contents = (
        (f"{name!r}, image {i}", encode_png(image, 1)) for i, (image, _) in enumerate(pairs)
    )
    images = _decoded(name, contents, len(pairs), decoder)
    labels = np.array([label for _, label in pairs], np.int64)
    classes = getattr(data, "classes", None) or [str(k) for k in range(int(labels.max()) + 1)]
    # GTSRB alone has near-duplicates: its file names carry the track.
    files = [p for p, *_ in getattr(data, "_samples", [])] or [
        f"{name}/{i}" for i in range(len(labels))
    ]
    return Dataset(
        f"{name}_{split}",
        images,
        labels,
        tuple(map(str, classes)),
        tuple(_group(str(f)) for f in files),
    )


def _digits(split: str) -> Dataset:
    """Three quarters of scikit-learn's digits are `train`, the rest `test`."""
    from scumble.data.digits import digits

    train, test = digits().split(0.25, seed=0)
    return train if split == "train" else test


def _decoded(
    name: str, files: Iterable[tuple[str, bytes]], count: int, decoder: Decoder | None
) -> Pixels:
    """uint8 (count, H, W, C) of image files, each read and decoded on its own."""
    # The original signs of GTSRB come in every size; the literature scales them to 32 pixels.
    decode = decoder or _Stretched((32, 32) if name.startswith("gtsrb") else None)
    images = np.empty((0, 0, 0, 0), np.uint8)
    for i, (where, content) in enumerate(files):
        try:
            pixels = decode(content)
        except (OSError, SyntaxError, ValueError) as exc:  # all three are Pillow's for broken files
            raise DatasetError(f"{where} is not a readable image: {exc}") from exc
        if i == 0:
            images = np.empty((count, *pixels.shape), np.uint8)
        images[i] = pixels
    if decoder is None and bool((images == images[..., :1]).all()):
        return np.ascontiguousarray(images[..., :1])
    return images


class _Stretched:
    """Decodes to RGB of one size, that of the first image if none is given."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size

    def __call__(self, content: bytes) -> Pixels:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
            picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(ground, picture)
        picture = picture.convert("RGB")
        self.size = self.size or picture.size
        if picture.size != self.size:
            picture = picture.resize(self.size, Image.Resampling.BILINEAR)
        return np.asarray(picture)


def _group(path: str) -> str:
    """`.../00005/00024_00022.ppm`, frame 22 of track 24, belongs to `.../00005/00024`."""
    return re.sub(r"(\d{5})_\d{5}\.ppm$", r"\1", path)


# name -> (torchvision.datasets, root, split) -> data set
TORCHVISION: dict[str, Callable[[Any, Path, str], Any]] = {
    "mnist": lambda tv, root, split: tv.MNIST(root, train=split == "train", download=True),
    "fashion_mnist": lambda tv, root, split: tv.FashionMNIST(
        root, train=split == "train", download=True
    ),
    "cifar10": lambda tv, root, split: tv.CIFAR10(root, train=split == "train", download=True),
    "cifar100": lambda tv, root, split: tv.CIFAR100(root, train=split == "train", download=True),
    "gtsrb": lambda tv, root, split: tv.GTSRB(root, split=split, download=True),
    "svhn": lambda tv, root, split: tv.SVHN(root, split=split, download=True),
}
