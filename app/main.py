"""Assembly: settings in, application out. The one module that knows all the others."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from app import defenses, engines
from app.api import build
from app.auxiliary import Auxiliaries
from app.batching import Batcher
from app.bundle import ONNX_FILE, Bundle, golden_inputs, open_bundle
from app.errors import ConfigError
from app.graph import tensor_input
from app.metrics import Metrics
from app.pipeline import Fused, Pipeline, fuse, self_test, warm_up
from app.service import Service
from app.settings import Settings, load_settings

# A batch that takes longer than this leaves the event loop to other requests, on a thread.
INLINE_S = 0.010
log = logging.getLogger("scumble")


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for these settings (default: from the environment), loaded, tested and warm.

    Raises:
        ConfigError: the settings cannot be served, and why.
    """
    settings = settings or load_settings()
    bundle = open_bundle(settings.model_dir, settings.model)
    engine_name = engines.resolve(settings.engine)
    load = partial(
        engines.load, engine_name, threads=settings.threads, precision=settings.precision
    )
    model = bundle.onnx(settings.precision)
    engine = load(model)
    defense = make_defense(settings, bundle)
    self_test(bundle, engine, settings.precision)
    pictures = golden_inputs(bundle.card.input)
    largest = max(settings.batch.max_size, settings.limits.max_images)
    # Not in bfloat16, and torch would interpret node by node what numpy does in less.
    fusible = engine_name != "torch" and settings.precision != "bf16"
    plain = Pipeline(engine, defense)
    pipeline = fuse(plain, load, model, pictures) if fusible else plain
    seconds = warm_up(pipeline, pictures, largest)
    inline = settings.batch.execution == "inline" or (
        settings.batch.execution == "auto" and seconds < INLINE_S
    )

    metrics = Metrics(CollectorRegistry())
    metrics.model_info.labels(
        model=bundle.card.name,
        version=bundle.card.version,
        precision=settings.precision,
        engine=engine_name,
        defense=settings.defense,
        sha256=bundle.card.files[ONNX_FILE[settings.precision]],
    ).set(1)
    batcher = partial(
        Batcher,
        metrics=metrics,
        max_size=settings.batch.max_size,
        max_queue=settings.limits.max_queue,
        max_wait_s=settings.batch.max_wait_us / 1e6,
        target_s=settings.batch.target_p99_ms / 1e3,
        inline=inline,
    )
    tensors = None
    if settings.tensor_input:
        planar = pictures.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
        opened = tensor_input(model)
        plain = Pipeline(load(opened), defense)
        from_tensors = fuse(plain, load, opened, planar) if fusible else plain
        warm_up(from_tensors, planar, settings.batch.max_size)
        tensors = batcher(from_tensors)
    service = Service(
        card=bundle.card,
        limits=settings.limits,
        pixels=batcher(pipeline),
        tensors=tensors,
        max_batch=settings.batch.max_size,
        metrics=metrics,
        count_images=metrics.images.labels(bundle.card.name, settings.precision).inc,
    )
    log.info(
        "loaded",
        extra={
            "model": bundle.card.name,
            "version": bundle.card.version,
            "precision": settings.precision,
            "engine": engine_name,
            "defense": repr(defense),
            "defends": "graph" if isinstance(pipeline, Fused) else "numpy",
            "execution": "inline" if inline else "thread",
            "full_batch_ms": round(seconds * 1000, 3),
        },
    )
    return build(service, access_log=settings.access_log)


def make_defense(settings: Settings, bundle: Bundle) -> defenses.Defense:
    """The defense that the settings name.

    Raises:
        ConfigError: no such defense, parameters that it does not allow, or an auxiliary file that
            the bundle lacks.
    """
    secret = settings.secret.get_secret_value().encode()
    try:
        return defenses.configure(
            settings.defense,
            settings.defense_params,
            bundle=Auxiliaries(bundle, settings.engine),
            secret=secret,
        )
    except defenses.DefenseError as exc:
        raise ConfigError(f"defense {settings.defense!r}: {exc}") from exc
