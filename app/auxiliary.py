"""Auxiliary networks of a bundle, for the defenses that compare an answer with another network's.

They run in the server's engine on one thread, in the order the requests come. A form (pixels or
float tensors) is loaded when its first batch comes, which is when the service warms up for it.
"""

from __future__ import annotations

import numpy as np

from app import engines
from app.bundle import Bundle
from app.defenses.base import DefenseError, Inputs, Probs
from app.engines import FAST, Engine, EngineName
from app.graph import single_output, tensor_input

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
    """Where the defenses of one bundle get their auxiliary networks."""

    def __init__(self, bundle: Bundle, engine: str = "auto") -> None:
        self._bundle = bundle
        self._engine = STAND_IN.get(engine, engine)

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
                f"`python -m training.auxiliary {card.name}`"
            )
        model = single_output(self._bundle.read(file), output)
        return Auxiliary(model, engines.resolve(self._engine))
