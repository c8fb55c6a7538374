"""Assembles the service: settings in, application out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI

from app.access.assembly import make_access, make_policies
from app.audit.assembly import make_audit
from app.http.application import build
from app.http.prediction import Service
from app.inference import engines
from app.inference.assembly import LoadedModel, load_served, make_defense, model_labels
from app.inference.bundle import open_bundle
from app.inference.executor import BoundedExecutor
from app.settings import Settings, load_settings
from app.system.async_lazy import AsyncLazy
from app.system.file_watcher import FileName, FileWatcher, LastGood, Listener
from app.telemetry.assembly import make_metrics, make_tracing
from app.telemetry.counters import increment

if TYPE_CHECKING:
    from app.inference.upstream.assembly import UpstreamModel


def create_app(
    settings: Settings | None = None,
    *,
    last_good: Mapping[FileName, LastGood] | None = None,
    listener: Listener | None = None,
    loaded: Callable[[LoadedModel | UpstreamModel], None] | None = None,
) -> FastAPI:
    """Make the application, with its model loaded, tested and warm.

    Args:
        settings: what to serve, by default from the environment.
        last_good: contents to use for files that cannot be loaded.
        listener: is told when a file has been reloaded.
        loaded: is given the model; the application keeps only what answers requests.

    Raises:
        ConfigError: the settings cannot be served; the message says why.
    """
    settings = settings or load_settings()
    bundle = open_bundle(settings.model_dir, settings.model)
    engine = engines.resolve(settings.engine, settings.precision)
    defense = make_defense(settings, bundle)

    metrics = make_metrics(model_labels(settings, bundle, engine))
    tracing = make_tracing(settings, os.environ)
    model = load_served(settings, bundle, engine, defense, metrics)

    policies = make_policies(settings, bundle, defense, model.max_size)
    model.warm_up(policies.warm_up)
    files = FileWatcher(
        failures=metrics.reload_failures,
        failing_s=metrics.reload_failing_s,
        allowed_s=settings.reload_failure_s,
        listener=listener,
    )
    access = make_access(settings, policies, metrics, files, last_good or {})

    service = Service(
        card=bundle.card,
        limits=settings.limits,
        pixels=model.pixels(),
        # Needs a copy of the network, and most clients never send tensors.
        tensors=AsyncLazy(partial(model.tensors, policies.warm_up))
        if settings.tensor_input
        else None,
        metrics=metrics,
        count_images=increment(metrics.images.labels(bundle.card.name, settings.precision)),
        executor=BoundedExecutor(settings.limits.max_queue, settings.limits.max_decode_bytes),
        access=access,
        audit=make_audit(settings, bundle.card, metrics, keyless=access is None),
        files=files,
        upstream=None if isinstance(model, LoadedModel) else model.upstream,
        pass_through=None if isinstance(model, LoadedModel) else model.pass_through(),
        traced=tracing is not None,
    )
    model.log_loaded(engine, defense)
    if loaded is not None:
        loaded(model)
    return build(
        service,
        access_log=settings.access_log,
        tracing=tracing,
        root_path=settings.root_path or "",
        cors_origins=settings.cors_origins,
    )
