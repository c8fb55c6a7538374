"""What policies do to the owner's own images, before they are served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.errors import ConfigError, RequestError
from app.inference.bundle import Card
from app.inference.decode import Pixels, decode
from app.inference.engines import Probs
from app.inference.pipeline import Pipeline, defended
from app.settings import LimitSettings
from scumble.defenses import Defense
from scumble.defenses.evidence import Evidence

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif"}
BATCH = 32
CHANGED = 0.01  # share of labels that a policy may change without a warning


@dataclass(frozen=True)
class PolicyEffect:
    """What a policy did to some images.

    Attributes:
        images: that were answered.
        changed: share of the answers with another label than the network's.
        withheld: share of the answers that were withheld; these are not among `changed`.
        l1: mean distance of the answers to the clean ones, 0 to 2.
    """

    images: int
    changed: float
    withheld: float
    l1: float

    def warning(self) -> str | None:
        """A sentence about a policy that changes many labels; None for others."""
        if self.changed <= CHANGED:
            return None
        return (
            f"the defense changes {self.changed:.1%} of these labels; label, codebook and "
            "keep_top1 keep them"
        )


def policy_effects(
    pipeline: Pipeline, policies: Sequence[Defense], images: Iterable[Pixels]
) -> list[PolicyEffect]:
    """Answer images under each of several policies; the network sees each image once.

    Args:
        pipeline: the network; its own policy does not count.
        policies: to be compared.
        images: (H, W, C), one by one.

    Raises:
        ConfigError: the network lacks scores that a policy needs.
    """
    needs = frozenset().union(*(policy.needs for policy in policies))
    rows: list[list[npt.NDArray[np.float64]]] = [[] for _ in policies]
    for batch in _batches(images):
        clean: Probs = pipeline.engine(batch)
        evidence: Evidence | None = None
        if needs and not rows[0]:
            pipeline.evidence(batch, clean, needs)  # loads what the scores need
        if needs and pipeline.scores is not None:
            clean, evidence = pipeline.scores(batch)
        for policy, found in zip(policies, rows, strict=True):
            answers, marks = defended(policy, clean, evidence, batch, [(len(batch), None)])
            withheld = np.zeros(len(batch), bool) if marks is None else marks != 0
            moved = (answers.argmax(1) != clean.argmax(1)) & ~withheld
            found.append(np.stack([moved, withheld, np.abs(answers - clean).sum(1)], axis=1))
    effects = []
    for found in rows:
        columns = np.concatenate(found) if found else np.empty((0, 3))
        means = columns.mean(axis=0).tolist() if len(columns) else (0.0, 0.0, 0.0)
        effects.append(PolicyEffect(len(columns), *means))
    return effects


def images_of(
    folder: Path, card: Card, limits: LimitSettings, refused: list[str]
) -> Iterator[tuple[Path, Pixels]]:
    """The image files below a folder, each with its pixels as the service decodes them.

    Args:
        folder: with image files at any depth.
        card: of the network.
        limits: of the service.
        refused: gets what the service refuses, each file with the reason.

    Raises:
        ConfigError: the folder has no image that the service takes.
    """
    count = 0
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        try:
            pixels = decode(
                file.read_bytes(),
                card.input,
                card.preprocessing,
                limits.max_pixels,
                max_jpeg_pixels=limits.max_jpeg_pixels,
            )
        except (RequestError, OSError) as exc:
            refused.append(f"{file.name}: {exc}")
            continue
        count += 1
        yield file, pixels
    if not count:
        first = f": {refused[0]}" if refused else ""
        raise ConfigError(f"no image in {str(folder)!r} can be answered{first}")


def _batches(images: Iterable[Pixels]) -> Iterator[Pixels]:
    rest = iter(images)
    while some := list(islice(rest, BATCH)):
        yield np.stack(some)
