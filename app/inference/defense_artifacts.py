"""What defenses need from a bundle: auxiliary networks, the codebook and the gate's thresholds.

The networks run in the engine of the server, on one thread, in the order of the requests. Each
input form (pixels or float tensors) is loaded with its first batch, during the warm-up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from app.inference import engines
from app.inference.bundle import CODEBOOK_FILE, GATE_FILE, Bundle
from app.inference.engines import FAST, Engine, EngineName
from app.inference.graph import single_output, tensor_input
from app.precision import Precision
from scumble.defenses.base import DefenseError, Inputs, Probs
from scumble.defenses.gate import Gate, read_gate

# The torch engine has the operators of the victims, not those of the auxiliary scores; another
# server has no auxiliary networks.
SUBSTITUTE = {"torch": "auto", "upstream": "auto"}


class AuxiliaryNetwork:
    """One output of an auxiliary network: images in, float32 rows (N, K) out.

    Takes uint8 (N, H, W, C) pixels and float (N, C, H, W) in [0, 1] alike.
    """

    def __init__(self, model: bytes, engine: EngineName) -> None:
        self._model = model
        self._engine = engine
        self._forms: dict[bool, Engine] = {}

    def __call__(self, inputs: Inputs) -> Probs:
        """The row of each image; it does not depend on the batch."""
        pixels = inputs.dtype == np.uint8
        if pixels not in self._forms:
            model = self._model if pixels else tensor_input(self._model)
            form = engines.load(self._engine, model, threads=1, precision="float32")
            form.prepare(FAST)
            self._forms[pixels] = form
        batch = inputs if pixels else inputs.astype(np.float32, copy=False)
        return self._forms[pixels](batch)


class DefenseArtifacts:
    """The auxiliary networks, the codebook and the thresholds of one bundle.

    Args:
        bundle: the bundle that is served.
        engine: runs the networks.
        precision: the precision that is served; codebook and thresholds depend on it.
    """

    def __init__(
        self, bundle: Bundle, engine: str = "auto", precision: Precision = "float32"
    ) -> None:
        self._bundle = bundle
        self._engine = SUBSTITUTE.get(engine, engine)
        self._precision = precision

    def auxiliary(self, file: str, output: str) -> AuxiliaryNetwork:
        """The part of the network in `file` that computes `output`.

        Raises:
            DefenseError: the bundle lacks the file; the message says how to make it.
            BundleError: the file is not the one that the card lists.
            ConfigError: the network lacks the output, or the engine is not installed.
        """
        card = self._bundle.card
        if file not in card.files:
            raise DefenseError(
                f"needs {file}, which {self._bundle} lacks; make it with "
                f"`python -m scumble.training.auxiliary {card.name}`"
            )
        model = single_output(self._bundle.read(file), output)
        return AuxiliaryNetwork(model, engines.resolve(self._engine))

    @property
    def version(self) -> str:
        """Name and version of the model; pseudorandom rows depend on it."""
        return f"{self._bundle.card.name} {self._bundle.card.version}"

    def codebook(self) -> dict[str, Any]:
        """The rows of the defense `codebook`: {form: {cells: {borders, rows}}}.

        Raises:
            DefenseError: the bundle has none for this precision; the message says how to make it.
            BundleError: the file is not the one that the card lists.
        """
        file = CODEBOOK_FILE[self._precision]
        document = self._calibrated(file)
        try:
            forms: dict[str, Any] = document["forms"]
        except (TypeError, KeyError) as exc:
            raise DefenseError(f"{file} of {self._bundle} is malformed: {exc!r}") from exc
        return forms

    def gate(self) -> Gate:
        """The thresholds of the defense `withhold`.

        Raises:
            DefenseError: the bundle has none for this precision; the message says how to make them.
            BundleError: the file is not the one that the card lists.
        """
        file = GATE_FILE.get(self._precision)
        if file is None:
            raise DefenseError(
                f"precision is {self._precision!r}, too coarse for thresholds; "
                f"allowed: {', '.join(GATE_FILE)}"
            )
        try:
            return read_gate(self._calibrated(file))
        except DefenseError as exc:
            raise DefenseError(f"{file} of {self._bundle}: {exc}") from exc

    def _calibrated(self, file: str) -> Any:
        if file not in self._bundle.card.files:
            raise DefenseError(
                f"needs {file}, which {self._bundle} lacks; make it with "
                f"`scumble calibrate {self._bundle.card.name}`"
            )
        try:
            return orjson.loads(self._bundle.read(file))
        except ValueError as exc:
            raise DefenseError(f"{file} of {self._bundle} is malformed: {exc!r}") from exc
