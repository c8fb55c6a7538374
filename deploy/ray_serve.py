"""The application on Ray Serve, with replicas instead of workers.

    python deploy/ray_serve.py --replicas 2
    python deploy/ray_serve.py --replicas 16 --address auto

Settings are those of `scumble serve`. Ray's proxy listens in place of our supervisor, so what that
does is not here, and a setting of it stops the start. docs/how-to/scaling.md says more.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

# Set before Ray is imported; otherwise it uses an external address and reports usage statistics.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import click
import ray
from fastapi import FastAPI
from ray import serve

from app.errors import ConfigError
from app.main import create_app
from app.settings import PREFIX, Settings, load_settings
from app.telemetry import logs

# Settings of what the supervisor does for its workers and connections.
SUPERVISORS = {
    "admin_host", "admin_port", "admin_hosts", "console", "tls_cert", "tls_key",
    "tls_handshake_timeout_s", "http", "uds", "watchdog_s", "drain_delay_s",
}  # fmt: skip


def settings_for(replicas: int) -> Settings:
    """The settings of the environment, with replicas instead of workers.

    Raises:
        ConfigError: they cannot be served, or not here.
    """
    settings = load_settings(workers=replicas)
    if ours := sorted(SUPERVISORS & settings.model_fields_set):
        names = ", ".join(f"{PREFIX}{name.upper()}" for name in ours)
        raise ConfigError(f"not on Ray Serve, whose proxy has no such thing: {names}")
    create_app(settings)  # fails here, once, instead of in every replica
    return settings


def application(settings: Settings, replicas: int) -> Any:
    """The deployment; Ray sends the settings to the replicas, with the shared secret."""

    def build() -> FastAPI:
        logs.configure(settings.log_level, settings.log_format)
        return create_app(settings)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="scumble",
        num_replicas=replicas,
        # Longer than the service's queue, so that its own 503, with Retry-After, comes first.
        max_ongoing_requests=2 * settings.limits.max_queue,
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s,
        ray_actor_options={"num_cpus": settings.threads},
        logging_config={"enable_access_log": settings.access_log},
    )
    return deployment.bind()


@click.command()
@click.option("--replicas", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--address", help="Of a running Ray cluster; none starts one on loopback.")
def main(replicas: int, address: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        settings = settings_for(replicas)
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc
    if address is None:
        cpus = replicas * settings.threads
        ray.init(num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1")
    else:
        ray.init(address=address)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(application(settings, replicas))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
