"""The network of another server as an engine that waits for its answers.

The service itself uses `app.inference.upstream.batching`, which does not wait. This is for tools:
previews, calibration, checks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from app.errors import ConfigError, RequestError
from app.inference.bundle import Bundle, Templated
from app.inference.engines import Batch, Probs
from app.inference.upstream.client import UpstreamClient, open_ca
from app.inference.upstream.monitor import Monitor
from app.inference.upstream.network_interface import Found, Network
from app.inference.upstream.v2_network import V2Network
from app.settings import Settings
from app.telemetry.metrics import Metrics
from scumble.defenses.evidence import Evidence
from scumble.defenses.scores import Whitener


def make_client(settings: Settings, metrics: Metrics) -> UpstreamClient:
    """The client that the settings ask for.

    Raises:
        ConfigError: they name no upstream, or its certificates cannot be read.
    """
    if not settings.upstream:
        raise ConfigError(
            "SCUMBLE_UPSTREAM is not set; needed for the engine upstream: "
            "http://HOST:PORT/v2/models/NAME, or http://HOST:PORT with SCUMBLE_UPSTREAM_TEMPLATE"
        )
    token = settings.upstream_token
    return UpstreamClient(
        settings.upstream_list,
        metrics,
        timeout_s=settings.upstream_timeout_s,
        # Batches, requests that are passed through, and a check of each replica.
        connections=2 * settings.upstream_concurrency + 1 + len(settings.upstream_list),
        token=None if token is None else token.get_secret_value(),
        tls=open_ca(None if settings.upstream_ca is None else str(settings.upstream_ca)),
    )


class UpstreamEngine:
    """Asks the upstream of the settings; each call opens connections of its own.

    Args:
        settings: that name the upstream.
        bundle: whose card describes the network.
    """

    def __init__(self, settings: Settings, bundle: Bundle) -> None:
        self._settings = settings
        self._bundle = bundle
        self._network = network_of(settings, bundle)

    @property
    def score_hint(self) -> str:
        """How the upstream comes to have the scores that it lacks."""
        return self._network.score_hint

    def __call__(self, batch: Batch, /) -> Probs:
        """Probabilities of each image.

        Raises:
            ConfigError: the upstream does not answer, or is not what the card says.
        """
        return np.concatenate([found.rows for found in self.found(batch)])

    def prepare(self, sizes: Iterable[int], /) -> None:
        """Does nothing: the other server prepares itself."""

    def found(self, batch: Batch) -> list[Found]:
        """All that the network says of the images, in parts.

        Raises:
            ConfigError: the upstream does not answer, or is not what the card says.
        """
        return asyncio.run(self._found(batch))

    async def _found(self, batch: Batch) -> list[Found]:
        client = make_client(self._settings, Metrics(CollectorRegistry()))
        monitor = Monitor(client, self._network, self._bundle.card.input, self._bundle.golden())
        network = self._network
        size = network.max_batch
        found = []
        async with monitor.running():
            if client.unusable is not None:
                changed = [replica.changed for replica in client.replicas if replica.changed]
                raise ConfigError("; ".join(changed) or f"{client.unusable}; see the log")
            for i in range(0, len(batch), size):
                part = batch[i : i + size]
                body, headers = network.request(part)
                read = partial(network.read, n=len(part))
                try:
                    answer = await client.ask(
                        network.path, body, headers, read, method=network.method
                    )
                except RequestError as exc:
                    raise ConfigError(str(exc)) from exc
                found.append(answer)
                if found[-1].valid is not None:
                    raise ConfigError("upstream gave no distribution for an image")
        return found


class UpstreamScores:
    """Clean rows and evidence of the same engine.

    Args:
        engine: asks the upstream.
        whitener: gives what the score `residual` needs.
    """

    made = True

    def __init__(self, engine: UpstreamEngine, whitener: Callable[[], Whitener | None]) -> None:
        self._engine = engine
        self._whitener = whitener

    def require(self, images: Batch) -> Evidence:
        """The evidence of example images.

        Raises:
            ConfigError: the upstream does not answer, or is not what the card says.
        """
        return self(images)[1]

    def __call__(self, batch: Batch) -> tuple[Probs, Evidence]:
        """Clean rows and evidence.

        Raises:
            ConfigError: the upstream does not answer, or is not what the card says.
        """
        found = joined(self._engine.found(batch))
        return found.rows, found.evidence(self._whitener())

    def prepare(self, sizes: Iterable[int]) -> None:
        """Does nothing: the other server prepares itself."""


def joined(parts: list[Found]) -> Found:
    """What the network says of the images of all parts."""

    def column(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else np.concatenate(columns)

    return Found(column("rows"), None, column("logits"), column("features"))


def network_of(settings: Settings, bundle: Bundle) -> Network:
    """The network that a bundle's card describes, and the template of the settings if it has one.

    Raises:
        ConfigError: the bundle has a network of its own, or the template is not the card's.
    """
    template = settings.upstream_template
    if isinstance(bundle.card.upstream, Templated):
        # Imported here: most upstreams speak V2.
        from app.inference.upstream.template_network import TemplateNetwork

        return TemplateNetwork.of(bundle.card, template)
    try:
        network = V2Network.of(bundle.card)
    except ValueError:
        raise ConfigError(
            f"engine is 'upstream', but {bundle} describes no network of another server; "
            "make a bundle that does with `scumble connect`"
        ) from None
    if template is not None:
        raise ConfigError(
            f"SCUMBLE_UPSTREAM_TEMPLATE is {str(template)!r}, but {bundle} describes a V2 server; "
            "allowed: a bundle that `scumble connect --template` made"
        )
    return network
