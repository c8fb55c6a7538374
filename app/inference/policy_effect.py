"""What a policy does to the owner's own images, before it is served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.errors import ConfigError, RequestError
from app.inference.bundle import Card
from app.inference.decode import Pixels, decode
from app.inference.engines import Probs
from app.inference.pipeline import Pipeline
from app.settings import LimitSettings

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
BATCH = 32
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PolicyEffect:
    """What a policy did to some images.

    Attributes:
        images: that were answered.
        refused: files that the service refuses, each with the reason.
        changed: share of the answers with another label than the network's.
        withheld: share of the answers that were withheld; these are not among `changed`.
        l1: mean distance of the answers to the clean ones, 0 to 2.
    """

    images: int
    refused: tuple[str, ...]
    changed: float
    withheld: float
    l1: float


def policy_effect(
    pipeline: Pipeline, card: Card, limits: LimitSettings, folder: Path
) -> PolicyEffect:
    """Answer all images below a folder, as the service would.

    Args:
        pipeline: network and policy.
        card: of the network.
        limits: of the service.
        folder: with PNG, JPEG and WebP files at any depth.

    Raises:
        ConfigError: the folder has no image that the service takes.
    """
    refused: list[str] = []
    changed: list[Flags] = []
    withheld: list[Flags] = []
    distance: list[Probs] = []
    for images in _batches(_pixels(folder, card, limits, refused)):
        clean = pipeline.engine(images)
        if not changed:  # what scores need is loaded once
            pipeline.evidence(images, clean, pipeline.defense.needs)
        answers = pipeline.by_client(images, [(len(images), None)])
        marks = np.zeros(len(images)) if answers.marks is None else answers.marks
        moved = answers.probabilities.argmax(1) != clean.argmax(1)
        changed.append(moved & (marks == 0))
        withheld.append(marks != 0)
        distance.append(answers.l1)
    if not changed:
        first = f": {refused[0]}" if refused else ""
        raise ConfigError(f"no image in {str(folder)!r} can be answered{first}")
    return PolicyEffect(
        sum(map(len, changed)),
        tuple(refused),
        float(np.concatenate(changed).mean()),
        float(np.concatenate(withheld).mean()),
        float(np.concatenate(distance).mean()),
    )


def _pixels(
    folder: Path, card: Card, limits: LimitSettings, refused: list[str]
) -> Iterator[Pixels]:
    """Image after image; what the service refuses is added to `refused`."""
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        try:
            yield decode(
                file.read_bytes(),
                card.input,
                card.preprocessing,
                limits.max_pixels,
                max_jpeg_pixels=limits.max_jpeg_pixels,
            )
        except (RequestError, OSError) as exc:
            refused.append(f"{file.name}: {exc}")


def _batches(images: Iterable[Pixels]) -> Iterator[Pixels]:
    rest = iter(images)
    while some := list(islice(rest, BATCH)):
        yield np.stack(some)
