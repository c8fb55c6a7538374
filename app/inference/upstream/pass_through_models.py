"""Models of the upstream that V2 clients reach in the upstream's own terms.

A request is passed through with its tensors as they are; of the answer, one output with
probabilities or logits is defended, and nothing else is read. The service does not know what the
tensors show, so a defense that needs images cannot be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from app.errors import ConfigError
from app.inference.bundle import Sent
from app.inference.engines import Probs
from app.inference.upstream.client import UpstreamClient
from app.inference.upstream.defense_time import measured
from app.inference.upstream.network_interface import Found, InvalidAnswer
from app.inference.upstream.v2_messages import Tensors
from app.inference.upstream.v2_network import V2Network
from app.settings import PassedModel, Settings
from scumble import defenses
from scumble.defenses import Defense, DefenseError
from scumble.defenses.evidence import Evidence, Marks
from scumble.defenses.scores import Whitener

ASSUMED_CLASSES = 1000  # of a model whose answers nobody has seen yet
UNKNOWN = Sent(
    input="", datatype="FP32", layout="NCHW", output="", answers="logits", fingerprint="0" * 64
)


class ImagesNeeded(Exception):
    """A defense looked at the images."""


class NoImages:
    """Stands for images that are not known: a defense that looks at them raises ImagesNeeded."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ImagesNeeded(name)

    def __getitem__(self, key: object) -> NoReturn:
        raise ImagesNeeded(str(key))

    def __len__(self) -> NoReturn:
        raise ImagesNeeded("len")


NO_IMAGES: Any = NoImages()


@dataclass(frozen=True)
class Passed:
    """One of these models.

    Attributes:
        name: on the upstream.
        network: reads its answers.
        classes: K; None if it is not known before an answer.
        served: it is the bundle's network, so that clients' own defenses are for it as well.
        defense: of clients without one of their own.
        whitener: for the score `residual`.
        facts: for the audit log; None for those of the service.
    """

    name: str
    network: V2Network
    classes: int | None
    served: bool
    defense: Defense
    whitener: Whitener | None = None
    facts: Mapping[str, str | None] | None = None

    @property
    def output(self) -> str:
        """Name of the defended output."""
        return self.network.sent.output

    def read(self, answer: Tensors, n: int) -> Found:
        """Check and convert the answer for `n` images.

        Raises:
            InvalidAnswer: the output is missing, or does not have a row for each image.
        """
        network = self.network
        if self.classes is None:
            given = answer.outputs.get(self.output)
            shape = () if given is None else given.shape
            if len(shape) != 2 or not shape[1]:
                raise InvalidAnswer(f"output {self.output!r} has shape {list(shape)}")
            network = replace(network, classes=shape[1])
        return network.read_tensors(answer, n)

    def defend(self, defense: Defense | None, found: Found) -> tuple[Probs, Marks | None]:
        """The rows to send out, and what was withheld.

        Args:
            defense: of the client; None for the model's.
            found: the clean rows.

        Raises:
            ImagesNeeded: the defense looks at the images.
        """
        chosen = self.defense if defense is None else defense
        if not chosen.withholds:
            return chosen(found.rows, NO_IMAGES), None
        rows, marks = chosen.answer(found.rows, NO_IMAGES, found.evidence(self.whitener))
        return rows, marks

    def values(self, rows: Probs) -> Probs:
        """Defended rows as the output has them: probabilities, or logits whose softmax they are."""
        if self.network.sent.answers == "probabilities":
            return rows
        return np.log(np.maximum(rows, np.finfo(np.float32).tiny)).astype(np.float32)


@dataclass(frozen=True)
class PassThrough:
    """All of these models.

    Attributes:
        client: sends the requests.
        models: by name.
        binary: the upstream takes tensors as bytes.
        concurrency: requests in flight to it.
        max_size: rows that are defended at once.
    """

    client: UpstreamClient
    models: Mapping[str, Passed]
    binary: bool
    concurrency: int
    max_size: int


def make_pass_through(
    settings: Settings,
    card: str,
    network: V2Network,
    client: UpstreamClient,
    defense: Defense,
    whitener: Whitener | None,
    max_size: int,
) -> PassThrough | None:
    """The models that the settings list; None for none.

    Args:
        settings: that list them.
        card: name of the bundle's network.
        network: that the bundle describes.
        client: sends the requests.
        defense: of the bundle's network.
        whitener: of the bundle's network, for the score `residual`.
        max_size: rows that are defended at once.

    Raises:
        ConfigError: a model's output or defense is missing, unknown, needs images or is too slow;
            its name is the card's, but it is another model; or the replicas have different models.
    """
    if not settings.upstream_models:
        return None
    paths = sorted({replica.model_path for replica in client.replicas})
    if len(paths) > 1:
        raise ConfigError(
            f"SCUMBLE_UPSTREAM has {' and '.join(paths)}; allowed with SCUMBLE_UPSTREAM_MODELS: "
            "the same model on all replicas"
        )
    served = paths[0].split("/")[3]
    models = {}
    for name, wanted in settings.upstream_models.items():
        try:
            if name == served:
                models[name] = _served(name, wanted, network, defense, whitener)
            elif name == card:
                raise ConfigError(
                    f"the served model, {served!r} on the upstream, has this name for clients; "
                    "allowed: other names, or another SCUMBLE_MODEL"
                )
            else:
                models[name] = _other(name, wanted)
            check_without_images(models[name].defense, models[name].classes or 10)
            if name != served:  # whose defense was measured with its own rows
                check_time(models[name].defense, max_size, settings.batch_limit_s)
        except (DefenseError, ConfigError) as exc:
            raise ConfigError(f"SCUMBLE_UPSTREAM_MODELS: model {name!r}: {exc}") from exc
    concurrency = settings.upstream_concurrency
    return PassThrough(client, models, network.sent.binary, concurrency, max_size)


def check_without_images(defense: Defense, classes: int) -> None:
    """Refuse a defense that looks at the images.

    Raises:
        ConfigError: it does.
    """
    rows = np.full((1, classes), 1 / classes, np.float32)
    one = np.ones(1, np.float32)
    try:
        defense.answer(rows, NO_IMAGES, Evidence(one, one, one))
    except ImagesNeeded:
        raise ConfigError(
            f"the defense {defense!r} needs images, which tensors that are passed through are not; "
            "allowed: a defense of rows, such as codebook, label, round or top_k"
        ) from None


def check_time(defense: Defense, images: int, limit_s: float) -> None:
    """Refuse a defense that takes too long for as many rows as are defended at once.

    How many classes the model has is not known before its first answer, so rows of
    `ASSUMED_CLASSES` are tried.

    Raises:
        ConfigError: it takes longer, or fails.
    """
    rows = np.full((images, ASSUMED_CLASSES), 1 / ASSUMED_CLASSES, np.float32)
    column = np.ones(images, np.float32)
    evidence = Evidence(column, column, column)
    try:
        measured(defense, lambda: defense.answer(rows, NO_IMAGES, evidence), images, limit_s)
    except ConfigError:
        raise
    except Exception as exc:
        raise ConfigError(
            f"the defense {defense!r} fails on {images} rows of {ASSUMED_CLASSES} classes: {exc!r}"
        ) from exc


def _served(
    name: str, wanted: PassedModel, network: V2Network, defense: Defense, whitener: Whitener | None
) -> Passed:
    if wanted.model_fields_set:
        raise ConfigError(
            f"it is the served one, whose card and SCUMBLE_DEFENSE say all; allowed: {{}}, "
            f"got {wanted.model_dump(exclude_defaults=True)}"
        )
    return Passed(name, network, network.classes, True, defense, whitener)


def _other(name: str, wanted: PassedModel) -> Passed:
    if not wanted.output or not wanted.defense:
        raise ConfigError(
            f"output is {wanted.output!r} and defense {wanted.defense!r}; both are needed"
        )
    sent = UNKNOWN.model_copy(update={"output": wanted.output, "answers": wanted.answers})
    defense = defenses.configure(wanted.defense, wanted.defense_params)
    facts = {"model": name, "version": None, "policy": wanted.defense}
    return Passed(name, V2Network(0, sent), None, False, defense, facts=facts)
