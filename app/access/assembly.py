"""API keys and budgets as the settings ask for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

from app.access.admission import Access
from app.access.grants import Grant, Grants
from app.access.keys import load_keys, parse_keys
from app.access.policies import Policies
from app.access.quotas import shared_buckets
from app.access.stores import MEMORY, Bucket, open_store
from app.errors import ConfigError
from app.inference import engines
from app.inference.assembly import configure_defense
from app.inference.bundle import Bundle
from app.settings import Settings
from app.system.file_watcher import FileName, FileWatcher, LastGood, WatchedFile
from app.system.urls import split
from app.telemetry.metrics import Metrics
from scumble.defenses import Defense

log = logging.getLogger("scumble")


def make_policies(
    settings: Settings, bundle: Bundle, defense: Defense, largest: int = 1
) -> Policies:
    """Make what builds the grants of keys.

    Args:
        settings: of the server.
        bundle: that is served.
        defense: the server's own.
        largest: images of the largest batch.
    """
    return Policies(
        partial(configure_defense, settings, bundle),
        server=(settings.defense, settings.defense_params),
        default=defense,
        shared=server_buckets(settings),
        sizes=[*(size for size in engines.FAST if size < largest), largest],
        limit_s=settings.batch_limit_s,
    )


def make_access(
    settings: Settings,
    policies: Policies,
    metrics: Metrics,
    files: FileWatcher,
    last_good: Mapping[FileName, LastGood],
) -> Access | None:
    """Make the check of keys and budgets; None if the settings name neither.

    Args:
        settings: of the server.
        policies: builds the grants of the keys.
        metrics: of this worker.
        files: keeps the keys loaded.
        last_good: the keys to use if their file cannot be loaded.

    Raises:
        ConfigError: the file of keys is broken, or the store cannot count for all workers.
    """
    shared = server_buckets(settings)
    if settings.keys_file is None:
        log.warning(
            "authentication is off: anyone who can reach this port can query the model; "
            "see SCUMBLE_KEYS_FILE"
        )
        if not shared:
            return None
    keys = watch_keys(settings, policies, last_good.get("keys"))
    if keys is not None:
        files.add(keys)
    return Access(
        keys,
        closed=settings.keys_on_failure == "closed",
        keyless=Grant(buckets=shared, policy=settings.defense),
        store=open_store(settings.store),
        failures=metrics.store_failures,
        clients=metrics.clients,
    )


def watch_keys(
    settings: Settings, policies: Policies, last_good: LastGood | None
) -> WatchedFile[Grants] | None:
    """Load the grants of the file of keys; None if the settings name no file.

    Raises:
        ConfigError: the file is broken, or the store cannot count for all workers.
    """
    path = settings.keys_file
    if path is None:
        require_shared_store(settings, {})
        return None

    def build(parts: tuple[bytes, ...]) -> Grants:
        grants = policies(parse_keys(path, parts[0]))
        require_shared_store(settings, grants)
        return grants

    return WatchedFile("keys", lambda: (load_keys(path),), build, last_good=last_good)


def server_buckets(settings: Settings) -> tuple[Bucket, ...]:
    """The buckets that all clients share."""
    return shared_buckets(settings.budget)


def require_shared_store(settings: Settings, grants: Grants) -> None:
    """Refuse budgets that each worker would count for itself.

    Raises:
        ConfigError: there are budgets and several workers, and the store is the memory of each.
    """
    counted = server_buckets(settings) or any(grant.buckets for grant in grants.values())
    in_memory = split(settings.store).scheme == split(MEMORY).scheme
    if counted and in_memory and settings.worker_count > 1:
        raise ConfigError(
            f"SCUMBLE_STORE is {MEMORY!r}, which {settings.worker_count} workers do not share: "
            "each would grant the whole budget; allowed: one worker, sqlite:///PATH or "
            "redis://HOST:PORT/DB"
        )
