"""`scumble serve`, `scumble reload` and `scumble check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from app.errors import ConfigError
from app.settings import Settings, load_settings, shown, variables
from app.system.json_values import parse

RELOAD_S = 600


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with settings.",
)
admin_port_option = click.option("--admin-port", type=int, help="Port of metrics and console.")


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add options for the most common settings; others come from the environment or a file."""
    decorators = [
        config_option,
        click.option("--model", help="Bundle to serve."),
        click.option("--model-dir", type=click.Path(path_type=Path), help="Folder of bundles."),
        click.option("--precision", type=click.Choice(["float32", "bf16", "int8"])),
        click.option("--engine", type=click.Choice(["auto", "openvino", "onnxruntime", "torch"])),
        click.option("--defense", help="Name of the defense."),
        click.option("--defense-params", help="Its parameters, a JSON object."),
        click.option("--workers", help="Number of processes, or auto."),
        click.option("--host", help="Address of the public port."),
        click.option("--port", type=int, help="Public port."),
        admin_port_option,
    ]
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


@click.command()
@options
def serve(**arguments: Any) -> None:
    """Serve a model until Ctrl-C or SIGTERM.

    Settings come from these options, then from SCUMBLE_* variables, then from a TOML file.
    """
    from app.processes.serve import serve as run

    try:
        code = run(_settings(arguments))
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc
    raise SystemExit(code)


@click.command()
@config_option
@admin_port_option
def reload(**arguments: Any) -> None:
    """Reload the model of the server on this machine from its files.

    No request is interrupted. If the files cannot be served, the server keeps the current model and
    the command exits with 1.
    """
    import httpx2

    try:
        settings = _settings(arguments)
        host = "127.0.0.1" if settings.admin_host in ("0.0.0.0", "::") else settings.admin_host  # noqa: S104  # compared, not bound
        url = f"http://[{host}]" if ":" in host else f"http://{host}"
        # Without a proxy of the environment: it would forward the request to itself.
        answer = httpx2.post(
            f"{url}:{settings.admin_port}/reload", timeout=RELOAD_S, trust_env=False
        )
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc
    except httpx2.HTTPError as exc:
        raise click.ClickException(f"no answer from the admin port: {exc}") from exc
    if answer.status_code != 200:
        raise click.ClickException(_refusal(answer.status_code, answer.content))
    click.echo("reloaded")


@click.command()
@options
def check(**arguments: Any) -> None:
    """Print the resolved settings with secrets masked, and check that they can be served."""
    from app.http.tls import open_certificate
    from app.inference import engines
    from app.inference.assembly import make_defense
    from app.inference.bundle import open_bundle
    from app.main import create_app

    try:
        settings = _settings(arguments)
        bundle = open_bundle(settings.model_dir, settings.model)
        engine = engines.resolve(settings.engine, settings.precision)
        defense = make_defense(settings, bundle)
        app = create_app(settings)
        open_certificate(settings)
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc
    for name, help_text in variables().items():
        click.echo(f"{name:35} = {shown(settings, name):28} {help_text}")
    accuracy = ", ".join(
        f"{name} {figure.value:.2%} of {figure.images} ({figure.data})"
        for name, figure in bundle.card.accuracy.items()
    )
    click.echo()
    click.echo(
        f"model     {bundle.card.name} {bundle.card.version}, {len(bundle.card.labels)} classes"
    )
    click.echo(f"accuracy  {accuracy or 'not measured'}")
    click.echo(f"engine    {engine}, {settings.precision}, {settings.worker_count} worker(s)")
    click.echo(f"defense   {defense!r}")
    most = app.state.service.pixels.default.max_size
    click.echo(f"batches   up to {most} images")
    if most < settings.batch.max_size:
        click.echo(
            f"          SCUMBLE_BATCH__MAX_SIZE is {settings.batch.max_size}; more than {most} "
            f"would take longer than {settings.batch_limit_s:g} s, 1/4 of SCUMBLE_WATCHDOG_S"
        )
    click.echo("ok: these settings can be served")


def _refusal(status: int, body: bytes) -> str:
    """The message of the admin port, or that this is not an admin port."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return f"unexpected answer ({status}); is --admin-port the admin port of a Scumble server?"


def _settings(arguments: dict[str, Any]) -> Settings:
    import os

    given = {name: value for name, value in arguments.items() if value is not None}
    if "config" in given:
        os.environ["SCUMBLE_CONFIG"] = str(given.pop("config"))
    if given.get("workers", "auto") != "auto":
        given["workers"] = _number("--workers", given["workers"])
    if "defense_params" in given:
        given["defense_params"] = parse("--defense-params", given["defense_params"])
    return load_settings(**given)


def _number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as exc:
        raise ConfigError(f"{option} is {text!r}; allowed: a number or auto") from exc
