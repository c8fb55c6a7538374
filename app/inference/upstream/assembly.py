"""Serves the network of another server as the settings ask: client, monitor, batchers, defense."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from app.errors import ConfigError
from app.inference.assembly import (
    INLINE_S,
    WarmUp,
    log_policy_warnings,
    warm_up_decoders,
    whitener_of,
)
from app.inference.batching import Batchers
from app.inference.bundle import GOLDEN_COUNT, Bundle, golden_inputs
from app.inference.engines import EngineName, Probs
from app.inference.pipeline import Pipeline, defended
from app.inference.upstream.batching import UpstreamBatcher
from app.inference.upstream.client import UpstreamClient
from app.inference.upstream.defense_time import measured
from app.inference.upstream.engine import UpstreamEngine, UpstreamScores, make_client, network_of
from app.inference.upstream.monitor import Monitor
from app.inference.upstream.network_interface import Network
from app.inference.upstream.pass_through_models import PassThrough, make_pass_through
from app.inference.upstream.v2_network import V2Network
from app.settings import Settings
from app.telemetry.metrics import Metrics
from scumble import defenses
from scumble.defenses.evidence import Evidence, Score
from scumble.defenses.scores import Whitener

WARM_ENERGY, WARM_RESIDUAL = 1.0, 1.0  # of golden images, whose scores the bundle does not have
log = logging.getLogger("scumble")


@dataclass(frozen=True)
class Upstream:
    """The server that runs the network, as the service sees it.

    Attributes:
        client: sends requests.
        monitor: compares golden outputs.
    """

    client: UpstreamClient
    monitor: Monitor

    def running(self) -> AbstractAsyncContextManager[None]:
        """Watch it in this context."""
        return self.monitor.running()

    def not_ready_reason(self) -> str | None:
        """Why it can answer nothing; None if it can."""
        return self.client.unusable


@dataclass(frozen=True)
class UpstreamModel:
    """A model that another server runs.

    Attributes:
        settings: that it was loaded with.
        bundle: its card, golden outputs and calibration.
        metrics: of its batchers.
        network: writes requests and reads answers.
        upstream: the server.
        pipeline: with the server's defense.
        threaded: defend on a thread.
    """

    settings: Settings
    bundle: Bundle
    metrics: Metrics
    network: Network
    upstream: Upstream
    pipeline: Pipeline
    threaded: bool

    @property
    def max_size(self) -> int:
        """Images of the largest batch."""
        return min(self.settings.batch.max_size, self.network.max_batch)

    def pixels(self) -> Batchers:
        """The batchers for uint8 images."""
        return self._batchers()

    def tensors(self, warm_up: WarmUp) -> Batchers:
        """The batchers for float tensors; defenses are warmed up for them.

        Args:
            warm_up: is called with example tensors.

        Raises:
            ConfigError: a defense fails on them.
        """
        images = golden_inputs(self.bundle.card.input)
        self._warm_up(
            images.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255), warm_up
        )
        return self._batchers()

    def warm_up(self, warm_up: WarmUp) -> None:
        """Call `warm_up` with example pixels."""
        self._warm_up(golden_inputs(self.bundle.card.input), warm_up)

    def pass_through(self) -> PassThrough | None:
        """The models whose V2 requests are passed through; None for none.

        Raises:
            ConfigError: the settings of one are not allowed.
        """
        if not isinstance(self.network, V2Network):
            if self.settings.upstream_models:
                raise ConfigError(
                    "SCUMBLE_UPSTREAM_MODELS needs a V2 server; the upstream is a JSON API"
                )
            return None
        return make_pass_through(
            self.settings,
            self.bundle.card.name,
            self.network,
            self.upstream.client,
            self.pipeline.defense,
            self._whitener if "residual" in self.network.scores else None,
            self.max_size,
        )

    def log_loaded(self, engine: EngineName, defense: defenses.Defense) -> None:
        """Log what is served and how."""
        log.info(
            "loaded",
            extra={
                "model": self.bundle.card.name,
                "version": self.bundle.card.version,
                "engine": engine,
                "upstream": [replica.url for replica in self.upstream.client.replicas],
                "defense": repr(defense),
                "defends": "numpy",
                "execution": "thread" if self.threaded else "inline",
                "max_batch": self.max_size,
            },
        )
        log_policy_warnings(self.settings, self.bundle, defense)
        token = self.settings.upstream_token is not None
        if token and any(url.startswith("http:") for url in self.settings.upstream_list):
            log.warning("SCUMBLE_UPSTREAM_TOKEN is sent in clear: the URL begins with http")

    @cached_property
    def _golden(self) -> Probs:
        return np.array(self.bundle.golden().probabilities["float32"], np.float32)

    @cached_property
    def _whitener(self) -> Whitener | None:
        return whitener_of(self.settings, self.bundle)

    def _evidence(self, needs: frozenset[Score]) -> Evidence:
        """Evidence of the golden images, to warm up defenses.

        Raises:
            ConfigError: the upstream has no such scores.
        """
        require(self.network, needs)
        rows = self._golden
        energy = np.full(len(rows), WARM_ENERGY, np.float32) if "energy" in needs else None
        residual = np.full(len(rows), WARM_RESIDUAL, np.float32) if "residual" in needs else None
        return Evidence(rows.max(axis=1), energy, residual)

    def _warm_up(self, images: np.ndarray, warm_up: WarmUp) -> None:
        warm_up(images, self._golden, 0.0, self._evidence)

    def _batchers(self) -> Batchers:
        settings = self.settings
        batcher = UpstreamBatcher(
            self.pipeline,
            self.metrics,
            client=self.upstream.client,
            network=self.network,
            concurrency=settings.upstream_concurrency,
            whitener=lambda: self._whitener,
            threaded=self.threaded,
            max_size=self.max_size,
            max_queue=settings.limits.max_queue,
            max_wait_s=settings.batch.max_wait_us / 1e6,
            target_s=settings.batch.target_p99_ms / 1e3,
        )
        return Batchers(batcher, batcher)


def load_upstream(
    settings: Settings, bundle: Bundle, defense: defenses.Defense, metrics: Metrics
) -> UpstreamModel:
    """Prepare to serve the network of another server; no request is sent yet.

    Raises:
        BundleError: a file is not the one that the card lists.
        ConfigError: the settings or the card do not fit, the server has no output for a score, or
            the defense is too slow.
    """
    if settings.precision != "float32":
        raise ConfigError(
            f"SCUMBLE_PRECISION is {settings.precision!r}; allowed with the engine upstream: "
            "float32, as the other server decides what it computes with"
        )
    network = network_of(settings, bundle)
    golden = bundle.golden()
    shape = np.shape(golden.probabilities.get("float32", ()))
    if shape != (GOLDEN_COUNT, network.classes) or "float32" not in golden.tolerance:
        raise ConfigError(
            f"{bundle}: golden.json has float32 outputs of shape {shape}; needed: "
            f"{(GOLDEN_COUNT, network.classes)}, as `scumble connect` records them"
        )
    client = make_client(settings, metrics)
    monitor = Monitor(client, network, bundle.card.input, golden, every_s=settings.upstream_check_s)
    require(network, defense.needs)
    warm_up_decoders(bundle.card.input, bundle.card.preprocessing)
    engine = UpstreamEngine(settings, bundle)
    scores = UpstreamScores(engine, partial(whitener_of, settings, bundle))
    pipeline = Pipeline(engine, defense, scores=scores if network.scores else None)
    model = UpstreamModel(
        settings, bundle, metrics, network, Upstream(client, monitor), pipeline, threaded=False
    )
    seconds = _defense_seconds(model)
    threaded = settings.batch.execution == "thread" or (
        settings.batch.execution == "auto" and seconds >= INLINE_S
    )
    return UpstreamModel(
        settings, bundle, metrics, network, model.upstream, pipeline, threaded=threaded
    )


def require(network: Network, needs: frozenset[Score]) -> None:
    """Refuse a defense that needs scores which the upstream has no output for.

    Raises:
        ConfigError: names the scores.
    """
    if missing := sorted(needs - network.scores):
        raise ConfigError(
            f"the upstream has no output for: {', '.join(missing)}; {network.score_hint}"
        )


def _defense_seconds(model: UpstreamModel) -> float:
    """Seconds that the defense takes for the largest batch.

    Raises:
        ConfigError: they are more than a batch may take.
    """
    images = golden_inputs(model.bundle.card.input)[:1].repeat(model.max_size, 0)
    rows = model._golden[:1].repeat(model.max_size, 0)
    defense = model.pipeline.defense
    evidence = model._evidence(defense.needs)[:1].first(model.max_size)
    answer = partial(defended, defense, rows, evidence, images, [(model.max_size, None)])
    return measured(defense, answer, model.max_size, model.settings.batch_limit_s)
