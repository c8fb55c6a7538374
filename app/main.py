"""Assembly: settings in, application out. The one module that knows all the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from app.access.admission import Access
from app.access.grants import Grant, Grants
from app.access.keys import load_keys, parse_keys
from app.access.policies import Policies
from app.access.quotas import common_buckets
from app.access.stores import MEMORY, Bucket, open_store
from app.audit.chain_file import ChainFile
from app.audit.log import Audit
from app.errors import ConfigError
from app.http.application import build
from app.http.prediction import Service
from app.inference import engines
from app.inference.async_lazy import AsyncLazy
from app.inference.auxiliary import Auxiliaries
from app.inference.batching import Batcher, Batchers
from app.inference.bundle import ONNX_FILE, Bundle, golden_inputs, open_bundle
from app.inference.executor import BoundedExecutor
from app.inference.graph import tensor_input
from app.inference.pipeline import Composed, Composer, Fused, self_test
from app.settings import Settings, collector, load_settings
from app.system.file_watcher import FileName, FileWatcher, LastGood, Listener, WatchedFile
from app.telemetry.metrics import Metrics
from scumble import defenses

if TYPE_CHECKING:
    from app.telemetry.tracing import Tracing

# A batch that takes longer than this leaves the event loop to other requests, on a thread.
INLINE_S = 0.010
OTEL_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
log = logging.getLogger("scumble")


def create_app(
    settings: Settings | None = None,
    *,
    last_good: Mapping[FileName, LastGood] | None = None,
    listener: Listener | None = None,
) -> FastAPI:
    """The service for these settings (default: from the environment), loaded, tested and warm.

    Args:
        settings: what is served.
        last_good: files to use where those that the settings name cannot be loaded.
        listener: is told of files that are loaded anew.

    Raises:
        ConfigError: the settings cannot be served, and why.
    """
    settings = settings or load_settings()
    bundle = open_bundle(settings.model_dir, settings.model)
    engine = engines.resolve(settings.engine, settings.precision)
    defense = make_defense(settings, bundle)
    compose = Composer(
        partial(engines.load, engine, threads=settings.threads, precision=settings.precision),
        defense,
        # Not in bfloat16, and torch would interpret node by node what numpy does in less.
        fusible=engine != "torch" and settings.precision != "bf16",
        limit_s=settings.batch_limit_s,
    )
    pictures = golden_inputs(bundle.card.input)
    pixels = compose(bundle.onnx(settings.precision), pictures, settings.batch.max_size)
    self_test(bundle, pixels.unfused.engine, settings.precision)
    inline = settings.batch.execution == "inline" or (
        settings.batch.execution == "auto" and pixels.seconds < INLINE_S
    )
    metrics = make_metrics(settings, bundle, engine)
    batchers = partial(make_batchers, settings, metrics, inline)
    tracing = make_tracing(settings, os.environ)
    policies = make_policies(settings, bundle, defense, pixels.max_size)
    policies.serve(pictures, pixels.unfused.engine(pictures))
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
        pixels=batchers(pixels),
        # Most clients never send any, and it needs a copy of the network.
        tensors=AsyncLazy(partial(for_tensors, compose, settings, bundle, policies, batchers))
        if settings.tensor_input
        else None,
        metrics=metrics,
        count_images=metrics.images.labels(bundle.card.name, settings.precision).inc,
        executor=BoundedExecutor(settings.limits.max_queue, settings.limits.max_decode_bytes),
        access=access,
        audit=make_audit(settings, bundle, metrics, keyless=access is None),
        files=files,
        traced=tracing is not None,
    )
    log.info(
        "loaded",
        extra={
            "model": bundle.card.name,
            "version": bundle.card.version,
            "precision": settings.precision,
            "engine": engine,
            "defense": repr(defense),
            "defends": "graph" if isinstance(pixels.fused, Fused) else "numpy",
            "execution": "inline" if inline else "thread",
            "max_batch": pixels.max_size,
            "full_batch_ms": round(pixels.seconds * 1000, 3),
        },
    )
    say_limited(settings, pixels)
    return build(
        service,
        access_log=settings.access_log,
        tracing=tracing,
        root_path=settings.root_path or "",
        cors_origins=settings.cors_origins,
    )


def say_limited(settings: Settings, composed: Composed) -> None:
    """Log that batches are smaller than the settings ask for."""
    if composed.max_size < settings.batch.max_size:
        log.warning(
            "batches have at most %d images, which take %.2g s: %d would take more than %.2g s, "
            "1/4 of SCUMBLE_WATCHDOG_S",
            composed.max_size,
            composed.seconds,
            settings.batch.max_size,
            settings.batch_limit_s,
        )


def for_tensors(
    compose: Composer,
    settings: Settings,
    bundle: Bundle,
    policies: Policies,
    batchers: Callable[[Composed], Batchers],
) -> Batchers:
    """Who answers float tensors. All is prepared: nobody waits for a part of it."""
    opened = tensor_input(bundle.onnx(settings.precision))
    pictures = golden_inputs(bundle.card.input)
    planar = pictures.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
    composed = compose(opened, planar, settings.batch.max_size)
    say_limited(settings, composed)
    policies.serve(planar, composed.unfused.engine(planar))
    made = batchers(composed)
    made.prepare()
    return made


def make_batchers(
    settings: Settings, metrics: Metrics, inline: bool, composed: Composed
) -> Batchers:
    """For the clients under the server's own defense, and for those who may have another."""
    batcher = partial(
        Batcher,
        metrics=metrics,
        max_size=composed.max_size,
        max_queue=settings.limits.max_queue,
        max_wait_s=settings.batch.max_wait_us / 1e6,
        target_s=settings.batch.target_p99_ms / 1e3,
        inline=inline,
    )
    own = batcher(composed.fused)
    if settings.keys_file is None or composed.fused is composed.unfused:
        return Batchers(own, own)
    return Batchers(own, batcher(composed.unfused))


def make_metrics(settings: Settings, bundle: Bundle, engine: str) -> Metrics:
    """The metrics of this worker, which say what it serves."""
    metrics = Metrics(CollectorRegistry())
    metrics.model_info.labels(
        model=bundle.card.name,
        version=bundle.card.version,
        precision=settings.precision,
        engine=engine,
        defense=settings.defense,
        sha256=bundle.card.files[ONNX_FILE[settings.precision]],
    ).set(1)
    return metrics


def make_defense(settings: Settings, bundle: Bundle) -> defenses.Defense:
    """The defense that the settings name.

    Raises:
        ConfigError: no such defense, parameters that it does not allow, or an auxiliary file that
            the bundle lacks.
    """
    try:
        defense = configure(settings, bundle, settings.defense, settings.defense_params)
    except defenses.DefenseError as exc:
        raise ConfigError(f"defense {settings.defense!r}: {exc}") from exc
    if not settings.defense_params and settings.defense in bundle.card.recommended:
        log.info("using the recommended parameters", extra={"defense": repr(defense)})
    return defense


def configure(
    settings: Settings, bundle: Bundle, name: str, params: Mapping[str, Any]
) -> defenses.Defense:
    """A defense of this server, whoever it is for.

    Raises:
        DefenseError: no such defense, or parameters that it does not allow.
        ConfigError: an auxiliary network cannot be loaded.
    """
    return defenses.configure(
        name,
        bundle.card.defense_params(name, params),
        bundle=Auxiliaries(bundle, settings.engine, settings.precision),
        secret=settings.secret.get_secret_value().encode(),
    )


def make_access(
    settings: Settings,
    policies: Policies,
    metrics: Metrics,
    files: FileWatcher,
    last_good: Mapping[FileName, LastGood],
) -> Access | None:
    """Keys and budgets, or None where anyone may ask any number; `files` keeps the keys loaded.

    Raises:
        ConfigError: the file of keys is broken, or the store cannot count for all workers.
    """
    common = common_budgets(settings)
    if settings.keys_file is None:
        log.warning("NO API KEYS: whoever reaches the port may ask; see SCUMBLE_KEYS_FILE")
        if not common:
            return None
    keys = make_keys(settings, policies, last_good.get("keys"))
    if keys is not None:
        files.add(keys)
    return Access(
        keys,
        closed=settings.keys_on_failure == "closed",
        anybody=Grant(buckets=common, policy=settings.defense),
        store=open_store(settings.store),
        failures=metrics.store_failures,
        clients=metrics.clients,
    )


def make_audit(
    settings: Settings, bundle: Bundle, metrics: Metrics, *, keyless: bool
) -> Audit | None:
    """The audit log, which is opened with its first line; None where none is wanted.

    Raises:
        ConfigError: its folder is not there, or not ours to write in.
    """
    if settings.audit_file is None:
        return None
    folder = settings.audit_file.absolute().parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"SCUMBLE_AUDIT_FILE is {str(settings.audit_file)!r}: "
            f"{folder} is no folder that this process may write in"
        )
    card = bundle.card
    return Audit(
        ChainFile(settings.audit_file, fsync=settings.audit_fsync),
        facts={"model": card.name, "version": card.version},
        policy=settings.defense if keyless else None,
        closed=settings.audit_on_failure == "closed",
        written=metrics.audit_written,
        lost=metrics.audit_lost,
    )


def make_tracing(settings: Settings, environ: Mapping[str, str]) -> Tracing | None:
    """What makes spans, where the settings or the standard OTEL_* variables name a collector.

    Raises:
        ConfigError: the settings name one, and the extra is not installed.
    """
    named = settings.otel_endpoint is not None
    if not named and not any(environ.get(name) for name in OTEL_ENDPOINTS):
        return None
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    for name in () if named else OTEL_ENDPOINTS:
        try:
            collector(environ.get(name) or "http://localhost")
        except ValueError as exc:  # the exporter would log parts of it
            log.warning("no traces: %s: %s", name, exc)
            return None
    try:
        from app.telemetry.tracing import Tracing, exporting
    except ImportError as exc:
        sentence = f"no traces: {exc}; install it with: pip install 'scumble[otel]'"
        if named:
            raise ConfigError(sentence) from exc
        log.warning("%s", sentence)  # a platform may set OTEL_* for everything that runs on it
        return None
    return Tracing(exporting(settings.otel_endpoint))


def common_budgets(settings: Settings) -> tuple[Bucket, ...]:
    """The buckets of all clients together."""
    budget = settings.budget
    return common_buckets(budget.window_images, budget.window_s, budget.total_images)


def make_policies(
    settings: Settings, bundle: Bundle, defense: defenses.Defense, largest: int = 1
) -> Policies:
    """What builds the grants of this server's keys, for batches of up to `largest` images."""
    return Policies(
        partial(configure, settings, bundle),
        server=(settings.defense, settings.defense_params),
        default=defense,
        common=common_budgets(settings),
        sizes=[*(size for size in engines.FAST if size < largest), largest],
        limit_s=settings.batch_limit_s,
    )


def make_keys(
    settings: Settings, policies: Policies, last_good: LastGood | None
) -> WatchedFile[Grants] | None:
    """The grants of the file of keys; None where there is none.

    Raises:
        ConfigError: it is broken, or there are budgets that the store cannot count for all workers.
    """
    path = settings.keys_file
    if path is None:
        refuse_uncountable(settings, {})
        return None

    def build(parts: tuple[bytes, ...]) -> Grants:
        grants = policies(parse_keys(path, parts[0]))
        refuse_uncountable(settings, grants)
        return grants

    return WatchedFile("keys", lambda: (load_keys(path),), build, last_good=last_good)


def refuse_uncountable(settings: Settings, grants: Grants) -> None:
    """Stop where each worker would count for itself.

    Raises:
        ConfigError: there are budgets, several workers, and no store that they share.
    """
    budgets = settings.budget.model_dump(exclude={"window_s"}).values()
    counted = any(grant.buckets for grant in grants.values()) or any(
        images is not None for images in budgets
    )
    if counted and settings.store.startswith(MEMORY) and settings.worker_count > 1:
        raise ConfigError(
            f"SCUMBLE_STORE is {MEMORY!r}, which each of {settings.worker_count} workers would "
            "have for itself: budgets would be served that many times over; allowed: one worker, "
            "sqlite:///PATH or redis://HOST:PORT/DB"
        )
