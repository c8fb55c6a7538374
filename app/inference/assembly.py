"""Loads a model as the settings ask: engine, defense, batches."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.errors import ConfigError
from app.inference import engines
from app.inference.batching import Batcher, Batchers
from app.inference.bundle import Bundle, InputShape, Preprocessing, golden_inputs
from app.inference.decode import decode
from app.inference.defense_artifacts import DefenseArtifacts
from app.inference.engine_selection import UPSTREAM
from app.inference.engines import Engine, EngineName, Probs
from app.inference.graph import tensor_input
from app.inference.pipeline import Composed, Composer, Fused, Pipeline, self_test
from app.inference.policy_warnings import policy_warnings
from app.inference.score_graph import ScoredEngine
from app.settings import Settings
from app.telemetry.metrics import Metrics
from scumble import defenses
from scumble.defenses.evidence import Evidence, Score
from scumble.defenses.none import NoDefense
from scumble.defenses.scores import Whitener

if TYPE_CHECKING:
    from app.inference.upstream.assembly import UpstreamModel

# A batch that takes longer than this runs on a thread, so that the event loop serves others.
INLINE_S = 0.010
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
log = logging.getLogger("scumble")

WarmUp = Callable[
    [npt.NDArray[Any], Probs, float, Callable[[frozenset[Score]], Evidence] | None], None
]
"""Takes images, their clean probabilities, the seconds of the engine for the largest batch, and
what gives the images' evidence with the scores that it is asked for."""


def make_defense(settings: Settings, bundle: Bundle) -> defenses.Defense:
    """Make the server's defense.

    Raises:
        ConfigError: the defense is unknown, a parameter is not allowed, or the bundle lacks a file.
    """
    try:
        defense = configure_defense(settings, bundle, settings.defense, settings.defense_params)
    except defenses.DefenseError as exc:
        raise ConfigError(f"defense {settings.defense!r}: {exc}") from exc
    if not settings.defense_params and settings.defense in bundle.card.recommended:
        log.info("using the recommended parameters", extra={"defense": repr(defense)})
    return defense


def configure_defense(
    settings: Settings, bundle: Bundle, name: str, params: Mapping[str, Any]
) -> defenses.Defense:
    """Make a defense with the server's secret and the networks of its bundle.

    Raises:
        DefenseError: the defense is unknown, or a parameter is not allowed.
        ConfigError: an auxiliary network cannot be loaded.
    """
    return defenses.configure(
        name,
        bundle.card.defense_params(name, params),
        bundle=DefenseArtifacts(bundle, settings.engine, settings.precision),
        secret=settings.secret.get_secret_value().encode(),
    )


def model_labels(settings: Settings, bundle: Bundle, engine: EngineName) -> dict[str, str]:
    """The labels of the metric that describes what is served."""
    return {
        "model": bundle.card.name,
        "version": bundle.card.version,
        "precision": settings.precision,
        "engine": engine,
        "defense": settings.defense,
        "sha256": bundle.card.files[bundle.card.served_file(settings.precision)],
    }


@dataclass(frozen=True)
class LoadedModel:
    """A model that is tested and warm for pixels, and can be loaded for float tensors.

    Attributes:
        settings: that it was loaded with.
        bundle: where it comes from.
        metrics: of its batchers.
        composer: makes a pipeline of an ONNX graph.
        composed: the pipelines for pixels.
        inline: run batches on the event loop.
    """

    settings: Settings
    bundle: Bundle
    metrics: Metrics
    composer: Composer
    composed: Composed
    inline: bool

    @property
    def pipeline(self) -> Pipeline:
        """Network and defense, for pixels."""
        return self.composed.unfused

    @property
    def max_size(self) -> int:
        """Images of the largest batch."""
        return self.composed.max_size

    def pixels(self) -> Batchers:
        """The batchers for uint8 images."""
        return self._batchers(self.composed)

    def tensors(self, warm_up: WarmUp) -> Batchers:
        """Load the model for float tensors; slow, so not on the event loop.

        Args:
            warm_up: is called with example tensors before the batchers are used.

        Raises:
            ConfigError: the graph has no input for tensors, or a defense fails on them.
        """
        graph = tensor_input(self.bundle.onnx(self.settings.precision))
        images = golden_inputs(self.bundle.card.input)
        tensors = images.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
        composed = self.composer(graph, tensors, self.settings.batch.max_size)
        log_limited(self.settings, composed)
        _warm_up(composed, tensors, warm_up)
        batchers = self._batchers(composed)
        batchers.prepare()
        return batchers

    def warm_up(self, warm_up: WarmUp) -> None:
        """Call `warm_up` with example pixels."""
        _warm_up(self.composed, golden_inputs(self.bundle.card.input), warm_up)

    def log_loaded(self, engine: EngineName, defense: defenses.Defense) -> None:
        """Log what is served and how."""
        composed = self.composed
        log.info(
            "loaded",
            extra={
                "model": self.bundle.card.name,
                "version": self.bundle.card.version,
                "precision": self.settings.precision,
                "engine": engine,
                "defense": repr(defense),
                "defends": "graph" if isinstance(composed.fused, Fused) else "numpy",
                "execution": "inline" if self.inline else "thread",
                "max_batch": self.max_size,
                "full_batch_ms": round(composed.seconds * 1000, 3),
            },
        )
        log_policy_warnings(self.settings, self.bundle, defense)
        log_limited(self.settings, composed)

    def _batchers(self, composed: Composed) -> Batchers:
        settings = self.settings
        batcher = partial(
            Batcher,
            metrics=self.metrics,
            max_size=composed.max_size,
            max_queue=settings.limits.max_queue,
            max_wait_s=settings.batch.max_wait_us / 1e6,
            target_s=settings.batch.target_p99_ms / 1e3,
            inline=self.inline,
        )
        default = batcher(composed.fused)
        if settings.keys_file is None or composed.fused is composed.unfused:
            return Batchers(default, default)
        return Batchers(default, batcher(composed.unfused))


def load_served(
    settings: Settings,
    bundle: Bundle,
    engine: EngineName,
    defense: defenses.Defense,
    metrics: Metrics,
) -> LoadedModel | UpstreamModel:
    """Load a model for the engine, whichever it is.

    Raises:
        BundleError: see `load_model`.
        ConfigError: see `load_model`; or the settings name no upstream, or models of one in vain.
    """
    if engine == UPSTREAM:
        # Imported here: it needs an extra of the distribution.
        from app.inference.upstream.assembly import load_upstream

        return load_upstream(settings, bundle, defense, metrics)
    if settings.upstream_models:
        raise ConfigError(
            f"SCUMBLE_UPSTREAM_MODELS needs the engine upstream; the engine is {engine!r}"
        )
    return load_model(settings, bundle, engine, defense, metrics)


def load_engine(settings: Settings, bundle: Bundle) -> Engine:
    """Load the network of a bundle for a tool, on one thread.

    Raises:
        BundleError: a file is not the one that the card lists.
        ConfigError: the engine cannot run the network, or the settings name no upstream.
    """
    engine = engines.resolve(settings.engine, settings.precision)
    if engine == UPSTREAM:
        from app.inference.upstream.engine import UpstreamEngine  # as above

        return UpstreamEngine(settings, bundle)
    model = bundle.onnx(settings.precision)
    return engines.load(engine, model, threads=1, precision=settings.precision)


def load_pipeline(settings: Settings, bundle: Bundle) -> Pipeline:
    """Load the network of a bundle with its scores for a tool, undefended and on one thread.

    Raises:
        BundleError: a file is not the one that the card lists.
        ConfigError: the engine cannot run the network, or the settings name no upstream.
    """
    engine = load_engine(settings, bundle)
    whitener = partial(whitener_of, settings, bundle)
    if engines.resolve(settings.engine, settings.precision) == UPSTREAM:
        from app.inference.upstream.engine import UpstreamEngine, UpstreamScores  # as above

        assert isinstance(engine, UpstreamEngine)  # noqa: S101  # as load_engine makes it
        return Pipeline(engine, NoDefense(), scores=UpstreamScores(engine, whitener))
    name = engines.resolve(settings.engine, settings.precision)
    load = partial(engines.load, name, threads=1, precision=settings.precision)
    model = bundle.onnx(settings.precision)
    return Pipeline(engine, NoDefense(), scores=ScoredEngine(load, model, whitener))


def load_model(
    settings: Settings,
    bundle: Bundle,
    engine: EngineName,
    defense: defenses.Defense,
    metrics: Metrics,
) -> LoadedModel:
    """Load, test and warm up a model.

    Raises:
        BundleError: a file is not the one that the card lists, or the self-test fails.
        ConfigError: the engine cannot run the model, or not fast enough.
    """
    composer = Composer(
        partial(engines.load, engine, threads=settings.threads, precision=settings.precision),
        defense,
        # Not in bfloat16, and torch would interpret node by node what numpy does in less.
        fusible=engine != "torch" and settings.precision != "bf16",
        limit_s=settings.batch_limit_s,
        whitener=partial(whitener_of, settings, bundle),
    )
    images = golden_inputs(bundle.card.input)
    composed = composer(bundle.onnx(settings.precision), images, settings.batch.max_size)
    self_test(bundle, composed.unfused.engine, settings.precision)
    warm_up_decoders(bundle.card.input, bundle.card.preprocessing)
    inline = settings.batch.execution == "inline" or (
        settings.batch.execution == "auto" and composed.seconds < INLINE_S
    )
    return LoadedModel(settings, bundle, metrics, composer, composed, inline)


def log_policy_warnings(settings: Settings, bundle: Bundle, defense: defenses.Defense) -> None:
    """Log warnings about policies that do nothing, or more than their owner may want."""
    precision = settings.precision
    clean = np.array(bundle.golden().probabilities[precision], np.float32)
    for sentence in policy_warnings(bundle.card, precision, clean, defense):
        log.warning("%s", sentence)


def whitener_of(settings: Settings, bundle: Bundle) -> Whitener | None:
    """What the score `residual` needs; None for a bundle that was not calibrated."""
    try:
        return DefenseArtifacts(bundle, settings.engine, settings.precision).gate().whitener
    except defenses.DefenseError:
        return None


def _warm_up(composed: Composed, images: npt.NDArray[Any], warm_up: WarmUp) -> None:
    rows = composed.unfused.engine(images)
    warm_up(images, rows, composed.engine_s, partial(composed.unfused.evidence, images, rows))


def warm_up_decoders(shape: InputShape, preprocessing: Preprocessing) -> None:
    """Decode an image of each format and kind.

    The libraries import a codec when they first use it, which fails in a process that has run out
    of file descriptors.
    """
    for format_ in IMAGE_FORMATS:
        for mode in ("RGB", "L", "RGBA"):
            file = io.BytesIO()
            picture = Image.new("RGB" if (format_, mode) == ("JPEG", "RGBA") else mode, (16, 12))
            picture.save(file, format_)
            decode(file.getvalue(), shape, preprocessing, max_pixels=16 * 12)


def log_limited(settings: Settings, composed: Composed) -> None:
    """Log a warning if batches are smaller than the settings ask for."""
    if composed.max_size < settings.batch.max_size:
        log.warning(
            "batch size limited to %d images (%.2g s): %d images would take longer than %.2g s, "
            "1/4 of SCUMBLE_WATCHDOG_S",
            composed.max_size,
            composed.seconds,
            settings.batch.max_size,
            settings.batch_limit_s,
        )
