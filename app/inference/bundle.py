"""A model bundle: `models/<name>/` with a card, ONNX files and golden outputs.

    card.json       what the model is, how it was made, sha256 of every other file
    float32.onnx    uint8 pixels (N, H, W, C) -> probabilities float32 (N, K)
    int8.onnx       the same, quantized in QDQ form
    golden.json     outputs for a few synthetic inputs, checked at every load
    surrogate.onnx, misinformation.onnx    optional, for some defenses
    codebook.float32.json, codebook.int8.json    optional, what the defense `codebook` serves
    gate.float32.json, gate.int8.json    optional, below which scores `withhold` withholds

A bundle for the engine `upstream` has no network: its card says how another server is asked, or
which template says it.

Each file is read once, hashed and passed on as bytes, so that the bytes that were checked are those
that run. A card names only files in its own folder, and a network stores all weights in its file.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from app.errors import BundleError
from app.precision import Precision
from app.system.json_values import Parameters
from app.system.validation import sentences

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FORMAT = "scumble-bundle/1"
GOLDEN_COUNT = 6
GOLDEN_FILE = "golden.json"
# The file of each precision; bf16 runs the float file with another hint to the engine.
ONNX_FILE: dict[Precision, str] = {
    "float32": "float32.onnx",
    "bf16": "float32.onnx",
    "int8": "int8.onnx",
}
# Optional files that `python -m scumble.training.auxiliary` writes, with the same input.
AUXILIARY_FILES = ("surrogate.onnx", "misinformation.onnx")
# Optional files that `scumble calibrate` makes, for the answers of each ONNX file.
CODEBOOK_FILE: dict[Precision, str] = {
    "float32": "codebook.float32.json",
    "bf16": "codebook.float32.json",
    "int8": "codebook.int8.json",
}
# The same with thresholds of scores, which bfloat16 is too coarse for.
GATE_FILE: dict[Precision, str] = {"float32": "gate.float32.json", "int8": "gate.int8.json"}

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
"""Name of a file in the bundle's folder: not a path, and not hidden."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    """A strict, immutable model that refuses unknown members."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InputShape(Frozen):
    """What the network takes: uint8 (N, height, width, channels)."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    channels: Literal[1, 3]


class Preprocessing(Frozen):
    """How a decoded picture becomes pixels of the input size, before the graph.

    Attributes:
        fit: of pictures of another size. `stretch` resizes to the input size. `crop` resizes so
            that the central `ratio` of the shorter side fills the input, then crops the centre.
            `resize_crop` resizes the shorter side to `shorter` pixels, then crops the centre, with
            torchvision's rounding. `letterbox` resizes so that the whole picture is inside the
            input, centred on a ground of the level `fill`.
        ratio: of `crop`.
        shorter: of `resize_crop`.
        fill: of `letterbox`.
        interpolation: filter of the resizing; it covers all pixels when a picture is reduced.
        orientation: turn the picture as its EXIF metadata say.
        alpha: what transparent pixels lie on; `drop` takes the colours that are stored for them.
        profile: of the colours of a picture that carries an ICC profile. `ignore` takes its numbers
            as they are, as most training code does; `srgb` converts them.
        reduce_jpeg: decode a large JPEG at a half, a quarter or an eighth of its size where the
            input needs no more.
    """

    fit: Literal["stretch", "crop", "resize_crop", "letterbox"] = "stretch"
    ratio: float = Field(default=1.0, gt=0, le=1)
    shorter: int | None = Field(default=None, gt=0, le=65_500)
    fill: int = Field(default=0, ge=0, le=255)
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    orientation: bool = True
    alpha: Literal["white", "black", "drop"] = "white"
    profile: Literal["ignore", "srgb"] = "ignore"
    reduce_jpeg: bool = True


class Sent(Frozen):
    """How a V2 server takes the images of a network and gives its rows, as `scumble connect` found.

    Attributes:
        version: of the model on that server; empty if the server names none.
        input: name of the input tensor.
        datatype: of the input.
        layout: where the channels are in the input.
        shape: of one image, where the input has another shape than the layout says.
        mean: of pixels in 0..1, per channel as the network has them, or one for all.
        std: of pixels in 0..1, the same way.
        bgr: the network takes blue first.
        output: name of the output with the rows.
        answers: what that output is.
        logits: name of the output with the logits, if it is another one.
        features: name of the output with the input of the last layer.
        max_batch: images of the largest request.
        binary: tensors are sent as bytes; JSON otherwise.
        fingerprint: sha256 of the server's metadata when the card was made.
    """

    version: str = ""
    input: str
    datatype: Literal["FP32", "FP16", "UINT8"]
    layout: Literal["NCHW", "NHWC"]
    shape: list[Annotated[int, Field(gt=0)]] | None = None
    mean: list[float] = Field(default=[0.0], min_length=1, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1, max_length=3)
    bgr: bool = False
    output: str
    answers: Literal["probabilities", "logits"]
    logits: str | None = None
    features: str | None = None
    max_batch: int = Field(default=32, ge=1, le=1024)
    binary: bool = True
    fingerprint: Sha256

    @property
    def logits_output(self) -> str | None:
        """Name of the output with the logits, whichever it is."""
        return self.output if self.answers == "logits" else self.logits

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs that are asked for."""
        names = (self.output, self.logits, self.features)
        return list(dict.fromkeys(name for name in names if name is not None))


class Templated(Frozen):
    """How a JSON API takes the images of a network: as a template says, which the settings name.

    Attributes:
        template: fingerprint of the template, without its headers.
        answers: what the API answers with.
    """

    template: Sha256
    answers: Literal["probabilities", "logits"]


def _kind_of_upstream(value: Any) -> str:
    given = value if isinstance(value, Mapping) else vars(value)
    return "template" if "template" in given else "v2"


Upstream = Annotated[
    Annotated[Sent, Tag("v2")] | Annotated[Templated, Tag("template")],
    Discriminator(_kind_of_upstream),
]


class Accuracy(Frozen):
    """Share of correct predictions, in [0, 1], on `images` images of `data`."""

    value: float = Field(ge=0, le=1)
    images: int = Field(gt=0)
    data: str


class MeasuredCopy(Frozen):
    """What the strongest attacker that was measured made of one policy's answers.

    Attributes:
        precision: that was served.
        defense: of the policy.
        params: of the defense.
        attacker: whose copy was the most accurate.
        queries: that it asked.
        copied: accuracy of the copy on the victim's own test images.
        served: accuracy of what honest users got.
        seeds: of which these are the means.
    """

    precision: Precision
    defense: str
    params: Parameters
    attacker: str
    queries: int = Field(gt=0)
    copied: float = Field(ge=0, le=1)
    served: float = Field(ge=0, le=1)
    seeds: int = Field(gt=0)


class Card(Frozen):
    """`card.json`, written by `scumble/training/`, never by hand."""

    format: Literal["scumble-bundle/1"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    labels: list[str] = Field(min_length=1)
    input: InputShape
    preprocessing: Preprocessing = Preprocessing()
    files: dict[FileName, Sha256]
    accuracy: dict[str, Accuracy] = {}
    quantization: dict[str, Any] = {}
    training: dict[str, Any] = {}
    auxiliary: dict[str, Any] = {}
    recommended: dict[str, Parameters] = {}
    copies: list[MeasuredCopy] = []
    data_licence: str = ""
    upstream: Upstream | None = None

    @model_validator(mode="after")
    def _shorter_covers_the_input(self) -> Self:
        wanted = max(self.input.height, self.input.width)
        shorter = self.preprocessing.shorter
        if self.preprocessing.fit == "resize_crop" and (shorter is None or shorter < wanted):
            raise ValueError(
                f"fit is 'resize_crop' and shorter {shorter}; needed: {wanted} or more, the longer "
                "side of the input"
            )
        return self

    @model_validator(mode="after")
    def _one_or_each_channel(self) -> Self:
        for name in ("mean", "std") if isinstance(self.upstream, Sent) else ():
            count = len(getattr(self.upstream, name))
            if count not in (1, self.input.channels):
                raise ValueError(
                    f"{name} has {count} numbers; allowed: 1 or {self.input.channels}, one per "
                    "channel"
                )
        return self

    @property
    def has_logits(self) -> bool:
        """Whether the network's logits are known, which `withhold` needs."""
        if isinstance(self.upstream, Sent):
            return self.upstream.logits_output is not None
        return self.upstream is None or self.upstream.answers == "logits"

    def served_file(self, precision: Precision) -> str:
        """The file that tells what is served: the network, or the answers of another server's."""
        return ONNX_FILE[precision] if self.upstream is None else GOLDEN_FILE

    def defense_params(self, defense: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """`given`, or the parameters that are recommended for the model if none are given."""
        return given or self.recommended.get(defense, {})


class Golden(Frozen):
    """`golden.json`: what each precision answered to `golden_inputs` when the bundle was made."""

    probabilities: dict[str, list[list[float]]]
    tolerance: dict[str, float]


class Bundle:
    """A bundle on disk whose card was read; files are read and verified on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = self._card()

    def __repr__(self) -> str:
        return f"Bundle({str(self.folder)!r})"

    def read(self, file: str) -> bytes:
        """A file's bytes.

        Raises:
            BundleError: the card does not list it, it is missing or not a regular file, its sha256
                differs, or it is a network with weights in other files.
        """
        if file not in self.card.files:
            raise BundleError(f"{self} has no {file}; its card lists {', '.join(self.card.files)}")
        try:
            content = _content(self.folder / file)
        except OSError as exc:
            raise BundleError(f"{self}: {file} cannot be read: {exc.strerror}") from exc
        found = hashlib.sha256(content).hexdigest()
        if found != self.card.files[file]:
            raise BundleError(
                f"{self}: {file} has sha256 {found}, but its card has {self.card.files[file]}"
            )
        if file.endswith(".onnx"):
            self._refuse_weights_elsewhere(file, content)
        return content

    def onnx(self, precision: Precision) -> bytes:
        """The ONNX file that runs `precision`.

        Raises:
            BundleError: see `read`; or the bundle has no network.
        """
        if self.card.upstream is not None:
            raise BundleError(
                f"{self} has no network: it describes one of another server; allowed: "
                "SCUMBLE_ENGINE=upstream with SCUMBLE_UPSTREAM"
            )
        return self.read(ONNX_FILE[precision])

    def golden(self) -> Golden:
        """Expected outputs for the self-test."""
        try:
            return Golden.model_validate_json(self.read(GOLDEN_FILE))
        except ValidationError as exc:
            raise BundleError(f"{self}: golden.json is malformed: {sentences(exc)}") from exc

    def _refuse_weights_elsewhere(self, file: str, content: bytes) -> None:
        """Refuse weights that an engine would read from files that the card does not cover."""
        if b"location" not in content:  # a cheap test: the key that such a network contains
            return
        from app.inference.graph import (
            outside,  # imported here because it needs numpy, and the supervisor does not
        )

        if (elsewhere := outside(content)) is not None:
            raise BundleError(
                f"{self}: {file} has weights in another file, {elsewhere!r}; allowed: networks "
                "whose weights are all in the ONNX file"
            )

    def _card(self) -> Card:
        path = self.folder / "card.json"
        try:
            return Card.model_validate_json(_content(path))
        except OSError as exc:
            raise BundleError(
                f"no bundle at {str(self.folder)!r}: {exc.strerror}: card.json"
            ) from exc
        except ValidationError as exc:
            raise BundleError(f"{str(path)!r} is malformed: {sentences(exc)}") from exc


def _content(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device might never end.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def open_bundle(root: Path, name: str) -> Bundle:
    """The bundle `root`/`name`.

    Raises:
        BundleError: it does not exist; the message lists the available ones.
    """
    found = sorted(p.parent.name for p in root.glob("*/card.json"))
    if name not in found:
        raise BundleError(
            f"no model {name!r} in {str(root)!r}; available: {', '.join(found) or 'none'}"
        )
    return Bundle(root / name)


def golden_inputs(shape: InputShape) -> npt.NDArray[np.uint8]:
    """`GOLDEN_COUNT` synthetic pictures, uint8 (n, H, W, C): waves of rising frequency.

    They are computed, so there are no images to license or to ship.
    """
    import numpy as np  # imported here because the supervisor does not need it

    n, y, x, c = np.ogrid[:GOLDEN_COUNT, : shape.height, : shape.width, : shape.channels]
    phase = (n + 1) * (y / shape.height + (n % 3) * x / shape.width) * np.pi + c + n
    return np.rint(127.5 + 127.5 * np.sin(phase)).astype(np.uint8)


def checked_card(card: Mapping[str, Any], files: Mapping[str, str] | None = None) -> Card:
    """A card of members that are known; of a bundle that is not made yet, without files.

    Raises:
        BundleError: no card may be like this.
    """
    full = {**card, "format": FORMAT, "files": files or {}}
    try:
        return Card.model_validate_json(orjson.dumps(full))
    except ValidationError as exc:
        raise BundleError(f"no card can be made of this: {sentences(exc)}") from exc


def write_card(folder: Path, card: dict[str, Any]) -> Card:
    """Hash the files of `folder`, complete `card` with them, check it, write it.

    Raises:
        BundleError: the card is not valid.
    """
    files = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.name != "card.json" and p.is_file() and not p.name.startswith(".")
    }
    full = checked_card(card, files)
    text = orjson.dumps(full.model_dump(mode="json"), option=orjson.OPT_INDENT_2)
    (folder / "card.json").write_bytes(text + b"\n")
    return full
