"""LitServe: two inference workers, and as many HTTP processes, which is its default."""

import litserve as ls
import numpy as np
from fastapi import UploadFile

from loadtest.peers.classifier import Classify, Pixels, Probs, decode, load, ports, setting

# Stock: the batch size of its documentation, no window, which is its default. That polls its queue
# without a pause, so tuned has a short window.
BATCHING = {
    "stock": {"max_batch_size": 8},
    "tuned": {"max_batch_size": 32, "batch_timeout": 0.001},
}


class Api(ls.LitAPI):
    """The classifier."""

    classify: Classify

    def setup(self, device: str) -> None:
        """Load the model, once per worker."""
        self.classify = load()

    def decode_request(self, request: UploadFile) -> Pixels:
        """One image of a form."""
        return decode(request.file.read())

    def batch(self, inputs: list[Pixels]) -> Pixels:
        """Several images as one array."""
        return np.stack(inputs)

    def predict(self, x: Pixels) -> Probs:
        """Probabilities of a batch."""
        return self.classify(x)

    def encode_response(self, output: Probs) -> dict[str, list[float]]:
        """The answer to one image."""
        return {"probabilities": output.tolist()}


if __name__ == "__main__":
    server = ls.LitServer(Api(**BATCHING[setting()]), accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=ports()[0], log_level="warning", generate_client_file=False)
