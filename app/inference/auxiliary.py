"""The parts of a bundle that defenses use: auxiliary networks and the codebook.

The networks run in the server's engine on one thread, in the order of the requests. A form
(pixels or float tensors) is loaded with its first batch, which is when the service warms up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from app.inference import engines
from app.inference.bundle import CODEBOOK_FILE, Bundle
from app.inference.engines import FAST, Engine, EngineName
from app.inference.graph import single_output, tensor_input
from app.precision import Precision
from scumble.defenses.base import DefenseError, Inputs, Probs

# The torch engine is an oracle of the victims' operators and lacks those of the scores.
STAND_IN = {"torch": "auto"}


class Auxiliary:
    """One output of one network: images in, rows float32 (N, K) out.

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


class Auxiliaries:
    """The auxiliary networks and the codebook of one bundle.

    Args:
        bundle: that is served.
        engine: of the networks.
        precision: that is served, which decides the codebook.
    """

    def __init__(
        self, bundle: Bundle, engine: str = "auto", precision: Precision = "float32"
    ) -> None:
        self._bundle = bundle
        self._engine = STAND_IN.get(engine, engine)
        self._precision = precision

    def auxiliary(self, file: str, output: str) -> Auxiliary:
        """The network of `file`, as far as `output` needs it.

        Raises:
            DefenseError: the bundle has no such file; says how it is made.
            BundleError: the file is not the one that the card lists.
            ConfigError: it has no such output, or no such engine is installed.
        """
        card = self._bundle.card
        if file not in card.files:
            raise DefenseError(
                f"needs {file}, which {self._bundle} lacks; make it with "
                f"`python -m scumble.training.auxiliary {card.name}`"
            )
        model = single_output(self._bundle.read(file), output)
        return Auxiliary(model, engines.resolve(self._engine))

    def codebook(self) -> dict[str, Any]:
        """The rows that the defense `codebook` may serve: {form: {cells: {borders, rows}}}.

        Raises:
            DefenseError: the bundle has none for this precision; says how it is made.
            BundleError: the file is not the one that the card lists.
        """
        file = CODEBOOK_FILE[self._precision]
        if file not in self._bundle.card.files:
            raise DefenseError(
                f"needs {file}, which {self._bundle} lacks; make it with "
                f"`scumble calibrate {self._bundle.card.name}`"
            )
        try:
            document: dict[str, Any] = orjson.loads(self._bundle.read(file))["forms"]
        except (ValueError, TypeError, KeyError) as exc:
            raise DefenseError(f"{file} of {self._bundle} is malformed: {exc!r}") from exc
        return document
