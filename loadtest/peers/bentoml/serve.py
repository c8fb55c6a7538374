"""BentoML: one service with two workers and adaptive batching."""

import os
import sys
from pathlib import Path

os.environ["BENTOML_DO_NOT_TRACK"] = "True"  # it would report its use

import bentoml
import numpy as np
from PIL.Image import Image

from loadtest.peers.classifier import load, ports, setting

LOGGING = {"access": {"enabled": setting() == "stock"}}  # its default is to log every request


@bentoml.service(workers=2, logging=LOGGING)
class Classifier:
    """The classifier."""

    def __init__(self) -> None:
        self.classify = load()

    # The figures of its documentation, in both settings: the window is only a bound, within which
    # the dispatcher adapts, and a smaller one turns load into answers of 503.
    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def predict(self, images: list[Image]) -> list[list[float]]:
        """Probabilities of a batch."""
        return self.classify(np.stack([image.convert("RGB") for image in images])).tolist()


if __name__ == "__main__":
    words = [sys.executable, "-m", "bentoml", "serve", "serve:Classifier"]
    words += ["--working-dir", str(Path(__file__).parent)]
    words += ["--host", "127.0.0.1", "--port", str(ports()[0])]
    os.execv(words[0], words)  # noqa: S606 - its own command
