"""`scumble connect`: the card of a network that another server runs."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import click
import orjson
from click.core import ParameterSource
from prometheus_client import CollectorRegistry

from app.commands.picture_options import Size, picture_options, taken_preprocessing
from app.errors import ConfigError
from app.inference.bundle import GOLDEN_FILE, Bundle, write_card
from app.inference.normalisation import PRESETS, Normalisation
from app.inference.upstream.client import UpstreamClient
from app.inference.upstream.connect import (
    INPUTS,
    Answers,
    Connected,
    Described,
    Layout,
    Wishes,
    describe,
    fetch,
    record,
    record_template,
)
from app.inference.upstream.engine import make_client
from app.inference.upstream.template_network import TemplateNetwork
from app.settings import load_settings
from app.telemetry.metrics import Metrics
from scumble.help_option import HELP

# Options that a template takes the place of; labels may be other ones.
DESCRIBED = frozenset(
    {"input_name", "datatype", "layout", "size", "preset", "mean", "std", "bgr"}
    | {"output", "answers", "logits", "features", "model_version", "max_batch"}
)


class Numbers(click.ParamType[tuple[float, ...]]):
    """`0.485,0.456,0.406`."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Parse the text."""
        try:
            return tuple(float(word) for word in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.5,0.5,0.5", param, ctx)


@click.command(context_settings=HELP)
@click.argument("url")
@click.option("--name", required=True, help="Of the bundle.")
@click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models"),
    show_default=True,
    help="Folder of bundles.",
)
@click.option(
    "--template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file that describes the JSON API of a server without V2.",
)
@click.option("--bundle-version", default="1", show_default=True, help="Of the bundle.")
@click.option("--replace", is_flag=True, help="Replace the bundle if there is one of this name.")
@click.option(
    "--labels",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A label a line, or a JSON list; without it classes are numbered.",
)
@click.option("--input", "input_name", help="Name of the input, if there are several.")
@click.option("--datatype", type=click.Choice(INPUTS), help="Of the input, if there are several.")
@click.option(
    "--layout",
    type=click.Choice(get_args(Layout)),
    help="Where the channels are, if the shape of the input does not say.",
)
@click.option("--size", type=Size(), help="HEIGHTxWIDTH, if the input takes any.")
@click.option(
    "--normalize",
    "preset",
    type=click.Choice(list(PRESETS)),
    help="What the network takes: imagenet (0..1 less the mean, by the deviation of ImageNet), tf "
    "(-1..1), 0..1, 0..255, or caffe (BGR, 0..255 less the mean). UINT8 inputs need none.",
)
@click.option("--mean", type=Numbers(), help="Of pixels in 0..1, as 0.485,0.456,0.406.")
@click.option("--std", type=Numbers(), help="Of pixels in 0..1, per channel of the network.")
@click.option("--bgr", is_flag=True, help="The network takes blue first.")
@click.option("--output", help="Name of the output with the rows, if there are several.")
@click.option(
    "--answers",
    type=click.Choice(get_args(Answers)),
    help="What the output is, where its values do not say.",
)
@click.option("--logits", help="Name of another output with the logits, for withhold.")
@click.option("--features", help="Name of the output with the last layer's input, for withhold.")
@click.option("--model-version", help="Of the model on the server, if it has several.")
@click.option("--max-batch", type=click.IntRange(1, 1024), help="Images of a request.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of later golden outputs; by default from two answers.",
)
@picture_options
@click.pass_context
def connect(
    context: click.Context,
    /,
    url: str,
    name: str,
    models: Path,
    template: Path | None,
    bundle_version: str,
    replace: bool,
    labels: Path | None,
    preset: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    bgr: bool,
    answers: Answers | None,
    tolerance: float | None,
    input_name: str | None,
    model_version: str | None,
    **options: Any,
) -> None:
    """Write the bundle NAME for the model that another server has at URL.

    URL is http://HOST:PORT/v2/models/NAME, of Triton, KServe, MLServer, OpenVINO Model Server or
    another server of the Open Inference Protocol. Its metadata say what they can, the options say
    the rest. With --template, URL is http://HOST:PORT of a server with a JSON API.

    The network's answers to some images are recorded, so that the engine `upstream` notices another
    network. SCUMBLE_UPSTREAM_TOKEN and SCUMBLE_UPSTREAM_CA are used as it does.
    """
    preprocessing = taken_preprocessing(options)
    wished = Wishes(input=input_name, version=model_version, **options)
    try:
        folder = models / name
        if folder.exists() and not replace:
            raise ConfigError(f"{str(folder)!r} exists; allowed: another --name, or --replace")
        if replace and folder.exists() and Bundle(folder).card.upstream is None:
            raise ConfigError(f"{str(folder)!r} has a network of its own; choose another --name")

        def normalisation(described: Described) -> Normalisation:
            return _normalisation(described, preset, mean, std, bgr)

        classes = None
        if template is not None:
            _refuse_described(context)
            found = asyncio.run(_connect_template(url, template, tolerance))
        else:
            found, classes = asyncio.run(_connect(url, wished, normalisation, answers, tolerance))
        names = _labels(labels, found.rows.shape[1], found.labels)
        click.echo(found.sentence())
        card = {
            "name": name,
            "version": bundle_version,
            "labels": names,
            "input": found.shape.model_dump(),
            "preprocessing": preprocessing,
            "upstream": found.card.model_dump(),
        }
        _write(folder, card, found)
    except ConfigError as exc:
        raise click.ClickException(" ".join(str(exc).split())) from exc
    except OSError as exc:
        raise click.ClickException(f"{str(models)!r} cannot be written: {exc}") from exc
    note = "" if classes in (None, len(names)) else f" (the metadata say {classes})"
    click.echo(f"{folder}: {len(names)} classes{note}")
    more = "" if template is None else f" SCUMBLE_UPSTREAM_TEMPLATE={template}"
    click.echo(f"serve it with SCUMBLE_ENGINE=upstream SCUMBLE_UPSTREAM={url}{more}")


async def _connect(
    url: str, wishes: Wishes, normalisation: Any, answers: Answers | None, tolerance: float | None
) -> tuple[Connected, int | None]:
    async with _client(url, None) as client:
        metadata, config = await fetch(client)
        described = describe(metadata, config, wishes)
        found = await record(client, described, normalisation(described), answers, tolerance)
        return found, described.classes


async def _connect_template(url: str, template: Path, tolerance: float | None) -> Connected:
    network = TemplateNetwork.load(template)
    async with _client(url, template) as client:
        return await record_template(client, network, tolerance)


@asynccontextmanager
async def _client(url: str, template: Path | None) -> AsyncIterator[UpstreamClient]:
    settings = load_settings(engine="upstream", upstream=url, upstream_template=template)
    client = make_client(settings, Metrics(CollectorRegistry()))
    await client.open()
    try:
        yield client
    finally:
        await client.close()


def _refuse_described(context: click.Context) -> None:
    """Refuse options about what a template describes.

    Raises:
        ConfigError: names them.
    """
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name in DESCRIBED
        and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise ConfigError(f"{', '.join(given)} given; with --template the template says it")


def _normalisation(
    described: Described,
    preset: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    bgr: bool,
) -> Normalisation:
    """What the options say; asked for where they say nothing and somebody is there.

    Raises:
        ConfigError: nothing was said, or numbers that do not fit.
    """
    said = preset is not None or mean is not None or std is not None
    if described.sent.datatype == "UINT8":
        if said:
            raise ConfigError("the input takes UINT8; allowed: no --normalize, --mean or --std")
        return Normalisation(bgr=bgr)
    if not said:
        if not sys.stdin.isatty():
            raise ConfigError(
                "metadata do not say how the input is normalised; give "
                f"--normalize {'|'.join(PRESETS)}, or --mean and --std"
            )
        preset = click.prompt("Normalisation of the input", type=click.Choice(list(PRESETS)))
    found = PRESETS[preset] if preset else Normalisation()
    given = Normalisation(mean or found.mean, std or found.std, found.bgr or bgr)
    channels = described.shape.channels
    for option, values in (("--mean", given.mean), ("--std", given.std)):
        if len(values) not in (1, channels) or (option == "--std" and min(values) <= 0):
            raise ConfigError(
                f"{option} is {','.join(map(str, values))}; allowed: 1 or {channels} numbers"
                f"{' above 0' if option == '--std' else ''}"
            )
    return given


def _labels(path: Path | None, classes: int, known: Sequence[str] | None) -> list[str]:
    if path is None:
        return [str(k) for k in range(classes)] if known is None else list(known)
    try:
        text = path.read_text(encoding="utf-8")
        listed = orjson.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (ValueError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{str(path)!r} holds no labels: {exc}") from exc
    names = [str(each).strip() for each in listed if str(each).strip()]
    if len(names) != classes or len(set(names)) != classes:
        raise ConfigError(
            f"{str(path)!r} has {len(set(names))} different labels; the model has {classes} classes"
        )
    return names


def _write(folder: Path, card: dict[str, Any], found: Connected) -> None:
    """Write the bundle beside its place, then put it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    golden = {
        "probabilities": {"float32": found.rows.tolist()},
        "tolerance": {"float32": found.tolerance},
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".connect-") as work:
        made = Path(work) / folder.name
        made.mkdir()
        (made / GOLDEN_FILE).write_bytes(orjson.dumps(golden) + b"\n")
        write_card(made, card)
        replaced = Path(work) / "replaced"
        if folder.exists():
            folder.rename(replaced)
        try:
            made.rename(folder)
        except BaseException:
            if replaced.exists():
                replaced.rename(folder)
            raise
