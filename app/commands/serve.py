"""`scumble serve`, `scumble reload` and `scumble check`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app.errors import ConfigError
from app.settings import Settings, changed, load_settings, shown, variables
from app.system.json_values import parse
from scumble.help_option import HELP

if TYPE_CHECKING:
    from app.inference.assembly import LoadedModel
    from app.inference.bundle import Card
    from app.inference.pipeline import Pipeline
    from app.inference.upstream.assembly import UpstreamModel

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
        click.option(
            "--engine",
            type=click.Choice(["auto", "openvino", "onnxruntime", "torch", "upstream"]),
        ),
        click.option("--upstream", help="URLs of the model on V2 servers, or of JSON APIs."),
        click.option(
            "--upstream-template",
            type=click.Path(path_type=Path),
            help="TOML file that describes the JSON API.",
        ),
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


@click.command(context_settings=HELP)
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


@click.command(context_settings=HELP)
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


@click.command(context_settings=HELP)
@options
@click.option("--all", "everything", is_flag=True, help="Show all settings, also the defaults.")
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with images of yours; shows what the defense does to their answers.",
)
def check(everything: bool, images: Path | None, **arguments: Any) -> None:
    """Check that the settings can be served.

    Shows the settings that differ from the defaults, with secrets masked, what would be served, and
    warnings about it. The model is loaded and tested. No port is opened.
    """
    from app.http.tls import open_certificate
    from app.inference import engines
    from app.inference.assembly import load_engine, make_defense
    from app.inference.bundle import golden_inputs, open_bundle
    from app.inference.engine_selection import UPSTREAM
    from app.inference.policy_warnings import policy_hint
    from app.main import create_app

    try:
        settings = _settings(arguments)
        bundle = open_bundle(settings.model_dir, settings.model)
        engine = engines.resolve(settings.engine, settings.precision)
        defense = make_defense(settings, bundle)
        with collected_warnings() as warnings:
            models: list[LoadedModel | UpstreamModel] = []
            app = create_app(settings, loaded=models.append)
            if engine == UPSTREAM:  # which the application asks once it runs
                load_engine(settings, bundle)(golden_inputs(bundle.card.input))
        open_certificate(settings)
        pipeline = models[0].pipeline
        effect = effect_on(images, settings, bundle.card, pipeline) if images else {}
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc
    shown_settings = variables() if everything else changed(settings)
    for name in shown_settings:
        click.echo(f"{name} = {shown(settings, name)}")
        if everything:
            click.echo(f"    {variables()[name]}")
    click.echo("" if shown_settings else "all settings are the defaults (--all shows them)\n")
    for name, text in described(settings, bundle.card, engine, repr(defense)).items():
        click.echo(f"{name:9} {text}")
    most = app.state.service.pixels.default.max_size
    click.echo(f"batches   up to {most} images")
    for name, text in effect.items():
        click.echo(f"{name:9} {text}")
    for sentence in warnings:
        click.echo(f"warning   {sentence}")
    if hint := policy_hint(bundle.card, settings.precision, defense):
        click.echo(f"hint      {hint}")
    for place in taken_ports(settings):
        click.echo(f"warning   {place} is in use now; a server could not bind it")
    click.echo("ok: these settings can be served")


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What is logged as a warning in the meantime, instead of logging it."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    log = logging.getLogger("scumble")
    handler, propagate = Collector(logging.WARNING), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def described(settings: Settings, card: Card, engine: str, defense: str) -> dict[str, str]:
    """What would be served, in a few words each."""
    accuracy = ", ".join(f"{name} {figure.value:.2%}" for name, figure in card.accuracy.items())
    images = {figure.images for figure in card.accuracy.values()}
    measured = f" of {images.pop():,} test images" if len(images) == 1 else ""
    return {
        "model": f"{card.name} {card.version}, {len(card.labels)} classes",
        "accuracy": f"{accuracy}{measured}" if accuracy else "not measured",
        "engine": f"{engine}, {settings.precision}, {settings.worker_count} worker(s)",
        "defense": defense,
    }


def effect_on(folder: Path, settings: Settings, card: Card, pipeline: Pipeline) -> dict[str, str]:
    """What the policy does to the answers for the images in a folder, in a few words each."""
    from app.inference.policy_effect import images_of, policy_effects

    refused: list[str] = []
    images = (pixels for _, pixels in images_of(folder, card, settings.limits, refused))
    (effect,) = policy_effects(pipeline, [pipeline.defense], images)
    said = {
        "images": f"{effect.images:,} in {folder}",
        "labels": f"{effect.changed:.2%} changed by the defense",
        "withheld": f"{effect.withheld:.2%} of the answers",
        "L1": f"{effect.l1:.3f}, mean distance to the clean answer",
    }
    if not pipeline.defense.withholds:
        del said["withheld"]
    if refused:
        said["refused"] = f"{len(refused)} images, the first is {refused[0]}"
    if warning := effect.warning():
        said["warning"] = warning
    return said


def taken_ports(settings: Settings) -> list[str]:
    """The ports of these settings that another process has now."""
    import socket

    places = [(settings.admin_host, settings.admin_port)]
    if settings.uds is None:
        places.insert(0, (settings.host, settings.port))
    taken = []
    for host, port in places:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                taken.append(f"{host} port {port}")
    return taken


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
