"""Makes the card of a network that another server runs, from its answers.

A V2 server has metadata, which say how it is asked; for a JSON API a template says that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson

from app.errors import ConfigError
from app.inference.bundle import InputShape, Sent, Templated, golden_inputs
from app.inference.engines import Probs
from app.inference.normalisation import Normalisation
from app.inference.upstream.client import UpstreamClient, UpstreamFailure
from app.inference.upstream.network_interface import Found, InvalidAnswer, Network
from app.inference.upstream.template_network import TemplateNetwork
from app.inference.upstream.v2_messages import Tensors, read_answer, read_json
from app.inference.upstream.v2_network import V2Network

Datatype = Literal["FP32", "FP16", "UINT8"]
Layout = Literal["NCHW", "NHWC"]
Answers = Literal["probabilities", "logits"]
INPUTS: tuple[Datatype, ...] = ("FP32", "FP16", "UINT8")
OUTPUTS = ("FP32", "FP16", "FP64")
MAX_BATCH = 32  # where the server names no limit
LEAST_TOLERANCE = 1e-4
MOST_DEVIATION = 0.01  # between two answers to the same image
PROBED = Sent(
    input="-", datatype="FP32", layout="NCHW", output="-", answers="logits", fingerprint="0" * 64
)


@dataclass(frozen=True)
class Wishes:
    """What the operator says of the network; None for what its metadata shall say."""

    input: str | None = None
    datatype: str | None = None
    layout: Layout | None = None
    size: tuple[int, int] | None = None
    output: str | None = None
    answers: Answers | None = None
    logits: str | None = None
    features: str | None = None
    max_batch: int | None = None
    version: str | None = None


@dataclass(frozen=True)
class Described:
    """A network as its server's metadata describe it.

    Attributes:
        shape: of the images.
        sent: how they are sent; normalisation and kind of answers are not known yet.
        classes: K; None if the metadata do not say.
    """

    shape: InputShape
    sent: Sent
    classes: int | None


@dataclass(frozen=True)
class Connected:
    """A network whose answers were recorded.

    Attributes:
        shape: of the images.
        card: what the bundle's card says of it.
        rows: (n, K) probabilities of the golden inputs.
        tolerance: for later answers to the same.
        labels: of the classes; None if the server does not tell them.
        request: how the network is asked.
    """

    shape: InputShape
    card: Sent | Templated
    rows: Probs
    tolerance: float
    labels: Sequence[str] | None
    request: str

    def sentence(self) -> str:
        """How the network is asked, for the operator to check."""
        golden = f"golden    {len(self.rows)} images, within {self.tolerance:.2g}"
        return f"{self.request}\n{golden}"


def describe(metadata: Mapping[str, Any], config: Mapping[str, Any], wishes: Wishes) -> Described:
    """What metadata and wishes say of a network.

    Args:
        metadata: of the model, as the protocol has them.
        config: Triton's configuration of the model; empty for other servers.
        wishes: of the operator.

    Raises:
        ConfigError: something is missing or contradictory; says which option tells it.
    """
    taken = _choose("input", metadata.get("inputs"), wishes.input, INPUTS, wishes.datatype)
    given = _choose("output", metadata.get("outputs"), wishes.output, OUTPUTS, None)
    for option, name in (("--logits", wishes.logits), ("--features", wishes.features)):
        known = [each.get("name") for each in _tensors(metadata.get("outputs"))]
        if name is not None and name not in known:
            raise ConfigError(f"{option} is {name!r}; the outputs are {', '.join(map(str, known))}")
    sides = [side for side in taken["shape"] if isinstance(side, int)]
    most = config.get("max_batch_size")
    if len(sides) < 2:
        raise ConfigError(f"the input has shape {sides}; allowed: a batch of images")
    if sides[0] > 1:
        raise ConfigError(f"the input takes exactly {sides[0]} images; allowed: 1, or any number")
    batch = wishes.max_batch or (most if isinstance(most, int) and most > 0 else MAX_BATCH)
    if sides[0] == 1:
        batch = 1
    shape, layout, other = _sides(sides[1:], wishes)
    classes = given["shape"][-1] if given["shape"] else -1
    versions = metadata.get("versions")
    version = wishes.version
    if version is None and isinstance(versions, list) and len(versions) == 1:
        version = str(versions[0])
    told = {name: metadata.get(name) for name in ("name", "platform", "inputs", "outputs")}
    sent = PROBED.model_copy(
        update={
            "version": version or "",
            "input": taken["name"],
            "datatype": taken["datatype"],
            "layout": layout,
            "shape": other,
            "output": given["name"],
            "logits": wishes.logits,
            "features": wishes.features,
            "max_batch": min(batch, 1024),
            "fingerprint": hashlib.sha256(
                orjson.dumps([told, version], option=orjson.OPT_SORT_KEYS)
            ).hexdigest(),
        }
    )
    return Described(shape, sent, classes if isinstance(classes, int) and classes > 0 else None)


async def fetch(client: UpstreamClient) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata of the model, and its configuration where the server is Triton.

    Raises:
        ConfigError: the server gives no metadata.
    """
    replica = client.replicas[0]
    try:
        answer = await client.send(replica, "GET", replica.url, None, {}, math.inf)
        metadata = read_json(answer.body)
    except (UpstreamFailure, InvalidAnswer) as exc:
        raise ConfigError(f"no metadata at {replica.url}: {exc}") from exc
    try:
        answer = await client.send(replica, "GET", f"{replica.url}/config", None, {}, math.inf)
        return metadata, read_json(answer.body)
    except (UpstreamFailure, InvalidAnswer):  # an extension, which other servers lack
        return metadata, {}


async def record(
    client: UpstreamClient,
    described: Described,
    normalisation: Normalisation,
    answers: Answers | None,
    tolerance: float | None,
) -> Connected:
    """Ask for the golden outputs, twice, and settle what the metadata do not say.

    Raises:
        ConfigError: the server refuses the requests, or gives rows that are not distributions,
            or other rows at the second time.
    """
    sent = described.sent.model_copy(
        update={
            "mean": list(normalisation.mean),
            "std": list(normalisation.std),
            "bgr": normalisation.bgr,
        }
    )
    images = golden_inputs(described.shape)
    try:
        sent, first = await _binary_or_json(client, sent, images)
    except (UpstreamFailure, InvalidAnswer) as exc:
        raise ConfigError(f"the server does not answer the golden inputs: {exc}") from exc
    values = np.concatenate([_values(part, sent.output) for part in first])
    if not sent.version:
        sent = sent.model_copy(update={"version": first[0].version})
    kind = answers or ("probabilities" if _are_distributions(values) else "logits")
    sent = sent.model_copy(update={"answers": kind})
    network = V2Network(values.shape[1], sent)
    try:
        rows = await _golden(client, network, images, sent.max_batch)
    except (UpstreamFailure, InvalidAnswer) as exc:
        raise ConfigError(f"the server's answers cannot be used: {exc}") from exc
    allowed = await _tolerance(client, network, images, rows, tolerance)
    told = _v2_request(described.shape, sent, network.classes)
    return Connected(described.shape, sent, rows, allowed, None, told)


async def record_template(
    client: UpstreamClient, network: TemplateNetwork, tolerance: float | None
) -> Connected:
    """Ask for the golden outputs, twice.

    Raises:
        ConfigError: the server refuses the requests, gives no distributions, or other ones at the
            second time.
    """
    images = golden_inputs(network.shape)
    try:
        rows = await _golden(client, network, images, network.max_batch)
    except (UpstreamFailure, InvalidAnswer) as exc:
        raise ConfigError(f"the server does not answer as the template says: {exc}") from exc
    allowed = await _tolerance(client, network, images, rows, tolerance)
    return Connected(
        network.shape, network.card, rows, allowed, network.template.model.labels,
        _template_request(network),
    )  # fmt: skip


async def _tolerance(
    client: UpstreamClient,
    network: Network,
    images: np.ndarray,
    rows: Probs,
    tolerance: float | None,
) -> float:
    """How far later answers to the same images, one at a time, may be off.

    Raises:
        ConfigError: there are none, or they are further off than networks are.
    """
    try:
        others = await _golden(client, network, images, 1)
    except (UpstreamFailure, InvalidAnswer) as exc:
        raise ConfigError(f"the server's answers cannot be used: {exc}") from exc
    deviation = float(np.abs(rows - others).max())
    if tolerance is not None:
        return tolerance
    if deviation > MOST_DEVIATION:
        raise ConfigError(
            f"two answers to the same image are {deviation:.2g} apart; allowed: "
            f"{MOST_DEVIATION}, or --tolerance"
        )
    return max(LEAST_TOLERANCE, 4 * deviation)


async def _golden(client: UpstreamClient, network: Network, images: np.ndarray, size: int) -> Probs:
    """The rows of images, `size` at a time.

    Raises:
        UpstreamFailure, InvalidAnswer: there are none.
    """
    replica = client.replicas[0]
    found = []
    for i in range(0, len(images), size):
        part = images[i : i + size]
        body, headers = network.request(part)
        url = replica.url + network.path
        answer = await client.send(replica, network.method, url, body, headers, math.inf)
        found.append(_rows(network, network.read(answer, len(part))))
    return np.concatenate(found)


async def _binary_or_json(
    client: UpstreamClient, sent: Sent, images: np.ndarray
) -> tuple[Sent, list[Tensors]]:
    """Tensors as bytes, or as JSON for servers that do not take bytes."""
    try:
        return sent, await _ask(client, sent, images)
    except (UpstreamFailure, InvalidAnswer) as first:
        text = sent.model_copy(update={"binary": False})
        for _ in range(2):  # it may have closed the connection after its error
            with suppress(UpstreamFailure, InvalidAnswer):
                return text, await _ask(client, text, images)
        raise first from None


async def _ask(client: UpstreamClient, sent: Sent, images: np.ndarray) -> list[Tensors]:
    replica = client.replicas[0]
    network = V2Network(1, sent)
    found = []
    for i in range(0, len(images), sent.max_batch):
        body, headers = network.request(images[i : i + sent.max_batch])
        answer = await client.send(replica, "POST", f"{replica.url}/infer", body, headers, math.inf)
        found.append(read_answer(answer.length, answer.body))
    return found


def _rows(network: Network, found: Found) -> Probs:
    if found.valid is not None:
        raise InvalidAnswer(f"{network.output} gives no {network.answers}")
    return found.rows


def _values(answer: Tensors, name: str) -> np.ndarray:
    values = answer.outputs.get(name)
    if values is None or values.dtype.kind != "f" or values.ndim < 2 or not values.size:
        shape = None if values is None else f"{values.dtype} {list(values.shape)}"
        raise ConfigError(f"output {name!r} is {shape}; needed: floats [N, K]")
    return values.reshape(len(values), -1).astype(np.float64)


def _are_distributions(values: np.ndarray) -> bool:
    return bool(((values >= -1e-3) & (values <= 1.01)).all()) and bool(
        (np.abs(values.sum(axis=1) - 1) < 0.01).all()
    )


def _tensors(listed: object) -> list[dict[str, Any]]:
    if not isinstance(listed, list):
        return []
    return [
        each
        for each in listed
        if isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("shape"), list)
    ]


def _choose(
    kind: str, listed: object, name: str | None, datatypes: Sequence[str], datatype: str | None
) -> dict[str, Any]:
    """The tensor of this name; without a name, the only one of a usable datatype."""
    tensors = _tensors(listed)
    shown = ", ".join(f"{t['name']} {t.get('datatype')} {t['shape']}" for t in tensors) or "none"
    found = [
        tensor
        for tensor in tensors
        if tensor.get("datatype") in datatypes
        and name in (None, tensor["name"])
        and datatype in (None, tensor.get("datatype"))
    ]
    if not found:
        wanted = f" named {name!r}" if name else ""
        raise ConfigError(
            f"the model has no {kind}{wanted} of {', '.join([datatype] if datatype else datatypes)}"
            f"; its {kind}s: {shown}"
        )
    if len({tensor["name"] for tensor in found}) > 1:
        raise ConfigError(f"the model has several {kind}s, choose one with --{kind}: {shown}")
    return found[0]


def _sides(sides: Sequence[int], wishes: Wishes) -> tuple[InputShape, Layout, list[int] | None]:
    """Shape of the images, layout, and the shape of an input with another layout."""
    height, width = wishes.size or (0, 0)
    if len(sides) == 3:
        first = sides[0] in (1, 3) and wishes.layout != "NHWC"
        layout: Layout = wishes.layout or ("NCHW" if first else "NHWC")
        c, h, w = sides if layout == "NCHW" else (sides[2], sides[0], sides[1])
        height, width = height or h, width or w
        if c not in (1, 3):
            raise ConfigError(f"the input has shape {list(sides)}; needed: 1 or 3 channels")
        if height < 1 or width < 1:
            raise ConfigError("the input takes images of any size; give --size HEIGHTxWIDTH")
        if (h > 0 and h != height) or (w > 0 and w != width):
            raise ConfigError(f"--size is {height}x{width}, the input has {h}x{w}")
        return _shape(height, width, c), layout, None
    if len(sides) == 2 and min(sides) > 0:
        return _shape(sides[0], sides[1], 1), wishes.layout or "NHWC", list(sides)
    values = sides[0] if len(sides) == 1 else 0
    channels = values // (height * width) if height * width else 0
    if channels in (1, 3) and channels * height * width == values:
        return _shape(height, width, channels), wishes.layout or "NHWC", [values]
    raise ConfigError(
        f"the input has shape {list(sides)}; needed: images, or --size for a row of their pixels"
    )


def _shape(height: int, width: int, channels: int) -> InputShape:
    return InputShape.model_validate({"height": height, "width": width, "channels": channels})


def _v2_request(shape: InputShape, sent: Sent, classes: int) -> str:
    scale = "pixels as they are" if sent.datatype == "UINT8" else _scale(sent)
    first = ", blue first" if sent.bgr else ""
    scores = [f"{name} from {what!r}" for name, what in _scores(sent)]
    return "\n".join(
        (
            f"input     {sent.input!r}: {sent.datatype} {sent.layout}, "
            f"{shape.height}x{shape.width}x{shape.channels}, {scale}{first}",
            f"output    {sent.output!r}: {sent.answers} of {classes} classes",
            f"scores    {', '.join(scores) or 'none'}",
            f"version   {sent.version or 'the server names none'}",
            f"requests  up to {sent.max_batch} images, as {'bytes' if sent.binary else 'JSON'}",
        )
    )


def _template_request(network: TemplateNetwork) -> str:
    request, response, shape = network.template.request, network.template.response, network.shape
    layout = f" {request.layout}" if request.encoding == "floats" else ""
    sides = f"{shape.height}x{shape.width}x{shape.channels}"
    size = "one image each" if network.max_batch == 1 else f"up to {network.max_batch} images"
    return "\n".join(
        (
            f"request   {network.method} {network.path}: {request.encoding}{layout}, {sides}",
            f"answer    {network.output}: {response.form} of {network.classes} {response.scale}",
            f"scores    {'energy' if network.scores else 'none'}",
            f"requests  {size}",
        )
    )


def _scale(sent: Sent) -> str:
    mean, std = np.array(sent.mean), np.array(sent.std)
    if not mean.any() and (std == 1).all():
        return "pixels / 255"
    shown = [", ".join(f"{value:.6g}" for value in values) for values in (mean, std)]
    return f"(pixels / 255 - [{shown[0]}]) / [{shown[1]}]"


def _scores(sent: Sent) -> list[tuple[str, str]]:
    found = []
    if sent.logits_output is not None:
        found.append(("energy", sent.logits_output))
    if sent.features is not None:
        found.append(("residual", sent.features))
    return found
