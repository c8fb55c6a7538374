"""`scumble keys`: create, list and revoke API keys. Servers reload the file by themselves."""

from __future__ import annotations

import json
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from app.access.keys import Key, KeyFile, KeyLimits, add_key, digest, new_key, read_keys, revoke_key
from app.errors import ConfigError
from app.system.json_values import parse
from app.system.timestamps import timestamp
from app.system.validation import allowed, sentence
from scumble.help_option import HELP

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

file_option = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of API keys.  [default: SCUMBLE_KEYS_FILE]",
)


@click.group(context_settings=HELP)
def keys() -> None:
    """Create, list and revoke API keys.

    A server with SCUMBLE_KEYS_FILE accepts only the keys in that file. It reloads the file within
    two seconds after a change.
    """


@keys.command(context_settings=HELP)
@file_option
@click.option(
    "--client", required=True, help="Name of the client; all keys of a client share its budgets."
)
@click.option("--defense", help="Name of the defense.  [default: the server's]")
@click.option("--defense-params", default="{}", help="Its parameters, a JSON object.")
@click.option(
    "--output",
    "form",
    type=click.Choice(["full", "top_k", "rounded", "label"]),
    default="full",
    show_default=True,
    help="Form of the answers.",
)
@click.option("--k", type=int, help="Number of classes, with --output top_k.")
@click.option("--decimals", type=int, help="Number of decimals, with --output rounded.")
@click.option("--window-images", type=int, help="Images per window.  [default: unlimited]")
@click.option(
    "--window-s", type=int, default=3600, show_default=True, help="Length of the window in seconds."
)
@click.option("--total-images", type=int, help="Images in total.  [default: unlimited]")
@click.option(
    "--window-clean",
    type=int,
    help="Answers per window, without those that are withheld.  [default: unlimited]",
)
@click.option("--total-clean", type=int, help="The same in total.  [default: unlimited]")
@click.option(
    "--on-store-failure",
    type=click.Choice(["closed", "open"]),
    default="closed",
    show_default=True,
    help="Refuse requests, or serve them uncounted, while the budget store is unavailable.",
)
@click.option("--route", "routes", multiple=True, help="Allowed path.  [default: all]")
def add(path: Path | None, **options: Any) -> None:
    """Create a key and print it once; the file contains only its hash."""
    key = new_key()
    try:
        record = _record(key, options)
        _try(record)
        add_key(_path(path), record)
    except (ConfigError, OSError) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"key {record.id} of {record.client}; it will not be shown again:", err=True)
    click.echo(key)


@keys.command("list", context_settings=HELP)
@file_option
def list_(path: Path | None) -> None:
    """Show all keys without their hashes, one per line."""
    try:
        found = read_keys(_path(path)).keys
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc
    for key in found:
        click.echo("  ".join([key.id, key.client, *_facts(key)]))


@keys.command(context_settings=HELP)
@file_option
@click.argument("key_id", metavar="ID")
def revoke(path: Path | None, key_id: str) -> None:
    """Revoke a key; its requests get 403 from then on."""
    try:
        key = revoke_key(_path(path), key_id, datetime.now(UTC))
    except (ConfigError, OSError) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"key {key.id} of {key.client} revoked {key.revoked}", err=True)


def _record(key: str, options: dict[str, Any]) -> Key:
    params = parse("--defense-params", options["defense_params"])
    try:
        return Key.model_validate(
            {
                "id": secrets.token_hex(4),
                "sha256": digest(key.encode()).hex(),
                "client": options["client"],
                "created": timestamp(time.time(), "seconds"),
                "defense": options["defense"],
                "defense_params": params,
                "output": {name: options[name] for name in ("form", "k", "decimals")},
                "limits": {name: options[name] for name in KeyLimits.model_fields},
                "on_store_failure": options["on_store_failure"],
                "routes": options["routes"],
            }
        )
    except ValidationError as exc:
        raise ConfigError("; ".join(map(_sentence, exc.errors(include_url=False)))) from exc


def _sentence(error: ErrorDetails) -> str:
    """One sentence about an option, named by the last part of the error's location."""
    names = [str(part) for part in error["loc"] if isinstance(part, str)]
    if not names:
        return allowed([error])
    option = {"routes": "route", "form": "output"}.get(names[-1], names[-1]).replace("_", "-")
    return sentence(f"--{option}", error)


def _try(key: Key) -> None:
    """Build the defense of the key, as a server with these settings would.

    Raises:
        ConfigError: a server would refuse the file.
    """
    if key.defense is None:
        return
    from app.access.assembly import make_policies
    from app.inference.assembly import make_defense
    from app.inference.bundle import open_bundle
    from app.settings import load_settings

    settings = load_settings()
    bundle = open_bundle(settings.model_dir, settings.model)
    make_policies(settings, bundle, make_defense(settings, bundle))(KeyFile(keys=(key,)))


def _path(path: Path | None) -> Path:
    from app.settings import load_settings

    path = path or load_settings().keys_file
    if path is None:
        raise ConfigError("no key file: use --file or set SCUMBLE_KEYS_FILE")
    return path


def _facts(key: Key) -> list[str]:
    limits, output = key.limits, key.output
    number = output.k or output.decimals
    facts = {
        "created": key.created,
        "revoked": key.revoked,
        "defense": key.defense and f"{key.defense} {json.dumps(key.defense_params)}",
        "output": f"{output.form} {number}" if number else output.form,
        "window": _images(limits.window_images, f" in {limits.window_s} s"),
        "total": _images(limits.total_images),
        "clean window": _images(limits.window_clean, f" in {limits.window_s} s", "answers"),
        "clean total": _images(limits.total_clean, unit="answers"),
        "store failure": key.on_store_failure,
        "routes": " ".join(key.routes),
    }
    return [f"{name}: {text}" for name, text in facts.items() if text]


def _images(number: int | None, rest: str = "", unit: str = "images") -> str | None:
    return None if number is None else f"{number} {unit}{rest}"
